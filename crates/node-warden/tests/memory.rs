//! What the warden remembers: over disconnection, kill, stop, and large output.
#![allow(clippy::disallowed_methods, reason = "these tests are about processes and real time")]

mod common;

use common::*;
use mesh_core::output::Digests;
use mesh_core::sha256;
use mesh_core::task::Outcome;
use node_warden::frames::{KnownState, Request, WITH_DIGESTS};
use node_warden::spool::{OutputReader, Stream};
use std::collections::HashSet;
use std::time::Instant;

#[test]
fn a_killed_warden_takes_its_tasks_along_and_says_lost() {
    let mut p = Node::new(&[]);
    let mark = mark();
    let (done, live, spool);
    {
        let mut c = p.connect();
        done = p.sh("echo done; exit 5");
        assert_eq!(c.run(&done).outcome, Outcome::Exited(5));
        live = p.sh(&format!("echo kept; (setsid setsid sleep {mark} &); sleep {mark}"));
        let key = c.start(&live);
        c.wait_output(key, 1);
        until("two sleep", || (processes(&format!("sleep\0{mark}")).len() == 2).then_some(()));
        spool = c.spool;
    }
    p.kill();
    until("its tasks are gone", || processes(&format!("sleep\0{mark}")).is_empty().then_some(()));
    p.start();
    let c = p.connect();
    assert_eq!(c.spool, spool, "the memory is the same");
    assert_eq!(c.known.len(), 2);
    for k in &c.known {
        let (state, text): (_, &[u8]) = if k.key() == done.key() {
            (KnownState::Ended(Outcome::Exited(5)), b"done\n")
        } else {
            (KnownState::Ended(Outcome::Lost { detail: "warden_ended".into() }), b"kept\n")
        };
        assert_eq!(k.state, state);
        assert!(k.started_at_ms > 0);
        assert_eq!(p.text(k.key(), k.output_end, Stream::Stdout), text);
    }
}

#[test]
fn killed_at_any_moment_no_end_is_told_that_is_not_kept() {
    let mut p = Node::new(&[]);
    let mut told = HashSet::new();
    for round in 0..4 {
        let mut c = p.connect();
        let orders: Vec<_> = (0..60).map(|n| p.sh(&format!("echo {n}; exit {}", n % 7))).collect();
        for o in &orders {
            c.start(o);
        }
        for o in &orders[..10 + round * 10] {
            c.wait_end(o.key());
            told.insert(o.key());
        }
        p.kill();
        p.start();
        let c = p.connect();
        for k in &c.known {
            let lost = matches!(&k.state, KnownState::Ended(Outcome::Lost { .. }));
            assert!(!(lost && told.contains(&k.key())), "an end was told and forgotten");
            assert_ne!(k.state, KnownState::Running);
        }
        let known: HashSet<_> = c.known.iter().map(|k| k.key()).collect();
        assert!(told.iter().all(|k| known.contains(k)));
    }
}

#[test]
fn a_new_daemon_finds_everything() {
    let p = Node::new(&[]);
    let go = p.open_file("go");
    let ended = p.sh("echo early");
    let live = p.sh(&format!("echo one; until [ -s {} ]; do sleep 0.01; done; echo two; exit 9", go.display()));
    {
        let mut c = p.connect();
        c.run(&ended);
        let key = c.start(&live);
        c.wait_output(key, 1);
    }
    let mut c = p.connect();
    let state = |c: &Client, key: Key| c.known.iter().find(|k| k.key() == key).unwrap().state.clone();
    assert_eq!(state(&c, ended.key()), KnownState::Ended(Outcome::Exited(0)));
    assert_eq!(state(&c, live.key()), KnownState::Running);
    // A newer one takes over; the older is hung up.
    let mut newer = p.connect();
    while c.step() {}
    std::fs::write(&go, "go").unwrap();
    let end = newer.wait_end(live.key());
    assert_eq!(end.outcome, Outcome::Exited(9));
    assert_eq!(p.text(live.key(), end.output_end, Stream::Stdout), b"one\ntwo\n");
    // What is forgotten is gone, from the list and from the disk.
    newer.forget(live.key());
    newer.forget(ended.key());
    assert_eq!(newer.run(&p.order(&["true"])).outcome, Outcome::Exited(0));
    assert!(OutputReader::open(&p.data(), live.key().0, live.key().1).unwrap().is_none());
    assert_eq!(p.connect().known.len(), 1);
}

#[test]
fn digests_are_of_the_whole_output_and_last_as_long_as_the_end() {
    let mut p = Node::new(&[]);
    let go = p.open_file("go");
    let both =
        p.sh(&format!("head -c 3000000 /dev/zero; echo e >&2; until [ -s {} ]; do sleep 0.01; done; echo tail; exit 3", go.display()));
    let (silent, missing) = (p.order(&["true"]), p.order(&["/no/such/program"]));
    let live = p.order(&["sleep", "4000"]);
    let key = both.key();
    {
        let mut c = p.connect();
        c.start(&both);
        c.start(&live);
        c.wait_started(live.key());
        let (end, _) = c.wait_output(key, 3_000_000);
        // What was given back counts all the same.
        let frames = p.read_output(key, end);
        c.acked(key, frames.iter().find(|f| f.end_offset > 2_000_000).unwrap().end_offset);
        assert_eq!(c.run(&silent).digests, Some(Digests::of_nothing()));
        assert_eq!(c.run(&missing).digests, None, "what never ran has none");
    }
    // The daemon was replaced in the middle.
    let mut c = p.connect();
    std::fs::write(&go, "go").unwrap();
    let end = c.wait_end(key);
    let whole = [&vec![0; 3_000_000][..], b"tail\n"].concat();
    let expect = Digests { stdout: sha256(&whole), stderr: sha256(b"e\n") };
    assert_eq!((end.outcome, end.digests), (Outcome::Exited(3), Some(expect)));
    let digests = |c: &Client, key| c.known.iter().find(|k| k.key() == key).unwrap().digests;
    p.kill();
    p.start();
    let c = p.connect();
    assert_eq!((digests(&c, key), digests(&c, silent.key())), (Some(expect), Some(Digests::of_nothing())), "kept with the end");
    assert_eq!((digests(&c, missing.key()), digests(&c, live.key())), (None, None));
    // A daemon of the version before is told what it can read.
    let mut c = Client::speaking(&p.data(), WITH_DIGESTS - 1);
    assert_eq!(c.known.len(), 4);
    assert!(c.known.iter().all(|k| k.digests.is_none()));
    assert_eq!(c.run(&p.sh("echo x")).digests, None);
}

#[test]
fn stop_ends_tasks_records_them_and_leaves() {
    for by_signal in [false, true] {
        let mut p = Node::new(&["--grace-ms", "200"]);
        let mark = mark();
        let mut c = p.connect();
        let orders: Vec<_> = (0..3).map(|_| p.sh(&format!("trap '' TERM; echo up; sleep {mark}; sleep {mark}"))).collect();
        for o in &orders {
            let key = c.start(o);
            c.wait_output(key, 1);
        }
        if by_signal {
            let pid = rustix::process::Pid::from_raw(p.pid() as i32).unwrap();
            rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        } else {
            c.send(&Request::Stop);
        }
        for o in &orders {
            assert_eq!(c.wait_end(o.key()).outcome, Outcome::Cancelled);
        }
        assert!(p.wait_end().success());
        assert_eq!(processes(&format!("sleep\0{mark}")), [] as [u32; 0]);
        p.start();
        let c = p.connect();
        assert_eq!(c.known.len(), 3);
        assert!(c.known.iter().all(|k| k.state == KnownState::Ended(Outcome::Cancelled)));
    }
}

#[test]
fn a_warden_without_a_daemon_ends_itself() {
    let mut p = Node::new(&["--grace-ms", "200", "--orphan-ms", "500"]);
    // One that ended before a slow daemon came did what it should; the next is for the daemon that comes.
    let mut c = until("a daemon comes in time", || {
        if p.warden.as_mut().unwrap().try_wait().unwrap().is_some() {
            p.start();
        }
        Client::try_connect(&p.data())
    });
    let o = p.sh("sleep 4000");
    c.start(&o);
    c.wait_started(o.key());
    drop(c);
    assert!(p.wait_end().success());
    p.args.truncate(2);
    p.start();
    let c = p.connect();
    assert_eq!(c.known[0].state, KnownState::Ended(Outcome::Cancelled));
}

