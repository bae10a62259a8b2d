-- What somebody may do with something that is not theirs. Of subject and role one is set; of node, session,
-- agent and labels one, too. Permissions are a JSON list, labels a JSON object.
CREATE TABLE grants (
    id          BYTEA NOT NULL PRIMARY KEY,
    subject     BYTEA,
    role        TEXT,
    node        BYTEA,
    session     BYTEA,
    agent       TEXT,
    labels      TEXT,
    permissions TEXT NOT NULL,
    created_by  BYTEA NOT NULL,
    created_at  BIGINT NOT NULL,
    expires_at  BIGINT
);
CREATE INDEX grants_subject ON grants (subject, id);
CREATE INDEX grants_role ON grants (role, id);
CREATE INDEX grants_created_by ON grants (created_by, id);
CREATE INDEX grants_node ON grants (node);
CREATE INDEX grants_session ON grants (session);
CREATE INDEX grants_agent ON grants (agent);
