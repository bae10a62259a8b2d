-- Log-ins as their people see them: id is the log-in's.
CREATE TABLE devices (
    id            BLOB    NOT NULL PRIMARY KEY,
    user          BLOB    NOT NULL,
    name          TEXT    NOT NULL,
    user_agent    TEXT,
    first_address TEXT,
    address       TEXT,
    last_seen_at  INTEGER NOT NULL,
    -- NULL: nobody has said yet.
    trusted       INTEGER
) STRICT;
CREATE INDEX devices_user ON devices (user, id);

-- Of those that lived before, no more is known.
INSERT INTO devices (id, user, name, last_seen_at)
    SELECT DISTINCT login, user, 'unnamed', 0 FROM refresh_tokens WHERE used_at IS NULL AND NOT ended;

ALTER TABLE sessions ADD COLUMN device BLOB;
