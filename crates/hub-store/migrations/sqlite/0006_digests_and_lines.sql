-- Of all that the attempt wrote, kept or not, as its node told at the end.
ALTER TABLE outputs ADD COLUMN stdout_sha256 BLOB;
ALTER TABLE outputs ADD COLUMN stderr_sha256 BLOB;

-- Counts the lines that were added to a session: now and then the oldest go.
ALTER TABLE session_events ADD COLUMN no INTEGER NOT NULL DEFAULT 0;
