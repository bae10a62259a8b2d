-- Set by a restore: when it was, and when its backup was made; until somebody has said go.
ALTER TABLE hub ADD COLUMN restored_at BIGINT;
ALTER TABLE hub ADD COLUMN backup_at BIGINT;
ALTER TABLE hub ADD COLUMN go BOOLEAN NOT NULL DEFAULT FALSE;
