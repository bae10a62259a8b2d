//! `grant`: what is shared with others.

use super::{Context, node_id, session_id};
use crate::cli::args::{Format, GrantAdd, GrantCommand};
use crate::cli::{Fail, output};
use crate::rest::{GrantLabels, GrantRequest, GrantResource};

pub(super) async fn perform(command: GrantCommand, context: &mut Context<'_, '_>) -> Result<(), Fail> {
    match command {
        GrantCommand::Add(add) => {
            let request = request(add, context).await?;
            let grant = context.client.create_grant(&request).await?;
            if context.format() == Format::Json {
                return output::json(context.io, &grant);
            }
            context.tell("granted; it is taken back with: cortex grant rm ID");
            // Alone on standard output, so that a script can keep it.
            writeln!(context.io.out, "{}", output::cell(&grant.id))?;
            Ok(context.io.out.flush()?)
        }
        GrantCommand::Ls => {
            let grants = context.client.grants().await?;
            output::list(context.io, context.format(), &grants, &["to", "on", "permissions", "expires", "id"], |g| {
                vec![
                    output::cell(&g.subject),
                    match &g.resource {
                        GrantResource::One(one) => output::cell(one),
                        GrantResource::Labels(l) => output::pairs(&l.labels),
                    },
                    output::cell(&g.permissions.join(" ")),
                    g.expires_at.as_deref().map_or_else(|| "never".to_owned(), output::cell),
                    output::cell(&g.id),
                ]
            })
        }
        GrantCommand::Rm { grant } => {
            context.client.delete_grant(&grant).await?;
            context.tell("taken back");
            Ok(())
        }
    }
}

async fn request(add: GrantAdd, context: &Context<'_, '_>) -> Result<GrantRequest, Fail> {
    let resource = match (add.node, add.session, add.agent) {
        (Some(node), ..) => GrantResource::One(node_id(&context.client, &node).await?),
        (_, Some(session), _) => GrantResource::One(session_id(&context.client, &session).await?),
        (.., Some(agent)) => GrantResource::One(agent),
        _ => GrantResource::Labels(GrantLabels { labels: add.labels.into_iter().collect() }),
    };
    Ok(GrantRequest { subject: add.subject, resource, permissions: add.permissions, expires_at: add.expires_at })
}
