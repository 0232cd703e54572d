-- What the benchmark looks at in a partition, beside what it measures.

-- name: granted
SELECT COUNT(*) FROM job JOIN lease ON lease.id = job.id WHERE job.id IN %s AND job.state = 'sent'

-- name: states
SELECT state, COUNT(*) FROM job WHERE id IN %s GROUP BY state

-- name: waiting
SELECT COUNT(*) FROM ready

-- name: commits
SHOW GLOBAL STATUS LIKE 'Com_commit'

-- How much undo history waits for the purge. MySQL has it elsewhere, and answers nothing here.
-- name: history
SHOW GLOBAL STATUS LIKE 'Innodb_history_list_length'

-- name: table_sizes
SELECT table_name, data_length + index_length FROM information_schema.tables WHERE table_schema = DATABASE()
ORDER BY 1

-- A read that stays open: its level, its beginning.
-- name: snapshot_level
SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ

-- name: snapshot
START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY
