//! `cortex-hub admin`: people, for who owns the hub's machine. Through the hub where one runs on the data
//! folder, else on what it keeps.

use crate::config::Config;
use crate::control;
use crate::keys::{Argon2Passwords, Keys};
use crate::serve::MADE_PASSWORD;
use anyhow::{Context, Result, anyhow, bail, ensure};
use hub_engine::accounts::{Accounts, Lifetimes, Recent, made_password};
use hub_engine::audit;
use hub_engine::events::Events;
use hub_engine::ports::Meta;
use hub_engine::records::HubMeta;
use hub_engine::rights::Rights;
use hub_engine::throttle::Throttle;
use hub_engine::users::{Change, Users};
use hub_store::Store;
use mesh_core::permission::{Caller, Via};
use mesh_process::{SharedClock, Tasks, files};
use mesh_wire::rest::{Page, UserPatch, UserRequest, UserView};
use std::io::Read;
use std::sync::Arc;
use std::time::Duration;

/// The hub takes 256 characters; a stream that never ends is no password.
const MAX_PASSWORD_BYTES: u64 = 4 << 10;
const GRACE: Duration = Duration::from_secs(10);
/// What the audit log says these came by: nobody is known to have asked but who owns the machine.
const DOOR: &str = "command";
const CALLER: Caller = Caller::System("admin command");

/// A password, and what is to be shown of it: one that was made is shown once.
pub struct Password {
    text: String,
    shown: Option<String>,
}

impl Password {
    /// From standard input, or made. Never an argument, which other users of the machine can read.
    pub fn get(from_stdin: bool) -> Result<Self> {
        if !from_stdin {
            let text = made_password();
            return Ok(Self { shown: Some(format!("password  {text}")), text });
        }
        let mut text = String::new();
        std::io::stdin().lock().take(MAX_PASSWORD_BYTES).read_to_string(&mut text).context("reading the password")?;
        // The line end of an `echo` is no part of it.
        let password = text.strip_suffix('\n').map_or(&text[..], |t| t.strip_suffix('\r').unwrap_or(t));
        ensure!(!password.is_empty(), "standard input holds no password");
        Ok(Self { text: password.to_owned(), shown: None })
    }
}

pub async fn create_user(config: &Config, username: &str, role: &str, password: Password, clock: SharedClock) -> Result<Vec<String>> {
    let Password { text, shown } = password;
    match free(config)? {
        None => {
            let body = UserRequest { username: username.to_owned(), password: Some(text), role: role.to_owned() };
            ask(config, "POST", "/users", &serde_json::to_value(body)?).await?;
        }
        Some(_lock) => {
            on_store(config, clock, async |users| {
                users.create(&CALLER, username, Some(text), role, None).await?;
                Ok(())
            })
            .await?;
        }
    }
    Ok([format!("user      {username} ({role})")].into_iter().chain(shown).collect())
}

pub async fn reset_password(config: &Config, username: &str, password: Password, clock: SharedClock) -> Result<Vec<String>> {
    let Password { text, shown } = password;
    match free(config)? {
        None => {
            let id = find(config, username).await?;
            let body = UserPatch { password: Some(text), ..UserPatch::default() };
            ask(config, "PATCH", &format!("/users/{id}"), &serde_json::to_value(body)?).await?;
        }
        Some(_lock) => {
            on_store(config, clock, async |users| {
                let user = users.named(&CALLER, username).await?;
                users.change(&CALLER, user.id, Change { password: Some(text), ..Change::default() }).await?;
                Ok(())
            })
            .await?;
            if username.eq_ignore_ascii_case("admin") {
                // It holds the password that was made at the first start, which counts no more.
                let _ = std::fs::remove_file(config.data_dir.join(MADE_PASSWORD));
            }
        }
    }
    let done = format!("the password of {username} is set; their log-ins are ended");
    Ok([done].into_iter().chain(shown).collect())
}

/// The lock on the data folder; none while a hub has it.
fn free(config: &Config) -> Result<Option<files::Lock>> {
    let dir = &config.data_dir;
    ensure!(
        dir.join("keys").join("hub-id").exists(),
        "there is no hub in {}; the first cortex-hub serve makes one, and its admin",
        dir.display()
    );
    files::Lock::try_take(&dir.join("hub.lock")).with_context(|| format!("lock in {}", dir.display()))
}

async fn ask(config: &Config, method: &str, path: &str, body: &serde_json::Value) -> Result<()> {
    control::ask(&config.data_dir, method, path, Some(body)).await.map(drop)
}

async fn find(config: &Config, username: &str) -> Result<String> {
    let mut cursor = String::new();
    loop {
        let body = control::ask(&config.data_dir, "GET", &format!("/users?limit=500{cursor}"), None).await?;
        let page: Page<UserView> = serde_json::from_slice(&body)?;
        let named = |u: &&UserView| u.username.as_ref().is_some_and(|n| n.eq_ignore_ascii_case(username));
        if let Some(user) = page.items.iter().find(named) {
            return Ok(user.id.clone());
        }
        match page.next_cursor {
            Some(next) => cursor = format!("&cursor={next}"),
            None => bail!("there is no user {username:?}"),
        }
    }
}

/// Does something to the people that the data folder of a stopped hub knows.
async fn on_store(config: &Config, clock: SharedClock, change: impl AsyncFnOnce(Users) -> hub_engine::Result<()>) -> Result<()> {
    let dir = &config.data_dir;
    if let Some(marker) = crate::backup::unfinished(dir) {
        bail!("a restore into {} did not finish ({}); run it again", dir.display(), marker.display());
    }
    let now = clock.now_ms();
    let keys = Arc::new(Keys::open(dir, now).map_err(|e| anyhow!(e))?);
    let (work, tasks) = (Tasks::new(), Tasks::new());
    let store = Store::open(dir, &config.database, &tasks).await.context("opening the store")?;
    let meta = store.hub(HubMeta { id: keys.hub, incarnation: 1, created_at: now }).await?;
    ensure!(meta.id == keys.hub, "the database and the keys in {} are of two hubs", dir.display());
    let log = crate::audit::log(dir, &store, &keys, meta.incarnation, clock.clone(), work.clone()).await?;
    let accounts = Arc::new(Accounts {
        recent: Recent::default(),
        store: store.clone(),
        keyring: keys,
        work: work.clone(),
        passwords: Arc::new(Argon2Passwords::new()?),
        throttle: Throttle::new(config.login_per_minute_address, config.login_per_minute_account, clock.clone()),
        rights: Arc::new(Rights::new(store.clone(), store.clone(), clock.clone())),
        clock: clock.clone(),
        events: Events::local(Duration::ZERO, clock),
        lifetimes: Lifetimes { access_secs: config.access_secs, refresh_days: config.refresh_days },
    });
    let via = Via { door: DOOR, ..Via::default() };
    let done = audit::scope(&log, via, change(Users { store, accounts, pool: None }), audit::Ending::of).await;
    work.end(GRACE).await;
    if let Err(error) = log.checkpoint().await {
        // The next start of the hub signs it.
        eprintln!("the entry of this in the audit log is not signed yet: {error}");
    }
    tasks.end(GRACE).await;
    Ok(done?)
}
