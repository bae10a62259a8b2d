//! `policy`, `disable`, `enable`: what the machine's owner says, with or without a hub. A daemon that runs
//! sees the files by itself.

use super::{Error, Form, Shown, io};
use crate::ceiling::{self, MAX_BYTES};
use crate::daemon::DaemonError;
use crate::state::DataDir;
use mesh_core::ceiling::Closed;
use mesh_process::config::BadSetting;
use mesh_process::{Clock as _, SystemClock};
use mesh_wire::convert::rfc3339;
use std::io::Read;
use std::process::ExitCode;

#[derive(clap::Subcommand)]
pub(super) enum Policy {
    /// Show the ceiling that holds now
    Show(Shown),
    /// Check a ceiling and put it in place of the present one
    Set {
        /// The ceiling (YAML), or - for standard input
        #[arg(value_name = "FILE")]
        file: String,
    },
}

/// A folder that is not there is more likely a wrong one than a node to come.
fn there(dir: &DataDir) -> Result<(), Error> {
    if dir.path().is_dir() { Ok(()) } else { Err(DaemonError::NotEnrolled(dir.path().to_path_buf()).into()) }
}

pub(super) fn policy(dir: &DataDir, command: &Policy) -> Result<ExitCode, Error> {
    there(dir)?;
    match command {
        Policy::Show(shown) => show(dir, shown.output)?,
        Policy::Set { file } => set(dir, file)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn show(dir: &DataDir, form: Form) -> Result<(), Error> {
    let (file, _) = ceiling::load(dir)?;
    let text = file.as_deref().unwrap_or(ceiling::DEFAULT);
    if form == Form::Json {
        let value: serde_json::Value = serde_saphyr::from_str(text).unwrap_or_default();
        let source = if file.is_some() { "file" } else { "default" };
        let all = serde_json::json!({"file": dir.ceiling(), "source": source, "disabled": ceiling::is_disabled(dir), "ceiling": value});
        println!("{}", serde_json::to_string_pretty(&all).unwrap_or_default());
        return Ok(());
    }
    print!("{text}");
    if file.is_none() {
        eprintln!("{} is not there: this holds", dir.ceiling().display());
    }
    if ceiling::is_disabled(dir) {
        eprintln!("this node is disabled: it takes no tasks at all until `cortex-node enable`");
    }
    Ok(())
}

fn set(dir: &DataDir, file: &str) -> Result<(), Error> {
    let (place, mut text) = (if file == "-" { "standard input" } else { file }, String::new());
    let read = if file == "-" {
        std::io::stdin().take(MAX_BYTES + 1).read_to_string(&mut text)
    } else {
        std::fs::File::open(file).and_then(|f| f.take(MAX_BYTES + 1).read_to_string(&mut text))
    };
    read.map_err(|e| BadSetting::new(place, "(file)", e))?;
    if text.len() as u64 > MAX_BYTES {
        return Err(BadSetting::new(place, "(file)", format!("is longer than {MAX_BYTES} bytes")).into());
    }
    ceiling::parse(place, &text)?;
    ceiling::store(dir, &text).map_err(io(dir.ceiling().display().to_string()))?;
    println!("set: {} counts from the next task on", dir.ceiling().display());
    Ok(())
}

pub(super) fn disable(dir: &DataDir) -> Result<ExitCode, Error> {
    there(dir)?;
    let fresh = ceiling::disable(dir, &rfc3339(SystemClock::new().now_ms())).map_err(io(dir.disabled().display().to_string()))?;
    let was = if fresh { "disabled" } else { "disabled already" };
    println!("{was}: this node takes no more tasks until `cortex-node enable`; what runs goes on, and `cortex-node stop` ends it");
    Ok(ExitCode::SUCCESS)
}

pub(super) fn enable(dir: &DataDir) -> Result<ExitCode, Error> {
    there(dir)?;
    let was = if ceiling::enable(dir).map_err(io(dir.disabled().display().to_string()))? { "enabled" } else { "enabled already" };
    match ceiling::load(dir) {
        Ok(_) => println!("{was}: this node takes tasks"),
        Err(e) => println!("{was}, and yet no task is taken ({}) until the ceiling is mended: {e}", Closed::CeilingUnreadable.as_str()),
    }
    Ok(ExitCode::SUCCESS)
}

/// What a join leaves behind for the owner, and says.
pub(super) fn make(dir: &DataDir) {
    let path = dir.ceiling();
    match ceiling::make(dir) {
        Ok(true) => println!(
            "ceiling: tasks have the full network of this machine until the egress proxy is built; what no hub can exceed stands in {}",
            path.display()
        ),
        Ok(false) => println!("ceiling: {} was there and holds", path.display()),
        // What would stand in it holds without it too.
        Err(error) => tracing::warn!(%error, file = %path.display(), "the ceiling cannot be written"),
    }
}
