//! Lists of tasks as statements that an index answers in order, whatever narrows them.
//!
//! SQLite is told which index: without statistics it guesses, and statistics age.

use crate::dialect::Dialect;
use crate::rows::{Id, TASK_COLUMNS, TASK_OUTPUT, all};
use crate::sql::{Sql, sql};
use hub_engine::ports::Window;
use hub_engine::records::TaskFilter;
use mesh_core::task::TaskState;
use mesh_core::{SessionId, TaskId, UnixMs};

/// The one that a task is on, or is meant for.
const NODE: &str = "COALESCE(t.attempt_node, t.named_node)";
/// The last moment that an id can say.
const LAST: UnixMs = (1 << 48) - 1;

/// A page, newest first; `None` when nothing can match.
pub(crate) fn tasks(dialect: Dialect, f: &TaskFilter, window: Window<TaskId>) -> Option<Sql> {
    // An id begins with the moment of its task, so times are bounds on ids.
    let first_at = |ms: UnixMs| TaskId::from_parts(ms, [0; 10]);
    let until = f.until.filter(|until| *until <= LAST).map(|until| first_at(until.max(0)));
    let mut q = sql(" WHERE TRUE");
    if let Some(id) = window.before.into_iter().chain(until).min() {
        q = q.and(" AND t.id < ", id.blob());
    }
    match f.since {
        Some(since) if since > LAST => return None,
        Some(since) if since > 0 => q = q.and(" AND t.id >= ", first_at(since).blob()),
        _ => {}
    }
    if let Some(id) = f.session {
        q = q.and(" AND t.session = ", id.blob());
    }
    if let Some(id) = f.node {
        q = q.and(&format!(" AND {NODE} = "), id.blob());
    }
    // Alone, the owner is a filter like any other, and has its indexes.
    let own = f.within.as_ref().filter(|w| w.nodes.is_empty() && w.sessions.is_empty()).map(|w| w.owner);
    if let Some(w) = f.within.as_ref().filter(|_| own.flatten().is_none()) {
        q = q.and_any(dialect, [("t.\"user\"", all(&w.owner)), ("t.session", all(&w.sessions)), (NODE, all(&w.nodes))]);
    }
    for id in f.user.into_iter().chain(own.flatten()) {
        q = q.and(" AND t.\"user\" = ", id.blob());
    }
    if let Some(id) = f.parent {
        q = q.and(" AND t.parent = ", id.blob());
    }
    if let Some(skill) = &f.skill {
        q = q.and(" AND t.skill = ", skill.as_str());
    }
    let index = index(f, own.flatten().or(f.user).is_some());
    let states = match &f.state {
        Some(state) => std::slice::from_ref(state),
        None if index == Some("tasks_user_state") => &TaskState::ALL,
        None => &[],
    };
    Some(merged(dialect, index, q, states, "DESC", window.limit))
}

/// Whatever is open is little; of what is not, the narrowest is a guess. None: the ids themselves.
fn index(f: &TaskFilter, own: bool) -> Option<&'static str> {
    let of = |alone, of_user| Some(if own { of_user } else { alone });
    match f {
        TaskFilter { state: Some(state), parent: None, .. } if !state.is_final() => of("tasks_state", "tasks_user_state"),
        // At most as many as a fan-out may have.
        TaskFilter { parent: Some(_), .. } => Some("tasks_parent"),
        TaskFilter { session: Some(_), .. } => of("tasks_session", "tasks_user_session"),
        TaskFilter { node: Some(_), .. } => of("tasks_node", "tasks_user_node"),
        TaskFilter { skill: Some(_), .. } => of("tasks_skill", "tasks_user_skill"),
        TaskFilter { state: Some(_), .. } => of("tasks_state", "tasks_user_state"),
        _ => own.then_some("tasks_user_state"),
    }
}

/// Tasks that are not final, oldest first.
pub(crate) fn open_tasks(dialect: Dialect, session: Option<SessionId>, after: Option<TaskId>, limit: u32) -> Sql {
    let mut q = sql(" WHERE TRUE");
    if let Some(id) = after {
        q = q.and(" AND t.id > ", id.blob());
    }
    if let Some(id) = session {
        q = q.and(" AND t.session = ", id.blob());
    }
    let open: Vec<TaskState> = TaskState::ALL.into_iter().filter(|s| !s.is_final()).collect();
    // Not by the index of sessions: what is open is little, what a session has had may be much.
    merged(dialect, Some("tasks_state"), q, &open, "ASC", limit)
}

/// A child that has not ended.
pub(crate) fn open_child(dialect: Dialect, parent: TaskId) -> Sql {
    let by = dialect.by_index("tasks_open_children");
    sql(format!("SELECT 1 FROM tasks{by} WHERE parent = $1 AND finished_at IS NULL LIMIT 1")).bind(parent.blob())
}

