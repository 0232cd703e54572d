-- Every statement of the shard. Portable between MariaDB >= 10.6 and MySQL >= 8.0, READ COMMITTED.
-- Lock order, everywhere: slot (shared), ready, lease, job.
-- What locks by id names its index: left to itself the optimizer scans a small table whole, and locks all of it.

-- ---- ownership

-- The ownership check of every write: it holds back a change of the slot until we commit, and sees every change
-- that was committed before. (A WHERE EXISTS in the update itself does not hold it back.)
-- name: lock_open_slots
SELECT slot, epoch FROM slot WHERE slot IN %s AND state = 'open' LOCK IN SHARE MODE

-- name: read_slots
SELECT slot, state, epoch FROM slot

-- name: open_slot
INSERT INTO slot (slot, state, epoch, changed_at) VALUES (%s, 'open', %s, UTC_TIMESTAMP(6))
ON DUPLICATE KEY UPDATE slot = slot

-- name: lock_sequence
SELECT next_seq FROM slot_sequence WHERE slot = %s FOR UPDATE

-- name: begin_sequence
INSERT INTO slot_sequence (slot, next_seq) VALUES (%s, 1) ON DUPLICATE KEY UPDATE slot = slot

-- name: advance_sequence
UPDATE slot_sequence SET next_seq = next_seq + %s WHERE slot = %s

-- ---- submit

-- name: find_submissions
SELECT slot, digest, first_id, n, call_digest FROM submission FORCE INDEX (submissions_of_owner)
WHERE owner = %s AND idem_key = %s

-- name: insert_submissions
INSERT INTO submission (slot, owner, idem_key, digest, first_id, n, call_digest, at)
VALUES {, |(%s, %s, %s, %s, %s, %s, %s, UTC_TIMESTAMP(6))}

-- name: owner_active_jobs
SELECT COALESCE(SUM(n), 0) FROM owner_tally WHERE owner = %s

-- name: insert_specs
INSERT INTO spec (id, body) VALUES {, |(%s, %s)}

-- name: insert_jobs
INSERT INTO job (id, slot, class_id, state, version, attempt, lost, max_attempts, priority, jobset, parent_id, depth,
    owner, vo, working_group, label, name, queue, pilot, host, cancel_requested, created_at, modified_at)
VALUES {, |(%s, %s, %s, %s, 1, 0, 0, %s, %s, %s, %s, %s,
    %s, %s, %s, %s, %s, %s, '', '', 0, UTC_TIMESTAMP(6), UTC_TIMESTAMP(6))}

-- name: insert_classes
INSERT INTO requirement_class (slot, class_id, body) VALUES {, |(%s, %s, %s)} ON DUPLICATE KEY UPDATE slot = slot

-- ---- dispatch

-- Live leases of repeated requests.
-- name: find_answers
SELECT subject, request_id, id, attempt, token, first_s, heartbeat_s FROM lease
WHERE request_id IN %s ORDER BY ordinal

-- What was won: a stale hint or a rival's row is simply not in the answer.
-- name: lock_ready
SELECT id, slot, class_id, ranking FROM ready FORCE INDEX (PRIMARY) WHERE id IN %s FOR UPDATE SKIP LOCKED

-- The best of several classes without Redis, in the order of dispatch; not locking, the caller locks by id.
-- name: best_ready
{ UNION ALL |(SELECT id, slot, class_id, ranking FROM ready
    WHERE slot = %s AND class_id = %s ORDER BY ranking, id LIMIT %s)}

-- What comes after one in the order of dispatch.
-- name: next_ready
SELECT id, slot, class_id, ranking FROM ready FORCE INDEX (dispatch_order)
WHERE slot = %s AND class_id = %s AND (ranking > %s OR (ranking = %s AND id > %s)) ORDER BY ranking, id LIMIT %s

-- name: active_classes
SELECT DISTINCT slot, class_id FROM ready

-- name: read_classes
{ UNION ALL |(SELECT slot, class_id, body FROM requirement_class WHERE slot = %s AND class_id = %s)}

-- A large payload is left out: who grants the job reads it then (specs_of).
-- name: read_claimed
SELECT job.id, job.slot, job.class_id, job.state, job.version, job.attempt, job.lost, job.max_attempts, job.priority,
    job.owner, job.cancel_requested, job.queue, job.pilot, job.host, job.jobset, job.vo,
    IF(LENGTH(spec.body) <= %s, spec.body, NULL), LENGTH(spec.body)
FROM job JOIN spec ON spec.id = job.id WHERE job.id IN %s

-- name: insert_leases
INSERT INTO lease (id, attempt, token, request_id, ordinal, subject, first_s, heartbeat_s, granted_at, expires_at)
VALUES {, |(%s, %s, %s, %s, %s, %s, %s, %s, UTC_TIMESTAMP(6), DATE_ADD(UTC_TIMESTAMP(6), INTERVAL %s SECOND))}

-- ---- who asks, and why

-- name: read_asked
SELECT queue, TIMESTAMPDIFF(MICROSECOND, '1970-01-01', last_at) FROM asked ORDER BY last_at DESC LIMIT %s

-- name: save_asked
INSERT INTO asked (queue, last_at) VALUES {, |(%s, FROM_UNIXTIME(%s))} ON DUPLICATE KEY UPDATE last_at = VALUES(last_at)

-- How many ready jobs of several classes rank before one, each counted to a bound.
-- name: count_before
SELECT COALESCE(SUM(n), 0) FROM ({ UNION ALL |SELECT COUNT(*) AS n FROM (SELECT id FROM ready
    WHERE slot = %s AND class_id = %s AND (ranking < %s OR (ranking = %s AND id < %s)) LIMIT %s) AS ahead})
    AS of_classes

-- name: read_place
SELECT slot, class_id, state, queue, owner, vo, priority, attempt, lost, max_attempts,
    TIMESTAMPDIFF(MICROSECOND, '1970-01-01', modified_at), pilot, host, error_plane, error_code, error_text,
    cancel_requested FROM job WHERE id = %s

-- name: read_lease_end
SELECT TIMESTAMPDIFF(MICROSECOND, '1970-01-01', expires_at) FROM lease WHERE id = %s

-- ---- bans

-- name: states_of_owner
SELECT CAST(created_at AS CHAR), id, state FROM job FORCE INDEX (jobs_of_owner)
WHERE owner = %s AND created_at >= %s AND (created_at > %s OR id > %s) ORDER BY created_at, id LIMIT %s

-- name: held_owners
SELECT owner FROM held_owner

-- name: insert_held_owner
INSERT INTO held_owner (owner) VALUES (%s) ON DUPLICATE KEY UPDATE owner = VALUES(owner)

-- name: delete_held_owner
DELETE FROM held_owner WHERE owner = %s

-- ---- transitions

-- name: lock_ready_of_jobs
SELECT id FROM ready FORCE INDEX (PRIMARY) WHERE id IN %s FOR UPDATE

-- name: lock_leases_of_jobs
SELECT id, attempt, token, first_s, heartbeat_s FROM lease FORCE INDEX (PRIMARY) WHERE id IN %s FOR UPDATE

-- name: lock_jobs
SELECT id, slot, class_id, state, version, attempt, lost, max_attempts, priority, owner, cancel_requested,
    queue, pilot, host, vo, working_group FROM job FORCE INDEX (PRIMARY) WHERE id IN %s FOR UPDATE

-- The derived table first, so that exactly the named rows are looked up and locked.
-- name: change_jobs
UPDATE ({ UNION ALL |SELECT %s AS id, %s AS version, %s AS state, %s AS attempt, %s AS lost, %s AS queue,
    %s AS pilot, %s AS host, %s AS cancel_requested, %s AS error_plane, %s AS error_code, %s AS error_text})
    AS changed STRAIGHT_JOIN job ON job.id = changed.id AND job.version = changed.version - 1
SET job.version = changed.version, job.state = changed.state, job.attempt = changed.attempt, job.lost = changed.lost,
    job.queue = changed.queue, job.pilot = changed.pilot, job.host = changed.host,
    job.cancel_requested = changed.cancel_requested, job.error_plane = changed.error_plane,
    job.error_code = changed.error_code, job.error_text = changed.error_text, job.modified_at = UTC_TIMESTAMP(6)

-- What most transitions change: the state, and what ends with it.
-- name: advance_jobs
UPDATE job FORCE INDEX (PRIMARY) SET version = version + 1, state = ELT(FIELD(id, %s), %s),
    cancel_requested = ELT(FIELD(id, %s), %s), error_plane = NULL, error_code = NULL, error_text = NULL,
    modified_at = UTC_TIMESTAMP(6)
