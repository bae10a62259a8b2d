-- What has ended, in the order in which it did, with and without the output it had.
ALTER TABLE tasks ADD COLUMN output_erased BOOLEAN NOT NULL DEFAULT FALSE;
CREATE INDEX tasks_end ON tasks (output_erased, finished_at, id) WHERE finished_at IS NOT NULL;

-- Which tasks have output in files, the oldest first; still the sum of it at a start.
DROP INDEX outputs_in_files;
CREATE INDEX outputs_in_files ON outputs (task, kept_len) WHERE kept_len > 0;
