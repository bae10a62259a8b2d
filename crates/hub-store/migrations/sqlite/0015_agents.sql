-- Supervised processes, run after run. A basic agent has no run; its spec is its config, as JSON text.
CREATE TABLE agents (
    id             BLOB    NOT NULL PRIMARY KEY,
    name           TEXT    NOT NULL,
    owner          BLOB    NOT NULL,
    key            BLOB,
    door           TEXT    NOT NULL,
    kind           TEXT    NOT NULL,
    session        BLOB,
    node           BLOB,
    selector       BLOB,
    spec           BLOB    NOT NULL,
    restart_policy TEXT    NOT NULL,
    restart_max    INTEGER NOT NULL,
    backoff_ms     INTEGER NOT NULL,
    created_at     INTEGER NOT NULL,
    status         TEXT    NOT NULL,
    run            INTEGER,
    -- Of the newest run; decided before the task is made.
    task           BLOB,
    on_node        BLOB,
    restarts       INTEGER NOT NULL,
    in_a_row       INTEGER NOT NULL,
    kill_at        INTEGER,
    kill_force     INTEGER NOT NULL,
    started_at     INTEGER,
    next_at        INTEGER,
    ended_at       INTEGER,
    reason         TEXT
) STRICT;
CREATE INDEX agents_owner ON agents (owner, id);
CREATE INDEX agents_name ON agents (name, id);
CREATE INDEX agents_living ON agents (id) WHERE ended_at IS NULL;
CREATE UNIQUE INDEX agents_living_name ON agents (name) WHERE ended_at IS NULL;
CREATE INDEX agents_end ON agents (ended_at) WHERE ended_at IS NOT NULL;

-- The newest lines of a log are in open, until they are worth a chunk of their own. What has no end yet is in
-- carry. Of the attempt of task that wrote last, all up to seq is taken.
CREATE TABLE agent_log_heads (
    agent      BLOB    NOT NULL PRIMARY KEY REFERENCES agents (id) ON DELETE CASCADE,
    total      INTEGER NOT NULL,
    first      INTEGER NOT NULL,
    -- Of all chunks.
    bytes      INTEGER NOT NULL,
    open_first INTEGER NOT NULL,
    open       BLOB    NOT NULL,
    carry      BLOB    NOT NULL,
    task       BLOB,
    attempt    INTEGER NOT NULL,
    seq        INTEGER NOT NULL
) STRICT;
CREATE TABLE agent_log (
    agent BLOB    NOT NULL REFERENCES agents (id) ON DELETE CASCADE,
    -- The offset of its first line.
    first INTEGER NOT NULL,
    lines INTEGER NOT NULL,
    data  BLOB    NOT NULL,
    PRIMARY KEY (agent, first)
) STRICT;

-- Whose run a task is.
ALTER TABLE tasks ADD COLUMN agent BLOB;
