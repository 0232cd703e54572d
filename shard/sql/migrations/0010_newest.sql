-- Lists with the newest first, of all, of an owner, of a slot. Of what was archived before this the time of its end
-- stands for that of its making, which its row did not have.
ALTER TABLE job
    DROP KEY jobs_of_owner,
    ADD KEY jobs_of_owner (owner, created_at, id),
    ADD KEY jobs_of_slot (slot, created_at, id),
    ADD KEY jobs_by_time (created_at, id);
ALTER TABLE archive_job ADD COLUMN created_at DATETIME(6) NOT NULL DEFAULT '1970-01-01 00:00:00' AFTER ended_at;
UPDATE archive_job SET created_at = ended_at;
ALTER TABLE archive_job
    DROP KEY archived_of_owner,
    ADD KEY archived_of_owner (owner, created_at, id),
    ADD KEY archived_of_slot (slot, created_at, id),
    ADD KEY archived_by_time (created_at, id)
