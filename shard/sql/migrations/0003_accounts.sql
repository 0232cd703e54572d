-- An owner is an account, `authority:subject`: two authorities may know the same subject. What is there belongs to the
-- authority in whose slots it lies (CERN's begin at 12288). May be run again where it was cut off.
ALTER TABLE job MODIFY owner VARCHAR(160) NOT NULL;
ALTER TABLE lease MODIFY subject VARCHAR(160) NOT NULL;
ALTER TABLE submission MODIFY owner VARCHAR(160) NOT NULL;
ALTER TABLE owner_tally MODIFY owner VARCHAR(160) NOT NULL;
ALTER TABLE job_event MODIFY actor VARCHAR(160) NOT NULL;
UPDATE job SET owner = CONCAT(IF(slot >= 12288, 'CERN:', 'central:'), owner)
WHERE owner NOT LIKE 'central:%' AND owner NOT LIKE 'CERN:%';
UPDATE lease SET subject = CONCAT(IF(id >> 39 >= 12288, 'CERN:', 'central:'), subject)
WHERE subject NOT LIKE 'central:%' AND subject NOT LIKE 'CERN:%';
UPDATE submission SET owner = CONCAT(IF(slot >= 12288, 'CERN:', 'central:'), owner)
WHERE owner NOT LIKE 'central:%' AND owner NOT LIKE 'CERN:%';
UPDATE owner_tally, (SELECT COALESCE(MIN(slot), 0) AS first FROM slot) AS slots
SET owner_tally.owner = CONCAT(IF(slots.first >= 12288, 'CERN:', 'central:'), owner_tally.owner)
WHERE owner NOT LIKE 'central:%' AND owner NOT LIKE 'CERN:%'
