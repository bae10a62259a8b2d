//! `login`, `logout`, `whoami`.

use super::Context;
use crate::cli::args::LoginArgs;
use crate::cli::config::Login;
use crate::cli::{Fail, output};
use crate::rest::{LoginRequest, TokenReply};
use crate::{Client, Credentials, Error};
use std::io::{BufRead as _, IsTerminal as _, Read as _};

/// The hub takes 256 characters; a stream that never ends is no password.
const MAX_PASSWORD_BYTES: u64 = 4 << 10;

pub(super) async fn login(args: LoginArgs, context: &mut Context<'_, '_>) -> Result<(), Fail> {
    let client = Client::new(&context.settings.url, Credentials::None)?;
    let username = match args.username {
        Some(name) => name,
        None => ask_username(context)?,
    };
    let password = if args.password_stdin { read_password()? } else { ask_password()? };
    let request = LoginRequest { username: username.clone(), password, device_name: host_name() };
    let reply = client.login(&request).await.map_err(|e| match e {
        Error::Problem { problem, .. } if problem.status == 401 => {
            Fail::Failed(format!("{} did not take that user name and password; try again", context.settings.url))
        }
        e => Fail::Hub(e),
    })?;
    let url = context.settings.url.clone();
    keep(url, username, reply, context)
}

/// Stores a log-in as the current one, and says so.
pub(super) fn keep(url: String, username: String, reply: TokenReply, context: &mut Context<'_, '_>) -> Result<(), Fail> {
    let stored = context.settings.store.update(|logins| {
        logins.current = Some(url.clone());
        logins.hubs.insert(url.clone(), Login { username: username.clone(), tokens: reply.into() });
    });
    stored.map_err(|e| Fail::Failed(format!("logged in, but the log-in cannot be stored: {e}")))?;
    let path = context.settings.store.path().map(|p| p.display().to_string()).unwrap_or_default();
    context.tell(&format!("logged in to {url} as {}; kept in {path}", output::cell(&username)));
    if context.settings.uses_api_key() {
        context.tell("an API key is set as well (--api-key or CORTEX_API_KEY) and goes before the log-in");
    }
    Ok(())
}

pub(super) async fn logout(context: &mut Context<'_, '_>) -> Result<(), Fail> {
    let url = context.settings.url.clone();
    if !context.settings.store.read()?.hubs.contains_key(&url) {
        context.tell(&format!("not logged in to {url}"));
        return Ok(());
    }
    // By the log-in and not by a key that may be set as well.
    let told = match context.settings.login_client()? {
        Some(client) => client.logout().await,
        None => Ok(()),
    };
    let forgotten = context.settings.store.update(|logins| {
        logins.hubs.remove(&url);
        logins.current = logins.current.take().filter(|c| *c != url);
    });
    forgotten.map_err(|e| Fail::Failed(format!("the stored log-in cannot be removed: {e}")))?;
    match told {
        // The hub no longer knew the log-in, which is what was wanted.
        Err(e) if e.status() == Some(401) => Ok(()),
        Err(e) => Err(Fail::Failed(format!("logged out here, but the hub could not be told: {e}"))),
        Ok(()) => Ok(()),
    }?;
    context.tell(&format!("logged out of {url}"));
    Ok(())
}

pub(super) async fn whoami(context: &mut Context<'_, '_>) -> Result<(), Fail> {
    let me = context.client.me().await?;
    let fields = vec![
        ("user", output::cell(&me.user.username)),
        ("id", output::cell(&me.user.id)),
        ("role", output::cell(&me.role)),
        ("may", output::or_dash(Some(&me.permissions.join(" ")))),
        ("hub", context.settings.url.clone()),
    ];
    output::one(context.io, context.format(), &me, fields)
}

pub(super) fn no_terminal() -> Fail {
    Fail::Usage("there is no terminal to ask at; use: cortex login --username NAME --password-stdin < FILE".to_owned())
}

fn ask_username(context: &mut Context<'_, '_>) -> Result<String, Fail> {
    let stdin = std::io::stdin();
    if !stdin.is_terminal() {
        return Err(no_terminal());
    }
    let _ = write!(context.io.err, "User name: ");
    let _ = context.io.err.flush();
    let mut line = String::new();
    stdin.lock().read_line(&mut line).map_err(|e| Fail::Failed(format!("cannot read the user name: {e}")))?;
    match line.trim() {
        "" => Err(Fail::Usage("a log-in needs a user name".to_owned())),
        name => Ok(name.to_owned()),
    }
}

fn ask_password() -> Result<String, Fail> {
    rpassword::prompt_password("Password: ").map_err(|_| no_terminal())
}

pub(super) fn read_password() -> Result<String, Fail> {
    let mut text = String::new();
    let read = std::io::stdin().lock().take(MAX_PASSWORD_BYTES).read_to_string(&mut text);
    read.map_err(|e| Fail::Failed(format!("cannot read the password: {e}")))?;
    // The line end of an `echo` is no part of it.
    let password = text.strip_suffix('\n').map_or(&text[..], |t| t.strip_suffix('\r').unwrap_or(t));
    if password.is_empty() {
        return Err(Fail::Usage("standard input holds no password".to_owned()));
    }
    Ok(password.to_owned())
}

/// What the hub lists this machine as. Where it cannot be told cheaply, the hub finds its own word.
pub(super) fn host_name() -> Option<String> {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").ok()?;
    let name = name.trim();
    mesh_core::name::check(name).ok().map(|()| name.to_owned())
}
