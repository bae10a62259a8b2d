-- Set by a restore: when it was, and when its backup was made; until somebody has said go.
ALTER TABLE hub ADD COLUMN restored_at INTEGER;
ALTER TABLE hub ADD COLUMN backup_at INTEGER;
ALTER TABLE hub ADD COLUMN go INTEGER NOT NULL DEFAULT 0;
