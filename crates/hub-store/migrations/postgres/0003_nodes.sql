-- What people set of a node. The epoch of a row is that of the registry when it was last changed so.
ALTER TABLE nodes ADD COLUMN slots TEXT;
ALTER TABLE nodes ADD COLUMN task_limit BIGINT;
ALTER TABLE nodes ADD COLUMN draining BOOLEAN NOT NULL DEFAULT FALSE;
ALTER TABLE nodes ADD COLUMN epoch BIGINT NOT NULL DEFAULT 0;
CREATE INDEX nodes_epoch ON nodes (epoch);
CREATE INDEX session_nodes_node ON session_nodes (node);

-- Raised by each change that people make to a node, so that every hub notices.
CREATE TABLE registry (
    one   BIGINT NOT NULL PRIMARY KEY CHECK (one = 1),
    epoch BIGINT NOT NULL
);
INSERT INTO registry (one, epoch) VALUES (1, 0);

-- Nodes that were removed: they are told so, and their ids never come again.
CREATE TABLE removed_nodes (
    id         BYTEA  NOT NULL PRIMARY KEY,
    removed_at BIGINT NOT NULL,
    epoch      BIGINT NOT NULL
);
CREATE INDEX removed_nodes_epoch ON removed_nodes (epoch);
