-- The partition of one shard, schema version 1.
-- Narrow hot tables (job, ready, lease) beside the wide immutable one (spec), so that a claim never rewrites a payload.
-- Runs unchanged on MariaDB >= 10.6 and MySQL >= 8.0. Times are UTC. Identifiers and names compare byte by byte.

-- Ownership: a slot that is open here may be written, at this epoch only. Every write reads its row share-locked,
-- so that closing a slot waits for open transactions and is seen by all later ones.
CREATE TABLE slot (
    slot       SMALLINT UNSIGNED NOT NULL,
    state      VARCHAR(16) NOT NULL,
    epoch      BIGINT UNSIGNED NOT NULL,
    changed_at DATETIME(6) NOT NULL,
    PRIMARY KEY (slot)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;

-- Blocks of job numbers. Not in `slot`: taking a block must not wait for share locks.
CREATE TABLE slot_sequence (
    slot     SMALLINT UNSIGNED NOT NULL,
    next_seq BIGINT UNSIGNED NOT NULL,
    PRIMARY KEY (slot)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;

-- Requirement classes; class_id is a hash of the body, the same on every shard.
CREATE TABLE requirement_class (
    slot     SMALLINT UNSIGNED NOT NULL,
    class_id BIGINT UNSIGNED NOT NULL,
    body     VARBINARY(2048) NOT NULL,
    PRIMARY KEY (slot, class_id)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;

-- What the submitter sent. Inserted once, never updated.
CREATE TABLE spec (
    id   BIGINT UNSIGNED NOT NULL,
    body MEDIUMBLOB NOT NULL,
    PRIMARY KEY (id)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;

-- One row per job. `version` numbers its events; `lost` counts attempts that ended without a report.
CREATE TABLE job (
    id               BIGINT UNSIGNED NOT NULL,
    slot             SMALLINT UNSIGNED NOT NULL,
    class_id         BIGINT UNSIGNED NOT NULL,
    state            VARCHAR(16) NOT NULL,
    version          INT UNSIGNED NOT NULL,
    attempt          SMALLINT UNSIGNED NOT NULL,
    lost             SMALLINT UNSIGNED NOT NULL,
    max_attempts     SMALLINT UNSIGNED NOT NULL,
    priority         INT NOT NULL,
    jobset           BIGINT UNSIGNED NOT NULL,
    parent_id        BIGINT UNSIGNED NULL,
    depth            TINYINT UNSIGNED NOT NULL,
    owner            VARCHAR(128) NOT NULL,
    vo               VARCHAR(128) NOT NULL,
    working_group    VARCHAR(128) NOT NULL,
    label            VARCHAR(128) NOT NULL,
    name             VARCHAR(256) NOT NULL,
    queue            VARCHAR(128) NOT NULL,
    pilot            VARCHAR(128) NOT NULL,
    host             VARCHAR(128) NOT NULL,
    cancel_requested TINYINT UNSIGNED NOT NULL,
    created_at       DATETIME(6) NOT NULL,
    modified_at      DATETIME(6) NOT NULL,
    error_plane      VARCHAR(128) NULL,
    error_code       INT UNSIGNED NULL,
    error_text       VARCHAR(1000) NULL,
    PRIMARY KEY (id),
    KEY jobs_of_jobset (jobset, id),
    KEY jobs_of_owner (owner, id)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;

-- Exactly the activated jobs. Claims take from it in the order of its key; ranking is minus the priority.
CREATE TABLE ready (
    id        BIGINT UNSIGNED NOT NULL,
    slot      SMALLINT UNSIGNED NOT NULL,
    class_id  BIGINT UNSIGNED NOT NULL,
    ranking   INT NOT NULL,
    queued_at DATETIME(6) NOT NULL,
    PRIMARY KEY (id),
    KEY dispatch_order (slot, class_id, ranking, id)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;

-- Exactly the jobs in a leased state. request_id and ordinal make a repeated get_job find its first answer.
CREATE TABLE lease (
    id           BIGINT UNSIGNED NOT NULL,
    attempt      SMALLINT UNSIGNED NOT NULL,
    token        VARCHAR(32) NOT NULL,
    request_id   VARCHAR(64) NOT NULL,
    ordinal      SMALLINT UNSIGNED NOT NULL,
    subject      VARCHAR(128) NOT NULL,
    first_s      DOUBLE NOT NULL,
    heartbeat_s  DOUBLE NOT NULL,
    granted_at   DATETIME(6) NOT NULL,
    expires_at   DATETIME(6) NOT NULL,
    PRIMARY KEY (id),
    UNIQUE KEY answer_of_request (request_id, subject, ordinal),
    KEY leases_by_expiry (expires_at)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;

-- Every transition of every job, numbered from 1.
CREATE TABLE job_event (
    id      BIGINT UNSIGNED NOT NULL,
    n       INT UNSIGNED NOT NULL,
    at      DATETIME(6) NOT NULL,
    event   VARCHAR(16) NOT NULL,
    source  VARCHAR(16) NULL,
    target  VARCHAR(16) NOT NULL,
    attempt SMALLINT UNSIGNED NOT NULL,
    actor   VARCHAR(128) NOT NULL,
    detail  VARCHAR(255) NOT NULL,
    PRIMARY KEY (id, n)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;

-- The final report of an attempt: what a repeated report is answered from.
CREATE TABLE report (
    id      BIGINT UNSIGNED NOT NULL,
    attempt SMALLINT UNSIGNED NOT NULL,
    token   VARCHAR(32) NOT NULL,
    state   VARCHAR(16) NOT NULL,
    at      DATETIME(6) NOT NULL,
    body    MEDIUMBLOB NOT NULL,
    PRIMARY KEY (id, attempt)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;

-- Idempotency of submit: one key of one owner is one range of ids in a slot.
CREATE TABLE submission (
    slot     SMALLINT UNSIGNED NOT NULL,
    owner    VARCHAR(128) NOT NULL,
    idem_key VARCHAR(128) NOT NULL,
    digest   BINARY(16) NOT NULL,
    first_id BIGINT UNSIGNED NOT NULL,
    n        INT UNSIGNED NOT NULL,
    at       DATETIME(6) NOT NULL,
    PRIMARY KEY (slot, owner, idem_key)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;

-- Counts by state, so that nobody counts millions of rows. One row per writer (a database connection), so that no two
-- open transactions share a row; the count is the sum over writers.
CREATE TABLE tally (
    slot   SMALLINT UNSIGNED NOT NULL,
    state  VARCHAR(16) NOT NULL,
    writer SMALLINT UNSIGNED NOT NULL,
    n      BIGINT NOT NULL,
    PRIMARY KEY (slot, state, writer)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;

-- Jobs of an owner that are not final, by the same rule: the serial number of the priority formula.
CREATE TABLE owner_tally (
    owner  VARCHAR(128) NOT NULL,
    writer SMALLINT UNSIGNED NOT NULL,
    n      BIGINT NOT NULL,
    PRIMARY KEY (owner, writer)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin
