-- What was done, by whom and how it ended: one chain of rows for each hub process. Rows are added and
-- never changed, but for what is erased of a person or a session.
CREATE TABLE audit (
    chain BLOB NOT NULL,
    seq INTEGER NOT NULL,
    id BLOB NOT NULL,
    at INTEGER NOT NULL,
    kind TEXT NOT NULL,
    action TEXT NOT NULL,
    user BLOB,
    key BLOB,
    agent TEXT,
    door TEXT NOT NULL,
    resource_kind TEXT NOT NULL,
    resource_id TEXT NOT NULL,
    outcome TEXT NOT NULL,
    session BLOB,
    person_digest BLOB NOT NULL,
    detail_digest BLOB NOT NULL,
    prev BLOB NOT NULL,
    hash BLOB NOT NULL,
    person BLOB,
    detail BLOB,
    PRIMARY KEY (chain, seq)
) WITHOUT ROWID;
CREATE UNIQUE INDEX audit_id ON audit (id);
CREATE INDEX audit_user ON audit (user, id) WHERE user IS NOT NULL;
CREATE INDEX audit_session ON audit (session, id) WHERE session IS NOT NULL;
CREATE INDEX audit_resource ON audit (resource_id, id);
CREATE INDEX audit_kind ON audit (kind, id) WHERE kind <> 'task_lifecycle';
CREATE INDEX audit_refused ON audit (outcome, id) WHERE outcome <> 'ok';

CREATE TABLE audit_checkpoints (
    chain BLOB NOT NULL,
    seq INTEGER NOT NULL,
    hub BLOB NOT NULL,
    at INTEGER NOT NULL,
    hash BLOB NOT NULL,
    key BLOB NOT NULL,
    signature BLOB NOT NULL,
    PRIMARY KEY (chain, seq)
) WITHOUT ROWID;

CREATE TRIGGER audit_stays BEFORE DELETE ON audit
BEGIN
    SELECT RAISE(ABORT, 'the audit log is append-only');
END;
CREATE TRIGGER audit_is_not_changed BEFORE UPDATE OF chain, seq, id, at, kind, action, user, key, agent, door, resource_kind,
    resource_id, outcome, session, person_digest, detail_digest, prev, hash ON audit
BEGIN
    SELECT RAISE(ABORT, 'the audit log is append-only');
END;
CREATE TRIGGER audit_is_only_erased BEFORE UPDATE OF person, detail ON audit
    WHEN (NEW.person IS NOT NULL AND NEW.person IS NOT OLD.person) OR (NEW.detail IS NOT NULL AND NEW.detail IS NOT OLD.detail)
BEGIN
    SELECT RAISE(ABORT, 'the audit log is append-only');
END;
CREATE TRIGGER audit_checkpoints_stay BEFORE DELETE ON audit_checkpoints
BEGIN
    SELECT RAISE(ABORT, 'the audit log is append-only');
END;
CREATE TRIGGER audit_checkpoints_are_not_changed BEFORE UPDATE ON audit_checkpoints
BEGIN
    SELECT RAISE(ABORT, 'the audit log is append-only');
END;