/// One query for each of `states`, merged by id as they are read: none of them is read to its end.
fn merged(dialect: Dialect, index: Option<&'static str>, conditions: Sql, states: &[TaskState], direction: &str, limit: u32) -> Sql {
    let Sql { text, values } = conditions;
    let by = index.map_or(String::new(), |name| dialect.by_index(name));
    let query = format!("SELECT {TASK_COLUMNS} FROM tasks t{by} {TASK_OUTPUT}{text}");
    let text = match states {
        [] => query,
        states => states.iter().map(|s| format!("{query} AND t.state = '{}'", s.as_str())).collect::<Vec<_>>().join(" UNION ALL "),
    };
    // The id is the second column.
    Sql { text: text.into(), values }.and(&format!(" ORDER BY 2 {direction} LIMIT "), limit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dialect::Lane;
    use crate::{Database, Store};
    use mesh_core::{NodeId, UserId};
    use mesh_process::Tasks;

    async fn plan(store: &Store, q: Sql) -> Vec<String> {
        let explain = Sql { text: format!("EXPLAIN QUERY PLAN {}", q.text).into(), values: q.values };
        store.read.rows(Lane::Quick, explain, |row| row.get(3)).await.unwrap()
    }

    /// Every set of filters, each with and without a cursor.
    fn filters() -> Vec<(TaskFilter, u32)> {
        let id = [7; 16];
        let each = (0..128u32).map(|set| {
            let has = |bit: u32| set & (1 << bit) != 0;
            let filter = TaskFilter {
                within: None,
                session: has(0).then(|| SessionId::from_bytes(id)),
                node: has(1).then(|| NodeId::from_bytes(id)),
                user: has(2).then(|| UserId::from_bytes(id)),
                state: has(3).then_some(TaskState::Failed),
                skill: has(4).then(|| "shell".into()),
                parent: None,
                since: has(5).then_some(1_700_000_000_000),
                until: has(6).then_some(1_800_000_000_000),
            };
            (filter, set)
        });
        each.collect()
    }

    #[tokio::test]
    async fn every_list_is_read_in_the_order_of_an_index() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), &Database::Sqlite, &Tasks::new()).await.unwrap();
        let (session, node, user, state, skill) = (1, 2, 4, 8, 16);
        for (filter, set) in filters() {
            for before in [None, Some(TaskId::from_bytes([9; 16]))] {
                let plan = plan(&store, tasks(Dialect::Sqlite, &filter, Window { before, limit: 9 }).unwrap()).await;
                let context = format!("{filter:?}: {plan:#?}");
                assert!(!plan.iter().any(|p| p.contains("TEMP B-TREE")), "nothing is sorted: {context}");
                let reads: Vec<&String> = plan.iter().filter(|p| p.contains(" t ")).collect();
                let by_time = set & 96 != 0 || before.is_some();
                let index = match set & 31 {
                    0 => "sqlite_autoindex_tasks_1",
                    s if s == session => "tasks_session (session=?",
                    s if s == node => "tasks_node (<expr>=?",
                    s if s == state => "tasks_state (state=?",
                    s if s == skill => "tasks_skill (skill=?",
                    s if s == user || s == user | state => "tasks_user_state (user=? AND state=?",
                    s if s == user | session => "tasks_user_session (user=? AND session=?",
                    s if s == user | node => "tasks_user_node (user=? AND <expr>=?",
                    s if s == user | skill => "tasks_user_skill (user=? AND skill=?",
                    _ => "tasks_",
                };
                assert!(!reads.is_empty() && reads.iter().all(|p| p.contains(index)), "{index}: {context}");
                assert!(!by_time || reads.iter().all(|p| p.contains("id<?") || p.contains("id>?")), "times are bounds: {context}");
                assert!(set & 31 != user || reads.len() == TaskState::ALL.len(), "one read a state: {context}");
            }
        }
    }

    #[tokio::test]
    async fn what_is_open_is_found_by_its_state() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), &Database::Sqlite, &Tasks::new()).await.unwrap();
        for session in [None, Some(SessionId::from_bytes([1; 16]))] {
            for after in [None, Some(TaskId::from_bytes([1; 16]))] {
                let plan = plan(&store, open_tasks(Dialect::Sqlite, session, after, 9)).await;
                let reads: Vec<&String> = plan.iter().filter(|p| p.contains(" t ")).collect();
                assert!(!plan.iter().any(|p| p.contains("TEMP B-TREE")), "{plan:#?}");
                assert_eq!(reads.len(), TaskState::ALL.iter().filter(|s| !s.is_final()).count(), "{plan:#?}");
                assert!(reads.iter().all(|p| p.contains("tasks_state (state=?")), "{plan:#?}");
            }
        }
    }
}