WHERE id IN %s AND version = ELT(FIELD(id, %s), %s)

-- What a claim changes, of jobs that it holds by their ready rows; found only as it knew them.
-- name: claim_jobs
UPDATE job FORCE INDEX (PRIMARY) SET version = version + 1, state = 'sent', attempt = attempt + 1,
    queue = ELT(FIELD(id, %s), %s), pilot = ELT(FIELD(id, %s), %s), host = ELT(FIELD(id, %s), %s),
    error_plane = NULL, error_code = NULL, error_text = NULL, modified_at = UTC_TIMESTAMP(6)
WHERE id IN %s AND state = 'activated' AND version = ELT(FIELD(id, %s), %s)

-- name: insert_events
INSERT INTO job_event (id, n, at, event, source, target, attempt, actor, detail)
VALUES {, |(%s, %s, UTC_TIMESTAMP(6), %s, %s, %s, %s, %s, %s)}

-- name: insert_ready
INSERT INTO ready (id, slot, class_id, ranking, queued_at) VALUES {, |(%s, %s, %s, %s, UTC_TIMESTAMP(6))}

-- name: delete_ready
DELETE ready FROM ready FORCE INDEX (PRIMARY) WHERE id IN %s

-- name: delete_leases
DELETE lease FROM lease FORCE INDEX (PRIMARY) WHERE id IN %s

-- name: add_to_tally
INSERT INTO tally (slot, state, vo, writer, n) VALUES {, |(%s, %s, %s, %s, %s)} ON DUPLICATE KEY UPDATE n = n + VALUES(n)

-- name: add_to_error_tally
INSERT INTO error_tally (hour, slot, plane, code, vo, writer, n, example)
VALUES {, |(UNIX_TIMESTAMP() DIV 3600, %s, %s, %s, %s, %s, %s, %s)}
ON DUPLICATE KEY UPDATE n = n + VALUES(n), example = VALUES(example)

-- name: add_to_owner_tally
INSERT INTO owner_tally (owner, writer, n) VALUES {, |(%s, %s, %s)} ON DUPLICATE KEY UPDATE n = n + VALUES(n)

-- name: extend_lease
UPDATE lease SET expires_at = DATE_ADD(UTC_TIMESTAMP(6), INTERVAL %s SECOND) WHERE id = %s

-- name: extend_leases
UPDATE lease FORCE INDEX (PRIMARY) SET expires_at = DATE_ADD(UTC_TIMESTAMP(6), INTERVAL %s SECOND) WHERE id IN %s

-- ---- report, release, reaper

-- name: find_report
SELECT token, state, body FROM report WHERE id = %s AND attempt = %s

-- name: find_event
SELECT n FROM job_event WHERE id = %s AND event = %s LIMIT 1

-- name: find_event_of_attempt
SELECT n FROM job_event WHERE id = %s AND event = %s AND attempt = %s LIMIT 1

-- name: count_events_of
SELECT COUNT(*) FROM job_event WHERE id = %s AND event = %s AND detail LIKE %s

-- name: insert_report
INSERT INTO report (id, attempt, token, state, at, body) VALUES (%s, %s, %s, %s, UTC_TIMESTAMP(6), %s)

-- name: insert_reports
INSERT INTO report (id, attempt, token, state, at, body) VALUES {, |(%s, %s, %s, %s, UTC_TIMESTAMP(6), %s)}

-- name: request_cancel
UPDATE job FORCE INDEX (PRIMARY) SET cancel_requested = 1 WHERE id IN %s

-- name: leases_of_request
SELECT id FROM lease WHERE request_id = %s AND subject = %s

-- Only of open slots: the leases that a moved slot left behind must not fill the batch for ever.
-- name: expired_leases
SELECT lease.id FROM lease STRAIGHT_JOIN slot ON slot.slot = lease.id >> 39 AND slot.state = 'open'
WHERE lease.expires_at < UTC_TIMESTAMP(6) ORDER BY lease.expires_at LIMIT %s

-- name: lock_expired
SELECT id, attempt FROM lease FORCE INDEX (PRIMARY) WHERE id IN %s AND expires_at < UTC_TIMESTAMP(6)
FOR UPDATE SKIP LOCKED

-- Where a stretch of ready jobs ends. What is old in it: no index has the age, so the caller bounds the stretch.
-- name: stop_ready_by_id
SELECT id FROM ready FORCE INDEX (PRIMARY) WHERE id BETWEEN %s AND %s ORDER BY id LIMIT 1 OFFSET %s

