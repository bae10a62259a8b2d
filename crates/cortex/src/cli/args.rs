//! The command line as it is written; nothing is looked up here.

use clap::{Args, Parser, Subcommand, ValueEnum};
use std::ffi::OsString;
use std::path::PathBuf;

/// Run commands on your machines, through a cortex hub.
#[derive(Debug, Parser)]
#[command(name = "cortex", version, max_term_width = 100, after_help = NOT_YET)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

const NOT_YET: &str = "Exit codes: 0 fine, 1 failed, 2 wrong usage or config (`cortex run --help` has its own).
Not yet: shell, cp, file, approval, workflow, bundle, tool, policy, events, completions.";

#[derive(Debug, Clone, Default, Args)]
pub struct Global {
    /// The hub [env: CORTEX_URL] [default: the one logged in to last, else http://127.0.0.1:8080]
    #[arg(long, global = true, value_name = "URL")]
    pub url: Option<String>,
    /// An API key instead of a log-in; other users of this machine can see arguments, so better by
    /// the environment [env: CORTEX_API_KEY]
    #[arg(long, global = true, value_name = "KEY")]
    pub api_key: Option<String>,
    /// Tables for people, or the hub's documents for programs
    #[arg(long, global = true, value_enum, default_value_t, value_name = "FORMAT")]
    pub output: Format,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    #[default]
    Table,
    Json,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Log in and keep the log-in on this machine
    Login(LoginArgs),
    /// End the log-in, here and on the hub
    Logout,
    /// Show who one is for the hub, and what one may do
    Whoami,
    /// Run a command on a machine and stream its output
    Run(Box<RunArgs>),
    /// The machines
    #[command(subcommand)]
    Node(NodeCommand),
    /// The sessions: workspaces that outlive a command
    #[command(subcommand)]
    Session(SessionCommand),
    /// What ran and what runs
    #[command(subcommand)]
    Task(TaskCommand),
    /// Processes that the hub looks after
    #[command(subcommand)]
    Agent(AgentCommand),
    /// People
    #[command(subcommand)]
    User(UserCommand),
    /// API keys for programs
    #[command(subcommand)]
    Key(KeyCommand),
    /// What is shared with others
    #[command(subcommand)]
    Grant(GrantCommand),
    /// Your log-ins, each a device
    #[command(subcommand)]
    Device(DeviceCommand),
    /// What was done, by whom and how it ended
    #[command(subcommand)]
    Audit(AuditCommand),
    /// Check the way to the hub; name the hop that fails
    Doctor,
    /// Let an agent's program use the machines: makes a key for it and prints its configuration
    Connect(ConnectArgs),
    /// Speak MCP on standard input and output, for programs that start their servers themselves
    Mcp,
    #[command(flatten)]
    Later(Later),
}

/// Takes all that follows, so that a command which is not built is refused by its name.
#[derive(Debug, Args)]
#[command(disable_help_flag = true)]
pub struct Anything {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub rest: Vec<OsString>,
}

/// Commands that the contract names and that are not built.
#[derive(Debug, Subcommand)]
pub enum Later {
    #[command(hide = true)]
    Shell(Anything),
    #[command(hide = true)]
    Cp(Anything),
    #[command(hide = true)]
    File(Anything),
    #[command(hide = true)]
    Approval(Anything),
    #[command(hide = true)]
    Workflow(Anything),
    #[command(hide = true)]
    Bundle(Anything),
    #[command(hide = true)]
    Tool(Anything),
    #[command(hide = true)]
    #[command(hide = true)]
    Policy(Anything),
    #[command(hide = true)]
    Events(Anything),
    #[command(hide = true)]
    Completions(Anything),
}

impl Later {
    /// One sentence: what is missing, and where there is one, the way round.
    pub fn sentence(&self) -> &'static str {
        match self {
            Self::Shell(_) => "`cortex shell` is not built; run one command at a time with: cortex run -- ARGV...",
            Self::Cp(_) => "`cortex cp` is not built; small input can be sent with: cortex run --stdin",
            Self::File(_) => "`cortex file` is not built; sessions have no synced files yet.",
            Self::Approval(_) => "`cortex approval` is not built; no policy asks for approvals yet.",
            Self::Workflow(_) => "`cortex workflow` is not built.",
            Self::Bundle(_) => "`cortex bundle` is not built.",
            Self::Tool(_) => "`cortex tool` is not built.",
            Self::Policy(_) => "`cortex policy` is not built; on the machine itself use: cortex-node policy",
            Self::Events(_) => "`cortex events` is not built; one task is followed with: cortex task logs -f TASK",
            Self::Completions(_) => "`cortex completions` is not built.",
        }
    }
}

#[derive(Debug, Args)]
pub struct LoginArgs {
    /// Asked for where it is missing
    #[arg(long, value_name = "NAME")]
    pub username: Option<String>,
    /// Read the password from standard input instead of asking
    #[arg(long, requires = "username")]
    pub password_stdin: bool,
}

#[derive(Debug, Subcommand)]
pub enum UserCommand {
    /// Add a person: invites them, and prints the link by which they choose a password
    Add {
        name: String,
        /// admin, developer, viewer or guest
        #[arg(long, value_name = "ROLE")]
        role: String,
        /// Give them the password on standard input instead of a link
        #[arg(long)]
        password_stdin: bool,
    },
    /// List the people
    Ls,
    /// Show one person
    Show {
        /// Id or name
        user: String,
    },
    /// Change a person
    #[command(group = clap::ArgGroup::new("change").required(true).multiple(true))]
    Set {
        /// Id or name
        user: String,
        /// A new name
        #[arg(long, value_name = "NAME", group = "change")]
        name: Option<String>,
        /// admin, developer, viewer or guest
        #[arg(long, value_name = "ROLE", group = "change")]
        role: Option<String>,
        /// End their log-ins and let nothing of theirs in
        #[arg(long, group = "change", conflicts_with = "enable")]
        disable: bool,
        /// Let them in again
        #[arg(long, group = "change")]
        enable: bool,
        /// Set the password on standard input, and end their log-ins
        #[arg(long, group = "change", conflicts_with = "invite")]
        password_stdin: bool,
        /// Print a new link for who has not accepted; the one before ends
        #[arg(long, group = "change")]
        invite: bool,
    },
    /// Choose a password by the link of an invite, and log in; asks for what is not given
    Accept {
        /// The link and then the password, each on a line of standard input, instead of asking
        #[arg(long)]
        stdin: bool,
    },
    /// Remove a person; their machines, sessions and agents pass to another
    Rm {
        /// Id or name
        user: String,
        /// Who is to have what they own, by id or name [default: who asks]
        #[arg(long, value_name = "USER")]
        transfer_to: Option<String>,
        /// What becomes of work of theirs that runs
        #[arg(long, value_name = "WORD", value_parser = ["finish", "cancel"], default_value = "finish")]
        work: String,
        /// Erase what tells who they were
        #[arg(long)]
        purge: bool,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
}

#[derive(Debug, Subcommand)]
pub enum NodeCommand {
    /// Invite a machine: writes NAME.yaml and prints the line to paste there
    Add(NodeAdd),
    /// List the machines
    Ls {
        /// Only those with these labels, such as os=linux,gpu
        #[arg(long, value_name = "LABELS")]
        select: Option<String>,
    },
    /// Show one machine
    Show {
        /// Id or name
        node: String,
    },
    /// Change a machine's name, labels, slots or bound on tasks
    Set(NodeSet),
    /// Give a machine no new work; what runs there goes on
    Drain {
        /// Id or name
        node: String,
    },
    /// Give a drained machine work again
    Resume {
        /// Id or name
        node: String,
    },
    /// End a machine's membership for good; its tasks fail, its entry stays
    Revoke {
        /// Id or name
        node: String,
    },
    /// Revoke a machine and remove its entry
    Rm {
        /// Id or name
        node: String,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
    /// Watch the load of the machines; prints once where there is no terminal
    Top {
        /// Only those with these labels, such as os=linux,gpu
        #[arg(long, value_name = "LABELS")]
        select: Option<String>,
    },
}

#[derive(Debug, Args)]
pub struct NodeSet {
    /// Id or name
    pub node: String,
    /// A new name
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Give it this label; may be given several times. Its other labels stay
    #[arg(long = "label", value_name = "K=V", value_parser = key_value)]
    pub labels: Vec<(String, String)>,
    /// Take this label away; may be given several times
    #[arg(long = "no-label", value_name = "K")]
    pub no_labels: Vec<String>,
    /// The most tasks at once that the hub gives it; 0: as many as the machine itself takes
    #[arg(long, value_name = "N")]
    pub max_tasks: Option<u32>,
    /// It has N slots of this kind, such as gpu=2; may be given several times. Other kinds stay
    #[arg(long = "slot", value_name = "KIND=N", value_parser = slot)]
    pub slots: Vec<(String, u32)>,
    /// Its slots are the GPUs found, again
    #[arg(long, conflicts_with = "slots")]
    pub default_slots: bool,
}

#[derive(Debug, Args)]
pub struct NodeAdd {
    pub name: String,
    /// A label of the machine; may be given several times
    #[arg(long = "label", value_name = "K=V", value_parser = key_value)]
    pub labels: Vec<(String, String)>,
    /// How long the invite can be used
    #[arg(long, value_name = "SECS")]
    pub ttl: Option<u64>,
}

#[derive(Debug, Subcommand)]
pub enum SessionCommand {
    /// Make a session
    New {
        name: String,
        /// How long it lives without being used
        #[arg(long, value_name = "SECS")]
        ttl: Option<u64>,
    },
    /// List the sessions
    Ls,
    /// Show one session
    Show {
        /// Id or name
        session: String,
    },
    /// Let a session use a machine
    Attach {
        /// Id or name
        session: String,
        /// Id or name
        node: String,
    },
    /// Take a machine from a session
    Detach {
        /// Id or name
        session: String,
        /// Id or name
        node: String,
    },
    /// Rename a session, or change how long it lives without being used
    #[command(group = clap::ArgGroup::new("change").required(true).multiple(true))]
    Set {
        /// Id or name
        session: String,
        /// Its new name
        #[arg(long, value_name = "NAME", group = "change")]
        name: Option<String>,
        /// How long it lives without being used, from now on
        #[arg(long, value_name = "SECS", group = "change")]
        ttl: Option<u64>,
    },
    /// Close a session; its tasks are cancelled
    Close {
        /// Id or name
        session: String,
    },
    /// Erase what a closed or expired session held: memory, messages, activity, output of its tasks
    Purge {
        /// Id or name
        session: String,
    },
}

const RUN_CODES: &str = "Exit codes: the command's own; 128+n ended by signal n; 124 timed out; 125 the mesh or this program failed;
126 denied; 127 program or folder not found; 130 cancelled; 2 wrong usage or config. `--output json` prints
the task instead of its output, whose `state` and `reason` say which was meant.
The first Ctrl-C cancels the command and waits for its end; the second leaves at once.";

#[derive(Debug, Clone, Args)]
#[command(after_help = RUN_CODES, override_usage = "cortex run [OPTIONS] -- ARGV...\n       cortex run [OPTIONS] --script TEXT")]
pub struct RunArgs {
    /// The machine, by id or name [default: any that may be used]
    #[arg(long, value_name = "NODE")]
    pub node: Option<String>,
    /// Run in this session's workspace, by id or name [default: one that is thrown away]
    #[arg(long, value_name = "SESSION")]
    pub session: Option<String>,
    /// Only machines with these labels: key=value or key, a comma means and
    #[arg(long, value_name = "LABELS", conflicts_with = "node")]
    pub select: Option<String>,
    /// On every machine that is online and matches: one result, and the highest exit code
    #[arg(long, conflicts_with_all = ["node", "interactive"])]
    pub all: bool,
    /// A folder in the workspace
    #[arg(long, value_name = "DIR")]
    pub cwd: Option<String>,
    /// A variable of the environment; may be given several times
    #[arg(long, value_name = "K=V", value_parser = key_value)]
    pub env: Vec<(String, String)>,
    /// End the command after this time
    #[arg(long, value_name = "SECS")]
    pub timeout: Option<u64>,
    /// Give up when no machine could take the command for so long; 0 waits for ever
    #[arg(long, value_name = "SECS", default_value_t = 60)]
    pub queue: u64,
    /// Where several wait, the higher goes first: -100 to 100
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub priority: Option<i64>,
    /// Run again, so often at most, when it failed
    #[arg(long, value_name = "N")]
    pub retries: Option<u32>,
    /// The pause before the first retry; it doubles each time
    #[arg(long, value_name = "MS", requires = "retries")]
    pub backoff: Option<u64>,
    /// What becomes of it when its machine cannot tell how it went: `requeue` runs it again, though it
    /// may have run
    #[arg(long, value_name = "WORD", value_parser = ["wait", "fail", "requeue"])]
    pub on_lost: Option<String>,
    /// It counts as lost when its machine is away for so long; 0 waits for ever
    #[arg(long, value_name = "SECS")]
    pub lost_after: Option<u64>,
    /// Do not start before this time, in RFC 3339
    #[arg(long, value_name = "TIME")]
    pub not_before: Option<String>,
    /// End it at this time wherever it is, in RFC 3339
    #[arg(long, value_name = "TIME")]
    pub deadline: Option<String>,
    /// The same key again, within a day and with the same command, is the same task
    #[arg(long, value_name = "KEY")]
    pub idempotency_key: Option<String>,
    /// Print the task's id and leave
    #[arg(long)]
    pub detach: bool,
    /// Send what is on standard input, a file or a pipe, to the command
    #[arg(long)]
    pub stdin: bool,
    /// Send standard input to the command as it comes, until its end
    #[arg(short, long, conflicts_with_all = ["stdin", "detach"])]
    pub interactive: bool,
    /// A script for /bin/sh
    #[arg(long, value_name = "TEXT", conflicts_with = "argv", required_unless_present = "argv")]
    pub script: Option<String>,
    /// The program and its arguments
    #[arg(last = true, value_name = "ARGV")]
    pub argv: Vec<String>,
}

#[derive(Debug, Subcommand)]
pub enum AgentCommand {
    /// Run a command and look after it: it goes on until it ends or is killed
    Spawn(AgentSpawn),
    /// List the agents, newest first
    Ls,
    /// Show one agent
    Show {
        /// Id or name
        agent: String,
    },
    /// End an agent; its process is given time to end by itself
    Kill {
        /// Id or name
        agent: String,
        /// Give it no time
        #[arg(long)]
        force: bool,
    },
    /// Print the newest lines that an agent wrote
    Logs {
        /// Id or name
        agent: String,
        /// Go on until the agent has ended
        #[arg(short, long)]
        follow: bool,
        /// How many [default: 100]
        #[arg(long, value_name = "N")]
        lines: Option<u64>,
        /// All that are kept
        #[arg(long, conflicts_with = "lines")]
        all: bool,
    },
}

#[derive(Debug, Args)]
pub struct AgentSpawn {
    /// One agent of a name lives at a time
    pub name: String,
    /// The machine, by id or name [default: any that may be used]
    #[arg(long, value_name = "NODE")]
    pub node: Option<String>,
    /// Only machines with these labels: key=value or key, a comma means and
    #[arg(long, value_name = "LABELS", conflicts_with = "node")]
    pub select: Option<String>,
    /// Run in this session's workspace, by id or name [default: one that is thrown away]
    #[arg(long, value_name = "SESSION")]
    pub session: Option<String>,
    /// A folder in the workspace
    #[arg(long, value_name = "DIR")]
    pub cwd: Option<String>,
    /// A variable of the environment; may be given several times
    #[arg(long, value_name = "K=V", value_parser = key_value)]
    pub env: Vec<(String, String)>,
    /// After which ends it is run again [default: never]
    #[arg(long, value_name = "WORD", value_parser = ["never", "on_failure", "always"])]
    pub restart: Option<String>,
    /// Restarts in a row, at most; a run of a minute begins the count anew [default: no bound]
    #[arg(long, value_name = "N", requires = "restart")]
    pub max: Option<u32>,
    /// The pause before the first restart; it doubles, up to five minutes [default: 1000]
    #[arg(long, value_name = "MS", requires = "restart")]
    pub backoff: Option<u64>,
    /// A script for /bin/sh
    #[arg(long, value_name = "TEXT", conflicts_with = "argv", required_unless_present = "argv")]
    pub script: Option<String>,
    /// The program and its arguments
    #[arg(last = true, value_name = "ARGV")]
    pub argv: Vec<String>,
}

#[derive(Debug, Subcommand)]
pub enum TaskCommand {
    /// List tasks, newest first
    Ls(TaskLs),
    /// Show one task and its history
    Show { task: String },
    /// Print a task's output so far
    Logs {
        /// Go on until the task has ended
        #[arg(short, long)]
        follow: bool,
        task: String,
    },
    /// Ask for the end of a task
    Cancel { task: String },
}

#[derive(Debug, Args)]
pub struct TaskLs {
    /// Id or name
    #[arg(long)]
    pub session: Option<String>,
    /// Id or name
    #[arg(long)]
    pub node: Option<String>,
    /// pending, awaiting_approval, assigned, running, succeeded, failed or cancelled
    #[arg(long)]
    pub state: Option<String>,
    /// What `run --all` started on each machine: the id that it told
    #[arg(long, value_name = "TASK")]
    pub parent: Option<String>,
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=500))]
    pub limit: u32,
}

#[derive(Debug, Args)]
pub struct ConnectArgs {
    pub program: Program,
    /// What the key may do; may be given several times [default: run tasks, read nodes, tasks and sessions, make sessions]
    #[arg(long = "scope", value_name = "SCOPE", num_args = 1..)]
    pub scopes: Vec<String>,
    /// After how many days the key ends
    #[arg(long, value_name = "DAYS", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=365))]
    pub expires: u32,
    /// What the key is called [default: the program's name]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Add it to the program's own file instead of printing it; what is there stays
    #[arg(long)]
    pub write: bool,
    /// The file, where it is not the program's usual one
    #[arg(long, value_name = "FILE", requires = "write")]
    pub file: Option<PathBuf>,
}

/// A program whose configuration is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Program {
    Claude,
    Codex,
    Cursor,
    Vscode,
    Gemini,
}

#[derive(Debug, Subcommand)]
pub enum KeyCommand {
    /// Make a key; its secret is shown this once
    #[command(visible_alias = "add")]
    New {
        name: String,
        /// What the key may do, such as tasks:dispatch or nodes:*; may be given several times
        #[arg(long = "scope", value_name = "SCOPE", required = true, num_args = 1..)]
        scopes: Vec<String>,
        /// When the key ends, in RFC 3339 [default: never]
        #[arg(long, value_name = "TIME")]
        expires_at: Option<String>,
    },
    /// List the keys
    Ls,
    /// Delete a key
    Rm {
        /// Id or name
        key: String,
    },
}

#[derive(Debug, Subcommand)]
pub enum GrantCommand {
    /// Share a machine, a session or an agent
    Add(GrantAdd),
    /// List what was shared by and with one
    Ls,
    /// Take a grant back
    Rm {
        /// Its id
        grant: String,
    },
}

#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("what").required(true).args(["node", "session", "agent", "labels"])))]
pub struct GrantAdd {
    /// The id or name of a user, or a role: admin, developer, viewer or guest
    #[arg(value_name = "WHO")]
    pub subject: String,
    /// What they may do there, such as nodes:read or tasks:dispatch
    #[arg(value_name = "PERMISSION", required = true)]
    pub permissions: Vec<String>,
    /// Id or name
    #[arg(long)]
    pub node: Option<String>,
    /// Id or name
    #[arg(long)]
    pub session: Option<String>,
    /// Name
    #[arg(long)]
    pub agent: Option<String>,
    /// All machines that have all of these labels; may be given several times
    #[arg(long = "label", id = "labels", value_name = "KEY=VALUE", value_parser = key_value)]
    pub labels: Vec<(String, String)>,
    /// When it ends, in RFC 3339 [default: never]
    #[arg(long, value_name = "TIME")]
    pub expires_at: Option<String>,
}

#[derive(Debug, Subcommand)]
pub enum DeviceCommand {
    /// List the devices; a new one is one that nobody has trusted yet
    Ls,
    /// End a device's log-in, whoever uses it
    Rm {
        /// Id or name
        device: String,
    },
    /// Mark a device as your own
    Trust {
        /// Id or name
        device: String,
        /// Take the mark away
        #[arg(long)]
        off: bool,
    },
}

#[derive(Debug, Subcommand)]
pub enum AuditCommand {
    /// List entries, newest first
    Ls(AuditLs),
    /// Write the whole log as JSON lines with the hub's signature; check it with: cortex-hub audit verify FILE
    Export {
        /// A new file, or - for standard output
        file: PathBuf,
    },
    /// Let the hub check its log
    Verify,
}

#[derive(Debug, Args)]
pub struct AuditLs {
    /// Such as node_lifecycle or authorization_denied
    #[arg(long = "type", value_name = "TYPE")]
    pub kind: Option<String>,
    /// The id of who did it
    #[arg(long, value_name = "USER")]
    pub user: Option<String>,
    /// Id or name
    #[arg(long, value_name = "SESSION")]
    pub session: Option<String>,
    /// The id of what it was done to
    #[arg(long, value_name = "ID")]
    pub resource: Option<String>,
    /// ok, denied or failed
    #[arg(long, value_name = "OUTCOME")]
    pub outcome: Option<String>,
    /// rest, socket, node or hub
    #[arg(long, value_name = "DOOR")]
    pub door: Option<String>,
    /// From this time on, in RFC 3339
    #[arg(long, value_name = "TIME")]
    pub since: Option<String>,
    /// Before this time, in RFC 3339
    #[arg(long, value_name = "TIME")]
    pub until: Option<String>,
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=500))]
    pub limit: u32,
}

fn slot(text: &str) -> Result<(String, u32), String> {
    let pair = text.split_once('=').filter(|(kind, _)| !kind.is_empty());
    pair.and_then(|(kind, n)| Some((kind.to_owned(), n.parse().ok()?))).ok_or_else(|| "write it as KIND=NUMBER".to_owned())
}

fn key_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((k, v)) if !k.is_empty() => Ok((k.to_owned(), v.to_owned())),
        _ => Err("write it as KEY=VALUE".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    fn parse(line: &str) -> Result<Command, clap::Error> {
        Cli::try_parse_from(line.split(' ')).map(|c| c.command)
    }

    #[test]
    fn the_definition_holds() {
        Cli::command().debug_assert();
    }

    #[test]
    fn run_takes_argv_or_a_script() {
        let Ok(Command::Run(r)) = parse("cortex run --node a --env A=b=c --env B= --timeout 5 -- make -j --output x") else { panic!() };
        assert_eq!(r.argv, ["make", "-j", "--output", "x"]);
        assert_eq!(r.env, [("A".into(), "b=c".into()), ("B".into(), String::new())]);
        assert_eq!((r.queue, r.timeout, r.node.as_deref()), (60, Some(5), Some("a")));
        let Ok(Command::Run(r)) = parse("cortex run --script true --queue 0") else { panic!() };
        assert_eq!((r.script.as_deref(), r.queue), (Some("true"), 0));
        let Ok(Command::Run(r)) =
            parse("cortex run --select os=linux,gpu --priority -5 --retries 2 --backoff 9 --on-lost requeue --lost-after 3 -- x")
        else {
            panic!()
        };
        assert_eq!((r.select.as_deref(), r.priority, r.retries, r.backoff), (Some("os=linux,gpu"), Some(-5), Some(2), Some(9)));
        assert_eq!((r.on_lost.as_deref(), r.lost_after), (Some("requeue"), Some(3)));
        for wrong in [
            "cortex run",
            "cortex run --script x -- y",
            "cortex run ls",
            "cortex run --env X -- y",
            "cortex run --env =x -- y",
            "cortex run --timeout soon -- y",
            "cortex run --node a --select os -- y",
            "cortex run --backoff 5 -- y",
            "cortex run --on-lost never -- y",
            "cortex login --password-stdin",
            "cortex key new k",
            "cortex device",
            "cortex device rm",
            "cortex device trust",
            "cortex audit",
            "cortex audit export",
            "cortex audit ls --limit 0",
            "cortex nonsense",
        ] {
            assert_eq!(parse(wrong).unwrap_err().exit_code(), 2, "{wrong}");
        }
    }

    #[test]
    fn global_flags_stand_anywhere() {
        let cli = Cli::try_parse_from(["cortex", "node", "ls", "--output", "json", "--url", "http://h"]).unwrap();
        assert_eq!((cli.global.output, cli.global.url.as_deref()), (Format::Json, Some("http://h")));
    }

    #[test]
    fn what_is_not_built_takes_anything() {
        for verb in "shell cp file approval workflow bundle tool policy events completions".split(' ') {
            for rest in ["", " --help", " -x y --z=1 -- a"] {
                let Ok(Command::Later(l)) = parse(&format!("cortex {verb}{rest}")) else { panic!("{verb}{rest}") };
                assert!(l.sentence().contains(&format!("`cortex {verb}` is not built")), "{}", l.sentence());
            }
        }
    }

    /// Words that begin with @ name no file to read.
    #[test]
    fn an_at_sign_is_a_character_like_any_other() {
        let Ok(Command::Run(r)) = parse("cortex run --node @n --env A=@/etc/passwd -- @/etc/passwd @@ @-") else { panic!() };
        assert_eq!((r.node.as_deref(), &r.env[0].1[..]), (Some("@n"), "@/etc/passwd"));
        assert_eq!(r.argv, ["@/etc/passwd", "@@", "@-"]);
        let Ok(Command::Run(r)) = parse("cortex run --script @/etc/passwd") else { panic!() };
        assert_eq!(r.script.as_deref(), Some("@/etc/passwd"));
        let Ok(Command::Key(KeyCommand::New { name, scopes, .. })) = parse("cortex key add @/etc/passwd --scope @x") else { panic!() };
        assert_eq!((&name[..], &scopes[..]), ("@/etc/passwd", &["@x".to_owned()][..]));
        let Ok(Command::Device(DeviceCommand::Trust { device, off: true })) = parse("cortex device trust @d --off") else { panic!() };
        assert_eq!(device, "@d");
        let cli = Cli::try_parse_from(["cortex", "whoami", "--url", "@/etc/passwd", "--api-key", "@/etc/passwd"]).unwrap();
        assert_eq!((cli.global.url.as_deref(), cli.global.api_key.as_deref()), (Some("@/etc/passwd"), Some("@/etc/passwd")));
    }

    #[test]
    fn one_thing_is_shared() {
        let Ok(Command::Grant(GrantCommand::Add(g))) = parse("cortex grant add ada nodes:read tasks:dispatch --label a=b=c --label d=e")
        else {
            panic!()
        };
        assert_eq!((g.subject.as_str(), g.permissions.len()), ("ada", 2));
        assert_eq!(g.labels, [("a".into(), "b=c".into()), ("d".into(), "e".into())]);
        for wrong in [
            "cortex grant add",
            "cortex grant add ada --node box",
            "cortex grant add ada nodes:read",
            "cortex grant add ada nodes:read --node box --session s",
            "cortex grant add ada nodes:read --label a",
            "cortex grant rm",
        ] {
            assert_eq!(parse(wrong).unwrap_err().exit_code(), 2, "{wrong}");
        }
    }

    #[test]
    fn a_machine_is_changed_by_flags() {
        let Ok(Command::Node(NodeCommand::Set(s))) =
            parse("cortex node set box --name b --label a=b=c --label d= --no-label e --max-tasks 0 --slot gpu=2")
        else {
            panic!()
        };
        assert_eq!(s.labels, [("a".into(), "b=c".into()), ("d".into(), String::new())]);
        assert_eq!((s.no_labels, s.max_tasks, s.slots), (vec!["e".to_owned()], Some(0), vec![("gpu".into(), 2)]));
        for wrong in [
            "cortex node set",
            "cortex node set a --slot gpu",
            "cortex node set a --slot gpu=-1",
            "cortex node set a --slot =1",
            "cortex node set a --max-tasks x",
            "cortex node set a --slot gpu=1 --default-slots",
            "cortex node rm",
            "cortex node rm --force x",
            "cortex node ls --select",
        ] {
            assert_eq!(parse(wrong).unwrap_err().exit_code(), 2, "{wrong}");
        }
    }
}
