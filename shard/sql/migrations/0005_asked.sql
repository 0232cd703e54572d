-- When the pilots of a computing queue last asked this shard for work.
CREATE TABLE asked (
    queue   VARCHAR(128) NOT NULL,
    last_at DATETIME(6) NOT NULL,
    PRIMARY KEY (queue)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin
