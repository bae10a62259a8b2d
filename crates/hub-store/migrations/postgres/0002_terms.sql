-- What a caller asks of when, where and how often a task runs, and how often it was run again.
ALTER TABLE tasks ADD COLUMN selector BYTEA;
ALTER TABLE tasks ADD COLUMN priority BIGINT NOT NULL DEFAULT 0;
ALTER TABLE tasks ADD COLUMN not_before BIGINT;
ALTER TABLE tasks ADD COLUMN deadline BIGINT;
ALTER TABLE tasks ADD COLUMN retries BIGINT NOT NULL DEFAULT 0;
ALTER TABLE tasks ADD COLUMN backoff_ms BIGINT NOT NULL DEFAULT 0;
ALTER TABLE tasks ADD COLUMN retried BIGINT NOT NULL DEFAULT 0;
ALTER TABLE tasks ADD COLUMN retry_at BIGINT;

-- What a caller's key has made: the scope is a digest of caller, method, path and key.
CREATE TABLE idempotency (
    scope      BYTEA NOT NULL PRIMARY KEY,
    request    BYTEA NOT NULL,
    thing      TEXT NOT NULL,
    created_at BIGINT NOT NULL
);
CREATE INDEX idempotency_age ON idempotency (created_at);
