-- What the audit asks of one partition. Every block but `facts` and `transitions` gives the rows that break a rule:
-- first the job's id (or the slot), then what is wrong with it. Read in one consistent snapshot, so it may run beside
-- live traffic. Portable between MariaDB >= 10.6 and MySQL >= 8.0.

-- name: snapshot_isolation
SET TRANSACTION ISOLATION LEVEL REPEATABLE READ

-- name: begin_snapshot
START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY

-- ---- facts, judged by the caller

-- name: totals
SELECT slot, COUNT(*), MIN(id), MAX(id) FROM job GROUP BY slot

-- name: states
SELECT state, SUM(n) FROM (SELECT state, COUNT(*) AS n FROM job GROUP BY state
    UNION ALL SELECT state, COUNT(*) FROM archive_job GROUP BY state) AS both_counts GROUP BY state

-- name: open_slots
SELECT slot, epoch FROM slot WHERE state = 'open'

-- name: transitions
SELECT source, event, target, COUNT(*), MIN(id) FROM job_event GROUP BY source, event, target

-- name: ids_of_slot
SELECT id FROM job WHERE slot = %s AND id > %s ORDER BY id LIMIT %s

-- name: ready_of
SELECT id FROM ready WHERE id IN %s

-- ---- I1, I9: what was accepted is here, and nothing else

-- What parts of the archive had that were dropped is missing, in submits of before their ends; but no more than they had.
-- name: submission_incomplete
WITH dropped AS (
    SELECT COALESCE(SUM(n), 0) AS n, COALESCE(MAX(before_at), '1970-01-01') AS before_at FROM (
        SELECT MAX(n) AS n, MAX(before_at) AS before_at FROM archive_dropped WHERE done = 1 GROUP BY name) AS parts),
accepted AS (
    SELECT first_id, n, at,
        (SELECT COUNT(*) FROM job WHERE job.id BETWEEN first_id AND first_id + submission.n - 1)
        + (SELECT COUNT(*) FROM archive_job WHERE archive_job.id BETWEEN first_id AND first_id + submission.n - 1)
            AS n_jobs
    FROM submission),
judged AS (
    SELECT first_id, accepted.n, n_jobs, dropped.n AS n_dropped, at < before_at AND n_jobs < accepted.n AS may_be_dropped,
        SUM(IF(at < before_at AND n_jobs < accepted.n, accepted.n - n_jobs, 0)) OVER () AS n_missing
    FROM accepted CROSS JOIN dropped WHERE n_jobs <> accepted.n)
SELECT first_id, CONCAT('a submit of ', n, ' jobs has ', n_jobs,
    IF(may_be_dropped, CONCAT(', ', n_missing, ' are missing of old, dropped were ', n_dropped), ''))
FROM judged WHERE NOT may_be_dropped OR n_missing > n_dropped ORDER BY first_id DESC LIMIT %s

-- With every submit complete, a surplus is made of jobs that nobody submitted.
-- name: job_never_submitted
SELECT slot, CONCAT(SUM(n_jobs), ' jobs, ', SUM(n_accepted), ' accepted') FROM (
    SELECT slot, COUNT(*) AS n_jobs, 0 AS n_accepted FROM job GROUP BY slot
    UNION ALL SELECT slot, COUNT(*), 0 FROM archive_job GROUP BY slot
    UNION ALL SELECT slot, 0, SUM(n) FROM submission GROUP BY slot) AS both_counts
GROUP BY slot HAVING SUM(n_jobs) > SUM(n_accepted) LIMIT %s

-- name: number_may_come_twice
SELECT newest.id, CONCAT('the next number of slot ', newest.slot, ' is ', COALESCE(slot_sequence.next_seq, 0))
FROM (SELECT slot, MAX(id) AS id FROM (SELECT slot, id FROM job UNION ALL SELECT slot, id FROM archive_job) AS all_ids
    GROUP BY slot) AS newest
LEFT JOIN slot_sequence ON slot_sequence.slot = newest.slot
WHERE slot_sequence.next_seq IS NULL OR slot_sequence.next_seq <= MOD(newest.id, 549755813888) LIMIT %s

-- ---- I2: one key, one range of ids

-- name: submissions_overlap
SELECT first_id, 'two submits share ids' FROM (
    SELECT first_id, LAG(first_id + n) OVER (PARTITION BY slot ORDER BY first_id) AS free_from FROM submission) AS ranges
WHERE first_id < free_from LIMIT %s

-- ---- one live table

-- name: activated_without_ready
SELECT job.id, 'activated, but has no ready row' FROM job LEFT JOIN ready ON ready.id = job.id
WHERE job.state = 'activated' AND ready.id IS NULL LIMIT %s

-- name: ready_without_activated
SELECT ready.id, CONCAT('has a ready row, but is ', COALESCE(job.state, 'no job')) FROM ready
LEFT JOIN job ON job.id = ready.id WHERE job.id IS NULL OR job.state <> 'activated' LIMIT %s

-- name: ready_differs
SELECT ready.id, 'its ready row has another slot, class or priority' FROM ready JOIN job ON job.id = ready.id
WHERE ready.slot <> job.slot OR ready.class_id <> job.class_id OR ready.ranking <> -job.priority LIMIT %s

-- name: leased_without_lease
SELECT job.id, CONCAT('is ', job.state, ', but has no lease') FROM job LEFT JOIN lease ON lease.id = job.id
WHERE job.state IN %s AND lease.id IS NULL LIMIT %s

