//! What this machine is and has, and how it does: told to the hub, never believed for a decision here.

use mesh_process::config::env;
use mesh_wire::node::{Capabilities, Gpu, HealthReport, Runtime, SandboxFeature};
use node_warden::{Probe, TreeKill};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use sysinfo::System;

/// Looked for on PATH. Only their presence is told: a version would need a run, and only the warden runs.
const RUNTIMES: [&str; 20] = [
    "python3",
    "node",
    "deno",
    "bun",
    "git",
    "docker",
    "podman",
    "gcc",
    "clang",
    "make",
    "cmake",
    "cargo",
    "go",
    "java",
    "ruby",
    "php",
    "perl",
    "dotnet",
    "chromium",
    "nvidia-smi",
];
const GPUS: &str = "/proc/driver/nvidia/gpus";

pub fn gather(workspace_root: &Path, probe: &Probe) -> Capabilities {
    let mut system = System::new().ok();
    if let Some(s) = &mut system {
        s.refresh_memory();
        s.refresh_cpu_list(sysinfo::CpuRefreshKind::nothing());
    }
    let system = system.as_ref();
    let uname = rustix::system::uname();
    let (disk_total, _) = disk_of(workspace_root);
    Capabilities {
        os: std::env::consts::OS.into(),
        arch: std::env::consts::ARCH.into(),
        kernel: uname.release().to_string_lossy().into_owned(),
        hostname: uname.nodename().to_string_lossy().into_owned(),
        cpu_model: system.and_then(|s| s.cpus().first()).map(|c| c.brand().trim().to_owned()).unwrap_or_default(),
        cpu_cores: std::thread::available_parallelism().map_or(1, |n| n.get() as u32),
        memory_bytes: system.map_or(0, System::total_memory),
        disk_bytes: disk_total,
        runtimes: runtimes(&env("PATH").ok().flatten().unwrap_or_default()),
        gpus: gpus(Path::new(GPUS)),
        skills: crate::skills::list(),
        sandbox: sandbox(probe),
    }
}

fn runtimes(path: &str) -> Vec<Runtime> {
    let folders: Vec<PathBuf> = path.split(':').filter(|p| p.starts_with('/')).map(PathBuf::from).collect();
    let runs = |p: PathBuf| std::fs::metadata(p).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0);
    RUNTIMES
        .iter()
        .filter(|name| folders.iter().any(|f| runs(f.join(name))))
        .map(|name| Runtime { name: (*name).into(), version: String::new() })
        .collect()
}

fn gpus(folder: &Path) -> Vec<Gpu> {
    let Ok(entries) = std::fs::read_dir(folder) else { return vec![] };
    let mut found: Vec<Gpu> = entries
        .flatten()
        .filter_map(|e| {
            let text = std::fs::read_to_string(e.path().join("information")).ok()?;
            let model = text.lines().find_map(|l| l.strip_prefix("Model:"))?.trim().to_owned();
            // The driver's text file does not tell memory.
            Some(Gpu { name: model, memory_bytes: 0 })
        })
        .collect();
    found.sort_by(|a, b| a.name.cmp(&b.name));
    found
}

fn sandbox(probe: &Probe) -> Vec<SandboxFeature> {
    let tree = match probe.tree_kill {
        TreeKill::PidNamespace => "pid namespace",
        TreeKill::UserPidNamespace => "pid namespace inside a user namespace",
        TreeKill::Cgroup => "cgroup.kill",
        TreeKill::None => "no way to end a whole tree was found; tasks are refused",
    };
    let root = rustix::process::geteuid().is_root();
    let uid = if root { "a uid per session" } else { "the node is not root: all tasks share its uid" };
    let feature = |name: &str, works: bool, detail: &str| SandboxFeature { name: name.into(), works, detail: detail.into() };
    vec![
        feature("tree_kill", probe.tree_kill != TreeKill::None, tree),
        feature("no_new_privs", probe.no_new_privs, ""),
        feature("uid", root, uid),
    ]
}

