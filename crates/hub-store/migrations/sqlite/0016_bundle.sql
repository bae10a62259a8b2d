-- The sequence of the trust bundle that a node has said it has.
ALTER TABLE nodes ADD COLUMN bundle_seq INTEGER NOT NULL DEFAULT 0;
