-- What becomes of granted work whose node is lost, and after how many seconds it counts as that.
ALTER TABLE tasks ADD COLUMN on_lost TEXT NOT NULL DEFAULT 'wait';
ALTER TABLE tasks ADD COLUMN lost_after INTEGER;
