-- A key that is used again for other jobs is noticed in whichever slot they go to: a submission knows the whole call that
-- it was a part of. Those of before do not, and are compared by their own part.
ALTER TABLE submission ADD COLUMN call_digest BINARY(16) NULL;
ALTER TABLE submission ADD KEY submissions_of_owner (owner, idem_key)