-- The ready job with the lowest number of each of several slots, and how long it has been ready.
-- name: oldest_ready
{ UNION ALL |(SELECT slot, TIMESTAMPDIFF(MICROSECOND, queued_at, UTC_TIMESTAMP(6)) FROM ready FORCE INDEX (PRIMARY)
    WHERE id BETWEEN %s AND %s ORDER BY id LIMIT 1)}

-- name: old_ready
SELECT id, TIMESTAMPDIFF(MICROSECOND, queued_at, UTC_TIMESTAMP(6)), class_id
FROM ready FORCE INDEX (PRIMARY)
WHERE id BETWEEN %s AND %s AND queued_at < DATE_SUB(UTC_TIMESTAMP(6), INTERVAL %s SECOND) ORDER BY id

-- name: old_unready
SELECT id, TIMESTAMPDIFF(MICROSECOND, modified_at, UTC_TIMESTAMP(6)), vo, queue
FROM job FORCE INDEX (PRIMARY) WHERE id BETWEEN %s AND %s AND state IN %s
    AND modified_at < DATE_SUB(UTC_TIMESTAMP(6), INTERVAL %s SECOND) ORDER BY id

-- name: jobs_of_jobset
SELECT id, slot, state, owner, vo, working_group FROM job FORCE INDEX (jobs_of_jobset)
WHERE jobset = %s AND id > %s AND slot IN %s ORDER BY id LIMIT %s

-- ---- reads

-- name: read_job
SELECT id, slot, state, queue, name, owner, vo, working_group, label, priority, attempt, max_attempts, jobset,
    parent_id, TIMESTAMPDIFF(MICROSECOND, '1970-01-01', created_at),
    TIMESTAMPDIFF(MICROSECOND, '1970-01-01', modified_at), pilot, host, cancel_requested,
    error_plane, error_code, error_text, lost
FROM job WHERE id IN %s ORDER BY id

-- name: read_depths
SELECT id, depth FROM job WHERE id IN %s UNION ALL SELECT id, depth FROM archive_job WHERE id IN %s

-- name: read_spec
SELECT body FROM spec WHERE id = %s

-- name: read_events
SELECT n, TIMESTAMPDIFF(MICROSECOND, '1970-01-01', at), event, source, target, attempt, actor, detail
FROM job_event WHERE id = %s ORDER BY n DESC LIMIT %s

-- name: read_reports
SELECT attempt, TIMESTAMPDIFF(MICROSECOND, '1970-01-01', at), state, body FROM report WHERE id = %s
ORDER BY attempt DESC LIMIT %s

-- name: count_reports
SELECT COUNT(*) FROM report WHERE id = %s

-- A page of a list, by the index that fits best: first the last row that may be looked at, then those that the other
-- filters leave up to there. Each filter is switched by its own argument.
-- name: stop_by_id
SELECT id FROM job FORCE INDEX (PRIMARY) WHERE id BETWEEN %s AND %s ORDER BY id LIMIT 1 OFFSET %s

-- name: list_by_id
SELECT id FROM job FORCE INDEX (PRIMARY) WHERE id BETWEEN %s AND %s AND created_at >= %s AND created_at < %s
    AND (%s = 0 OR slot IN %s OR queue IN %s) AND (%s = '' OR state = %s) AND (%s = '' OR owner = %s)
    AND (%s = 0 OR jobset = %s) AND (%s = 0 OR vo = %s) AND (%s = 0 OR slot BETWEEN %s AND %s OR owner LIKE %s)
ORDER BY id LIMIT %s

-- name: stop_by_jobset
SELECT id FROM job FORCE INDEX (jobs_of_jobset) WHERE jobset = %s AND id BETWEEN %s AND %s ORDER BY id LIMIT 1 OFFSET %s

-- name: list_by_jobset
SELECT id FROM job FORCE INDEX (jobs_of_jobset) WHERE jobset = %s AND id BETWEEN %s AND %s AND created_at >= %s AND created_at < %s
    AND (%s = 0 OR slot IN %s OR queue IN %s) AND (%s = '' OR state = %s) AND (%s = '' OR owner = %s)
    AND (%s = 0 OR jobset = %s) AND (%s = 0 OR vo = %s) AND (%s = 0 OR slot BETWEEN %s AND %s OR owner LIKE %s)
ORDER BY id LIMIT %s

