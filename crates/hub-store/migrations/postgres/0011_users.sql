-- How people come and go. Who was invited and has not accepted has an empty password, which nobody has.
ALTER TABLE users ADD COLUMN disabled_at BIGINT;
-- That of the registry when this person's rights were last changed.
ALTER TABLE users ADD COLUMN epoch BIGINT NOT NULL DEFAULT 0;

-- One link a person, to choose a password by.
CREATE TABLE user_invites (
    "user"     BYTEA  NOT NULL PRIMARY KEY,
    mac        BYTEA  NOT NULL UNIQUE,
    expires_at BIGINT NOT NULL
);

-- Their ids stay, so that history can be read. Leaving: what was theirs is still to pass to the successor.
CREATE TABLE removed_users (
    id         BYTEA   NOT NULL PRIMARY KEY,
    -- None once it is erased.
    username   TEXT,
    role       TEXT    NOT NULL,
    created_at BIGINT  NOT NULL,
    removed_at BIGINT  NOT NULL,
    successor  BYTEA   NOT NULL,
    cancel     BOOLEAN NOT NULL,
    leaving    BOOLEAN NOT NULL,
    epoch      BIGINT  NOT NULL
);
CREATE INDEX removed_users_leaving ON removed_users (id) WHERE leaving;
