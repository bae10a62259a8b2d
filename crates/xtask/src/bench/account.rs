//! What processes have used, from `/proc`.

use anyhow::{Context, Result};
use std::fmt::Display;

/// CPU seconds.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cpu {
    pub own: f64,
    /// Of children that have ended and were waited for, and of theirs.
    pub children: f64,
}

impl Cpu {
    pub fn since(&self, earlier: &Self) -> Self {
        Self { own: self.own - earlier.own, children: self.children - earlier.children }
    }
}

fn read(path: &str) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| path.to_owned())
}

fn ticks(n: u64) -> f64 {
    n as f64 / rustix::param::clock_ticks_per_second() as f64
}

/// `pid` is a number or `self`. To 10 ms: enough for a phase of seconds.
pub fn of_process(pid: impl Display) -> Result<Cpu> {
    parse_stat(&read(&format!("/proc/{pid}/stat"))?).with_context(|| format!("/proc/{pid}/stat"))
}

fn parse_stat(text: &str) -> Option<Cpu> {
    // The name may hold anything, also a bracket; the fields follow the last one.
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
    let field = |n: usize| fields.get(n - 3)?.parse::<u64>().ok();
    Some(Cpu { own: ticks(field(14)? + field(15)?), children: ticks(field(16)? + field(17)?) })
}

/// Busy CPU seconds of the whole machine: shows neighbours too.
pub fn of_machine() -> Result<f64> {
    parse_machine(&read("/proc/stat")?).context("/proc/stat")
}

fn parse_machine(text: &str) -> Option<f64> {
    let fields: Vec<u64> = text.lines().next()?.split_whitespace().skip(1).map_while(|f| f.parse().ok()).collect();
    // user nice system idle iowait irq softirq steal; guest time is part of user.
    let [user, nice, system, _idle, _iowait, irq, softirq, ..] = fields[..] else { return None };
    Some(ticks(user + nice + system + irq + softirq))
}

/// Resident memory in MiB.
pub fn resident(pid: u32) -> Result<f64> {
    let text = read(&format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|l| l.strip_prefix("VmRSS:")).context("VmRSS")?;
    let kib: f64 = line.trim().trim_end_matches("kB").trim().parse().context("VmRSS")?;
    Ok(kib / 1024.0)
}

/// The process that was started with these arguments after its program's name.
pub fn find(arguments: &[&str]) -> Result<Option<u32>> {
    for entry in std::fs::read_dir("/proc").context("/proc")?.flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else { continue };
        let Ok(line) = std::fs::read(entry.path().join("cmdline")) else { continue };
        let words: Vec<_> = line.split(|b| *b == 0).skip(1).collect();
        if arguments.iter().enumerate().all(|(i, a)| words.get(i) == Some(&a.as_bytes())) {
            return Ok(Some(pid));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_lines() {
        let tick = ticks(1);
        let cpu = parse_stat("7 (a) b (c) S 1 2 3 4 5 6 7 8 9 10 100 20 30 4 20 0").unwrap();
        assert!((cpu.own - 120.0 * tick).abs() < 1e-9 && (cpu.children - 34.0 * tick).abs() < 1e-9, "{cpu:?}");
        assert!(parse_stat("7 (a) S 1").is_none());
        let busy = parse_machine("cpu  10 1 20 500 9 2 3 0 5 0\ncpu0 1 1\n").unwrap();
        assert!((busy - 36.0 * tick).abs() < 1e-9, "{busy}");
    }
}
