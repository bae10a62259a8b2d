-- Ids, digests and keys are blobs; times are milliseconds since the Unix epoch.
-- Numbers that are unsigned in the program keep their 64 bits here.

CREATE TABLE hub (
    one         INTEGER NOT NULL PRIMARY KEY CHECK (one = 1),
    id          BLOB    NOT NULL,
    incarnation INTEGER NOT NULL,
    created_at  INTEGER NOT NULL
) STRICT;

CREATE TABLE users (
    id            BLOB    NOT NULL PRIMARY KEY,
    username      TEXT    NOT NULL COLLATE NOCASE UNIQUE,
    role          TEXT    NOT NULL,
    password_hash TEXT    NOT NULL,
    created_at    INTEGER NOT NULL
) STRICT;

CREATE TABLE refresh_tokens (
    mac        BLOB    NOT NULL PRIMARY KEY,
    login      BLOB    NOT NULL,
    user       BLOB    NOT NULL,
    expires_at INTEGER NOT NULL,
    used_at    INTEGER,
    ended      INTEGER NOT NULL DEFAULT 0
) STRICT, WITHOUT ROWID;
CREATE INDEX refresh_tokens_login ON refresh_tokens (login);
CREATE INDEX refresh_tokens_user ON refresh_tokens (user);

CREATE TABLE api_keys (
    id           BLOB    NOT NULL PRIMARY KEY,
    user         BLOB    NOT NULL,
    name         TEXT    NOT NULL,
    prefix       TEXT    NOT NULL,
    mac          BLOB    NOT NULL UNIQUE,
    scopes       TEXT    NOT NULL,
    created_at   INTEGER NOT NULL,
    expires_at   INTEGER,
    last_used_at INTEGER
) STRICT;
CREATE INDEX api_keys_user ON api_keys (user, id);

CREATE TABLE invites (
    id         BLOB    NOT NULL PRIMARY KEY,
    owner      BLOB    NOT NULL,
    public_key BLOB    NOT NULL,
    name       TEXT,
    labels     TEXT    NOT NULL,
    created_at INTEGER NOT NULL,
    expires_at INTEGER NOT NULL,
    revoked_at INTEGER,
    used_at    INTEGER,
    used_spki  BLOB,
    used_node  BLOB,
    notices    TEXT    NOT NULL
) STRICT;
CREATE INDEX invites_owner ON invites (owner, id);

CREATE TABLE nodes (
    id             BLOB    NOT NULL PRIMARY KEY,
    name           TEXT    NOT NULL,
    owner          BLOB    NOT NULL,
    labels         TEXT    NOT NULL,
    max_tasks      INTEGER NOT NULL,
    version        TEXT    NOT NULL,
    capabilities   BLOB    NOT NULL,
    created_at     INTEGER NOT NULL,
    last_seen_at   INTEGER,
    generation     INTEGER NOT NULL,
    cert_spki      BLOB    NOT NULL,
    cert_der       BLOB    NOT NULL,
    cert_not_after INTEGER NOT NULL,
    cert_counter   INTEGER NOT NULL,
    revoked_at     INTEGER,
    notices        TEXT    NOT NULL
) STRICT;
CREATE INDEX nodes_owner ON nodes (owner, id);
CREATE INDEX nodes_name ON nodes (name, id);

CREATE TABLE sessions (
    id         BLOB    NOT NULL PRIMARY KEY,
    owner      BLOB    NOT NULL,
    name       TEXT    NOT NULL,
    created_at INTEGER NOT NULL,
    expires_at INTEGER NOT NULL,
    ttl_ms     INTEGER NOT NULL,
    closed_at  INTEGER
) STRICT;
CREATE INDEX sessions_owner ON sessions (owner, id);

CREATE TABLE session_nodes (
    session     BLOB    NOT NULL REFERENCES sessions (id) ON DELETE CASCADE,
    node        BLOB    NOT NULL,
    position    INTEGER NOT NULL,
    attached_at INTEGER NOT NULL,
    PRIMARY KEY (session, node)
) STRICT, WITHOUT ROWID;

CREATE TABLE tasks (
    id              BLOB    NOT NULL PRIMARY KEY,
    session         BLOB,
    named_node      BLOB,
    user            BLOB    NOT NULL,
    key             BLOB,
    door            TEXT    NOT NULL,
    skill           TEXT    NOT NULL,
    digest          BLOB    NOT NULL,
    seal            BLOB    NOT NULL,
    timeout_secs    INTEGER NOT NULL,
    queue_secs      INTEGER NOT NULL,
    created_at      INTEGER NOT NULL,
    state           TEXT    NOT NULL,
    attempt         INTEGER,
    attempt_node    BLOB,
    granted         BLOB,
    cancel_at       INTEGER,
    cancel_reason   TEXT,
    reason_code     TEXT,
    reason_detail   TEXT,
    exit_code       INTEGER,
    signal          INTEGER,
    assigned_at     INTEGER,
    started_at      INTEGER,
    finished_at     INTEGER,
    sandbox_applied TEXT,
    signed_key      TEXT,
    signed_digest   BLOB,
    -- The seq of the newest line of history.
    events          INTEGER NOT NULL,
    spec            BLOB    NOT NULL,
    result          BLOB
) STRICT;
CREATE INDEX tasks_session ON tasks (session, id) WHERE session IS NOT NULL;
CREATE INDEX tasks_node ON tasks (COALESCE(attempt_node, named_node), id);
CREATE INDEX tasks_user ON tasks (user, id);
CREATE INDEX tasks_state ON tasks (state, id);

CREATE TABLE task_events (
    task    BLOB    NOT NULL REFERENCES tasks (id) ON DELETE CASCADE,
    seq     INTEGER NOT NULL,
    at      INTEGER NOT NULL,
    kind    TEXT    NOT NULL,
    attempt INTEGER,
    state   TEXT    NOT NULL,
    node    BLOB,
    detail  TEXT    NOT NULL,
    PRIMARY KEY (task, seq)
) STRICT, WITHOUT ROWID;

-- Kept output is the first kept_len bytes of the attempt's file, then the frames in held: what is
-- small stays in the row, so that it costs no sync of its own.
CREATE TABLE outputs (
    task         BLOB    NOT NULL,
    attempt      INTEGER NOT NULL,
    durable_seq  INTEGER NOT NULL,
    kept_seq     INTEGER NOT NULL,
    kept_len     INTEGER NOT NULL,
    stdout_bytes INTEGER NOT NULL,
    stderr_bytes INTEGER NOT NULL,
    truncated    INTEGER NOT NULL,
    held         BLOB    NOT NULL,
    PRIMARY KEY (task, attempt)
) STRICT;