/// The layers that every task of this node gets, as `sandbox_applied` names them.
pub fn sandbox_applied(probe: &Probe) -> String {
    let mut layers = vec![];
    match probe.tree_kill {
        TreeKill::PidNamespace => layers.push("pid_namespace"),
        TreeKill::UserPidNamespace => layers.extend(["user_namespace", "pid_namespace"]),
        TreeKill::Cgroup => layers.push("cgroup"),
        TreeKill::None => {}
    }
    if probe.no_new_privs {
        layers.push("no_new_privs");
    }
    if rustix::process::geteuid().is_root() {
        layers.push("uid");
    }
    layers.join(",")
}

/// Total and free bytes of the file system that holds `path`.
pub fn disk_of(path: &Path) -> (u64, u64) {
    let real = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    rustix::fs::statvfs(&real).map_or((0, 0), |s| (s.f_blocks.saturating_mul(s.f_frsize), s.f_bavail.saturating_mul(s.f_frsize)))
}

/// Samples of how the machine does. CPU is measured between two calls.
pub struct Health {
    /// None where the machine does not tell.
    system: Option<System>,
    workspace_root: PathBuf,
}

impl Health {
    pub fn new(workspace_root: impl Into<PathBuf>) -> Self {
        let mut system = System::new().ok();
        if let Some(s) = &mut system {
            s.refresh_cpu_usage();
        }
        Self { system, workspace_root: workspace_root.into() }
    }

    pub fn sample(&mut self, running: u32) -> HealthReport {
        if let Some(s) = &mut self.system {
            s.refresh_cpu_usage();
            s.refresh_memory();
        }
        let system = self.system.as_ref();
        let (disk_total, disk_free) = disk_of(&self.workspace_root);
        HealthReport {
            cpu_percent: system.map_or(0.0, |s| f64::from(s.global_cpu_usage())),
            memory_used: system.map_or(0, System::used_memory),
            memory_total: system.map_or(0, System::total_memory),
            disk_used: disk_total.saturating_sub(disk_free),
            disk_total,
            load_1m: System::load_average().map_or(0.0, |l| l.one),
            running,
            ..HealthReport::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_can_be_executed_is_a_runtime() {
        let tmp = tempfile::tempdir().unwrap();
        for (name, mode) in [("git", 0o755), ("java", 0o644)] {
            let p = tmp.path().join(name);
            std::fs::write(&p, "").unwrap();
            std::fs::set_permissions(&p, std::fs::Permissions::from_mode(mode)).unwrap();
        }
        let found = runtimes(&format!("relative:{}", tmp.path().display()));
        assert_eq!(found, [Runtime { name: "git".into(), version: String::new() }]);
    }

    #[test]
    fn gpus_are_read_from_the_drivers_folder() {
        let tmp = tempfile::tempdir().unwrap();
        std::fs::create_dir(tmp.path().join("0000:01:00.0")).unwrap();
        std::fs::write(tmp.path().join("0000:01:00.0/information"), "Model: \t\t NVIDIA X1\nIRQ: 1\n").unwrap();
        assert_eq!(gpus(tmp.path()), [Gpu { name: "NVIDIA X1".into(), memory_bytes: 0 }]);
        assert!(gpus(&tmp.path().join("none")).is_empty());
    }

    #[test]
    fn a_real_machine_has_something() {
        let probe = Probe { tree_kill: TreeKill::PidNamespace, no_new_privs: true };
        let c = gather(Path::new("/"), &probe);
        assert!(c.memory_bytes > 0 && c.disk_bytes > 0 && c.cpu_cores > 0 && !c.kernel.is_empty());
        assert_eq!(c.skills.len(), 2);
        let h = Health::new("/").sample(3);
        assert!(h.memory_total > 0 && h.memory_used > 0 && h.disk_total > 0);
        assert_eq!(h.running, 3);
        assert!(sandbox_applied(&probe).starts_with("pid_namespace,no_new_privs"));
    }
}
