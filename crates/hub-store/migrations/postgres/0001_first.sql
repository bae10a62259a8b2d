-- The same tables as on SQLite. Ids, digests and keys are bytea; times are milliseconds since the
-- Unix epoch. Numbers that are unsigned in the program keep their 64 bits here.

CREATE TABLE hub (
    one         BIGINT NOT NULL PRIMARY KEY CHECK (one = 1),
    id          BYTEA  NOT NULL,
    incarnation BIGINT NOT NULL,
    created_at  BIGINT NOT NULL
);

CREATE TABLE users (
    id            BYTEA  NOT NULL PRIMARY KEY,
    -- With this collation lower() changes ASCII letters only.
    username      TEXT   NOT NULL COLLATE "C",
    role          TEXT   NOT NULL,
    password_hash TEXT   NOT NULL,
    created_at    BIGINT NOT NULL
);
CREATE UNIQUE INDEX users_username ON users (lower(username));

CREATE TABLE refresh_tokens (
    mac        BYTEA   NOT NULL PRIMARY KEY,
    login      BYTEA   NOT NULL,
    "user"     BYTEA   NOT NULL,
    expires_at BIGINT  NOT NULL,
    used_at    BIGINT,
    ended      BOOLEAN NOT NULL DEFAULT FALSE
);
CREATE INDEX refresh_tokens_login ON refresh_tokens (login);
CREATE INDEX refresh_tokens_user ON refresh_tokens ("user");

CREATE TABLE api_keys (
    id           BYTEA  NOT NULL PRIMARY KEY,
    "user"       BYTEA  NOT NULL,
    name         TEXT   NOT NULL,
    prefix       TEXT   NOT NULL,
    mac          BYTEA  NOT NULL UNIQUE,
    scopes       TEXT   NOT NULL,
    created_at   BIGINT NOT NULL,
    expires_at   BIGINT,
    last_used_at BIGINT
);
CREATE INDEX api_keys_user ON api_keys ("user", id);

CREATE TABLE invites (
    id         BYTEA  NOT NULL PRIMARY KEY,
    owner      BYTEA  NOT NULL,
    public_key BYTEA  NOT NULL,
    name       TEXT,
    labels     TEXT   NOT NULL,
    created_at BIGINT NOT NULL,
    expires_at BIGINT NOT NULL,
    revoked_at BIGINT,
    used_at    BIGINT,
    used_spki  BYTEA,
    used_node  BYTEA,
    notices    TEXT   NOT NULL
);
CREATE INDEX invites_owner ON invites (owner, id);

CREATE TABLE nodes (
    id             BYTEA  NOT NULL PRIMARY KEY,
    name           TEXT   NOT NULL,
    owner          BYTEA  NOT NULL,
    labels         TEXT   NOT NULL,
    max_tasks      BIGINT NOT NULL,
    version        TEXT   NOT NULL,
    capabilities   BYTEA  NOT NULL,
    created_at     BIGINT NOT NULL,
    last_seen_at   BIGINT,
    generation     BIGINT NOT NULL,
    cert_spki      BYTEA  NOT NULL,
    cert_der       BYTEA  NOT NULL,
    cert_not_after BIGINT NOT NULL,
    cert_counter   BIGINT NOT NULL,
    revoked_at     BIGINT,
    notices        TEXT   NOT NULL
);
CREATE INDEX nodes_owner ON nodes (owner, id);
CREATE INDEX nodes_name ON nodes (name, id);

CREATE TABLE sessions (
    id         BYTEA  NOT NULL PRIMARY KEY,
    owner      BYTEA  NOT NULL,
    name       TEXT   NOT NULL,
    created_at BIGINT NOT NULL,
    expires_at BIGINT NOT NULL,
    ttl_ms     BIGINT NOT NULL,
    closed_at  BIGINT
);
CREATE INDEX sessions_owner ON sessions (owner, id);

CREATE TABLE session_nodes (
    session     BYTEA  NOT NULL REFERENCES sessions (id) ON DELETE CASCADE,
    node        BYTEA  NOT NULL,
    position    BIGINT NOT NULL,
    attached_at BIGINT NOT NULL,
    PRIMARY KEY (session, node)
);

CREATE TABLE tasks (
    id              BYTEA  NOT NULL PRIMARY KEY,
    session         BYTEA,
    named_node      BYTEA,
    "user"          BYTEA  NOT NULL,
    key             BYTEA,
    door            TEXT   NOT NULL,
    skill           TEXT   NOT NULL,
    digest          BYTEA  NOT NULL,
    seal            BYTEA  NOT NULL,
    timeout_secs    BIGINT NOT NULL,
    queue_secs      BIGINT NOT NULL,
    created_at      BIGINT NOT NULL,
    state           TEXT   NOT NULL,
    attempt         BIGINT,
    attempt_node    BYTEA,
    granted         BYTEA,
    cancel_at       BIGINT,
    cancel_reason   TEXT,
    reason_code     TEXT,
    reason_detail   TEXT,
    exit_code       BIGINT,
    signal          BIGINT,
    assigned_at     BIGINT,
    started_at      BIGINT,
    finished_at     BIGINT,
    sandbox_applied TEXT,
    signed_key      TEXT,
    signed_digest   BYTEA,
    -- The seq of the newest line of history.
    events          BIGINT NOT NULL,
    spec            BYTEA  NOT NULL,
    result          BYTEA
);
CREATE INDEX tasks_session ON tasks (session, id) WHERE session IS NOT NULL;
CREATE INDEX tasks_node ON tasks (COALESCE(attempt_node, named_node), id);
CREATE INDEX tasks_user ON tasks ("user", id);
CREATE INDEX tasks_state ON tasks (state, id);

CREATE TABLE task_events (
    task    BYTEA  NOT NULL REFERENCES tasks (id) ON DELETE CASCADE,
    seq     BIGINT NOT NULL,
    at      BIGINT NOT NULL,
    kind    TEXT   NOT NULL,
    attempt BIGINT,
    state   TEXT   NOT NULL,
    node    BYTEA,
    detail  TEXT   NOT NULL,
    PRIMARY KEY (task, seq)
);

-- Kept output is the first kept_len bytes of the attempt's file, then the frames in held: what is
-- small stays in the row, so that it costs no sync of its own.
CREATE TABLE outputs (
    task         BYTEA   NOT NULL,
    attempt      BIGINT  NOT NULL,
    durable_seq  BIGINT  NOT NULL,
    kept_seq     BIGINT  NOT NULL,
    kept_len     BIGINT  NOT NULL,
    stdout_bytes BIGINT  NOT NULL,
    stderr_bytes BIGINT  NOT NULL,
    truncated    BOOLEAN NOT NULL,
    held         BYTEA   NOT NULL,
    PRIMARY KEY (task, attempt)
);
