use super::sample::{agent, agent_id, attempt, entry_id, frame, grant, node_id, task_id, user, user_id};
use super::{T0, all, window};
use futures::future::join_all;
use hub_engine::ports::{AgentState, Agents, Creation, Grants, Idempotency, Once, Users};
use hub_engine::records::{
    Agent, AgentApplied, AgentFilter, Leaving, LogPage, LogSource, Resource, Spawned, StateEntry, StateWritten, Stream, Within,
};
use mesh_core::agent::{Action, End, Event, Kind, Life, Refused, Run, Status};
use mesh_core::lines::Source;
use std::sync::Arc;

const KEEP: u64 = 1 << 20;

pub async fn agents<S: Agents + AgentState + Grants + Idempotency + Users>(make: impl AsyncFn() -> Arc<S>) {
    lives(&*make().await).await;
    lists(&*make().await).await;
    names(&*make().await).await;
    logs(&*make().await).await;
    logs_are_bounded(&*make().await).await;
    erased_and_handed_over(&*make().await).await;
}

async fn done(store: &impl Agents, n: u16, event: Event, now: i64) -> (Agent, Vec<Action>) {
    match store.apply_agent(agent_id(n), &event, now, KEEP).await.unwrap() {
        AgentApplied::Done(agent, actions) => (*agent, actions),
        other => panic!("{event:?}: {other:?}"),
    }
}
fn ended(n: u16) -> Event {
    Event::Ended { task: task_id(n), end: End::Failure("exit code 1".into()) }
}

async fn lives(store: &impl Agents) {
    assert_eq!(store.agent(agent_id(1)).await.unwrap(), None);
    assert_eq!(store.apply_agent(agent_id(1), &ended(1), T0, KEEP).await.unwrap(), AgentApplied::Unknown);
    assert_eq!(store.add_agent(&agent(1)).await.unwrap(), Spawned::Done);
    assert_eq!(store.agent(agent_id(1)).await.unwrap(), Some(agent(1)));
    let (now, actions) = done(store, 1, Event::Started { task: task_id(1), node: Some(node_id(1)) }, T0 + 5).await;
    assert_eq!((now.life.status, now.life.started_at, actions), (Status::Running, Some(T0 + 5), vec![]));
    assert_eq!(store.agent(agent_id(1)).await.unwrap(), Some(now), "what is told is what is kept");
    let (now, actions) = done(store, 1, ended(1), T0 + 6).await;
    assert_eq!(actions, [Action::Rest { until: T0 + 1006 }]);
    assert_eq!(store.agent(agent_id(1)).await.unwrap(), Some(now.clone()));
    assert_eq!(store.apply_agent(agent_id(1), &ended(1), T0 + 7, KEEP).await.unwrap(), AgentApplied::Refused(Refused::Superseded));
    assert_eq!(store.agent(agent_id(1)).await.unwrap(), Some(now), "what is refused changes nothing");

    // The pause is over for two who look at once, as two hubs do: one run is decided.
    let due: Vec<Event> = [2, 3].map(|n| Event::Due { task: task_id(n) }).into();
    let decided = join_all(due.iter().map(|due| store.apply_agent(agent_id(1), due, T0 + 1006, KEEP))).await;
    let begun: Vec<Run> = decided
        .into_iter()
        .filter_map(|d| if let AgentApplied::Done(_, actions) = d.unwrap() { Some(actions) } else { None })
        .map(|actions| if let [Action::Begin(run)] = actions[..] { run } else { panic!("{actions:?}") })
        .collect();
    assert_eq!(begun.len(), 1, "{begun:?}");
    assert_eq!(store.agent(agent_id(1)).await.unwrap().unwrap().life.run, Some(begun[0]));
    let (now, _) = done(store, 1, Event::KillAsked { force: true }, T0 + 1010).await;
    assert_eq!(store.agent(agent_id(1)).await.unwrap(), Some(now));
    let (now, _) = done(store, 1, Event::Ended { task: begun[0].task, end: End::Clean }, T0 + 1011).await;
    assert_eq!((now.life.status, now.life.ended_at), (Status::Killed, Some(T0 + 1011)));
    assert_eq!(store.agent(agent_id(1)).await.unwrap(), Some(now));
}

async fn lists(store: &impl Agents) {
    for n in 1..=4 {
        let of = Agent { owner: user_id(1 + n % 2), ..agent(n) };
        assert_eq!(store.add_agent(&of).await.unwrap(), Spawned::Done);
    }
    done(store, 3, Event::KillAsked { force: false }, T0).await;
    done(store, 4, ended(4), T0).await;
    done(store, 4, Event::KillAsked { force: false }, T0).await;
    let names = async |filter: AgentFilter, w| store.agents(&filter, w).await.unwrap().into_iter().map(|a| a.name).collect::<Vec<_>>();
    let f = AgentFilter::default;
    assert_eq!(names(f(), all()).await, ["a4", "a3", "a2", "a1"], "newest first");
    assert_eq!(names(f(), window(Some(agent_id(4)), 2)).await, ["a3", "a2"]);
    assert_eq!(names(AgentFilter { within: Some(Within::owned_by(user_id(1))), ..f() }, all()).await, ["a4", "a2"]);
    let granted = Within { agents: vec!["a1".into()], ..Within::owned_by(user_id(1)) };
    assert_eq!(names(AgentFilter { within: Some(granted.clone()), ..f() }, all()).await, ["a4", "a2", "a1"]);
    assert_eq!(names(AgentFilter { within: Some(Within::default()), ..f() }, all()).await, [""; 0], "nothing is within nothing");
    assert_eq!(names(AgentFilter { name: Some("a2".into()), ..f() }, all()).await, ["a2"]);
    assert_eq!(names(AgentFilter { status: Some(Status::Stopping), ..f() }, all()).await, ["a3"]);
    let living = async |after, limit| store.living_agents(after, limit).await.unwrap().into_iter().map(|a| a.name).collect::<Vec<_>>();
    assert_eq!(living(None, 9).await, ["a1", "a2", "a3"], "oldest first");
    assert_eq!(living(Some(agent_id(1)), 1).await, ["a2"]);
    let counts = store.agents_by_status(None).await.unwrap();
    assert_eq!(counts, [(Status::Starting, 2), (Status::Stopping, 1), (Status::Killed, 1)].into());
    assert_eq!(store.agents_by_status(Some(&granted)).await.unwrap(), [(Status::Starting, 2), (Status::Killed, 1)].into());
}

async fn names(store: &(impl Agents + AgentState + Grants + Idempotency)) {
    let named = |n, owner, name: &str| Agent { name: name.into(), owner: user_id(owner), ..agent(n) };
    let entry = |owner| StateEntry {
        id: entry_id(1),
        agent: "a".into(),
        key: "k".into(),
        owner: user_id(owner),
        value: b"1".to_vec(),
        updated_at: T0,
    };
    assert_eq!(store.state_owner("a").await.unwrap(), None);
    let racing = [named(1, 1, "a"), named(2, 1, "a"), named(3, 2, "a")];
    let added = join_all(racing.iter().map(|a| store.add_agent(a))).await;
    let added: Vec<Spawned> = added.into_iter().map(Result::unwrap).collect();
    assert_eq!(added.iter().filter(|s| **s == Spawned::Done).count(), 1, "of one name one lives: {added:?}");
    let owner = store.state_owner("a").await.unwrap().unwrap();
    let (own, other) = if owner == user_id(1) { (1, 2) } else { (2, 1) };
    assert_eq!(store.add_agent(&named(4, other, "a")).await.unwrap(), Spawned::Foreign);
    assert_eq!(store.add_agent(&named(5, own, "a")).await.unwrap(), Spawned::NameTaken);
    assert_eq!(store.put_state(&entry(other), 9).await.unwrap(), StateWritten::Foreign, "what is kept under a name is of one person");
    assert_eq!(store.put_state(&entry(own), 9).await.unwrap(), StateWritten::Done);
    store.add_grant(&grant(1, Resource::Agent("a".into()))).await.unwrap();
    let living = store.agents(&AgentFilter::default(), all()).await.unwrap();
    let AgentApplied::Done(..) = store.apply_agent(living[0].id, &Event::KillAsked { force: false }, T0, KEEP).await.unwrap() else {
        panic!()
    };
    let killed = Event::Ended { task: living[0].life.run.unwrap().task, end: End::Cancelled };
    store.apply_agent(living[0].id, &killed, T0, KEEP).await.unwrap();
    assert_eq!(store.add_agent(&named(4, other, "a")).await.unwrap(), Spawned::Foreign, "the name stays its owner's");
    assert_eq!(store.add_agent(&named(5, own, "a")).await.unwrap(), Spawned::Done, "the one before has ended");
    assert!(store.remove_state("a", "k", user_id(own)).await.unwrap());
    assert_eq!(store.grants(None, T0, all()).await.unwrap().len(), 1, "there still is an agent of that name");

    let once = Once { scope: [1; 32], request: [2; 32], at: T0, since: T0 - 1 };
    let keyed = |a: Agent| Creation::Agent(Box::new(a));
    assert_eq!(store.create(keyed(named(6, own, "b")), &once).await.unwrap(), None);
    let known = store.create(keyed(named(7, own, "c")), &once).await.unwrap().unwrap();
    assert_eq!((known.thing, store.agent(agent_id(7)).await.unwrap()), (agent_id(6).to_string(), None));
    assert!(store.create(keyed(named(8, other, "b")), &Once { scope: [3; 32], ..once }).await.is_err());
    assert_eq!(store.known(&[3; 32], T0 - 1).await.unwrap(), None, "nothing of it stays");
}

fn texts(page: &LogPage) -> Vec<String> {
    page.lines.iter().map(|(_, l)| String::from_utf8_lossy(&l.text).into_owned()).collect()
}
fn source(run: u16, no: u32) -> LogSource {
    LogSource { task: task_id(run), attempt: attempt(no) }
}

async fn logs(store: &impl Agents) {
    assert_eq!(store.log(agent_id(1), 0, 10, 999).await.unwrap(), LogPage::default());
    store.add_agent(&agent(1)).await.unwrap();
    let basic = Agent { kind: Kind::Basic, spec: br#"{"a": 1}"#.to_vec(), life: Life::basic(T0), ..agent(2) };
    store.add_agent(&basic).await.unwrap();
    assert_eq!(store.agent(agent_id(2)).await.unwrap(), Some(basic));
    let config = store.log(agent_id(2), 0, 10, 999).await.unwrap();
    assert_eq!((texts(&config), config.lines[0].1.source), (vec![r#"{"a": 1}"#.to_owned()], Source::Agent), "a basic one logs its config");

    let frames = [frame(1, Stream::Stdout, "one\ntw"), frame(2, Stream::Stderr, "oh\n"), frame(3, Stream::Stdout, "o\nopen")];
    let add = async |src, frames: &[_], from_here| store.add_log(agent_id(1), src, frames.to_vec(), from_here, KEEP).await.unwrap();
    assert_eq!(store.log_mark(agent_id(1), source(1, 1)).await.unwrap(), 0);
    assert_eq!(add(source(1, 1), &frames[..2], false).await, Some(2));
    assert_eq!(add(source(1, 1), &frames, false).await, Some(3), "what came before is taken once");
    assert_eq!(store.log_mark(agent_id(1), source(1, 1)).await.unwrap(), 3);
    let gap = [frame(5, Stream::Stdout, "x\n")];
    assert_eq!(add(source(1, 1), &gap, false).await, None);
    let page = store.log(agent_id(1), 0, 10, 999).await.unwrap();
    assert_eq!((texts(&page), page.total, page.first), (vec!["one".into(), "oh".into(), "two".into()], 3, 0));
    assert_eq!((page.lines[2].0, page.lines[2].1.at, page.lines[1].1.source), (2, T0 + 1, Source::Stderr));
    done(store, 1, ended(1), T0 + 9).await;
    let page = store.log(agent_id(1), 3, 10, 999).await.unwrap();
    assert_eq!(texts(&page), ["open", "run 1 ended: exit code 1; it is run again"], "the end of a run ends its last line");
    assert_eq!(add(source(2, 1), &[frame(1, Stream::Stdout, "again\n")], false).await, Some(1), "another run counts anew");
    assert_eq!(add(source(2, 1), &[frame(7, Stream::Stdout, "after\n")], true).await, Some(7), "what is missing never comes");
    let page = store.log(agent_id(1), 5, 1, 999).await.unwrap();
    assert_eq!((texts(&page), page.total), (vec!["again".into()], 7));
    assert_eq!(texts(&store.log(agent_id(1), 0, 10, 7).await.unwrap()), ["one", "oh"], "about so many bytes");
    assert_eq!(texts(&store.log(agent_id(1), 0, 10, 0).await.unwrap()), ["one"], "at least one");
    assert_eq!(texts(&store.log(agent_id(1), 7, 10, 99).await.unwrap()), [""; 0]);
    assert_eq!(store.add_log(agent_id(9), source(1, 1), gap.to_vec(), false, KEEP).await.unwrap(), Some(5), "nobody asks for it any more");
}

/// Far more than is kept, in lines short and long.
async fn logs_are_bounded(store: &impl Agents) {
    const BOUND: u64 = 40_000;
    store.add_agent(&agent(1)).await.unwrap();
    let (mut seq, mut written, mut total) = (0, 0u64, 0u64);
    let mut newest = String::new();
    while written < 40 * BOUND {
        let frames: Vec<_> = (0..8)
            .map(|_| {
                seq += 1;
                let mut data = String::new();
                for _ in 0..20 {
                    newest = format!("{total} {}", "x".repeat((total % 97) as usize * if total % 101 == 0 { 90 } else { 1 }));
                    data.push_str(&newest);
                    data.push('\n');
                    total += 1;
                }
                written += data.len() as u64;
                frame(seq, Stream::Stdout, data)
            })
            .collect();
        assert_eq!(store.add_log(agent_id(1), source(1, 1), frames, false, BOUND).await.unwrap(), Some(seq));
    }
    let (mut kept, mut offset, mut first) = (0u64, 0, None);
    loop {
        let page = store.log(agent_id(1), offset, 100, 1 << 20).await.unwrap();
        if page.lines.is_empty() {
            assert_eq!(offset, page.total, "pages lead to the end");
            break;
        }
        first.get_or_insert(page.first);
        assert_eq!(page.lines[0].0, offset.max(page.first), "and have no gap");
        for (at, line) in &page.lines {
            // A line of more than one piece, if there is one, begins with no number.
            kept += line.text.len() as u64;
            offset = at + 1;
        }
    }
    let page = store.log(agent_id(1), offset - 1, 9, 1 << 20).await.unwrap();
    assert_eq!(texts(&page), [newest], "the newest is there");
    assert!(page.total >= total, "every line counts, kept or not: {} {total}", page.total);
    assert!(kept <= BOUND && kept > BOUND / 4, "{kept} of {written} bytes, where {BOUND} are kept");
    let first = first.unwrap();
    assert!(first > 0 && first == page.first, "{first}");
    let early = store.log(agent_id(1), 3, 1, 999).await.unwrap();
    assert_eq!(early.lines[0].0, first, "what is gone is passed over");
}

async fn erased_and_handed_over(store: &(impl Agents + AgentState + Grants + Users)) {
    for n in 1..=3 {
        store.add_agent(&Agent { owner: user_id(2), ..agent(n) }).await.unwrap();
    }
    store.add_grant(&grant(1, Resource::Agent("a1".into()))).await.unwrap();
    for n in 1..=2 {
        store.add_log(agent_id(n), source(n, 1), vec![frame(1, Stream::Stdout, "x\n".repeat(9000))], false, KEEP).await.unwrap();
        done(store, n, Event::Ended { task: task_id(n), end: End::Clean }, T0 + i64::from(n)).await;
    }
    assert_eq!(store.erase_agents(T0 + 1, 10).await.unwrap(), 0, "none had ended before that");
    assert_eq!(store.erase_agents(T0 + 2, 10).await.unwrap(), 1);
    assert_eq!((store.agent(agent_id(1)).await.unwrap(), store.log(agent_id(1), 0, 9, 99).await.unwrap()), (None, LogPage::default()));
    assert_eq!(store.grants(None, T0, all()).await.unwrap(), [], "what was granted on it went with it");
    assert_eq!(store.log(agent_id(2), 0, 9, 99).await.unwrap().total, 9001);
    assert_eq!(store.erase_agents(i64::MAX, 10).await.unwrap(), 1, "who lives stays");

    for n in [1, 2] {
        store.create_user(&user(n, &format!("u{n}")), None).await.unwrap();
    }
    let leaving = Leaving { user: user_id(2), successor: user_id(1), cancel: false, purge: false, at: T0 };
    store.create_user(&hub_engine::records::User { role: mesh_core::permission::Role::Admin, ..user(3, "boss") }, None).await.unwrap();
    store.remove_user(&leaving).await.unwrap();
    while !store.hand_over(user_id(2), 1).await.unwrap() {}
    let inherited = store.agent(agent_id(3)).await.unwrap().unwrap();
    assert_eq!((inherited.owner, inherited.restart.policy), (user_id(1), mesh_core::agent::Policy::Never), "nothing begins again");
    assert_eq!(store.state_owner("a3").await.unwrap(), Some(user_id(1)));
}
