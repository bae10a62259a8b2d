//! Invites, their file, and the line to paste.

use super::App;
use super::body::{Creating, PathId, Query};
use super::page::{PlainList, page, window};
use super::problem::{Answer, Refusal};
use super::views;
use super::who::Who;
use crate::config::host_of;
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use hub_engine::nodes::NewInvite;
use mesh_core::{InviteId, enrol};
use mesh_process::proxy;
use mesh_wire::convert::rfc3339;
use mesh_wire::rest::*;
use std::fmt::Write;

/// Invite a machine
#[utoipa::path(
    post, path = "/nodes/invites", tag = "invites",
    request_body(content = InviteRequest, example = json!({"name": "laptop", "labels": {"room": "lab"}})),
    params(("Idempotency-Key" = Option<String>, Header)),
    responses(
        (status = 201, description = "The invite with its secret, told once", body = InviteReply),
        (status = 409, description = "The `Idempotency-Key` has made an invite before, whose secret was told once (`already_created`)"),
        (status = 422, description = "A name, label or time that cannot be; `idempotency_mismatch`"),
    ),
)]
pub async fn create(State(app): State<App>, who: Who, asked: Creating<InviteRequest>) -> Answer<(StatusCode, Json<InviteReply>)> {
    let (r, keyed) = asked.split(&app, &who);
    if r.policy.is_some() {
        return Err(Refusal::not_yet("a policy of an invite"));
    }
    let made = app.nodes.invite(who.caller(), r.name, r.labels, r.ttl_secs, keyed).await?;
    let config_yaml = yaml(&app, &made);
    let download_url = format!("{}/api/v1/downloads/{}/cortex-node", app.facts.public_url, super::downloads::TARGET);
    let join_command = join_command(&app, &config_yaml, &download_url);
    Ok((
        StatusCode::CREATED,
        Json(InviteReply {
            id: made.invite.id.to_string(),
            expires_at: rfc3339(made.invite.expires_at),
            config_yaml,
            join_command,
            download_url,
        }),
    ))
}

/// Invites
#[utoipa::path(
    get, path = "/nodes/invites", tag = "invites",
    params(PlainList),
    responses((status = 200, description = "A page", body = Page<InviteView>)),
)]
pub async fn list(State(app): State<App>, who: Who, Query(q): Query<PlainList>) -> Answer<Json<Page<InviteView>>> {
    let w = window(q.limit, q.cursor.as_deref(), "invites", InviteId::from_bytes)?;
    let found = app.nodes.invites(who.caller(), w).await?;
    let now = app.clock.now_ms();
    Ok(Json(page(found, w.limit, "invites", |i| *i.id.as_bytes(), |i| views::invite(i, now))))
}

