-- What the doctor asks a partition's database. Portable between MariaDB >= 10.6 and MySQL >= 8.0.

-- name: server_variables
SHOW GLOBAL VARIABLES WHERE Variable_name IN %s

-- name: server_clock
SELECT UNIX_TIMESTAMP(NOW(6))

-- name: schema_bytes
SELECT COALESCE(SUM(data_length + index_length), 0) FROM information_schema.tables WHERE table_schema = DATABASE()
