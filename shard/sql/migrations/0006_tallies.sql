-- Counts by VO too, and errors by code and hour, so that the monitor counts no jobs. May be run again where it was cut off:
-- the counts are made anew from the jobs.
ALTER TABLE tally ADD COLUMN vo VARCHAR(128) NOT NULL DEFAULT '' AFTER state;
ALTER TABLE tally DROP PRIMARY KEY, ADD PRIMARY KEY (slot, state, vo, writer);
DELETE FROM tally;
INSERT INTO tally (slot, state, vo, writer, n) SELECT slot, state, vo, 0, COUNT(*) FROM job GROUP BY slot, state, vo;
-- hour: since the epoch. example: a job with that error.
CREATE TABLE error_tally (
    hour    INT UNSIGNED NOT NULL,
    slot    SMALLINT UNSIGNED NOT NULL,
    plane   VARCHAR(128) NOT NULL,
    code    INT UNSIGNED NOT NULL,
    vo      VARCHAR(128) NOT NULL,
    writer  SMALLINT UNSIGNED NOT NULL,
    n       BIGINT NOT NULL,
    example BIGINT UNSIGNED NOT NULL,
    PRIMARY KEY (hour, slot, plane, code, vo, writer)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin
