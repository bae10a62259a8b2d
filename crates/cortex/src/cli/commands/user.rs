//! `user`: people.

use super::login::{host_name, keep, no_terminal, read_password};
use super::node::said_yes;
use super::{Context, is_id, pick};
use crate::cli::args::{Format, UserCommand};
use crate::cli::{Fail, output};
use crate::rest::{AcceptRequest, UserPatch, UserRequest, UserView};
use crate::{Client, Credentials, Error};
use std::io::{BufRead as _, IsTerminal as _, Read as _};

/// A link and a password are short; a stream that never ends is neither.
const MAX_INPUT_BYTES: u64 = 8 << 10;

pub(super) async fn perform(command: UserCommand, context: &mut Context<'_, '_>) -> Result<(), Fail> {
    match command {
        UserCommand::Add { name, role, password_stdin } => {
            let password = password_stdin.then(read_password).transpose()?;
            let user = context.client.create_user(&UserRequest { username: name, password, role }).await?;
            changed(&user, "added", context)
        }
        UserCommand::Ls => ls(context).await,
        UserCommand::Show { user } => {
            let id = user_id(&context.client, &user).await?;
            let user = context.client.user(&id).await?;
            show(&user, context)
        }
        UserCommand::Set { user, name, role, disable, enable, password_stdin, invite } => {
            let password = password_stdin.then(read_password).transpose()?;
            let id = user_id(&context.client, &user).await?;
            let disabled = (disable || enable).then_some(disable);
            let change = UserPatch { username: name, role, disabled, password, invite: invite.then_some(true) };
            let user = context.client.change_user(&id, &change).await?;
            changed(&user, "changed", context)
        }
        UserCommand::Accept { stdin } => accept(stdin, context).await,
        UserCommand::Rm { user, transfer_to, work, purge, yes } => {
            let id = user_id(&context.client, &user).await?;
            let heir = match &transfer_to {
                Some(other) => Some(user_id(&context.client, other).await?),
                None => None,
            };
            rm(&id, heir.as_deref(), work == "cancel", purge, yes, context).await
        }
    }
}

/// A word for people, and the link alone on standard output; for programs the person as they now are.
fn changed(user: &UserView, word: &str, context: &mut Context<'_, '_>) -> Result<(), Fail> {
    if context.format() == Format::Json {
        return output::json(context.io, user);
    }
    context.tell(&format!("{}: {word}", name(user)));
    let Some(url) = &user.invite_url else { return Ok(()) };
    let until = output::or_dash(user.invite_expires_at.as_deref());
    context.tell(&format!("this link is shown this once, works once and until {until}; whoever has it can choose the password"));
    writeln!(context.io.out, "{}", output::cell(url))?;
    Ok(context.io.out.flush()?)
}

fn name(user: &UserView) -> String {
    user.username.as_deref().map_or_else(|| "a removed person".to_owned(), output::cell)
}

async fn ls(context: &mut Context<'_, '_>) -> Result<(), Fail> {
    let users = context.client.users().await?;
    let now = context.now_ms;
    output::list(context.io, context.format(), &users, &["name", "role", "status", "added", "id"], |u| {
        vec![name(u), output::cell(&u.role), output::cell(&u.status), output::ago(Some(&u.created_at), now), output::cell(&u.id)]
    })
}

fn show(u: &UserView, context: &mut Context<'_, '_>) -> Result<(), Fail> {
    let mut fields = vec![
        ("name", name(u)),
        ("id", output::cell(&u.id)),
        ("role", output::cell(&u.role)),
        ("status", output::cell(&u.status)),
        ("added", output::cell(&u.created_at)),
    ];
    if let Some(until) = &u.invite_expires_at {
        fields.push(("invite ends", output::cell(until)));
    }
    if let Some(at) = &u.removed_at {
        fields.push(("removed", output::cell(at)));
    }
    output::one(context.io, context.format(), u, fields)
}

