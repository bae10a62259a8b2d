//! Live input: each piece once and in order, bounded, and remembered while the daemon is away.
#![allow(clippy::disallowed_methods, reason = "these tests are about processes and real time")]

mod common;

use common::*;
use mesh_core::input::{Fate, MAX_PIECE_BYTES, MAX_WAITING_BYTES};
use mesh_core::task::Outcome;
use node_warden::frames::{Event, Request, VERSION};
use node_warden::spool::Stream;
use std::io::{Read, Write};

#[test]
fn pieces_reach_the_task_in_order_and_once() {
    let p = Node::new(&[]);
    let mut c = p.connect();
    let mut o = p.order(&["cat"]).open();
    o.stdin = b"given,".to_vec();
    let key = c.start(&o);
    c.wait_started(key);
    assert_eq!(c.input(key, 2, b"early,", false), (Fate::Gap, 0));
    assert_eq!(c.input(key, 1, b"one,", false), (Fate::Taken, 1));
    // It is read while the task runs, not at its end.
    let (end, _) = c.wait_output(key, 1);
    assert!(p.text(key, end, Stream::Stdout).starts_with(b"given,"));
    assert_eq!(c.input(key, 1, b"other bytes under the same number,", false), (Fate::Taken, 1));
    assert_eq!(c.input(key, 3, b"three,", false), (Fate::Gap, 1));
    assert_eq!(c.input(key, 2, b"two,", false), (Fate::Taken, 2));
    assert_eq!(c.input(key, 3, b"three", true), (Fate::Taken, 3));
    let end = c.wait_end(key);
    assert_eq!(end.outcome, Outcome::Exited(0));
    assert_eq!(p.text(key, end.output_end, Stream::Stdout), b"given,one,two,three");
    assert_eq!(c.input(key, 4, b"late", false).0, Fate::Ended);
}

#[test]
fn an_end_closes_and_says_so_again() {
    let p = Node::new(&[]);
    let mut c = p.connect();
    // It goes on after its input has ended.
    let key = c.start(&p.sh("cat; echo over; exec sleep 600").open());
    c.wait_started(key);
    assert_eq!(c.input(key, 1, b"", true), (Fate::Taken, 1));
    c.wait_output(key, 1);
    assert_eq!(c.input(key, 1, b"", true), (Fate::Taken, 1));
    assert_eq!(c.input(key, 2, b"x", false), (Fate::Closed, 1));
    assert_eq!(c.input(key, 7, b"x", false), (Fate::Closed, 1));
    c.cancel(key);
    c.wait_end(key);
}

#[test]
fn a_task_that_does_not_read_costs_nobody_else() {
    let p = Node::new(&[]);
    let mut c = p.connect();
    let go = p.open_file("go");
    let script = format!("until [ -s {} ]; do sleep 0.01; done; cat | sha256sum", go.display());
    let key = c.start(&p.sh(&script).open());
    c.wait_started(key);
    let mut sent = vec![];
    let mut seq = 0;
    let piece = |seq: u64| vec![seq as u8; MAX_PIECE_BYTES];
    loop {
        let piece = piece(seq);
        match c.input(key, seq + 1, &piece, false) {
            (Fate::Taken, n) => {
                seq += 1;
                assert_eq!(n, seq);
                sent.extend(piece);
            }
            answer => {
                assert_eq!(answer, (Fate::Full, seq));
                break;
            }
        }
        // The bound, and what the kernel's pipe holds besides.
        assert!(sent.len() <= MAX_WAITING_BYTES + (1 << 20), "nothing stops it");
    }
    assert!(sent.len() >= MAX_WAITING_BYTES);
    // The loop is not held up: others start, take input and end meanwhile.
    let other = c.start(&p.order(&["cat"]).open());
    c.wait_started(other);
    assert_eq!(c.input(other, 1, b"beside", true), (Fate::Taken, 1));
    assert_eq!(c.wait_end(other).outcome, Outcome::Exited(0));
    // As large as before: how much of the last piece the pipe took is the machine's business.
    assert_eq!(c.input(key, seq + 1, &piece(seq), false), (Fate::Full, seq));
    // Once it reads, the same number is taken, and nothing was lost or doubled.
    std::fs::write(&go, "go").unwrap();
    until("there is room again", || (c.input(key, seq + 1, b"last", false).0 == Fate::Taken).then_some(()));
    sent.extend(b"last");
    assert_eq!(c.input(key, seq + 2, b"", true), (Fate::Taken, seq + 2));
    let end = c.wait_end(key);
    let hex: String = mesh_core::sha256(&sent).iter().map(|b| format!("{b:02x}")).collect();
    let text = String::from_utf8(p.text(key, end.output_end, Stream::Stdout)).unwrap();
    assert!(text.starts_with(&hex), "{text} is not of {} bytes", sent.len());
}

#[test]
fn a_task_that_closes_its_input_is_told_from_one_that_never_had_any() {
    let p = Node::new(&[]);
    let mut c = p.connect();
    let closed = c.start(&p.sh("exec <&-; echo closed; exec sleep 600").open());
    // The word of its start comes after init has let go of its own copy.
    c.wait_started(closed);
    c.wait_output(closed, 1);
    assert_eq!(c.input(closed, 1, b"x", false), (Fate::Closed, 0));
    assert_eq!(c.input(closed, 1, b"x", false), (Fate::Closed, 0));
    let without = c.start(&p.sh("readlink /proc/self/fd/0; exec sleep 600"));
    let (end, _) = c.wait_output(without, 1);
    assert_eq!(p.text(without, end, Stream::Stdout), b"/dev/null\n", "as before");
    assert_eq!(c.input(without, 1, b"x", false), (Fate::NoInput, 0));
    let unknown = p.order(&["true"]).key();
    assert_eq!(c.input(unknown, 1, b"x", false), (Fate::NotRunning, 0));
    assert!(c.ends.is_empty());
    for key in [closed, without] {
        c.cancel(key);
        c.wait_end(key);
    }
}

#[test]
fn a_new_daemon_repeats_what_it_is_not_sure_of() {
    let p = Node::new(&[]);
    let key = {
        let mut c = p.connect();
        let key = c.start(&p.order(&["cat"]).open());
        c.wait_started(key);
        assert_eq!(c.input(key, 1, b"one,", false), (Fate::Taken, 1));
        // The daemon dies without hearing the answer.
        let (task, attempt) = key;
        c.send(&Request::Input { task, attempt, request: 99, seq: 2, data: b"two,".to_vec(), eof: false });
        c.wait_output(key, 1);
        key
    };
    let mut c = p.connect();
    assert_eq!(c.input(key, 2, b"two,", false), (Fate::Taken, 2));
    assert_eq!(c.input(key, 1, b"one,", false), (Fate::Taken, 2));
    assert_eq!(c.input(key, 3, b"three", true), (Fate::Taken, 3));
    let end = c.wait_end(key);
    assert_eq!(p.text(key, end.output_end, Stream::Stdout), b"one,two,three");
    assert!(c.answers.is_empty(), "an answer goes to who asked: {:?}", c.answers);
}

#[test]
fn a_daemon_of_before_live_input_is_served_as_before() {
    let p = Node::new(&[]);
    drop(p.connect());
    let mut old = std::os::unix::net::UnixStream::connect(node_warden::socket_path(&p.data())).unwrap();
    old.set_read_timeout(Some(PATIENCE)).unwrap();
    for (said, answered) in [(1, 1), (VERSION + 7, VERSION)] {
        old.write_all(&Request::Hello { version: said }.encode()).unwrap();
        let mut head = [0; 4];
        old.read_exact(&mut head).unwrap();
        let mut body = vec![0; u32::from_be_bytes(head) as usize];
        old.read_exact(&mut body).unwrap();
        let welcome = <Event as node_warden::frames::Message>::decode(&body).unwrap();
        assert!(matches!(welcome, Event::Welcome { version, .. } if version == answered), "{welcome:?}");
    }
}
