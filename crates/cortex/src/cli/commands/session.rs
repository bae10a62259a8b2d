//! `session`: workspaces that outlive a command.

use super::{Context, node_id, session_id};
use crate::cli::args::{Format, SessionCommand};
use crate::cli::{Fail, output};
use crate::rest::{AttachRequest, SessionPatch, SessionRequest, SessionView};

pub(super) async fn perform(command: SessionCommand, context: &mut Context<'_, '_>) -> Result<(), Fail> {
    match command {
        SessionCommand::New { name, ttl } => {
            let session = context.client.create_session(&SessionRequest { name, ttl_secs: ttl }).await?;
            show(&session, context)
        }
        SessionCommand::Ls => ls(context).await,
        SessionCommand::Show { session } => {
            let id = session_id(&context.client, &session).await?;
            let session = context.client.session(&id).await?;
            show(&session, context)
        }
        SessionCommand::Attach { session, node } => {
            let (session, node) = both(&session, &node, context).await?;
            context.client.attach(&session, &node, &AttachRequest::default()).await?;
            changed(&session, "attached", context).await
        }
        SessionCommand::Detach { session, node } => {
            let (session, node) = both(&session, &node, context).await?;
            context.client.detach(&session, &node).await?;
            changed(&session, "detached", context).await
        }
        SessionCommand::Close { session } => {
            let id = session_id(&context.client, &session).await?;
            context.client.close_session(&id).await?;
            changed(&id, "closed", context).await
        }
        SessionCommand::Set { session, name, ttl } => {
            let id = session_id(&context.client, &session).await?;
            let session = context.client.change_session(&id, &SessionPatch { name, ttl_secs: ttl }).await?;
            show(&session, context)
        }
        SessionCommand::Purge { session } => {
            let id = session_id(&context.client, &session).await?;
            context.client.purge_session(&id).await?;
            changed(&id, "erased", context).await
        }
    }
}

async fn both(session: &str, node: &str, context: &Context<'_, '_>) -> Result<(String, String), Fail> {
    Ok((session_id(&context.client, session).await?, node_id(&context.client, node).await?))
}

/// A word for people; for programs the session as it now is.
async fn changed(id: &str, word: &str, context: &mut Context<'_, '_>) -> Result<(), Fail> {
    match context.format() {
        Format::Table => context.tell(word),
        Format::Json => {
            let session = context.client.session(id).await?;
            output::json(context.io, &session)?;
        }
    }
    Ok(())
}

async fn ls(context: &mut Context<'_, '_>) -> Result<(), Fail> {
    let sessions = context.client.sessions().await?;
    let now = context.now_ms;
    output::list(context.io, context.format(), &sessions, &["name", "status", "nodes", "created", "expires", "id"], |s| {
        vec![
            output::cell(&s.name),
            output::cell(&s.status),
            s.attached_node_ids.len().to_string(),
            output::ago(Some(&s.created_at), now),
            output::cell(&s.expires_at),
            output::cell(&s.id),
        ]
    })
}

fn show(s: &SessionView, context: &mut Context<'_, '_>) -> Result<(), Fail> {
    let fields = vec![
        ("name", output::cell(&s.name)),
        ("id", output::cell(&s.id)),
        ("status", output::cell(&s.status)),
        ("nodes", output::or_dash(Some(&s.attached_node_ids.join(" ")))),
        ("created", output::cell(&s.created_at)),
        ("expires", output::cell(&s.expires_at)),
        ("user", output::cell(&s.user_id)),
    ];
    output::one(context.io, context.format(), s, fields)
}
