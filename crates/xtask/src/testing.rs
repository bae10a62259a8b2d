//! All tests, and a second look at the few that failed.
//!
//! Tests here use real clocks, real servers and real processes, and share the machine with each other. One
//! that fails is run once more, alone: passing then, it is named *unsteady* in the summary and does not
//! end the run; see docs/decisions/0027. More than [`SECOND_LOOKS`] failures are no accident and end it.

#![expect(clippy::disallowed_methods, reason = "a chore starts the tests")]

use anyhow::{Context, Result, ensure};
use cargo_metadata::Message;
use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// So many tests of a run are looked at again.
const SECOND_LOOKS: usize = 3;

/// One program of tests.
struct Program {
    /// As `hub-store redis`.
    name: String,
    path: PathBuf,
    /// Where cargo would run it.
    folder: PathBuf,
}

/// A test that failed; no name where its program ended without naming one.
type Failure<'a> = (&'a Program, Option<String>);

/// False when a test failed twice, or too many did once.
pub fn run(root: &Path) -> Result<bool> {
    let programs = build(root)?;
    let mut failures = vec![];
    for program in &programs {
        println!("\n     Running {} ({})", program.name, program.path.display());
        for name in program.run(&[])? {
            failures.push((program, name));
        }
    }
    let documented = cargo(root).args(["test", "--workspace", "--locked", "--doc", "-q"]).status()?.success();
    ensure!(documented, "the examples in the documentation failed");
    second_look(&failures)
}

fn second_look(failures: &[Failure]) -> Result<bool> {
    let named = |(program, test): &Failure| format!("{}: {}", program.name, test.as_deref().unwrap_or("the whole program"));
    if failures.len() > SECOND_LOOKS {
        println!("\nfailing tests: {}", failures.len());
        failures.iter().for_each(|f| println!("  {}", named(f)));
        return Ok(false);
    }
    let mut failed_twice = vec![];
    for failure @ (program, test) in failures {
        println!("\n      Once more, alone: {}", named(failure));
        let again = match test {
            Some(test) => program.run(&["--exact", test])?,
            None => program.run(&[])?,
        };
        if !again.is_empty() {
            failed_twice.push(named(failure));
        }
    }
    failures
        .iter()
        .map(named)
        .filter(|f| !failed_twice.contains(f))
        .for_each(|f| println!("\nUNSTEADY (failed among the others, passed alone): {f}"));
    failed_twice.iter().for_each(|f| println!("\nfailed twice: {f}"));
    Ok(failed_twice.is_empty())
}

fn cargo(root: &Path) -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(root);
    cargo
}

fn build(root: &Path) -> Result<Vec<Program>> {
    let mut building = cargo(root)
        .args(["test", "--workspace", "--locked", "--no-run", "--message-format=json-render-diagnostics"])
        .stdout(Stdio::piped())
        .spawn()
        .context("cargo does not start")?;
    let told = building.stdout.take().expect("it was asked for");
    let mut programs = vec![];
    for message in Message::parse_stream(BufReader::new(told)) {
        let Message::CompilerArtifact(made) = message? else { continue };
        let (true, Some(path)) = (made.profile.test, made.executable) else { continue };
        let folder = made.manifest_path.parent().context("a manifest lies in a folder")?.into();
        let package = made.manifest_path.parent().and_then(|p| p.file_name()).unwrap_or_default();
        programs.push(Program { name: format!("{package} {}", made.target.name), path: path.into(), folder });
    }
    ensure!(building.wait()?.success(), "the tests do not build");
    ensure!(!programs.is_empty(), "cargo named no program of tests");
    // Quick ones first: what is wrong at the bottom is told early.
    programs.sort_by_key(|p| (p.folder.ends_with("tests"), p.name.clone()));
    Ok(programs)
}

impl Program {
    /// Shows what it prints; the names of what failed.
    fn run(&self, args: &[&str]) -> Result<BTreeSet<Option<String>>> {
        let mut running = Command::new(&self.path)
            .args(args)
            .current_dir(&self.folder)
            .env("CARGO_MANIFEST_DIR", &self.folder)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("{} does not start", self.path.display()))?;
        let mut told = BufReader::new(running.stdout.take().expect("it was asked for"));
        let (mut failed, mut line) = (BTreeSet::new(), vec![]);
        while told.read_until(b'\n', &mut line)? > 0 {
            std::io::stdout().write_all(&line)?;
            failed.extend(failed_test(&String::from_utf8_lossy(&line)).map(|name| Some(name.to_owned())));
            line.clear();
        }
        let code = running.wait()?;
        if !code.success() && failed.is_empty() {
            println!("{} ended with {code}", self.name);
            failed.insert(None);
        }
        Ok(failed)
    }
}

fn failed_test(line: &str) -> Option<&str> {
    line.strip_prefix("test ")?.trim_end().strip_suffix(" ... FAILED").map(|name| name.trim_end_matches(" - should panic"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_read_from_what_tests_print() {
        assert_eq!(failed_test("test bus::holes ... FAILED\n"), Some("bus::holes"));
        assert_eq!(failed_test("test bus::holes - should panic ... FAILED\n"), Some("bus::holes"));
        assert_eq!(failed_test("test bus::holes ... ok\n"), None);
        assert_eq!(failed_test("test result: FAILED. 1 passed\n"), None);
    }

    /// A shell script that stands for a program of tests.
    fn program(folder: &Path, script: &str) -> Program {
        use std::os::unix::fs::PermissionsExt;
        let path = folder.join("program");
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        Program { name: "a program".into(), path, folder: folder.into() }
    }

    fn outcome(script: &str) -> bool {
        let folder = tempfile::tempdir().unwrap();
        let program = program(folder.path(), script);
        let failures: Vec<_> = program.run(&[]).unwrap().into_iter().map(|name| (&program, name)).collect();
        second_look(&failures).unwrap()
    }

    #[test]
    fn one_that_fails_twice_fails_and_one_that_fails_once_does_not() {
        assert!(outcome("echo 'test one ... ok'"));
        assert!(!outcome("echo 'test one ... FAILED'; exit 101"));
        assert!(outcome(r#"[ "$2" = one ] && exit 0; echo 'test one ... FAILED'; exit 101"#));
        assert!(!outcome(r#"[ $# = 2 ] && exit 0; for t in a b c d; do echo "test $t ... FAILED"; done; exit 101"#), "too many");
        assert!(!outcome("exit 134"), "a program that ends without a word");
    }
}
