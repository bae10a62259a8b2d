//! The command line of `cortex-hub`.

use crate::admin;
use crate::config::{Config, Flags};
use crate::serve::Hub;
use crate::{audit, backup, ca};
use clap::{Args, Parser, Subcommand};
use hub_engine::rotation::Step;
use mesh_process::config::BadSetting;
use mesh_process::{Clock, SystemClock, signals, telemetry};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Parser)]
#[command(name = "cortex-hub", version, about = "The hub of a Cortex mesh")]
struct Cli {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Command,
}

#[derive(Args)]
struct Common {
    /// A TOML file with settings
    #[arg(long, global = true)]
    config: Option<PathBuf>,
    /// Where the hub keeps everything (default: ./cortex-data)
    #[arg(long, global = true)]
    data_dir: Option<PathBuf>,
    /// A log filter, such as info or debug
    #[arg(long, global = true)]
    log_level: Option<String>,
    /// More log: debug
    #[arg(short, long, global = true)]
    verbose: bool,
}

#[derive(Subcommand)]
enum Command {
    /// Serve until SIGINT or SIGTERM
    Serve {
        /// Allow plain HTTP on an address that others can reach
        #[arg(long)]
        insecure_http: bool,
        /// Serve on all addresses of this machine, over HTTPS by the hub's own authority
        #[arg(long)]
        lan: bool,
    },
    /// Look at settings
    Config {
        #[command(subcommand)]
        command: ConfigCommand,
    },
    /// The hub's certificate authority
    Ca {
        #[command(subcommand)]
        command: CaCommand,
    },
    /// People, from the hub's own machine, whether the hub runs or not
    Admin {
        #[command(subcommand)]
        command: AdminCommand,
    },
    /// Print the description of the API, as GET /openapi.json answers it
    Openapi,
    /// Write all that the hub keeps into one new file, while it runs
    Backup {
        file: PathBuf,
        /// With the hub's keys, under a passphrase
        #[arg(long)]
        with_keys: bool,
        /// The passphrase is the first line of this file, or of standard input for -
        #[arg(long, value_name = "FILE")]
        passphrase_file: Option<PathBuf>,
    },
    /// Put a backup in place of what a stopped hub has; then let the hub go on
    Restore {
        #[arg(required_unless_present_any = ["go", "mark"], conflicts_with_all = ["go", "mark"])]
        file: Option<PathBuf>,
        /// Only read the file to its end and say what is in it
        #[arg(long)]
        check: bool,
        /// Say what the restore may have undone, and let the hub go on
        #[arg(long, conflicts_with_all = ["check", "mark"])]
        go: bool,
        /// The database was put back by other means, such as PostgreSQL's own: hold back as after a restore
        #[arg(long, conflicts_with = "check")]
        mark: bool,
        /// The passphrase is the first line of this file, or of standard input for -
        #[arg(long, value_name = "FILE")]
        passphrase_file: Option<PathBuf>,
    },
    /// The audit log
    Audit {
        #[command(subcommand)]
        command: AuditCommand,
    },
    #[command(external_subcommand)]
    Other(Vec<String>),
}

#[derive(Subcommand)]
enum ConfigCommand {
    /// Say whether the settings can be used
    Check,
}

#[derive(Subcommand)]
enum AdminCommand {
    /// Add a person who can log in
    CreateUser {
        username: String,
        /// admin, developer, viewer or guest
        #[arg(long, default_value = "developer")]
        role: String,
        /// Read the password from standard input instead of making one, which is shown once
        #[arg(long)]
        password_stdin: bool,
    },
    /// Set somebody's password and end all of their log-ins
    ResetPassword {
        username: String,
        /// Read the password from standard input instead of making one, which is shown once
        #[arg(long)]
        password_stdin: bool,
    },
}

#[derive(Subcommand)]
enum AuditCommand {
    /// Check an export of the log, by itself: that nothing in it was changed, removed, reordered or cut off
    Verify {
        file: PathBuf,
        /// The public key that must have signed it, as `ca show` prints it
        #[arg(long, value_name = "HEX")]
        key: Option<String>,
    },
}

#[derive(Subcommand)]
enum CaCommand {
    /// Print the hub's id, the pin of its root, where a rotation stands, and the roots (PEM), which clients of its HTTPS must trust
    Show,
    /// Put a new root and a new task key in the place of the old ones, step by step, while the hub runs
    #[command(group(clap::ArgGroup::new("step").required(true)))]
    Rotate {
        /// Make them, and let the nodes learn to believe them
        #[arg(long, group = "step")]
        begin: bool,
        /// Use them: certificates and orders are theirs from now on
        #[arg(long, group = "step")]
        issue: bool,
        /// Take the old ones away: they count no more
        #[arg(long, group = "step")]
        retire: bool,
        /// Go back to before --begin
        #[arg(long, group = "step")]
        abort: bool,
        /// Go on although nodes cannot follow, which need a new invite then
        #[arg(long)]
        leave_behind: bool,
    },
}

/// Wrong usage or settings.
const USAGE: u8 = 2;

