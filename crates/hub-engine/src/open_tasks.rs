//! The tasks that have not ended, read a part at a time: there may be more than memory should hold.

use crate::ports::{Journal, Stored};
use crate::records::Task;
use mesh_core::{SessionId, TaskId};

/// Tasks that are read together.
const AT_ONCE: u32 = 500;

/// Goes over narrow tasks, oldest first. What happens to them meanwhile may be seen or not.
pub(crate) struct OpenTasks<'j> {
    journal: &'j dyn Journal,
    session: Option<SessionId>,
    read: std::vec::IntoIter<Task>,
    after: Option<TaskId>,
}

impl<'j> OpenTasks<'j> {
    pub(crate) fn all(journal: &'j dyn Journal) -> Self {
        Self { journal, session: None, read: vec![].into_iter(), after: None }
    }
    pub(crate) fn of(journal: &'j dyn Journal, session: SessionId) -> Self {
        Self { session: Some(session), ..Self::all(journal) }
    }

    pub(crate) async fn next(&mut self) -> Stored<Option<Task>> {
        if self.read.len() == 0 {
            self.read = self.journal.open_tasks(self.session, self.after, AT_ONCE).await?.into_iter();
        }
        let next = self.read.next();
        self.after = next.as_ref().map(|t| t.id).or(self.after);
        Ok(next)
    }
}
