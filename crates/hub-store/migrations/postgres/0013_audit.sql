-- What was done, by whom and how it ended: one chain of rows for each hub process. Rows are added and
-- never changed, but for what is erased of a person or a session.
CREATE TABLE audit (
    chain BYTEA NOT NULL,
    seq BIGINT NOT NULL,
    id BYTEA NOT NULL,
    at BIGINT NOT NULL,
    kind TEXT NOT NULL,
    action TEXT NOT NULL,
    "user" BYTEA,
    key BYTEA,
    agent TEXT,
    door TEXT NOT NULL,
    resource_kind TEXT NOT NULL,
    resource_id TEXT NOT NULL,
    outcome TEXT NOT NULL,
    session BYTEA,
    person_digest BYTEA NOT NULL,
    detail_digest BYTEA NOT NULL,
    prev BYTEA NOT NULL,
    hash BYTEA NOT NULL,
    person BYTEA,
    detail BYTEA,
    PRIMARY KEY (chain, seq)
);
CREATE UNIQUE INDEX audit_id ON audit (id);
CREATE INDEX audit_user ON audit ("user", id) WHERE "user" IS NOT NULL;
CREATE INDEX audit_session ON audit (session, id) WHERE session IS NOT NULL;
CREATE INDEX audit_resource ON audit (resource_id, id);
CREATE INDEX audit_kind ON audit (kind, id) WHERE kind <> 'task_lifecycle';
CREATE INDEX audit_refused ON audit (outcome, id) WHERE outcome <> 'ok';

CREATE TABLE audit_checkpoints (
    chain BYTEA NOT NULL,
    seq BIGINT NOT NULL,
    hub BYTEA NOT NULL,
    at BIGINT NOT NULL,
    hash BYTEA NOT NULL,
    key BYTEA NOT NULL,
    signature BYTEA NOT NULL,
    PRIMARY KEY (chain, seq)
);

CREATE FUNCTION audit_append_only() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'the audit log is append-only';
END
$$;
CREATE FUNCTION audit_erased_only() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF (OLD.chain, OLD.seq, OLD.id, OLD.at, OLD.kind, OLD.action, OLD."user", OLD.key, OLD.agent, OLD.door, OLD.resource_kind,
        OLD.resource_id, OLD.outcome, OLD.session, OLD.person_digest, OLD.detail_digest, OLD.prev, OLD.hash)
        IS DISTINCT FROM (NEW.chain, NEW.seq, NEW.id, NEW.at, NEW.kind, NEW.action, NEW."user", NEW.key, NEW.agent, NEW.door,
        NEW.resource_kind, NEW.resource_id, NEW.outcome, NEW.session, NEW.person_digest, NEW.detail_digest, NEW.prev, NEW.hash)
        OR (NEW.person IS NOT NULL AND NEW.person IS DISTINCT FROM OLD.person)
        OR (NEW.detail IS NOT NULL AND NEW.detail IS DISTINCT FROM OLD.detail) THEN
        RAISE EXCEPTION 'the audit log is append-only';
    END IF;
    RETURN NEW;
END
$$;
CREATE TRIGGER audit_stays BEFORE DELETE ON audit FOR EACH ROW EXECUTE FUNCTION audit_append_only();
CREATE TRIGGER audit_is_only_erased BEFORE UPDATE ON audit FOR EACH ROW EXECUTE FUNCTION audit_erased_only();
CREATE TRIGGER audit_is_not_emptied BEFORE TRUNCATE ON audit FOR EACH STATEMENT EXECUTE FUNCTION audit_append_only();
CREATE TRIGGER audit_checkpoints_stay BEFORE DELETE OR UPDATE ON audit_checkpoints FOR EACH ROW EXECUTE FUNCTION audit_append_only();
CREATE TRIGGER audit_checkpoints_are_not_emptied BEFORE TRUNCATE ON audit_checkpoints
    FOR EACH STATEMENT EXECUTE FUNCTION audit_append_only();
