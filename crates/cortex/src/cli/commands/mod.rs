//! One file per noun. [`perform`] decides which one it is.

mod agent;
mod audit;
mod connect;
mod device;
mod doctor;
mod fan;
mod grant;
mod input;
mod key;
mod login;
mod mcp;
mod node;
pub mod run;
mod session;
mod task;
mod top;
mod user;

use super::args::{Cli, Command, Format};
use super::config::{Environment, Settings};
use super::{Fail, Io, report};
use crate::{Client, Error};
use mesh_process::{Clock as _, SystemClock};
use std::time::Duration;

/// How long the end of the program waits for a log-in that is being renewed.
const SETTLE: Duration = Duration::from_secs(5);

/// What every command is given.
pub(crate) struct Context<'a, 'b> {
    pub settings: &'a Settings,
    pub client: Client,
    pub io: &'a mut Io<'b>,
    pub now_ms: i64,
}

impl Context<'_, '_> {
    fn format(&self) -> Format {
        self.settings.format
    }
    /// A note in the table form alone: programs read documents.
    fn tell(&mut self, text: &str) {
        if self.format() == Format::Table {
            self.io.note(text);
        }
    }
}

/// Does what the command line says; gives the exit code.
pub async fn perform(cli: Cli, io: &mut Io<'_>) -> u8 {
    // What is not built is refused before anything else is looked at.
    if let Some(sentence) = not_yet(&cli.command) {
        return report(io, &Fail::Usage(format!("not yet: {sentence}")), false);
    }
    let settings =
        Environment::read().map_err(|e| Error::Setting(e.to_string())).and_then(|environment| Settings::resolve(&cli.global, environment));
    if let Command::Doctor = cli.command {
        return doctor::command(settings, cli.global.output, io).await;
    }
    let (settings, client) = match settings.and_then(|s| s.client().map(|c| (s, c))) {
        Ok(both) => both,
        Err(e) => return report(io, &Fail::Hub(e), false),
    };
    let with_key = settings.uses_api_key();
    let renewing = client.clone();
    let mut context = Context { settings: &settings, client, io, now_ms: SystemClock::new().now_ms() };
    let done = match cli.command {
        Command::Run(args) => {
            let code = run::command(*args, context).await;
            renewing.settle(SETTLE).await;
            return code;
        }
        Command::Login(args) => login::login(args, &mut context).await,
        Command::Logout => login::logout(&mut context).await,
        Command::Whoami => login::whoami(&mut context).await,
        Command::Node(command) => node::perform(command, &mut context).await,
        Command::Agent(command) => agent::perform(command, &mut context).await,
        Command::Session(command) => session::perform(command, &mut context).await,
        Command::Task(command) => task::perform(command, &mut context).await,
        Command::User(command) => user::perform(command, &mut context).await,
        Command::Audit(command) => audit::perform(command, &mut context).await,
        Command::Key(command) => key::perform(command, &mut context).await,
        Command::Grant(command) => grant::perform(command, &mut context).await,
        Command::Device(command) => device::perform(command, &mut context).await,
        Command::Connect(args) => connect::perform(args, &mut context).await,
        Command::Mcp => mcp::perform(&mut context).await,
        Command::Doctor | Command::Later(_) => Ok(()),
    };
    renewing.settle(SETTLE).await;
    match done {
        Ok(()) => 0,
        Err(fail) => report(io, &fail, with_key),
    }
}

fn not_yet(command: &Command) -> Option<&'static str> {
    match command {
        Command::Later(later) => Some(later.sentence()),
        _ => None,
    }
}

/// True for `prefix_` and a UUID, whatever it names.
fn is_id(text: &str, prefix: &str) -> bool {
    let Some(uuid) = text.strip_prefix(prefix) else { return false };
    uuid.len() == 36 && uuid.bytes().enumerate().all(|(i, b)| if matches!(i, 8 | 13 | 18 | 23) { b == b'-' } else { b.is_ascii_hexdigit() })
}

/// The one thing that has a name. Of several, those that are `alive` count; among several of them
/// nobody should have to guess.
fn pick<'t, T>(
    kind: &str,
    name: &str,
    items: &'t [T],
    facts: impl Fn(&T) -> (&str, &str),
    alive: impl Fn(&T) -> bool,
) -> Result<&'t T, Fail> {
    let named: Vec<&T> = items.iter().filter(|i| facts(i).1 == name).collect();
    let living: Vec<&T> = named.iter().copied().filter(|i| alive(i)).collect();
    match (&living[..], &named[..]) {
        ([one], _) | ([], [one]) => Ok(one),
        ([], []) => Err(Fail::Failed(format!("there is no {kind} {name:?}; see what there is with: cortex {kind} ls"))),
        (several, all) => {
            let several = if several.is_empty() { all } else { several };
            let ids: Vec<_> = several.iter().map(|i| facts(i).0).collect();
            Err(Fail::Failed(format!("several are named {name:?}; give the id of one: {}", ids.join(", "))))
        }
    }
}

/// The id of a session that is given by id or name.
async fn session_id(client: &Client, text: &str) -> Result<String, Fail> {
    if is_id(text, "sess_") {
        return Ok(text.to_owned());
    }
    let sessions = client.sessions().await?;
    Ok(pick("session", text, &sessions, |s| (&s.id, &s.name), |s| s.status == "active")?.id.clone())
}

/// The id of a node that is given by id or name.
async fn node_id(client: &Client, text: &str) -> Result<String, Fail> {
    if is_id(text, "node_") {
        return Ok(text.to_owned());
    }
    let nodes = client.nodes().await?;
    Ok(pick("node", text, &nodes, |n| (&n.id, &n.name), |n| n.status != "revoked")?.id.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids() {
        assert!(is_id("node_0190b2a4-7c1e-7000-8000-0123456789ab", "node_"));
        for no in ["node_", "node_1", "sess_0190b2a4-7c1e-7000-8000-0123456789ab", "node_0190b2a4x7c1e-7000-8000-0123456789ab"] {
            assert!(!is_id(no, "node_"), "{no}");
        }
    }

    #[test]
    fn names() {
        let all = [("1", "a", true), ("2", "b", true), ("3", "b", false), ("4", "c", true), ("5", "c", true), ("6", "d", false)];
        let check = |name: &str, expect: Result<&str, &str>| match (pick("node", name, &all, |t| (t.0, t.1), |t| t.2), expect) {
            (Ok(t), Ok(id)) => assert_eq!(t.0, id),
            (Err(Fail::Failed(text)), Err(part)) => assert!(text.contains(part), "{text}"),
            (got, want) => panic!("{got:?}, not {want:?}"),
        };
        check("a", Ok("1"));
        check("b", Ok("2"));
        check("c", Err("4, 5"));
        check("d", Ok("6"));
        check("e", Err("cortex node ls"));
    }
}