async fn rm(id: &str, heir: Option<&str>, cancel: bool, purge: bool, yes: bool, context: &mut Context<'_, '_>) -> Result<(), Fail> {
    let user = context.client.user(id).await?;
    let name = name(&user);
    if !yes {
        let work = if cancel { ", cancel what they run" } else { "" };
        let erase = if purge { ", erase who they were" } else { "" };
        let _ = write!(context.io.err, "cortex: remove {name} ({}) for good{work}{erase}? [y/N] ", output::cell(&user.id));
        let _ = context.io.err.flush();
        if !said_yes(std::io::stdin().lock()) {
            return Err(Fail::Failed("nobody was removed; --yes removes without asking".into()));
        }
    }
    context.client.delete_user(id, heir, cancel, purge).await?;
    match context.format() {
        Format::Table => context.tell(&format!("{name}: removed; their tasks stay to be read")),
        Format::Json => output::json(context.io, &serde_json::json!({ "id": id, "removed": true }))?,
    }
    Ok(())
}

async fn accept(from_stdin: bool, context: &mut Context<'_, '_>) -> Result<(), Fail> {
    let (link, password) = if from_stdin { read_both()? } else { ask_both(context)? };
    let (url, token) = parts(&link).ok_or_else(|| Fail::Usage("that is no link of an invite: it is https://HUB/accept#TOKEN".into()))?;
    let client = Client::new(url, Credentials::None)?;
    let reply = client.accept_invite(&AcceptRequest { token: token.to_owned(), password, device_name: host_name() }).await;
    let reply = reply.map_err(|e| match e {
        Error::Problem { problem, .. } if problem.status == 401 => Fail::Failed(problem.detail),
        e => Fail::Hub(e),
    })?;
    let tokens = crate::Tokens { access_token: reply.access_token.clone(), refresh_token: reply.refresh_token.clone() };
    let me = Client::new(url, Credentials::Tokens(tokens))?.me().await?;
    keep(client.url().to_owned(), me.user.username, reply, context)
}

/// The hub's address and the token of a link.
fn parts(link: &str) -> Option<(&str, &str)> {
    let (page, token) = link.trim().split_once('#').filter(|(_, token)| !token.is_empty())?;
    Some((page.strip_suffix("/accept")?, token))
}

fn read_both() -> Result<(String, String), Fail> {
    let mut text = String::new();
    let read = std::io::stdin().lock().take(MAX_INPUT_BYTES).read_to_string(&mut text);
    read.map_err(|e| Fail::Failed(format!("cannot read standard input: {e}")))?;
    let mut lines = text.lines();
    match (lines.next(), lines.next()) {
        (Some(link), Some(password)) if !password.is_empty() => Ok((link.to_owned(), password.to_owned())),
        _ => Err(Fail::Usage("standard input holds the link on its first line and the password on its second".into())),
    }
}

fn ask_both(context: &mut Context<'_, '_>) -> Result<(String, String), Fail> {
    let stdin = std::io::stdin();
    if !stdin.is_terminal() {
        return Err(Fail::Usage("there is no terminal to ask at; use: cortex user accept --stdin < FILE".to_owned()));
    }
    let _ = write!(context.io.err, "Link: ");
    let _ = context.io.err.flush();
    let mut link = String::new();
    stdin.lock().take(MAX_INPUT_BYTES).read_line(&mut link).map_err(|e| Fail::Failed(format!("cannot read the link: {e}")))?;
    let ask = |prompt| rpassword::prompt_password(prompt).map_err(|_| no_terminal());
    let password = ask("New password: ")?;
    if ask("Again: ")? != password {
        return Err(Fail::Failed("the two are not the same; nothing was sent".into()));
    }
    Ok((link, password))
}

/// The id of a person who is given by id or name. Upper and lower case are the same, as for the hub.
async fn user_id(client: &Client, text: &str) -> Result<String, Fail> {
    if is_id(text, "user_") {
        return Ok(text.to_owned());
    }
    let users = client.users().await?;
    let folded: Vec<(&str, String)> =
        users.iter().map(|u| (u.id.as_str(), u.username.as_deref().unwrap_or_default().to_ascii_lowercase())).collect();
    Ok(pick("user", &text.to_ascii_lowercase(), &folded, |u| (u.0, &u.1), |_| true)?.0.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links() {
        assert_eq!(parts("https://hub.example.org/accept#cmi_abc\n"), Some(("https://hub.example.org", "cmi_abc")));
        assert_eq!(parts("http://h:1/base/accept#x"), Some(("http://h:1/base", "x")));
        for no in ["", "cmi_abc", "https://hub/accept", "https://hub/accept#", "https://hub/other#x", "#x"] {
            assert_eq!(parts(no), None, "{no}");
        }
    }
}
