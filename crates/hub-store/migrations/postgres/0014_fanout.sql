-- A fan-out: the children name their parent, and the parent says how many there are.
ALTER TABLE tasks ADD COLUMN parent BYTEA;
ALTER TABLE tasks ADD COLUMN children BIGINT;
-- Of one parent by id; how they stand; is one of them still open?
CREATE INDEX tasks_parent ON tasks (parent, id) WHERE parent IS NOT NULL;
CREATE INDEX tasks_parent_state ON tasks (parent, state) WHERE parent IS NOT NULL;
CREATE INDEX tasks_open_children ON tasks (parent) WHERE parent IS NOT NULL AND finished_at IS NULL;
-- Parents, which are no work of their own.
CREATE INDEX tasks_parents ON tasks (state) WHERE children IS NOT NULL;