/// Revoke an invite that was not used
#[utoipa::path(
    delete, path = "/nodes/invites/{id}", tag = "invites",
    responses((status = 204, description = "Revoked"), (status = 409, description = "It was used or revoked before")),
)]
pub async fn revoke(State(app): State<App>, who: Who, PathId(id): PathId<InviteId>) -> Answer<StatusCode> {
    app.nodes.revoke_invite(who.caller(), id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// A YAML scalar in double quotes. JSON's escapes are all YAML's too.
fn quoted(text: &str) -> String {
    serde_json::Value::String(text.to_owned()).to_string()
}

/// The invite file. Its secret is told here and kept nowhere.
fn yaml(app: &App, made: &NewInvite) -> String {
    let i = &made.invite;
    let hub = app.keys.hub;
    let mut y = String::new();
    // Writing to a string cannot fail.
    let _ = writeln!(y, "# cortex-node invite · one machine · expires {}", rfc3339(i.expires_at));
    if for_this_machine_alone(app) {
        let _ = writeln!(y, "# {LOOPBACK}");
    }
    let also: Vec<String> = app.facts.node_also.iter().map(|a| quoted(a)).collect();
    let also = if also.is_empty() { String::new() } else { format!("also: [{}], ", also.join(", ")) };
    let _ = writeln!(
        y,
        "hub: {{ id: {}, grpc: {}, {also}url: {}, server_name: {} }}",
        quoted(&hub.to_string()),
        quoted(&app.facts.node_address),
        quoted(&app.facts.public_url),
        quoted(&enrol::server_name(hub))
    );
    // Of one moment.
    let authority = app.keys.authority();
    let issuing = authority.issuing();
    let _ = writeln!(y, "ca_pin: {}", quoted(&issuing.pin()));
    let _ = writeln!(y, "task_keys: [{}]", quoted(&format!("ed25519:{}", STANDARD.encode(issuing.public()))));
    let secret = URL_SAFE_NO_PAD.encode(made.seed);
    let _ = writeln!(y, "invite: {{ id: {}, secret: {} }}", quoted(&i.id.to_string()), quoted(&secret));
    let labels: Vec<String> = i.labels.iter().map(|(k, v)| format!("{}: {}", quoted(k), quoted(v))).collect();
    let name = i.name.as_ref().map(|n| format!("name: {}, ", quoted(n))).unwrap_or_default();
    let _ = writeln!(y, "node: {{ {name}labels: {{ {} }}, workspace_root: \"~/cortex\" }}", labels.join(", "));
    y
}

const LOOPBACK: &str = "This address is loopback: it works on the hub's own machine only. For another machine start the hub with --lan, or with CORTEX_NODE_ADDR and CORTEX_PUBLIC_URL set to addresses that it can reach.";

/// Does an invite name an address that another machine would take for its own?
fn for_this_machine_alone(app: &App) -> bool {
    is_loopback(&app.facts.node_address) || host_of(&app.facts.public_url).is_some_and(proxy::is_loopback)
}

fn is_loopback(host_port: &str) -> bool {
    proxy::is_loopback(host_port.rsplit_once(':').map_or(host_port, |(h, _)| h))
}

/// One shell text: fetches the binary where it is missing, checks its SHA-256, and gives the invite by
/// standard input. The secret is in no argument list and no address.
fn join_command(app: &App, yaml: &str, url: &str) -> String {
    let mut c = String::new();
    if for_this_machine_alone(app) {
        let _ = writeln!(c, "# {LOOPBACK}");
    }
    // The hub's own authority is not known on the machine; the pin, like the digest, is ours.
    let pinned = app.facts.download_pin.as_ref().map(|pin| format!(" -k --pinnedpubkey '{pin}'")).unwrap_or_default();
    match app.binaries.of(super::downloads::TARGET) {
        Some(b) => {
            // A text of ours in single quotes: neither a URL nor a digest holds one.
            let _ = writeln!(
                c,
                "if ! command -v cortex-node >/dev/null && ! [ -x ./cortex-node ]; then curl -fsSL{pinned} -o cortex-node.part '{url}' && echo '{}  cortex-node.part' | sha256sum -c --quiet - && chmod 755 cortex-node.part && mv cortex-node.part cortex-node; fi",
                hex::encode(b.sha256)
            );
        }
        None => {
            let _ = writeln!(c, "# This hub has no cortex-node binary for {} beside it: install it first.", super::downloads::TARGET);
        }
    }
    let _ = write!(c, "PATH=\"$PATH:.\" cortex-node join - <<'CORTEX_INVITE'\n{yaml}CORTEX_INVITE\n");
    c
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_seen() {
        for yes in ["127.0.0.1:7443", "[::1]:7443", "localhost:1", "127.9.9.9:1"] {
            assert!(is_loopback(yes), "{yes}");
        }
        for no in ["10.0.0.1:7443", "hub.example.org:7443", "[fe80::1]:7443"] {
            assert!(!is_loopback(no), "{no}");
        }
    }

    #[test]
    fn names_cannot_break_out_of_the_file() {
        assert_eq!(quoted("a\" }\nx: y"), r#""a\" }\nx: y""#);
    }
}
