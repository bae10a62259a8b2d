-- How people come and go. Who was invited and has not accepted has an empty password, which nobody has.
ALTER TABLE users ADD COLUMN disabled_at INTEGER;
-- That of the registry when this person's rights were last changed.
ALTER TABLE users ADD COLUMN epoch INTEGER NOT NULL DEFAULT 0;

-- One link a person, to choose a password by.
CREATE TABLE user_invites (
    user       BLOB    NOT NULL PRIMARY KEY,
    mac        BLOB    NOT NULL UNIQUE,
    expires_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- Their ids stay, so that history can be read. Leaving: what was theirs is still to pass to the successor.
CREATE TABLE removed_users (
    id         BLOB    NOT NULL PRIMARY KEY,
    -- None once it is erased.
    username   TEXT,
    role       TEXT    NOT NULL,
    created_at INTEGER NOT NULL,
    removed_at INTEGER NOT NULL,
    successor  BLOB    NOT NULL,
    cancel     INTEGER NOT NULL,
    leaving    INTEGER NOT NULL,
    epoch      INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX removed_users_leaving ON removed_users (id) WHERE leaving;