pub async fn run() -> ExitCode {
    let cli = Cli::parse();
    let c = &cli.common;
    let level = c.log_level.clone().or(c.verbose.then(|| "debug".to_owned()));
    let mut flags = Flags { config: c.config.clone(), data_dir: c.data_dir.clone(), log_level: level, ..Flags::default() };
    match cli.command {
        Command::Serve { insecure_http, lan } => {
            (flags.insecure_http, flags.lan) = (insecure_http, lan);
            serve(&flags).await
        }
        Command::Config { command: ConfigCommand::Check } => match checked(&flags) {
            Ok(_) => {
                println!("the settings can be used");
                ExitCode::SUCCESS
            }
            Err(e) => usage(&e),
        },
        Command::Ca { command: CaCommand::Show } => told(&flags, async |config| ca::show(config, SystemClock::new().now_ms()).await).await,
        Command::Ca { command: CaCommand::Rotate { begin, issue, retire, leave_behind, .. } } => {
            let step = match (begin, issue, retire) {
                (true, ..) => Step::Begin,
                (_, true, _) => Step::Issue,
                (.., true) => Step::Retire,
                _ => Step::Abort,
            };
            told(&flags, async |config| ca::rotate(config, step, leave_behind).await).await
        }
        Command::Admin { command } => {
            told(&flags, async |config| match command {
                AdminCommand::CreateUser { username, role, password_stdin } => {
                    admin::create_user(config, &username, &role, admin::Password::get(password_stdin)?, SystemClock::shared()).await
                }
                AdminCommand::ResetPassword { username, password_stdin } => {
                    admin::reset_password(config, &username, admin::Password::get(password_stdin)?, SystemClock::shared()).await
                }
            })
            .await
        }
        Command::Audit { command: AuditCommand::Verify { file, key } } => match audit::verify_file(&file, key.as_deref()) {
            Ok(lines) => {
                lines.iter().for_each(|line| println!("{line}"));
                ExitCode::SUCCESS
            }
            Err(e) => {
                eprintln!("cortex-hub: {e:#}");
                ExitCode::FAILURE
            }
        },
        Command::Openapi => match writeln!(std::io::stdout(), "{:#}", crate::doors::rest::document()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        },
        Command::Backup { file, with_keys, passphrase_file } => {
            let plan = backup::Plan { to: file, with_keys, passphrase_file };
            told(&flags, async |config| backup::backup(config, &plan, SystemClock::new().now_ms())).await
        }
        Command::Restore { file: Some(file), check: true, passphrase_file, .. } => {
            told(&flags, async |config| backup::check(config, &file, passphrase_file.as_deref())).await
        }
        Command::Restore { file: Some(file), passphrase_file, .. } => {
            told(&flags, async |config| backup::restore(config, &file, passphrase_file.as_deref(), SystemClock::new().now_ms()).await).await
        }
        Command::Restore { mark: true, .. } => told(&flags, async |config| backup::mark(config, SystemClock::new().now_ms()).await).await,
        Command::Restore { file: None, .. } => {
            told(&flags, async |config| backup::go(config, |line| println!("{line}")).await.map(|()| vec![])).await
        }
        Command::Other(words) => {
            let word = words.first().map_or("", String::as_str);
            usage(&format!("there is no command {word:?}; see cortex-hub --help"))
        }
    }
}

/// Runs one command on the settings and prints what it gives.
async fn told(flags: &Flags, command: impl AsyncFnOnce(&Config) -> anyhow::Result<Vec<String>>) -> ExitCode {
    let config = match Config::load(flags) {
        Ok(c) => c,
        Err(e) => return usage(&e),
    };
    match command(&config).await {
        Ok(lines) => {
            lines.iter().for_each(|line| println!("{line}"));
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("cortex-hub: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn usage(message: &dyn std::fmt::Display) -> ExitCode {
    eprintln!("cortex-hub: {message}");
    ExitCode::from(USAGE)
}

/// The settings, with the files that they name.
fn checked(flags: &Flags) -> Result<Config, BadSetting> {
    let config = Config::load(flags)?;
    config.check_files(SystemClock::new().now_ms())?;
    Ok(config)
}

/// The crate of MCP logs whole messages, and what tasks said is for who may read it.
const QUIET: &str = "rmcp=error";

async fn serve(flags: &Flags) -> ExitCode {
    let config = match checked(flags) {
        Ok(c) => c,
        Err(e) => return usage(&e),
    };
    let (exporter, spans) = match config.otlp_endpoint.as_deref().map(crate::otlp::start).transpose() {
        Ok(started) => started.unzip(),
        Err(e) => return usage(&format!("log.otlp_endpoint: {e:#}")),
    };
    if let Err(e) = telemetry::init_with(&format!("{},{QUIET}", config.log_level), config.log_json, spans) {
        return usage(&format!("log.level: {e}"));
    }
    let hub = match Hub::start(config, SystemClock::shared()).await {
        Ok(hub) => hub,
        Err(e) => {
            eprintln!("cortex-hub: {e:#}");
            // An address that cannot be bound is a setting that cannot be used.
            let setting = e.downcast_ref::<std::io::Error>().is_some() && e.to_string().contains("cannot listen");
            return if setting { ExitCode::from(USAGE) } else { ExitCode::FAILURE };
        }
    };
    println!("hub ready: {}://{} (nodes: {})", if hub.https { "https" } else { "http" }, hub.http, hub.node);
    if flags.lan {
        println!("reach it at {}; programs trust it by the certificate that cortex-hub ca show prints", hub.reach.url);
    }
    if let Some(password) = &hub.made_password {
        println!("log in as admin with the password {password}");
        println!("it is kept in {} until you change it", hub.data_dir.join(crate::serve::MADE_PASSWORD).display());
    }
    let asked = tokio::select! {
        biased;
        asked = signals::shutdown() => asked.is_ok(),
        () = hub.failed() => false,
    };
    tracing::info!("stopping");
    let clean = tokio::select! {
        biased;
        clean = hub.stop() => clean,
        Ok(again) = signals::shutdown() => {
            tracing::warn!("a second signal: the hub ends at once, whatever is under way");
            // What is committed is on the disk; threads that hang must not hold this up.
            std::process::exit(again.exit_code())
        }
    };
    if let Some(exporter) = exporter {
        exporter.stop().await;
    }
    if !clean {
        // As above: what was cut off is not waited for.
        std::process::exit(1)
    }
    if asked { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
