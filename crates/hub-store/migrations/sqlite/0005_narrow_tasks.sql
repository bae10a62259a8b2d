-- A spec that is not small lies apart: lists and changes of state pass it by.
CREATE TABLE task_specs (
    task BLOB NOT NULL PRIMARY KEY REFERENCES tasks (id) ON DELETE CASCADE,
    spec BLOB NOT NULL
) STRICT;
INSERT INTO task_specs (task, spec) SELECT id, spec FROM tasks WHERE length(spec) > 2048;
UPDATE tasks SET spec = x'' WHERE length(spec) > 2048;

-- One index for each way to ask for tasks, alone and within those of one user. Those of a user alone are
-- read state by state.
DROP INDEX tasks_user;
CREATE INDEX tasks_user_state ON tasks (user, state, id);
CREATE INDEX tasks_user_session ON tasks (user, session, id) WHERE session IS NOT NULL;
CREATE INDEX tasks_user_node ON tasks (user, COALESCE(attempt_node, named_node), id);
CREATE INDEX tasks_user_skill ON tasks (user, skill, id);
CREATE INDEX tasks_skill ON tasks (skill, id);
