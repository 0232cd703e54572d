-- Owners whose ready jobs were held back: where they are let in again, those jobs are found.
CREATE TABLE held_owner (
    owner VARCHAR(160) NOT NULL,
    PRIMARY KEY (owner)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin
