//! The bus in memory passes the suite; feeds show what their readers may see; the engine tells what it
//! does.

use hub_engine::bus::LocalBus;
use hub_testkit::contract::{self, BusPlan};
use std::sync::Arc;

#[tokio::test]
async fn bus() {
    contract::bus(async |plan: BusPlan| Arc::new(LocalBus::new(plan.keep, plan.keep_for, plan.clock)) as _).await;
}

mod feeds {
    use hub_engine::Error;
    use hub_engine::accounts::Authenticated;
    use hub_engine::bus::EventId;
    use hub_engine::events::{Data, Event, Events, Feed, NodeNews, SessionNews, Told, Topic, Whose};
    use hub_engine::links::{Health, Link, Links};
    use hub_testkit::contract::HandClock;
    use hub_testkit::contract::sample::{key_id, login_id, node_id, session_id, spool_id, user_id};
    use mesh_core::permission::{Caller, Role, Scope};
    use std::sync::Arc;
    use std::time::Duration;

    fn events() -> (Events, Arc<HandClock>) {
        let clock = Arc::new(HandClock::default());
        (Events::local(Duration::from_secs(600), clock.clone()), clock)
    }
    fn person(n: u16, role: Role) -> Authenticated {
        Authenticated { caller: Caller::person(user_id(n), role), login: Some(login_id(n)) }
    }
    fn key(n: u16, role: Role, scopes: &[&str]) -> Authenticated {
        let scopes: Vec<_> = scopes.iter().map(|s| Scope::parse(s).unwrap()).collect();
        Authenticated { caller: Caller::key(key_id(n), user_id(n), role, scopes), login: None }
    }
    /// One event of each built topic for each of two owners.
    fn publish(events: &Events) {
        for owner in [1, 2] {
            events.tell(user_id(owner), Data::Node(node_id(owner), NodeNews::Online));
            events.tell(user_id(owner), Data::Session(session_id(owner), SessionNews::Closed));
            events.tell(user_id(owner), task(owner));
        }
    }
    fn task(owner: u16) -> Data {
        use hub_engine::events::{TaskKind, TaskNews};
        Data::Task(Box::new(TaskNews {
            kind: TaskKind::Ended,
            task: hub_testkit::contract::sample::task_id(owner),
            session: None,
            node: None,
            skill: "echo".into(),
            state: mesh_core::task::TaskState::Succeeded,
            attempt: 1,
            reason: None,
            exit_code: None,
            signal: None,
        }))
    }
    /// What is there to be told, as topic and owner.
    fn told(feed: &mut Feed) -> Vec<(Topic, u16)> {
        let mut out = vec![];
        while let Some(Told::Event(_, e)) = futures::FutureExt::now_or_never(feed.next()) {
            let owner = [1, 2].into_iter().find(|n| user_id(*n) == e.owner).unwrap();
            out.push((e.topic().unwrap(), owner));
        }
        out
    }

    #[test]
    fn a_reader_sees_what_its_rights_reach() {
        use Topic::*;
        let (events, _) = events();
        let all = vec![(Nodes, 1), (Sessions, 1), (Tasks, 1), (Nodes, 2), (Sessions, 2), (Tasks, 2)];
        let own = vec![(Nodes, 2), (Sessions, 2), (Tasks, 2)];
        let cases = [
            (person(1, Role::Admin), all.clone()),
            (person(9, Role::Viewer), all.clone()),
            (person(2, Role::Developer), own.clone()),
            (person(9, Role::Developer), vec![]),
            (key(1, Role::Admin, &["*"]), all),
            (key(2, Role::Developer, &["*"]), own),
            (key(1, Role::Admin, &["nodes:read"]), vec![(Nodes, 1), (Nodes, 2)]),
            (key(2, Role::Developer, &["nodes:read", "tasks:read"]), vec![(Nodes, 2), (Tasks, 2)]),
        ];
        let mut feeds: Vec<_> = cases.iter().map(|(who, _)| events.open(who.clone(), None, None).unwrap()).collect();
        publish(&events);
        for ((who, wanted), feed) in cases.iter().zip(&mut feeds) {
            assert_eq!(told(feed), *wanted, "{who:?}");
        }
        let mut one = events.open(person(1, Role::Admin), Some(vec![Sessions, Nodes, Sessions]), None).unwrap();
        assert_eq!(one.topics(), [Nodes, Sessions]);
        publish(&events);
        assert_eq!(told(&mut one), [(Nodes, 1), (Sessions, 1), (Nodes, 2), (Sessions, 2)]);
    }

