-- The end of a session, what it holds beside tasks, and what agents keep.
ALTER TABLE sessions ADD COLUMN expired_at INTEGER;
-- When its erasure was asked for; purging while that is under way.
ALTER TABLE sessions ADD COLUMN purged_at INTEGER;
ALTER TABLE sessions ADD COLUMN purging INTEGER NOT NULL DEFAULT 0;
CREATE INDEX sessions_end ON sessions (expires_at) WHERE closed_at IS NULL AND expired_at IS NULL;
CREATE INDEX sessions_purging ON sessions (id) WHERE purging;

-- A session's tasks by their end; open ones have none.
CREATE INDEX tasks_session_end ON tasks (session, finished_at) WHERE session IS NOT NULL;

-- Values are JSON. An id gives an entry its place in a list.
CREATE TABLE session_memory (
    id         BLOB NOT NULL PRIMARY KEY,
    session    BLOB NOT NULL,
    key        TEXT NOT NULL,
    value      BLOB NOT NULL,
    updated_at INTEGER NOT NULL,
    UNIQUE (session, key)
) STRICT;
CREATE INDEX session_memory_list ON session_memory (session, id);

CREATE TABLE messages (
    id         BLOB NOT NULL PRIMARY KEY,
    session    BLOB NOT NULL,
    role       TEXT NOT NULL,
    content    BLOB NOT NULL,
    created_at INTEGER NOT NULL
) STRICT;
CREATE INDEX messages_list ON messages (session, id);

-- What happened in a session, beside its tasks, which have a history of their own.
CREATE TABLE session_events (
    id      BLOB NOT NULL PRIMARY KEY,
    session BLOB NOT NULL,
    at      INTEGER NOT NULL,
    kind    TEXT NOT NULL,
    subject TEXT NOT NULL,
    actor   BLOB
) STRICT;
CREATE INDEX session_events_list ON session_events (session, id);
INSERT INTO session_events (id, session, at, kind, subject, actor) SELECT id, id, created_at, 'created', name, owner FROM sessions;

CREATE TABLE agent_state (
    id         BLOB NOT NULL PRIMARY KEY,
    agent      TEXT NOT NULL,
    key        TEXT NOT NULL,
    -- Of the agent: the same in all of its rows.
    owner      BLOB NOT NULL,
    value      BLOB NOT NULL,
    updated_at INTEGER NOT NULL,
    UNIQUE (agent, key)
) STRICT;
CREATE INDEX agent_state_owner ON agent_state (owner, id);
CREATE INDEX agent_state_agent ON agent_state (agent, id);

-- Output files that no row counts on any more, until they are gone from the disk.
CREATE TABLE erased_output (
    task    BLOB NOT NULL,
    attempt INTEGER NOT NULL,
    PRIMARY KEY (task, attempt)
) STRICT;
-- How much is kept in files is added up when the hub starts.
CREATE INDEX outputs_in_files ON outputs (kept_len) WHERE kept_len > 0;
