//! Real processes through a real warden: what a task gets, what it leaves, how it ends.
#![allow(clippy::disallowed_methods, reason = "these tests are about processes and real time")]

mod common;

use common::*;
use mesh_core::task::{NeverStarted, Outcome, Reason, ReasonCode};
use node_warden::frames::Request;
use node_warden::spool::Stream;
use std::time::{Duration, Instant};

fn refused(outcome: &Outcome) -> (ReasonCode, String) {
    match outcome {
        Outcome::NeverStarted(NeverStarted::Refused(Reason { code, detail })) => (*code, detail.clone()),
        other => panic!("{other:?} is no refusal"),
    }
}

#[test]
fn exit_codes_and_signals() {
    let p = Node::new(&[]);
    let mut c = p.connect();
    for (script, expect) in [
        ("exit 0", Outcome::Exited(0)),
        ("exit 7", Outcome::Exited(7)),
        ("exit 255", Outcome::Exited(255)),
        ("kill -9 $$", Outcome::Signalled(9)),
        ("kill -15 $$", Outcome::Signalled(15)),
    ] {
        let o = p.sh(script);
        let end = c.run(&o);
        assert_eq!(end.outcome, expect, "{script}");
        assert_eq!((end.output_end, end.last_seq), (0, 0));
        assert!(c.started.contains_key(&o.key()));
    }
}

#[test]
fn output_is_exact_in_both_streams() {
    let p = Node::new(&[]);
    let mut c = p.connect();
    let o = p.sh(r"printf 'a\0b\377\n'; printf 'err\200' >&2");
    let end = c.run(&o);
    assert_eq!(end.outcome, Outcome::Exited(0));
    assert_eq!(p.text(o.key(), end.output_end, Stream::Stdout), b"a\0b\xff\n");
    assert_eq!(p.text(o.key(), end.output_end, Stream::Stderr), b"err\x80");
    let frames = p.read_output(o.key(), end.output_end);
    assert_eq!(frames.last().unwrap().seq, end.last_seq);
    assert!(frames.iter().enumerate().all(|(i, f)| f.seq == i as u64 + 1 && f.t_ms > 1_600_000_000_000));
}

#[test]
fn programs_that_cannot_run_say_why() {
    let p = Node::new(&[]);
    let mut c = p.connect();
    let end = c.run(&p.order(&["no-such-program-here"]));
    assert_eq!(refused(&end.outcome).0, ReasonCode::NotFound);
    let end = c.run(&p.order(&["./nothing"]));
    assert_eq!(refused(&end.outcome).0, ReasonCode::NotFound);
    let end = c.run(&p.order(&["/etc/passwd"]));
    let (code, detail) = refused(&end.outcome);
    assert_eq!(code, ReasonCode::BadRequest);
    assert!(detail.contains("may not be executed"), "{detail}");
    let o = p.sh("printf junk > it; chmod 755 it");
    assert_eq!(c.run(&o).outcome, Outcome::Exited(0));
    let (code, detail) = refused(&c.run(&p.order(&["./it"])).outcome);
    assert_eq!(code, ReasonCode::BadRequest);
    assert!(detail.contains("format"), "{detail}");
}

#[test]
fn the_search_path_is_the_tasks_own() {
    let p = Node::new(&[]);
    let mut c = p.connect();
    let script = "mkdir bin && printf '#!/bin/sh\\nexit 42\\n' > bin/mine && chmod 755 bin/mine";
    assert_eq!(c.run(&p.sh(script)).outcome, Outcome::Exited(0));
    let mut o = p.order(&["mine"]);
    o.env = vec![("PATH".into(), "/nowhere:bin:/usr/bin".into())];
    assert_eq!(c.run(&o).outcome, Outcome::Exited(42));
}

#[test]
fn cwd_stays_inside() {
    let p = Node::new(&[]);
    let mut c = p.connect();
    assert_eq!(c.run(&p.sh("mkdir -p a/b && ln -s / out && ln -s a/b in && ln -s ../.. up")).outcome, Outcome::Exited(0));
    let run = |c: &mut Client, cwd: &str| {
        let mut o = p.sh("pwd -P");
        o.cwd = cwd.into();
        let end = c.run(&o);
        let text = String::from_utf8(p.text(o.key(), end.output_end, Stream::Stdout)).unwrap();
        (end.outcome, text.trim_end().to_owned())
    };
    let space = p.workspace().canonicalize().unwrap();
    for (cwd, at) in [("", ""), ("a/b", "/a/b"), ("in", "/a/b"), ("a/../a", "/a")] {
        assert_eq!(run(&mut c, cwd), (Outcome::Exited(0), format!("{}{at}", space.display())), "{cwd}");
    }
    assert_eq!(refused(&run(&mut c, "missing").0).0, ReasonCode::NotFound);
    for cwd in ["out", "out/tmp", "up"] {
        assert_eq!(refused(&run(&mut c, cwd).0).0, ReasonCode::PolicyDenied, "{cwd}");
    }
}

#[test]
fn stdin_arrives_whole_and_ends() {
    let p = Node::new(&[]);
    let mut c = p.connect();
    let input: Vec<u8> = (0..1_000_000u32).map(|n| (n % 251) as u8).collect();
    let mut o = p.order(&["cat"]);
    o.stdin = input.clone();
    let end = c.run(&o);
    assert_eq!(end.outcome, Outcome::Exited(0));
    assert!(p.text(o.key(), end.output_end, Stream::Stdout) == input);
    // Nobody reads it, and nothing hangs.
    let mut o = p.order(&["true"]);
    o.stdin = input;
    assert_eq!(c.run(&o).outcome, Outcome::Exited(0));
    let o = p.sh("cat; readlink /proc/self/fd/0");
    let end = c.run(&o);
    assert_eq!(p.text(o.key(), end.output_end, Stream::Stdout), b"/dev/null\n");
}

#[test]
fn environment_and_descriptors_are_exact() {
    let p = Node::new(&[]);
    let mut c = p.connect();
    let mut o = p.order(&["env"]);
    o.env = vec![("ONE".into(), "1 2".into()), ("LANG".into(), "de".into())];
    let end = c.run(&o);
    let text = String::from_utf8(p.text(o.key(), end.output_end, Stream::Stdout)).unwrap();
    let mut lines: Vec<_> = text.lines().collect();
    lines.sort_unstable();
    let home = format!("HOME={}", p.workspace().display());
    let path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    assert_eq!(lines, [home.as_str(), "LANG=de", "ONE=1 2", path, "TMPDIR=/tmp", "USER=cortex"]);
    // 3 is the folder that ls itself has open.
    let o = p.order(&["ls", "/proc/self/fd"]);
    let end = c.run(&o);
    assert_eq!(p.text(o.key(), end.output_end, Stream::Stdout), b"0\n1\n2\n3\n");
}

#[test]
fn it_runs_as_its_user_without_any_privilege() {
    let p = Node::new(&[]);
    let mut c = p.connect();
    let o = p.sh("cat /proc/self/status; echo again > /dev/stdout; umask; echo pid $$");
    let end = c.run(&o);
    assert_eq!(end.outcome, Outcome::Exited(0));
    let text = String::from_utf8(p.text(o.key(), end.output_end, Stream::Stdout)).unwrap();
    let line = |name: &str| {
        let line = text.lines().find(|l| l.starts_with(&format!("{name}:"))).unwrap_or_else(|| panic!("{name} in {text}"));
        line.split_whitespace().skip(1).map(str::to_owned).collect::<Vec<_>>()
    };
    let uid = task_uid().to_string();
    assert_eq!(line("Uid"), vec![uid.clone(); 4]);
    assert!(line("Gid").iter().all(|g| g != "0"));
    if is_root() {
        assert_eq!(line("Gid"), vec![uid; 4]);
        assert!(line("Groups").is_empty());
    }
    assert_eq!(line("NoNewPrivs"), ["1"]);
    for set in ["SigBlk", "SigIgn", "SigCgt", "CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(line(set), ["0000000000000000"], "{set}");
    }
    assert!(text.contains("again\n0022\npid 2\n"), "{text}");
}

#[test]
fn root_never_runs_a_task_as_itself() {
    if !is_root() {
        return;
    }
    let p = Node::new(&[]);
    let mut c = p.connect();
    let mut o = p.order(&["true"]);
    o.place.run_as = None;
    assert_eq!(refused(&c.run(&o).outcome).0, ReasonCode::PolicyDenied);
}

#[test]
fn an_ephemeral_workspace_goes_with_its_task() {
    let p = Node::new(&[]);
    let mut c = p.connect();
    let mut o = p.sh("mkdir -p a/b; touch a/b/c; ln -s / root");
    o.place.ephemeral = true;
    o.place.workspace = p.dir.path().join("work/once").to_str().unwrap().into();
    assert_eq!(c.run(&o).outcome, Outcome::Exited(0));
    until("it is removed", || std::fs::read_dir(p.dir.path().join("work")).unwrap().next().is_none().then_some(()));
}

/// A child in a session of its own, whose parent is gone: what a mere process group would miss.
fn escaping(mark: &str, then: &str) -> String {
    format!("(setsid setsid sleep {mark} </dev/null >/dev/null 2>&1 &) ; echo up; {then}")
}

#[test]
fn nothing_outlives_the_task() {
    let p = Node::new(&[]);
    let mut c = p.connect();
    let mark = mark();
    let o = p.sh(&escaping(&mark, &format!("while ! pgrep -f 'sleep {mark}' >/dev/null; do :; done; exit 3")));
    assert_eq!(c.run(&o).outcome, Outcome::Exited(3));
    assert_eq!(processes(&format!("sleep\0{mark}")), [] as [u32; 0]);
    // It holds the pipe, too: the end must not wait for it.
    let o = p.sh(&format!("(setsid sleep {mark} &) ; exit 4"));
    assert_eq!(c.run(&o).outcome, Outcome::Exited(4));
    assert_eq!(processes(&format!("sleep\0{mark}")), [] as [u32; 0]);
}

#[test]
fn cancel_ends_the_whole_tree() {
    // A grace that outlasts the test: that it ends at all shows that TERM was enough.
    let p = Node::new(&["--grace-ms", "600000"]);
    let mut c = p.connect();
    let mark = mark();
    let o = p.sh(&escaping(&mark, &format!("exec sleep {mark}")));
    let key = c.start(&o);
    until("two sleep", || (processes(&format!("sleep\0{mark}")).len() == 2).then_some(()));
    c.cancel(key);
    assert_eq!(c.wait_end(key).outcome, Outcome::Cancelled);
    assert_eq!(processes(&format!("sleep\0{mark}")), [] as [u32; 0]);
}

#[test]
fn a_clean_end_after_term_is_still_a_cancel() {
    let p = Node::new(&["--grace-ms", "600000"]);
    let mut c = p.connect();
    let o = p.sh("trap 'echo bye; exit 0' TERM; echo up; while :; do sleep 0.01; done");
    let key = c.start(&o);
    c.wait_output(key, 1);
    c.cancel(key);
    let end = c.wait_end(key);
    assert_eq!(end.outcome, Outcome::Cancelled);
    assert_eq!(p.text(key, end.output_end, Stream::Stdout), b"up\nbye\n");
    // The end is known: the cancel changes nothing and is answered with it.
    let o = p.order(&["true"]);
    assert_eq!(c.run(&o).outcome, Outcome::Exited(0));
    c.cancel(o.key());
    assert_eq!(c.wait_end(o.key()).outcome, Outcome::Exited(0));
}

#[test]
fn who_ignores_term_is_killed_after_the_grace() {
    let p = Node::new(&["--grace-ms", "300"]);
    let mut c = p.connect();
    let o = p.sh("trap '' TERM; echo up; while :; do sleep 0.01; done");
    let key = c.start(&o);
    c.wait_output(key, 1);
    let begun = Instant::now();
    c.cancel(key);
    assert_eq!(c.wait_end(key).outcome, Outcome::Cancelled);
    assert!(begun.elapsed() >= Duration::from_millis(300));
}

#[test]
fn a_time_out_ends_the_whole_tree() {
    let p = Node::new(&["--grace-ms", "200"]);
    let mut c = p.connect();
    let mark = mark();
    let mut o = p.sh(&escaping(&mark, "trap '' TERM; while :; do sleep 0.01; done"));
    o.timeout_secs = 1;
    let begun = Instant::now();
    assert_eq!(c.run(&o).outcome, Outcome::TimedOut);
    // A shell that was too slow to ignore TERM ends without the grace.
    assert!(begun.elapsed() >= Duration::from_secs(1));
    assert_eq!(processes(&format!("sleep\0{mark}")), [] as [u32; 0]);
}

#[test]
fn the_same_start_runs_once_and_another_is_a_conflict() {
    let p = Node::new(&[]);
    let file = p.open_file("count");
    let mut c = p.connect();
    let o = p.sh(&format!("echo x >> {}", file.display()));
    for _ in 0..5 {
        c.start(&o);
    }
    c.wait_end(o.key());
    c.start(&o);
    assert_eq!(c.wait_end(o.key()).outcome, Outcome::Exited(0));
    let mut other = p.sh("true");
    other.task = o.task;
    c.start(&other);
    while c.conflicts.is_empty() {
        assert!(c.step(), "the warden hung up");
    }
    assert_eq!(c.conflicts, [o.key()]);
    assert_eq!(std::fs::read_to_string(file).unwrap(), "x\n");
}

#[test]
fn a_cancel_that_comes_first_forbids_the_start_for_good() {
    let mut p = Node::new(&[]);
    let file = p.open_file("count");
    let o = p.sh(&format!("echo x >> {}", file.display()));
    let never = Outcome::NeverStarted(NeverStarted::Cancelled);
    {
        let mut c = p.connect();
        c.cancel(o.key());
        assert_eq!(c.wait_end(o.key()).outcome, never);
        assert_eq!(c.run(&o).outcome, never);
    }
    p.kill();
    p.start();
    let mut c = p.connect();
    assert_eq!(c.run(&o).outcome, never);
    // In one write: the start is noted, not yet made.
    let o = p.sh(&format!("echo x >> {}; sleep 4000", file.display()));
    let mut both = Request::Start { grant: o.grant() }.encode();
    both.extend(Request::Cancel { task: o.task, attempt: o.key().1 }.encode());
    std::io::Write::write_all(&mut c.stream, &both).unwrap();
    assert_eq!(c.wait_end(o.key()).outcome, never);
    assert_eq!(std::fs::read_to_string(file).unwrap(), "");
}