-- The same, the newest first: from a position (created_at, id), which is left out, down to one, which is not.
-- name: stop_newest
SELECT TIMESTAMPDIFF(MICROSECOND, '1970-01-01', created_at), id FROM job FORCE INDEX (jobs_by_time)
WHERE created_at >= %s AND created_at <= %s AND (created_at < %s OR id < %s)
ORDER BY created_at DESC, id DESC LIMIT 1 OFFSET %s

-- name: list_newest
SELECT TIMESTAMPDIFF(MICROSECOND, '1970-01-01', created_at), id FROM job FORCE INDEX (jobs_by_time)
WHERE created_at >= %s AND (created_at > %s OR id >= %s) AND created_at <= %s AND (created_at < %s OR id < %s)
    AND (%s = 0 OR slot IN %s OR queue IN %s) AND (%s = '' OR state = %s) AND (%s = '' OR owner = %s)
    AND (%s = 0 OR jobset = %s) AND (%s = 0 OR vo = %s) AND (%s = 0 OR slot BETWEEN %s AND %s OR owner LIKE %s)
ORDER BY created_at DESC, id DESC LIMIT %s

-- name: stop_newest_of_owner
SELECT TIMESTAMPDIFF(MICROSECOND, '1970-01-01', created_at), id FROM job FORCE INDEX (jobs_of_owner)
WHERE owner = %s AND created_at >= %s AND created_at <= %s AND (created_at < %s OR id < %s)
ORDER BY created_at DESC, id DESC LIMIT 1 OFFSET %s

-- name: list_newest_of_owner
SELECT TIMESTAMPDIFF(MICROSECOND, '1970-01-01', created_at), id FROM job FORCE INDEX (jobs_of_owner)
WHERE owner = %s AND created_at >= %s AND (created_at > %s OR id >= %s) AND created_at <= %s AND (created_at < %s OR id < %s)
    AND (%s = 0 OR slot IN %s OR queue IN %s) AND (%s = '' OR state = %s) AND (%s = '' OR owner = %s)
    AND (%s = 0 OR jobset = %s) AND (%s = 0 OR vo = %s) AND (%s = 0 OR slot BETWEEN %s AND %s OR owner LIKE %s)
ORDER BY created_at DESC, id DESC LIMIT %s

-- name: stop_newest_of_slot
SELECT TIMESTAMPDIFF(MICROSECOND, '1970-01-01', created_at), id FROM job FORCE INDEX (jobs_of_slot)
WHERE slot = %s AND created_at >= %s AND created_at <= %s AND (created_at < %s OR id < %s)
ORDER BY created_at DESC, id DESC LIMIT 1 OFFSET %s

-- name: list_newest_of_slot
SELECT TIMESTAMPDIFF(MICROSECOND, '1970-01-01', created_at), id FROM job FORCE INDEX (jobs_of_slot)
WHERE slot = %s AND created_at >= %s AND (created_at > %s OR id >= %s) AND created_at <= %s AND (created_at < %s OR id < %s)
    AND (%s = 0 OR slot IN %s OR queue IN %s) AND (%s = '' OR state = %s) AND (%s = '' OR owner = %s)
    AND (%s = 0 OR jobset = %s) AND (%s = 0 OR vo = %s) AND (%s = 0 OR slot BETWEEN %s AND %s OR owner LIKE %s)
ORDER BY created_at DESC, id DESC LIMIT %s

-- name: find_archived
SELECT id, body FROM archive_job WHERE id IN %s ORDER BY id

-- name: find_archived_rows
SELECT id, job_row FROM archive_job WHERE id IN %s ORDER BY id

-- name: sizes_of_archived
SELECT id, LENGTH(body) FROM archive_job WHERE id IN %s ORDER BY id

-- The next jobs of a partition, by what bounds it.
-- name: next_archived
SELECT id FROM archive_job FORCE INDEX (PRIMARY)
WHERE ended_at >= %s AND ended_at < %s AND id > %s ORDER BY id LIMIT %s

-- name: stop_archived_by_id
SELECT id FROM archive_job FORCE INDEX (PRIMARY) WHERE id BETWEEN %s AND %s ORDER BY id LIMIT 1 OFFSET %s

