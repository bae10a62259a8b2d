//! The `cortex` command: what is written on the command line, done with [`crate::Client`].
//!
//! Not an interface for programs; those use the client or `--output json`.

pub mod args;
pub mod commands;
pub mod config;
pub mod exit;
pub mod output;

use crate::Error;
use clap::Parser as _;
use std::ffi::OsString;
use std::io::{self, Write};

/// Why a command did not do what it was asked to.
#[derive(Debug)]
pub enum Fail {
    /// Exit code 2.
    Usage(String),
    /// Exit code 1: what was wrong, and what to do next.
    Failed(String),
    Hub(Error),
    /// Whoever read our output has left: no reason to say anything.
    ReaderLeft,
}

impl From<Error> for Fail {
    fn from(e: Error) -> Self {
        Self::Hub(e)
    }
}
impl From<io::Error> for Fail {
    /// For writing output; other failures name what they are about.
    fn from(e: io::Error) -> Self {
        match e.kind() {
            io::ErrorKind::BrokenPipe => Self::ReaderLeft,
            _ => Self::Failed(format!("cannot write the output: {e}")),
        }
    }
}

/// Where a command writes.
pub struct Io<'a> {
    pub out: &'a mut dyn Write,
    pub err: &'a mut dyn Write,
}

impl Io<'_> {
    /// Tells a person something that is no result. That nobody reads it is no failure.
    pub fn note(&mut self, text: &str) {
        let _ = writeln!(self.err, "cortex: {text}");
        let _ = self.err.flush();
    }
}

/// Runs the program and gives its exit code.
pub fn main(args: impl IntoIterator<Item = OsString>) -> u8 {
    let cli = match args::Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(e) => {
            // Help and version come this way too, with code 0.
            let _ = e.print();
            return u8::try_from(e.exit_code()).unwrap_or(2);
        }
    };
    let (mut out, mut err) = (io::stdout(), io::stderr());
    let mut io = Io { out: &mut out, err: &mut err };
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => return report(&mut io, &Fail::Failed(format!("cannot start: {e}")), false),
    };
    let code = runtime.block_on(commands::perform(cli, &mut io));
    runtime.shutdown_background();
    code
}

/// Says what was wrong and what to do next, and gives the exit code.
pub(crate) fn report(io: &mut Io<'_>, fail: &Fail, with_key: bool) -> u8 {
    match fail {
        Fail::Usage(text) => {
            io.note(&output::clean(text));
            2
        }
        Fail::Failed(text) => {
            io.note(&output::clean(text));
            1
        }
        Fail::Hub(e) => {
            say_error(io, e, with_key);
            if matches!(e, Error::Setting(_)) { 2 } else { 1 }
        }
        Fail::ReaderLeft => 0,
    }
}

/// One line on what was wrong, and one on what to do where there is something.
pub(crate) fn say_error(io: &mut Io<'_>, e: &Error, with_key: bool) {
    io.note(&output::clean(&e.to_string()));
    if let Some(advice) = advice(e, with_key) {
        let _ = writeln!(io.err, "  {advice}");
    }
}

fn advice(e: &Error, with_key: bool) -> Option<String> {
    Some(match e {
        Error::Unreachable { tls: true, .. } => {
            "the hub's certificate is not trusted here: give its root in the file that SSL_CERT_FILE names (cortex-hub ca show)".into()
        }
        Error::Unreachable { .. } => "is the hub running there? another one is named with --url or CORTEX_URL".into(),
        Error::Interrupted { .. } => "what was asked for may have been done: look before asking again".into(),
        Error::Problem { problem, retry_after } => match (problem.status, problem.code.as_str()) {
            (401, _) if with_key => "the API key is wrong, ended or deleted; make one with: cortex key new NAME --scope SCOPE".into(),
            (401, _) => "log in with: cortex login".into(),
            (403, _) => "what you may do is told by: cortex whoami".into(),
            (429, _) => format!("try again in {} s", retry_after.unwrap_or(1)),
            (500.., code) if code != "not_yet" && !problem.request_id.is_empty() => {
                format!("the hub's log says more under request {}", output::clean(&problem.request_id))
            }
            _ => return None,
        },
        Error::Store(_) | Error::Setting(_) | Error::Protocol { .. } => return None,
    })
}