-- name: lease_without_leased
SELECT lease.id, CONCAT('has a lease, but is ', COALESCE(job.state, 'no job')) FROM lease
LEFT JOIN job ON job.id = lease.id WHERE job.id IS NULL OR job.state NOT IN %s LIMIT %s

-- name: spec_missing
SELECT job.id, 'has no spec' FROM job LEFT JOIN spec ON spec.id = job.id WHERE spec.id IS NULL LIMIT %s

-- name: spec_without_job
SELECT spec.id, 'a spec of no job' FROM spec LEFT JOIN job ON job.id = spec.id WHERE job.id IS NULL LIMIT %s

-- name: class_missing
SELECT job.id, 'its requirement class is not stored' FROM job
LEFT JOIN requirement_class AS class ON class.slot = job.slot AND class.class_id = job.class_id
WHERE class.class_id IS NULL LIMIT %s

-- name: slot_wrong
SELECT job.id, CONCAT('is filed under slot ', job.slot) FROM job
LEFT JOIN slot ON slot.slot = job.slot WHERE job.slot <> job.id >> 39 OR slot.slot IS NULL LIMIT %s

-- ---- I3, I4: one grant per attempt, one attempt at a time

-- name: attempt_granted_twice
SELECT id, CONCAT('attempt ', attempt, ' was granted ', COUNT(*), ' times') FROM job_event
WHERE event = 'claim' GROUP BY id, attempt HAVING COUNT(*) > 1 LIMIT %s

-- name: lease_of_other_attempt
SELECT lease.id, CONCAT('is at attempt ', job.attempt, ', its lease at ', lease.attempt) FROM lease
JOIN job ON job.id = lease.id WHERE lease.attempt <> job.attempt LIMIT %s

-- ---- I5: one accepted final report

-- name: finished_twice
SELECT id, 'two reports say finished' FROM report WHERE state = 'finished' GROUP BY id HAVING COUNT(*) > 1 LIMIT %s

-- name: report_of_no_attempt
SELECT report.id, CONCAT('has a report of attempt ', report.attempt) FROM report LEFT JOIN job ON job.id = report.id
WHERE job.id IS NULL OR report.attempt > job.attempt LIMIT %s

-- ---- I7: declared transitions, numbered without a gap, ending where the job is

-- name: events_missing
SELECT job.id, CONCAT('is at version ', job.version, ' with ', COUNT(job_event.n), ' events') FROM job
LEFT JOIN job_event ON job_event.id = job.id GROUP BY job.id, job.version
HAVING COUNT(job_event.n) <> job.version OR COALESCE(MAX(job_event.n), 0) <> job.version LIMIT %s

-- name: events_of_no_job
SELECT job_event.id, 'has events, but is no job' FROM job_event LEFT JOIN job ON job.id = job_event.id
WHERE job.id IS NULL LIMIT %s

-- name: chain_broken
SELECT id, CONCAT('event ', n, ' leaves ', COALESCE(source, 'nothing'), ', the one before ended in ',
    COALESCE(before_it, 'nothing')) FROM (
    SELECT id, n, source, LAG(target) OVER (PARTITION BY id ORDER BY n) AS before_it FROM job_event) AS chain
WHERE COALESCE(source, '') <> COALESCE(before_it, '') LIMIT %s

-- name: state_not_of_last_event
SELECT job.id, CONCAT('is ', job.state, ', its last event ended in ', job_event.target) FROM job
JOIN job_event ON job_event.id = job.id AND job_event.n = job.version WHERE job_event.target <> job.state LIMIT %s

-- ---- I11: the tallies are the counts

-- name: tally_differs
SELECT slot, CONCAT(state, ' of VO ', vo, ': the tally says ', SUM(tallied), ', counted ', SUM(counted)) FROM (
    SELECT slot, state, vo, n AS tallied, 0 AS counted FROM tally
    UNION ALL SELECT slot, state, vo, 0, COUNT(*) FROM job GROUP BY slot, state, vo) AS both_counts
GROUP BY slot, state, vo HAVING SUM(tallied) <> SUM(counted) LIMIT %s

-- name: archive_tally_differs
SELECT slot, CONCAT(state, ' of VO ', vo, ': the archive says ', SUM(tallied), ', counted ', SUM(counted)) FROM (
    SELECT slot, state, vo, n AS tallied, 0 AS counted FROM archive_tally
    UNION ALL SELECT slot, state, vo, 0, COUNT(*) FROM archive_job GROUP BY slot, state, vo) AS both_counts
GROUP BY slot, state, vo HAVING SUM(tallied) <> SUM(counted) LIMIT %s

-- name: archived_and_hot
SELECT job.id, 'is in the hot tables and in the archive' FROM job JOIN archive_job ON archive_job.id = job.id LIMIT %s

-- name: archived_not_final
SELECT id, CONCAT('is archived, but ', state) FROM archive_job WHERE state NOT IN %s LIMIT %s

-- name: owner_tally_differs
SELECT 0, CONCAT('owner ', owner, ': the tally says ', SUM(tallied), ', counted ', SUM(counted)) FROM (
    SELECT owner, n AS tallied, 0 AS counted FROM owner_tally
    UNION ALL SELECT owner, 0, COUNT(*) FROM job WHERE state NOT IN %s GROUP BY owner) AS both_counts
GROUP BY owner HAVING SUM(tallied) <> SUM(counted) LIMIT %s
