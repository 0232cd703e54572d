-- Lists of a site show what ran there, wherever it waited: of what was archived before this, only what waited there.
ALTER TABLE archive_job ADD COLUMN queue VARCHAR(128) NOT NULL DEFAULT '' AFTER vo