-- name: list_archived_by_id
SELECT id FROM archive_job FORCE INDEX (PRIMARY) WHERE id BETWEEN %s AND %s AND created_at >= %s AND created_at < %s
    AND (%s = 0 OR slot IN %s OR queue IN %s) AND (%s = '' OR state = %s) AND (%s = '' OR owner = %s)
    AND (%s = 0 OR jobset = %s) AND (%s = 0 OR vo = %s) AND (%s = 0 OR slot BETWEEN %s AND %s OR owner LIKE %s)
ORDER BY id LIMIT %s

-- name: stop_archived_by_jobset
SELECT id FROM archive_job FORCE INDEX (archived_of_jobset) WHERE jobset = %s AND id BETWEEN %s AND %s ORDER BY id LIMIT 1 OFFSET %s

-- name: list_archived_by_jobset
SELECT id FROM archive_job FORCE INDEX (archived_of_jobset) WHERE jobset = %s AND id BETWEEN %s AND %s AND created_at >= %s AND created_at < %s
    AND (%s = 0 OR slot IN %s OR queue IN %s) AND (%s = '' OR state = %s) AND (%s = '' OR owner = %s)
    AND (%s = 0 OR jobset = %s) AND (%s = 0 OR vo = %s) AND (%s = 0 OR slot BETWEEN %s AND %s OR owner LIKE %s)
ORDER BY id LIMIT %s

-- What ended before a time was made before it: its months are left out.
-- name: stop_archived_newest
SELECT TIMESTAMPDIFF(MICROSECOND, '1970-01-01', created_at), id FROM archive_job FORCE INDEX (archived_by_time)
WHERE ended_at >= %s AND created_at >= %s AND created_at <= %s AND (created_at < %s OR id < %s)
ORDER BY created_at DESC, id DESC LIMIT 1 OFFSET %s

-- name: list_archived_newest
SELECT TIMESTAMPDIFF(MICROSECOND, '1970-01-01', created_at), id FROM archive_job FORCE INDEX (archived_by_time)
WHERE ended_at >= %s AND created_at >= %s AND (created_at > %s OR id >= %s) AND created_at <= %s AND (created_at < %s OR id < %s)
    AND (%s = 0 OR slot IN %s OR queue IN %s) AND (%s = '' OR state = %s) AND (%s = '' OR owner = %s)
    AND (%s = 0 OR jobset = %s) AND (%s = 0 OR vo = %s) AND (%s = 0 OR slot BETWEEN %s AND %s OR owner LIKE %s)
ORDER BY created_at DESC, id DESC LIMIT %s

-- name: stop_archived_newest_of_owner
SELECT TIMESTAMPDIFF(MICROSECOND, '1970-01-01', created_at), id FROM archive_job FORCE INDEX (archived_of_owner)
WHERE ended_at >= %s AND owner = %s AND created_at >= %s AND created_at <= %s AND (created_at < %s OR id < %s)
ORDER BY created_at DESC, id DESC LIMIT 1 OFFSET %s

-- name: list_archived_newest_of_owner
SELECT TIMESTAMPDIFF(MICROSECOND, '1970-01-01', created_at), id FROM archive_job FORCE INDEX (archived_of_owner)
WHERE ended_at >= %s AND owner = %s AND created_at >= %s AND (created_at > %s OR id >= %s) AND created_at <= %s AND (created_at < %s OR id < %s)
    AND (%s = 0 OR slot IN %s OR queue IN %s) AND (%s = '' OR state = %s) AND (%s = '' OR owner = %s)
    AND (%s = 0 OR jobset = %s) AND (%s = 0 OR vo = %s) AND (%s = 0 OR slot BETWEEN %s AND %s OR owner LIKE %s)
ORDER BY created_at DESC, id DESC LIMIT %s

-- name: stop_archived_newest_of_slot
SELECT TIMESTAMPDIFF(MICROSECOND, '1970-01-01', created_at), id FROM archive_job FORCE INDEX (archived_of_slot)
WHERE ended_at >= %s AND slot = %s AND created_at >= %s AND created_at <= %s AND (created_at < %s OR id < %s)
ORDER BY created_at DESC, id DESC LIMIT 1 OFFSET %s

-- name: list_archived_newest_of_slot
SELECT TIMESTAMPDIFF(MICROSECOND, '1970-01-01', created_at), id FROM archive_job FORCE INDEX (archived_of_slot)
WHERE ended_at >= %s AND slot = %s AND created_at >= %s AND (created_at > %s OR id >= %s) AND created_at <= %s AND (created_at < %s OR id < %s)
    AND (%s = 0 OR slot IN %s OR queue IN %s) AND (%s = '' OR state = %s) AND (%s = '' OR owner = %s)
    AND (%s = 0 OR jobset = %s) AND (%s = 0 OR vo = %s) AND (%s = 0 OR slot BETWEEN %s AND %s OR owner LIKE %s)
ORDER BY created_at DESC, id DESC LIMIT %s

-- name: archived_counts
SELECT slot, state, vo, SUM(n) FROM archive_tally GROUP BY slot, state, vo

-- ---- archive

-- name: old_final
SELECT id FROM job FORCE INDEX (PRIMARY) WHERE id BETWEEN %s AND %s AND state IN %s
    AND modified_at < DATE_SUB(UTC_TIMESTAMP(6), INTERVAL %s SECOND) ORDER BY id LIMIT %s

-- What each job will be in the archive, about: events and reports have some columns more.
-- name: sizes_of
SELECT id, SUM(n_bytes) FROM (
    SELECT id, 1024 + 2 * (LENGTH(name) + COALESCE(LENGTH(error_text), 0)) AS n_bytes FROM job WHERE id IN %s
    UNION ALL SELECT id, LENGTH(body) FROM spec WHERE id IN %s
    UNION ALL SELECT id, SUM(128 + LENGTH(actor) + LENGTH(detail)) FROM job_event WHERE id IN %s GROUP BY id
    UNION ALL SELECT id, SUM(128 + LENGTH(body)) FROM report WHERE id IN %s GROUP BY id) AS parts
GROUP BY id ORDER BY id

-- name: archived_from
SELECT id, slot, state, owner, vo, queue, jobset, depth, created_at, modified_at
FROM job FORCE INDEX (PRIMARY) WHERE id IN %s ORDER BY id

-- name: specs_of
SELECT id, body FROM spec WHERE id IN %s

-- name: events_of
SELECT id, n, TIMESTAMPDIFF(MICROSECOND, '1970-01-01', at), event, source, target, attempt, actor, detail
FROM job_event WHERE id IN %s ORDER BY id, n

-- name: reports_of
SELECT id, attempt, TIMESTAMPDIFF(MICROSECOND, '1970-01-01', at), state, body, token FROM report WHERE id IN %s
ORDER BY id, attempt

-- name: insert_archived
INSERT INTO archive_job (id, ended_at, created_at, slot, state, owner, vo, queue, jobset, depth, body, job_row)
VALUES {, |(%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)}

-- name: add_to_archive_tally
INSERT INTO archive_tally (month, slot, state, vo, n) VALUES {, |(%s, %s, %s, %s, %s)}
ON DUPLICATE KEY UPDATE n = n + VALUES(n)

-- name: delete_jobs
DELETE job FROM job FORCE INDEX (PRIMARY) WHERE id IN %s

-- name: delete_specs
DELETE FROM spec WHERE id IN %s

-- name: delete_events
DELETE FROM job_event WHERE id IN %s

-- name: delete_reports
DELETE FROM report WHERE id IN %s

-- name: read_partitions
SELECT partition_name, partition_description, table_rows, data_length + index_length
FROM information_schema.partitions
WHERE table_schema = DATABASE() AND table_name = 'archive_job' ORDER BY partition_ordinal_position

-- :name and :bound are made from a checked year and month; identifiers cannot be parameters.
-- name: add_partition
ALTER TABLE archive_job ADD PARTITION (PARTITION :name VALUES LESS THAN (':bound'))

-- name: drop_partition
ALTER TABLE archive_job DROP PARTITION :name

-- For the lock on a table's definition, before and after an ALTER.
-- name: wait_a_second
SET SESSION lock_wait_timeout = 1

-- name: wait_as_ever
SET SESSION lock_wait_timeout = DEFAULT

-- Jobs that were made before a time, and which of them ended before it: it is read in pages.
-- name: ended_before
SELECT CAST(created_at AS CHAR), id, state IN %s AND modified_at < %s FROM job FORCE INDEX (jobs_by_time)
WHERE created_at < %s AND created_at >= %s AND (created_at > %s OR id > %s) ORDER BY created_at, id LIMIT %s

-- name: read_dropped
SELECT n, done FROM archive_dropped WHERE name = %s ORDER BY at DESC LIMIT 1

-- name: insert_dropped
INSERT INTO archive_dropped (name, before_at, n, actor, at, done) VALUES (%s, %s, %s, %s, UTC_TIMESTAMP(6), 0)

