//! Starts `/bin/true` many times through a warden that already runs, or plainly, and prints the rate:
//! `rate DATA_DIR COUNT IN_FLIGHT`, `rate plain COUNT THREADS`.
#![allow(clippy::disallowed_methods, reason = "the plain way is the measure")]

use mesh_core::policy::{Asked, Machine, Place, judge};
use mesh_core::spec::{Program, Shell, Spec};
use mesh_core::task::{AttemptNo, Outcome};
use mesh_core::{TaskId, UserId};
use node_warden::frames::{Decoder, Event, Request, VERSION};
use std::io::{Read, Write};
use std::path::Path;
use std::time::Instant;

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let (place, count, width) = (&args[1], args[2].parse::<u64>().unwrap(), args[3].parse::<u64>().unwrap());
    let begun = Instant::now();
    if place == "plain" {
        std::thread::scope(|s| {
            for _ in 0..width {
                s.spawn(|| {
                    for _ in 0..count / width {
                        assert!(std::process::Command::new("/bin/true").env_clear().output().unwrap().status.success());
                    }
                });
            }
        });
    } else {
        through_warden(Path::new(place), count, width);
    }
    println!("{:.0} a second", count as f64 / begun.elapsed().as_secs_f64());
}

fn through_warden(data: &Path, count: u64, width: u64) {
    let mut stream = std::os::unix::net::UnixStream::connect(node_warden::socket_path(data)).unwrap();
    stream.write_all(&Request::Hello { version: VERSION }.encode()).unwrap();
    let (mut decoder, mut buffer) = (Decoder::<Event>::new(), vec![0; 65536]);
    let spec = Spec::Shell(Shell {
        program: Program::Argv(vec!["/bin/true".into()]),
        cwd: String::new(),
        env: Default::default(),
        stdin: vec![],
        stdin_open: false,
    });
    let workspace = data.parent().unwrap().join("rate-space").to_str().unwrap().to_owned();
    let place = Place { workspace, run_as: rustix::process::geteuid().is_root().then_some(65534), ephemeral: false };
    let stamp = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64;
    let (mut sent, mut done) = (0, 0);
    while done < count {
        let mut out = vec![];
        while sent < count && sent - done < width {
            sent += 1;
            let mut id = [0; 16];
            id[..8].copy_from_slice(&stamp.to_be_bytes());
            id[8..].copy_from_slice(&sent.to_be_bytes());
            let task = TaskId::from_bytes(id);
            let asked =
                Asked { task, attempt: AttemptNo(1), user: UserId::from_bytes([1; 16]), spec: &spec, digest: [0; 32], timeout_secs: 0 };
            out.extend(Request::Start { grant: judge(&asked, place.clone(), &Machine::OPEN).unwrap() }.encode());
        }
        stream.write_all(&out).unwrap();
        let n = stream.read(&mut buffer).unwrap();
        assert!(n > 0, "the warden hung up");
        decoder.push(&buffer[..n]);
        let mut forget = vec![];
        while let Some(event) = decoder.pop().unwrap() {
            if let Event::Ended { task, attempt, outcome, .. } = event {
                assert_eq!(outcome, Outcome::Exited(0));
                forget.extend(Request::Forget { task, attempt }.encode());
                done += 1;
            }
        }
        stream.write_all(&forget).unwrap();
    }
}
