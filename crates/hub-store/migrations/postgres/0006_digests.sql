-- Of all that the attempt wrote, kept or not, as its node told at the end.
ALTER TABLE outputs ADD COLUMN stdout_sha256 BYTEA;
ALTER TABLE outputs ADD COLUMN stderr_sha256 BYTEA;
