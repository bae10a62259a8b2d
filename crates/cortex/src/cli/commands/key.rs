//! `key`: API keys.

use super::{Context, is_id, pick};
use crate::cli::args::{Format, KeyCommand};
use crate::cli::{Fail, output};
use crate::rest::ApiKeyRequest;

pub(super) async fn perform(command: KeyCommand, context: &mut Context<'_, '_>) -> Result<(), Fail> {
    match command {
        KeyCommand::New { name, scopes, expires_at } => {
            let key = context.client.create_api_key(&ApiKeyRequest { name, scopes, expires_at }).await?;
            if context.format() == Format::Json {
                return output::json(context.io, &key);
            }
            let Some(secret) = key.secret else {
                return Err(Fail::Failed(format!("the hub made the key {} and did not give its secret; delete it", key.id)));
            };
            context.tell(&format!("made {}; its secret is shown this once", output::cell(&key.id)));
            // Alone on standard output, so that it can be piped to where it is kept.
            writeln!(context.io.out, "{}", output::cell(&secret))?;
            Ok(context.io.out.flush()?)
        }
        KeyCommand::Ls => {
            let keys = context.client.api_keys().await?;
            let now = context.now_ms;
            output::list(context.io, context.format(), &keys, &["name", "prefix", "scopes", "used", "expires", "id"], |k| {
                vec![
                    output::cell(&k.name),
                    output::cell(&k.prefix),
                    output::or_dash(Some(&k.scopes.join(" "))),
                    output::ago(k.last_used_at.as_deref(), now),
                    k.expires_at.as_deref().map_or_else(|| "never".to_owned(), output::cell),
                    output::cell(&k.id),
                ]
            })
        }
        KeyCommand::Rm { key } => {
            let id = if is_id(&key, "key_") {
                key
            } else {
                let keys = context.client.api_keys().await?;
                pick("key", &key, &keys, |k| (&k.id, &k.name), |_| true)?.id.clone()
            };
            context.client.delete_api_key(&id).await?;
            context.tell("deleted");
            Ok(())
        }
    }
}