    #[test]
    fn a_topic_that_may_not_be_read_or_is_not_built_is_refused() {
        let (events, _) = events();
        let open = |who: Authenticated, topics: Option<Vec<Topic>>| events.open(who, topics, None).map(|f| f.topics().to_vec());
        let nodes = || key(1, Role::Admin, &["nodes:read"]);
        assert!(matches!(open(nodes(), Some(vec![Topic::Tasks])), Err(Error::Forbidden(_))));
        assert!(matches!(open(nodes(), Some(vec![Topic::Nodes, Topic::Tasks])), Err(Error::Forbidden(_))));
        assert_eq!(open(nodes(), None).unwrap(), [Topic::Nodes]);
        assert_eq!(open(person(1, Role::Guest), None).unwrap(), [Topic::Nodes, Topic::Tasks, Topic::Sessions], "something may be granted");
        assert!(matches!(open(key(1, Role::Admin, &["agents:read"]), None), Err(Error::Forbidden(_))));
        assert!(matches!(open(person(1, Role::Developer), Some(vec![Topic::Audit])), Err(Error::Forbidden(_))));
        for t in [Topic::Audit, Topic::Files, Topic::Approvals, Topic::Notifications] {
            assert!(matches!(open(person(1, Role::Admin), Some(vec![t])), Err(Error::Invalid { code: "not_yet", .. })), "{t:?}");
        }
    }

    #[test]
    fn changed_rights_are_looked_at_before_anything_more_is_told() {
        let (events, _) = events();
        let looks = |feed: &mut Feed| matches!(futures::FutureExt::now_or_never(feed.next()), Some(Told::LookAgain));
        let mut a = events.open(person(1, Role::Admin), None, None).unwrap();
        let mut b = events.open(key(2, Role::Developer, &["*"]), None, None).unwrap();
        for (whose, concerns_a, concerns_b) in [
            (Whose::User(user_id(1)), true, false),
            (Whose::Login(login_id(1)), true, false),
            (Whose::Login(login_id(2)), false, false),
            (Whose::User(user_id(2)), false, true),
            (Whose::Key(key_id(2)), false, true),
            (Whose::Key(key_id(1)), false, false),
        ] {
            events.rights_changed(whose);
            assert_eq!((looks(&mut a), looks(&mut b)), (concerns_a, concerns_b), "{whose:?}");
        }
        events.rights_changed(Whose::User(user_id(1)));
        publish(&events);
        assert!(looks(&mut a));
        a.set_rights(person(1, Role::Developer)).unwrap();
        assert_eq!(told(&mut a), [(Topic::Nodes, 1), (Topic::Sessions, 1), (Topic::Tasks, 1)], "a narrower reach holds at once");
        a.set_rights(person(1, Role::Guest)).unwrap();
        publish(&events);
        assert_eq!(told(&mut a), [], "nothing was granted");
        assert!(a.set_rights(key(1, Role::Admin, &["nodes:read"])).is_err(), "a topic of the stream is gone");
    }

    #[tokio::test]
    async fn a_reset_says_whether_the_reader_was_too_slow() {
        let (events, _) = events();
        let mut returned = events.open(person(1, Role::Admin), None, Some(&EventId::new("of-another-life"))).unwrap();
        assert!(matches!(returned.next().await, Told::Reset { behind: false, .. }));
        let mut slow = events.open(person(1, Role::Admin), None, None).unwrap();
        events.tell(user_id(1), task(1));
        assert!(matches!(slow.next().await, Told::Event(..)));
        for _ in 0..=hub_engine::bus::EVENTS_KEPT {
            events.tell(user_id(1), task(1));
        }
        assert!(matches!(slow.next().await, Told::Reset { behind: true, .. }));
    }

    fn link(node: u16, generation: u64) -> Link {
        let (commands, _) = tokio::sync::mpsc::channel(1);
        Link {
            node: node_id(node),
            owner: user_id(1),
            generation,
            spool: spool_id(1),
            task_limit: None,
            max_tasks: 1,
            closed: None,
            keeps: 0,
            offers: Default::default(),
            draining: false,
            own_tasks: 1,
            epoch: 0,
            cut: Default::default(),
            commands,
            health: None,
            rtt: None,
        }
    }
    fn kinds(feed: &mut Feed) -> Vec<&'static str> {
        let mut out = vec![];
        while let Some(Told::Event(_, e)) = futures::FutureExt::now_or_never(feed.next()) {
            out.push(Event::kind(&e));
        }
        out
    }

    #[test]
    fn links_tell_who_comes_and_goes() {
        let (events, _) = events();
        let mut feed = events.open(person(1, Role::Admin), None, None).unwrap();
        let links = Links::telling(events);
        links.open(link(1, 1));
        links.open(link(1, 2));
        assert_eq!(kinds(&mut feed), ["online"], "a newer link of a node that is here changes nothing");
        links.close(node_id(1), 1);
        assert_eq!(kinds(&mut feed), [""; 0], "an older one that ends neither");
        links.close(node_id(1), 2);
        links.close(node_id(1), 2);
        links.open(link(1, 3));
        // The receiver of its commands is gone: the link is closed by the first command.
        links.send(node_id(1), hub_engine::links::LinkCommand::Close { code: "x", detail: String::new() });
        assert_eq!(kinds(&mut feed), ["offline", "online", "offline"]);
    }

    #[test]
    fn health_is_told_now_and_then_and_only_to_listeners() {
        let (events, clock) = events();
        let sample = |n| events.health(&link(n, 1), Health::default());
        sample(1);
        let mut feed = events.open(person(1, Role::Admin), None, None).unwrap();
        (0..5).for_each(|_| sample(1));
        sample(2);
        assert_eq!(kinds(&mut feed).len(), 2, "one for each node; none was counted while nobody listened");
        clock.advance(Duration::from_secs(14));
        sample(1);
        assert_eq!(kinds(&mut feed).len(), 0);
        clock.advance(Duration::from_secs(1));
        sample(1);
        assert_eq!(kinds(&mut feed), ["health"]);
    }

    mod tasks {
        use super::*;
        use hub_testkit::contract::sample::{attempt, task};
        use mesh_core::task::{Event as Step, NeverStarted, Outcome, Reason, ReasonCode, step};

        /// What a task's life tells, as types and states.
        fn life(first: Option<&Step>, steps: &[Step]) -> Vec<(&'static str, &'static str)> {
            let (events, _) = events();
            let mut feed = events.open(person(1, Role::Admin), None, None).unwrap();
            let mut t = task(1);
            if let Some(assigned) = first {
                t.progress = step(&t.terms, &t.progress, assigned, 1).unwrap().0;
            }
            events.accepted(&t);
            for s in steps {
                t.progress = step(&t.terms, &t.progress, s, 2).unwrap().0;
                events.stepped(&t, s);
            }
            let mut out = vec![];
            while let Some(Told::Event(_, e)) = futures::FutureExt::now_or_never(feed.next()) {
                let Data::Task(news) = &e.data else { panic!("{e:?}") };
                out.push((e.kind(), news.state.as_str()));
            }
            out
        }
        fn assigned(n: u32) -> Step {
            Step::Assigned { attempt: attempt(n), node: node_id(1), granted: Some(spool_id(1)) }
        }
        fn ended(n: u32, outcome: Outcome) -> Step {
            Step::Ended { attempt: attempt(n), outcome }
        }
        const CANCEL: Step = Step::CancelRequested { reason: ReasonCode::CancelledByUser };

        #[test]
        fn each_life_ends_once() {
            let started = Step::Started { attempt: attempt(1) };
            let begin = [("accepted", "pending"), ("assigned", "assigned")];
            let of = |rest: &[(&'static str, &'static str)]| begin.iter().chain(rest).copied().collect::<Vec<_>>();
            let first = assigned(1);
            let placed = |steps: &[Step]| life(Some(&first), steps);

            assert_eq!(placed(&[started.clone(), ended(1, Outcome::Exited(0))]), of(&[("started", "running"), ("ended", "succeeded")]));
            assert_eq!(life(None, &[assigned(1), ended(1, Outcome::Done)]), of(&[("ended", "succeeded")]));
            assert_eq!(life(None, &[CANCEL]), [("accepted", "pending"), ("cancel_requested", "cancelled"), ("ended", "cancelled")]);
            assert_eq!(
                placed(&[started, CANCEL, ended(1, Outcome::Cancelled)]),
                of(&[("started", "running"), ("cancel_requested", "running"), ("ended", "cancelled")])
            );
            let expired = Step::Expired { detail: "no_slot".into() };
            assert_eq!(life(None, &[expired]), [("accepted", "pending"), ("ended", "failed")]);
            let late = ended(1, Outcome::NeverStarted(NeverStarted::Late));
            let denied = ended(2, Outcome::NeverStarted(NeverStarted::Refused(Reason::new(ReasonCode::PolicyDenied, "x"))));
            assert_eq!(placed(&[late, assigned(2), denied]), of(&[("requeued", "pending"), ("assigned", "assigned"), ("ended", "failed")]));
        }
    }
}
