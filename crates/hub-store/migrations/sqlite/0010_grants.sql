-- What somebody may do with something that is not theirs. Of subject and role one is set; of node, session,
-- agent and labels one, too. Permissions are a JSON list, labels a JSON object.
CREATE TABLE grants (
    id          BLOB NOT NULL PRIMARY KEY,
    subject     BLOB,
    role        TEXT,
    node        BLOB,
    session     BLOB,
    agent       TEXT,
    labels      TEXT,
    permissions TEXT NOT NULL,
    created_by  BLOB NOT NULL,
    created_at  INTEGER NOT NULL,
    expires_at  INTEGER
) STRICT;
CREATE INDEX grants_subject ON grants (subject, id);
CREATE INDEX grants_role ON grants (role, id);
CREATE INDEX grants_created_by ON grants (created_by, id);
CREATE INDEX grants_node ON grants (node);
CREATE INDEX grants_session ON grants (session);
CREATE INDEX grants_agent ON grants (agent);