-- name: forget_dropped
DELETE FROM archive_dropped WHERE name = %s AND done = 0

-- name: end_dropped
UPDATE archive_dropped SET done = 1 WHERE name = %s

-- name: drop_archive_tally
DELETE FROM archive_tally WHERE month = %s

-- name: archived_tally_of
SELECT COALESCE(SUM(n), 0) FROM archive_tally WHERE month = %s

-- name: counts
SELECT slot, state, vo, SUM(n) FROM tally GROUP BY slot, state, vo

-- name: owner_counts
SELECT owner, SUM(n) AS n_active FROM owner_tally GROUP BY owner HAVING n_active > 0
ORDER BY n_active DESC, owner LIMIT %s

-- name: owner_count
SELECT COALESCE(SUM(n), 0) FROM owner_tally WHERE owner = %s

-- name: error_counts
SELECT slot, plane, code, SUM(n) AS n_errors, MAX(example), MAX(hour) FROM error_tally
WHERE hour >= %s AND (%s = 0 OR vo = %s) GROUP BY slot, plane, code ORDER BY n_errors DESC, slot, plane, code LIMIT %s

-- name: drop_old_errors
DELETE FROM error_tally WHERE hour < %s LIMIT 1000

-- ---- samples of the tallies, and what they are judged by

-- name: read_sampled
SELECT hour, TIMESTAMPDIFF(MICROSECOND, '1970-01-01', at) FROM sampled WHERE hour >= %s ORDER BY hour

-- name: insert_sampled
INSERT INTO sampled (hour, at) VALUES (%s, UTC_TIMESTAMP(6))

-- name: insert_samples
INSERT INTO tally_sample (hour, slot, state, vo, n) VALUES {, |(%s, %s, %s, %s, %s)}

-- Of each slot and state: the sum over several hours, and what the first and the last of them had.
-- name: sampled_levels
SELECT slot, state, SUM(n), SUM(IF(hour = %s, n, 0)), SUM(IF(hour = %s, n, 0)) FROM tally_sample
WHERE hour BETWEEN %s AND %s AND (%s = 0 OR vo = %s) GROUP BY slot, state

-- name: drop_old_samples
DELETE FROM tally_sample WHERE hour < %s ORDER BY hour LIMIT 5000

-- name: drop_old_sampled
DELETE FROM sampled WHERE hour < %s

-- Of the newest leases of a slot: how many are of jobs in a state, and how many of those have used up three quarters of
-- the time between two heartbeats.
-- name: silent_leases
SELECT COUNT(*), COALESCE(SUM(some.expires_at < DATE_ADD(UTC_TIMESTAMP(6), INTERVAL some.heartbeat_s / 4 SECOND)), 0)
FROM (SELECT id, expires_at, heartbeat_s FROM lease WHERE id BETWEEN %s AND %s ORDER BY id DESC LIMIT %s) AS some
STRAIGHT_JOIN job ON job.id = some.id AND job.state = %s AND (%s = 0 OR job.vo = %s)

-- name: slot_errors
SELECT plane, code, SUM(n) AS n_errors, MAX(example) FROM error_tally
WHERE hour >= %s AND slot = %s AND (%s = 0 OR vo = %s) GROUP BY plane, code ORDER BY n_errors DESC, plane, code LIMIT 1

-- name: database_time
SELECT TIMESTAMPDIFF(MICROSECOND, '1970-01-01', UTC_TIMESTAMP(6))

-- Migrations: run on a connection of their own, before there is a schema.

-- :name is replaced by a checked name; identifiers cannot be parameters.
-- name: create_database
CREATE DATABASE IF NOT EXISTS `:name` CHARACTER SET utf8mb4 COLLATE utf8mb4_bin

-- name: migration_lock
SELECT GET_LOCK(%s, %s)

-- name: make_schema_version
CREATE TABLE IF NOT EXISTS schema_version (
    version INT UNSIGNED NOT NULL PRIMARY KEY,
    checksum CHAR(64) NOT NULL,
    applied_at DATETIME(6) NOT NULL
) ENGINE = InnoDB

-- name: read_schema_version
SELECT version, checksum FROM schema_version

-- name: insert_schema_version
INSERT INTO schema_version (version, checksum, applied_at) VALUES (%s, %s, UTC_TIMESTAMP(6))
