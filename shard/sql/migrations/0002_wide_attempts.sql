-- A job that is given back uses up none of its attempts, but it is counted: a pilot that takes and gives back in a loop
-- came to 65,535 within the hour, and the claim of that job failed from then on, with everybody else's in its batch.
ALTER TABLE job MODIFY attempt INT UNSIGNED NOT NULL;
ALTER TABLE lease MODIFY attempt INT UNSIGNED NOT NULL;
ALTER TABLE job_event MODIFY attempt INT UNSIGNED NOT NULL;
ALTER TABLE report MODIFY attempt INT UNSIGNED NOT NULL
