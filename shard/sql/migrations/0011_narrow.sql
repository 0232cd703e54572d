-- What lists show of an archived job lies beside its body, so that a list of a thousand reads no thousand bodies. NULL in
-- what was archived before this.
ALTER TABLE archive_job ADD COLUMN job_row BLOB NULL;
-- A drop is only done when the counts are gone too. Of those of before, one that left its counts behind was cut off.
ALTER TABLE archive_dropped ADD COLUMN done TINYINT UNSIGNED NOT NULL DEFAULT 0;
UPDATE archive_dropped SET done = 1 WHERE NOT EXISTS (SELECT 1 FROM archive_tally
    WHERE month = IF(archive_dropped.name = 'before2020', 0, CAST(SUBSTRING(archive_dropped.name, 2) AS UNSIGNED)))