fn resident_kib(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find(|l| l.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn a_hundred_mebibytes_pass_through_a_small_spool() {
    use std::os::unix::fs::MetadataExt;
    const BOUND: u64 = 8 << 20;
    let p = Node::new(&["--attempt-bytes", &BOUND.to_string()]);
    let mut c = p.connect();
    let o = p.order(&["head", "-c", "104857600", "/dev/zero"]);
    let key = c.start(&o);
    c.wait_output(key, 1);
    let mut reader = OutputReader::open(&p.data(), key.0, key.1).unwrap().unwrap();
    let (mut bytes, mut seq, mut most) = (0u64, 0, 0);
    loop {
        let end = match c.ends.get(&key) {
            Some(e) => e.output_end,
            None => c.output[&key].0,
        };
        while let Some(f) = reader.next(end).unwrap() {
            assert_eq!(f.seq, seq + 1);
            assert!(f.bytes.iter().all(|b| *b == 0));
            (seq, bytes) = (f.seq, bytes + f.bytes.len() as u64);
        }
        let file = std::fs::read_dir(p.data().join("spool/out")).unwrap().next().unwrap().unwrap();
        most = most.max(file.metadata().unwrap().blocks() * 512);
        if c.ends.contains_key(&key) {
            break;
        }
        c.acked(key, reader.offset());
        assert!(c.step(), "the warden hung up");
    }
    assert_eq!(bytes, 104_857_600);
    assert!(most < 2 * BOUND + (4 << 20), "the file took {most} bytes");
    let own = resident_kib(p.pid());
    assert!(own < 64 << 10, "the warden took {own} KiB");
}

#[test]
fn a_full_spool_pauses_the_task_and_an_ack_lets_it_go_on() {
    const BOUND: u64 = 1 << 20;
    for bounds in [["--attempt-bytes", "1048576"], ["--node-bytes", "1048576"]] {
        let p = Node::new(&bounds);
        let mut c = p.connect();
        let o = p.sh("head -c 4000000 /dev/zero; echo done >&2");
        let key = c.start(&o);
        let (full, _) = c.wait_output(key, BOUND);
        // It stands still: the same figure after others have come and gone.
        for _ in 0..5 {
            assert!(matches!(c.run(&p.order(&["true"])).outcome, Outcome::Exited(0)));
        }
        let (after, _) = c.output[&key];
        assert!(after < BOUND + (256 << 10) && after >= full);
        assert!(!c.ends.contains_key(&key));
        let mut reader = OutputReader::open(&p.data(), key.0, key.1).unwrap().unwrap();
        let mut total = 0;
        while !c.ends.contains_key(&key) {
            let end = c.output[&key].0;
            while let Some(f) = reader.next(end).unwrap() {
                total += f.bytes.len();
            }
            c.acked(key, reader.offset());
            assert!(c.step(), "the warden hung up");
        }
        while let Some(f) = reader.next(c.ends[&key].output_end).unwrap() {
            total += f.bytes.len();
        }
        assert_eq!(total, 4_000_005);
    }
}

#[test]
fn freed_output_is_not_asked_for_after_a_kill() {
    // It is freed in steps of a sixteenth of this.
    let mut p = Node::new(&["--attempt-bytes", "16777216"]);
    let mut c = p.connect();
    let o = p.sh("head -c 6000000 /dev/zero; echo; sleep 4000");
    let key = c.start(&o);
    let (end, last) = c.wait_output(key, 6_000_000);
    let frames = p.read_output(key, end);
    let half = frames.iter().find(|f| f.end_offset > 3_000_000).unwrap();
    c.acked(key, half.end_offset);
    assert_eq!(c.run(&p.order(&["true"])).outcome, Outcome::Exited(0));
    p.kill();
    p.start();
    let c = p.connect();
    let known = c.known.iter().find(|k| k.key() == key).unwrap();
    assert!(known.last_seq >= last && known.output_end >= end);
    let left = p.read_output(key, known.output_end);
    assert_eq!(left[0].seq, half.seq + 1);
    let mut r = OutputReader::open(&p.data(), key.0, key.1).unwrap().unwrap();
    assert_eq!(r.seek_after(half.seq, known.output_end).unwrap(), half.end_offset);
}

#[test]
fn a_daemon_that_does_not_read_holds_up_nobody() {
    let p = Node::new(&[]);
    let mut c = p.connect();
    let orders: Vec<_> = (0..400).map(|n| p.sh(&format!("for i in 1 2 3 4 5; do echo {n}; done"))).collect();
    for o in &orders {
        c.start(o);
    }
    // All of it passes while nothing is read. Another daemon, which takes the connection away with what it may
    // still hold, comes only then, and sees the ends.
    let out = p.data().join("spool/out");
    until("all have written", || std::fs::read_dir(&out).is_ok_and(|d| d.count() == 400).then_some(()));
    until("all have ended", || {
        let c = p.connect();
        c.known.iter().filter(|k| matches!(k.state, KnownState::Ended(Outcome::Exited(0)))).count().eq(&400).then_some(())
    });
}

#[test]
fn two_thousand_at_sixty_four_in_flight() {
    let p = Node::new(&[]);
    let mut c = p.connect();
    let (mut sent, mut done) = (0, 0);
    let begun = Instant::now();
    while done < 2000 {
        while sent < 2000 && sent - done < 64 {
            c.start(&p.order(&["/bin/true"]));
            sent += 1;
        }
        assert!(c.step(), "the warden hung up");
        for (key, end) in std::mem::take(&mut c.ends) {
            assert_eq!(end.outcome, Outcome::Exited(0));
            c.forget(key);
            done += 1;
        }
    }
    println!("{:.0} tasks a second", 2000.0 / begun.elapsed().as_secs_f64());
    let fds = std::fs::read_dir(format!("/proc/{}/fd", p.pid())).unwrap().count();
    assert!(fds < 64, "{fds} descriptors are left");
}

#[test]
fn launch_is_idempotent_and_the_warden_stands_alone() {
    let p = Node::new(&[]);
    let data = p.dir.path().join("second");
    let exe = example();
    let first = std::thread::scope(|s| {
        let all: Vec<_> = (0..3).map(|_| s.spawn(|| node_warden::launch(&exe, &data))).collect();
        all.into_iter().map(|t| t.join().unwrap()).collect::<Vec<_>>()
    });
    first.into_iter().for_each(|r| r.unwrap());
    node_warden::launch(&exe, &data).unwrap();
    let mut c = Client::connect(&data);
    let mode = |name: &str| {
        use std::os::unix::fs::MetadataExt;
        std::fs::metadata(data.join(name)).unwrap().mode() & 0o777
    };
    assert_eq!((mode(""), mode("warden.sock"), mode("warden.lock")), (0o700, 0o600, 0o600));
    let pids = processes(&format!("{}", data.display()));
    assert_eq!(pids.len(), 1);
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pids[0])).unwrap();
    let session: u32 = stat.rsplit(") ").next().unwrap().split(' ').nth(3).unwrap().parse().unwrap();
    assert_eq!(session, pids[0], "a session of its own");
    assert_eq!(c.run(&p.order(&["true"])).outcome, Outcome::Exited(0));
    c.send(&Request::Stop);
    while c.step() {}
    until("it is gone", || processes(&format!("{}", data.display())).is_empty().then_some(()));
    assert!(!data.join("warden.sock").exists());
}

#[test]
fn the_machine_can_end_trees() {
    let probe = node_warden::probe();
    let expect = if is_root() { node_warden::TreeKill::PidNamespace } else { node_warden::TreeKill::UserPidNamespace };
    assert_eq!(probe.tree_kill, expect);
    assert!(probe.no_new_privs);
}

/// The same tests without root: the warden then works in a user namespace of its own.
#[test]
fn all_of_this_without_root() {
    use std::os::unix::fs::PermissionsExt;
    if !is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
    let copy = |from: &std::path::Path, to: &str| {
        let to = dir.path().join(to);
        copy_program(from, &to);
        std::fs::set_permissions(&to, std::fs::Permissions::from_mode(0o755)).unwrap();
        to
    };
    let warden = copy(&example(), "warden");
    let own = std::env::current_exe().unwrap();
    // The other test file's binary lies beside this one, the newest under its name.
    let tasks = std::fs::read_dir(own.parent().unwrap()).unwrap().flatten().filter(|e| {
        let name = e.file_name().into_string().unwrap_or_default();
        name.starts_with("tasks-") && !name.contains('.')
    });
    let tasks = tasks.max_by_key(|e| e.metadata().unwrap().modified().unwrap()).map(|e| e.path());
    for (name, exe) in [("memory", Some(own.clone())), ("tasks", tasks)] {
        let Some(exe) = exe else { continue };
        let exe = copy(&exe, name);
        let out = std::process::Command::new("setpriv")
            .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
            .arg(exe)
            .args(["--skip", "two_thousand", "--test-threads", "2"])
            .env("NODE_WARDEN_EXAMPLE", &warden)
            .env("TMPDIR", dir.path())
            .current_dir(dir.path())
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&out.stdout);
        assert!(out.status.success(), "{name}: {text}\n{}", String::from_utf8_lossy(&out.stderr));
    }
}
