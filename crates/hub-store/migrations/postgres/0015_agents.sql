-- Supervised processes, run after run. A basic agent has no run; its spec is its config, as JSON text.
CREATE TABLE agents (
    id             BYTEA    NOT NULL PRIMARY KEY,
    name           TEXT    NOT NULL,
    owner          BYTEA    NOT NULL,
    key            BYTEA,
    door           TEXT    NOT NULL,
    kind           TEXT    NOT NULL,
    session        BYTEA,
    node           BYTEA,
    selector       BYTEA,
    spec           BYTEA    NOT NULL,
    restart_policy TEXT    NOT NULL,
    restart_max    BIGINT NOT NULL,
    backoff_ms     BIGINT NOT NULL,
    created_at     BIGINT NOT NULL,
    status         TEXT    NOT NULL,
    run            BIGINT,
    -- Of the newest run; decided before the task is made.
    task           BYTEA,
    on_node        BYTEA,
    restarts       BIGINT NOT NULL,
    in_a_row       BIGINT NOT NULL,
    kill_at        BIGINT,
    kill_force     BOOLEAN NOT NULL,
    started_at     BIGINT,
    next_at        BIGINT,
    ended_at       BIGINT,
    reason         TEXT
);
CREATE INDEX agents_owner ON agents (owner, id);
CREATE INDEX agents_name ON agents (name, id);
CREATE INDEX agents_living ON agents (id) WHERE ended_at IS NULL;
CREATE UNIQUE INDEX agents_living_name ON agents (name) WHERE ended_at IS NULL;
CREATE INDEX agents_end ON agents (ended_at) WHERE ended_at IS NOT NULL;

-- The newest lines of a log are in open, until they are worth a chunk of their own. What has no end yet is in
-- carry. Of the attempt of task that wrote last, all up to seq is taken.
CREATE TABLE agent_log_heads (
    agent      BYTEA    NOT NULL PRIMARY KEY REFERENCES agents (id) ON DELETE CASCADE,
    total      BIGINT NOT NULL,
    first      BIGINT NOT NULL,
    -- Of all chunks.
    bytes      BIGINT NOT NULL,
    open_first BIGINT NOT NULL,
    open       BYTEA    NOT NULL,
    carry      BYTEA    NOT NULL,
    task       BYTEA,
    attempt    BIGINT NOT NULL,
    seq        BIGINT NOT NULL
);
CREATE TABLE agent_log (
    agent BYTEA    NOT NULL REFERENCES agents (id) ON DELETE CASCADE,
    -- The offset of its first line.
    first BIGINT NOT NULL,
    lines BIGINT NOT NULL,
    data  BYTEA    NOT NULL,
    PRIMARY KEY (agent, first)
);

-- Whose run a task is.
ALTER TABLE tasks ADD COLUMN agent BYTEA;
