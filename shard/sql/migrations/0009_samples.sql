-- What the tallies said at the first look of each hour (since the epoch), the archive counted in: which state grows where
-- is judged by it. Old hours are dropped.
CREATE TABLE sampled (
    hour INT UNSIGNED NOT NULL,
    at   DATETIME(6) NOT NULL,
    PRIMARY KEY (hour)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;
CREATE TABLE tally_sample (
    hour  INT UNSIGNED NOT NULL,
    slot  SMALLINT UNSIGNED NOT NULL,
    state VARCHAR(16) NOT NULL,
    vo    VARCHAR(128) NOT NULL,
    n     BIGINT NOT NULL,
    PRIMARY KEY (hour, slot, state, vo)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin
