//! How many times each process forces data to disk, counted by strace.

use super::mesh::Mesh;
use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

const CALLS: [&str; 2] = ["fdatasync", "fsync"];

#[derive(Debug, Serialize)]
pub struct Count {
    pub process: &'static str,
    pub fdatasync: u64,
    pub fsync: u64,
}

/// Before anything is started.
pub fn check() -> Result<()> {
    let found = Command::new("strace").arg("-V").stdout(Stdio::null()).stderr(Stdio::null()).status();
    ensure!(found.is_ok_and(|s| s.success()), "--syncs needs strace; install it: apt-get install strace");
    Ok(())
}

/// strace on one process, from when it is attached until it is asked for its summary.
struct Tracer {
    process: &'static str,
    child: Child,
    summary: PathBuf,
}

impl Tracer {
    fn attach(process: &'static str, pid: u32, folder: &std::path::Path) -> Result<Self> {
        let summary = folder.join(process);
        let mut command = Command::new("strace");
        command.args(["-f", "-c", "-e", "trace=fdatasync,fsync", "-p", &pid.to_string(), "-o"]).arg(&summary);
        let child = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().context("strace")?;
        let mut tracer = Self { process, child, summary };
        let words = tracer.child.stderr.take().context("strace has no standard error")?;
        let mut words = BufReader::new(words);
        let mut line = String::new();
        while words.read_line(&mut line)? > 0 {
            if line.contains("attached") {
                // The rest is one line for each process that comes and goes; a closed pipe would end strace.
                std::thread::spawn(move || std::io::copy(&mut words, &mut std::io::sink()));
                return Ok(tracer);
            }
        }
        bail!("strace cannot trace the {process}: {}", line.trim())
    }

    fn finish(mut self) -> Result<Count> {
        if let Some(pid) = rustix::process::Pid::from_raw(self.child.id().cast_signed()) {
            rustix::process::kill_process(pid, rustix::process::Signal::INT)?;
        }
        self.child.wait()?;
        let text = std::fs::read_to_string(&self.summary).context("strace's summary")?;
        let [fdatasync, fsync] = CALLS.map(|call| calls(&text, call));
        Ok(Count { process: self.process, fdatasync, fsync })
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        // Does nothing to one that was waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The column `calls` of a call's row; a call that was not made has none.
fn calls(summary: &str, call: &str) -> u64 {
    let row = summary.lines().map(|l| l.split_whitespace().collect::<Vec<_>>()).find(|w| w.last() == Some(&call));
    row.and_then(|w| w.get(3)?.parse().ok()).unwrap_or(0)
}

/// Counts while `work` runs.
pub async fn during(mesh: &Mesh, work: impl Future<Output = Result<()>>) -> Result<Vec<Count>> {
    let folder = tempfile::tempdir()?;
    let tracers: Result<Vec<_>> = mesh.pids.named().into_iter().map(|(name, pid)| Tracer::attach(name, pid, folder.path())).collect();
    let tracers = tracers?;
    work.await?;
    tracers.into_iter().map(Tracer::finish).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_summary() {
        let text = "% time     seconds  usecs/call     calls    errors syscall\n\
                    ------ ----------- ----------- --------- --------- ----------------\n \
                    93.51    0.001234         308         4           fdatasync\n  \
                    6.49    0.000086          86         1         1 fsync\n\
                    100.00    0.001320         264         5         1 total\n";
        assert_eq!((calls(text, "fdatasync"), calls(text, "fsync"), calls("", "fsync")), (4, 1, 0));
    }
}
