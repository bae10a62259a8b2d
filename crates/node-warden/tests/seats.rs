//! Two programs, two wardens, one memory: who is started where, and which id the hub is told.
#![allow(clippy::disallowed_methods, reason = "these tests are about processes and real time")]

mod common;

use common::*;
use mesh_core::SpoolId;
use node_warden::frames::Request;
use std::path::{Path, PathBuf};

struct Machine {
    dir: tempfile::TempDir,
}

impl Machine {
    fn program(&self, name: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        if !path.exists() {
            copy_program(&example(), &path);
        }
        path
    }
    fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }
    /// Starts what must be started; gives the names of the seats in their order, and the id.
    fn launch(&self, program: &str) -> (Vec<String>, SpoolId) {
        let w = node_warden::launch_all(&self.program(program), &self.data()).unwrap();
        let name = |p: &Path| p.strip_prefix(self.data().canonicalize().unwrap()).unwrap().display().to_string();
        (w.seats.iter().map(|p| name(p)).collect(), w.spool)
    }
    fn stop(&self, seat: &str) {
        let mut c = Client::connect(&self.data().join(seat));
        c.send(&Request::Stop);
        while c.step() {}
        self.gone(seat);
    }
    fn pids(&self, seat: &str) -> Vec<u32> {
        processes(&format!("--data-dir\0{}\0", self.data().canonicalize().unwrap().join(seat).display().to_string().trim_end_matches('/')))
    }
    fn gone(&self, seat: &str) {
        until("the warden is gone", || self.pids(seat).is_empty().then_some(()));
    }
    fn kill(&self, seat: &str) {
        for pid in self.pids(seat) {
            let _ = rustix::process::kill_process(rustix::process::Pid::from_raw(pid as i32).unwrap(), rustix::process::Signal::KILL);
        }
        // Started by this process: it is collected by the next launch, and holds nothing until then.
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        for seat in ["", "w2", "w3"] {
            if self.data().join(seat).exists() {
                self.kill(seat);
            }
        }
    }
}

#[test]
fn each_program_has_its_warden_and_all_one_memory() {
    let m = Machine { dir: tempfile::tempdir().unwrap() };
    let (seats, id) = m.launch("a");
    assert_eq!(seats, [""]);
    assert_eq!(m.launch("a"), (vec!["".to_owned()], id), "the same program: the same warden");
    assert_eq!(m.launch("b"), (vec!["w2".to_owned(), "".to_owned()], id), "another program beside it, under the same id");
    assert_eq!(m.launch("b").0, ["w2", ""]);
    assert_eq!(m.launch("a").0, ["", "w2"], "and back");
    assert_eq!(m.launch("c").0, ["w3", "", "w2"]);

    // What is empty and gone is not started again, and leaves nothing behind.
    m.stop("");
    m.stop("w3");
    assert_eq!(m.launch("b"), (vec!["w2".to_owned()], id));
    assert!(!m.data().join("w3").exists());
    // The place of one that is gone is free for any program.
    assert_eq!(m.launch("c"), (vec!["".to_owned(), "w2".to_owned()], id));
}

#[test]
fn memory_is_found_where_it_lies_and_its_loss_is_told() {
    let m = Machine { dir: tempfile::tempdir().unwrap() };
    let id = m.launch("a").1;
    assert_eq!(m.launch("b").0, ["w2", ""]);
    // A refusal is something to remember.
    let (task, attempt) = (mesh_core::TaskId::from_bytes([1; 16]), mesh_core::task::AttemptNo(1));
    let mut c = Client::connect(&m.data().join("w2"));
    c.send(&Request::Cancel { task, attempt });
    while c.ends.is_empty() {
        assert!(c.step());
    }
    m.kill("w2");
    while c.step() {}
    m.stop("");
    assert_eq!(m.launch("c"), (vec!["w2".to_owned()], id), "its warden is gone, what it knew is not");
    let mut c = Client::connect(&m.data().join("w2"));
    assert_eq!((c.known.len(), c.known[0].task), (1, task));

    // Somebody takes the folder away: what was there is gone, and must not be answered as never heard of.
    c.send(&Request::Stop);
    while c.step() {}
    std::fs::remove_dir_all(m.data().join("w2")).unwrap();
    let (seats, fresh) = m.launch("c");
    assert!(seats.contains(&"w2".to_owned()) && fresh > id, "{seats:?}: {fresh} after {id}");
    // It stays so, whichever program comes.
    for seat in &seats {
        m.stop(seat);
    }
    assert_eq!(m.launch("b").1, fresh);
}
