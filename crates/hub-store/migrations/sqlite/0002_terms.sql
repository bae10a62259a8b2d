-- What a caller asks of when, where and how often a task runs, and how often it was run again.
ALTER TABLE tasks ADD COLUMN selector BLOB;
ALTER TABLE tasks ADD COLUMN priority INTEGER NOT NULL DEFAULT 0;
ALTER TABLE tasks ADD COLUMN not_before INTEGER;
ALTER TABLE tasks ADD COLUMN deadline INTEGER;
ALTER TABLE tasks ADD COLUMN retries INTEGER NOT NULL DEFAULT 0;
ALTER TABLE tasks ADD COLUMN backoff_ms INTEGER NOT NULL DEFAULT 0;
ALTER TABLE tasks ADD COLUMN retried INTEGER NOT NULL DEFAULT 0;
ALTER TABLE tasks ADD COLUMN retry_at INTEGER;

-- What a caller's key has made: the scope is a digest of caller, method, path and key.
CREATE TABLE idempotency (
    scope      BLOB NOT NULL PRIMARY KEY,
    request    BLOB NOT NULL,
    thing      TEXT NOT NULL,
    created_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX idempotency_age ON idempotency (created_at);
