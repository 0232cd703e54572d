-- Jobs that ended some time ago leave the hot tables: one row each, with all that belongs to it, in a partition per month.
-- Every unique key of a partitioned table must hold the partition's column. The pass adds the months as it needs them.
CREATE TABLE archive_job (
    id       BIGINT UNSIGNED NOT NULL,
    ended_at DATETIME(6) NOT NULL,
    slot     SMALLINT UNSIGNED NOT NULL,
    state    VARCHAR(16) NOT NULL,
    owner    VARCHAR(160) NOT NULL,
    vo       VARCHAR(128) NOT NULL,
    jobset   BIGINT UNSIGNED NOT NULL,
    depth    TINYINT UNSIGNED NOT NULL,
    body     MEDIUMBLOB NOT NULL,
    PRIMARY KEY (id, ended_at),
    KEY archived_of_owner (owner, id),
    KEY archived_of_jobset (jobset, id)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin
PARTITION BY RANGE COLUMNS (ended_at) (PARTITION before2020 VALUES LESS THAN ('2020-01-01'));
-- Counts of the archive by month (YYYYMM).
CREATE TABLE archive_tally (
    month INT UNSIGNED NOT NULL,
    slot  SMALLINT UNSIGNED NOT NULL,
    state VARCHAR(16) NOT NULL,
    vo    VARCHAR(128) NOT NULL,
    n     BIGINT NOT NULL,
    PRIMARY KEY (month, slot, state, vo)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;
-- Which parts were dropped as a whole, by whom: the jobs that are not there any more.
CREATE TABLE archive_dropped (
    name      VARCHAR(32) NOT NULL,
    before_at DATETIME(6) NOT NULL,
    n         BIGINT NOT NULL,
    actor     VARCHAR(160) NOT NULL,
    at        DATETIME(6) NOT NULL,
    PRIMARY KEY (name, at)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin
