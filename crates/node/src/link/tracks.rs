//! The marks that an attempt leaves in the log, one line for each of its steps, with the same fields as
//! the hub's: `task`, `attempt`, and `request_id` while it is known. The target is `task`.

use super::orders::Key;
use std::collections::BTreeMap;

/// Requests by the attempts that they led to; only in memory, since it is for logs alone.
#[derive(Debug, Default)]
pub struct Tracks(BTreeMap<Key, String>);

impl Tracks {
    pub fn received(&mut self, key: Key, request_id: &str) {
        if !request_id.is_empty() {
            self.0.insert(key, request_id.to_owned());
        }
        self.mark(&key, "received");
    }
    pub fn mark(&self, key: &Key, step: &str) {
        let request_id = self.0.get(key).map_or("", String::as_str);
        tracing::debug!(target: "task", task = %key.task, attempt = key.attempt.ordinal(), request_id, "{step}");
    }
    /// The last mark.
    pub fn over(&mut self, key: &Key, step: &str) {
        self.mark(key, step);
        self.0.remove(key);
    }
}
