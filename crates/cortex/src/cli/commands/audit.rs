//! `audit`: what was done, by whom and how it ended.

use super::{Context, session_id};
use crate::AuditFilter;
use crate::cli::args::{AuditCommand, AuditLs, Format};
use crate::cli::{Fail, output};
use futures::StreamExt;
use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

pub(super) async fn perform(command: AuditCommand, context: &mut Context<'_, '_>) -> Result<(), Fail> {
    match command {
        AuditCommand::Ls(args) => ls(args, context).await,
        AuditCommand::Export { file } => export(&file, context).await,
        AuditCommand::Verify => verify(context).await,
    }
}

async fn ls(args: AuditLs, context: &mut Context<'_, '_>) -> Result<(), Fail> {
    let session = match &args.session {
        None => None,
        Some(text) => Some(session_id(&context.client, text).await?),
    };
    let AuditLs { kind, user, resource, outcome, door, since, until, limit, .. } = args;
    let filter = AuditFilter { kind, user, session, resource, outcome, door, since, until, limit: Some(limit), cursor: None };
    let page = context.client.audit(&filter).await?;
    let columns = ["at", "action", "outcome", "user", "resource", "address", "door"];
    output::list(context.io, context.format(), &page.items, &columns, |e| {
        vec![
            output::cell(&e.at),
            output::cell(&e.action),
            output::cell(&e.outcome),
            output::or_dash(Some(&e.actor.username).filter(|n| !n.is_empty()).or(e.actor.user_id.as_ref()).map(String::as_str)),
            output::or_dash(Some(&e.resource.id)),
            output::or_dash(e.address.as_deref()),
            output::cell(&e.actor.door),
        ]
    })
}

async fn export(file: &Path, context: &mut Context<'_, '_>) -> Result<(), Fail> {
    let mut pieces = Box::pin(context.client.audit_export().await?);
    if file == Path::new("-") {
        while let Some(piece) = pieces.next().await {
            context.io.out.write_all(&piece?)?;
        }
        return Ok(context.io.out.flush()?);
    }
    let open = OpenOptions::new().write(true).create_new(true).mode(0o600).open(file);
    let mut to = open.map_err(|e| Fail::Failed(format!("{}: {e}", file.display())))?;
    while let Some(piece) = pieces.next().await {
        to.write_all(&piece?)?;
    }
    to.sync_all()?;
    context.tell(&format!("wrote {}; check it with: cortex-hub audit verify {0}", file.display()));
    Ok(())
}

async fn verify(context: &mut Context<'_, '_>) -> Result<(), Fail> {
    let found = context.client.audit_verify().await?;
    if context.format() == Format::Json {
        output::json(context.io, &found)?;
    } else {
        output::list(context.io, Format::Table, &found.heads, &["chain", "rows", "signed", "state"], |h| {
            let bad = h.first_bad_seq.map(|seq| format!("row {seq}: {}", h.problem.as_deref().unwrap_or("bad")));
            let good = if h.restored { "good, ends at a restore" } else { "good" };
            vec![
                output::cell(&h.chain),
                h.seq.to_string(),
                h.signed_seq.to_string(),
                bad.map_or_else(|| good.to_owned(), |b| output::cell(&b)),
            ]
        })?;
    }
    if found.ok { Ok(()) } else { Err(Fail::Failed("the audit log is not what was written".into())) }
}
