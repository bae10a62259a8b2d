//! Who one is for the hub: tokens, cookies, keys and devices, and what is none of these.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as B64;
use ed25519_dalek::{Signer, SigningKey};
use mesh_tests::{Hub, PASSWORD, checked, shown, text, until};
use reqwest::{Client, Method, RequestBuilder, Response};
use serde_json::{Value, json};
use std::process::Output;

fn web() -> Client {
    Client::builder().no_proxy().redirect(reqwest::redirect::Policy::none()).build().unwrap()
}

async fn answer(method: &str, path: &str, r: RequestBuilder) -> (u16, Value) {
    let (status, body) = checked(method, path, r.send().await.unwrap()).await;
    (status, serde_json::from_slice(&body).unwrap_or(Value::Null))
}

async fn log_in(hub: &Hub, device: &str) -> Value {
    let body = json!({"username": "admin", "password": PASSWORD, "device_name": device});
    let path = "/api/v1/auth/login";
    let (status, tokens) = answer("POST", path, web().post(format!("{}{path}", hub.http)).json(&body)).await;
    assert_eq!(status, 200, "{tokens}");
    tokens
}

/// A call with this bearer token.
async fn with(hub: &Hub, token: &str, method: &str, path: &str, body: Option<Value>) -> (u16, Value) {
    let mut r = web().request(method.parse().unwrap(), format!("{}{path}", hub.http)).bearer_auth(token);
    if let Some(body) = body {
        r = r.json(&body);
    }
    answer(method, path, r).await
}

async fn me(hub: &Hub, token: &str) -> u16 {
    with(hub, token, "GET", "/api/v1/auth/me", None).await.0
}

/// HMAC-SHA256 (RFC 2104), for keys of at most a block.
fn hmac(key: &[u8], text: &[u8]) -> [u8; 32] {
    let block = |mask: u8| -> Vec<u8> { (0..64).map(|i| key.get(i).copied().unwrap_or(0) ^ mask).collect() };
    mesh_core::sha256(&[block(0x5c), mesh_core::sha256(&[block(0x36), text.to_vec()].concat()).to_vec()].concat())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_is_not_exactly_ours_is_refused() {
    let hub = Hub::start().await;
    let genuine = text(&log_in(&hub, "a").await, "access_token");
    assert_eq!(me(&hub, &genuine).await, 200);
    let parts: Vec<&str> = genuine.split('.').collect();
    let read = |part: &str| -> Value { serde_json::from_slice(&B64.decode(part).unwrap()).unwrap() };
    let (header, claims) = (read(parts[0]), read(parts[1]));
    assert_eq!(header["alg"], "EdDSA");

    // With the hub's own key, so that each is refused for the one thing that is wrong with it.
    let seed = std::fs::read_to_string(hub.data().join("keys/jwt.key")).unwrap();
    let seed = u256(seed.trim());
    let (own, stranger) = (SigningKey::from_bytes(&seed), SigningKey::from_bytes(&[9; 32]));
    let joined = |header: &Value, claims: &Value| format!("{}.{}", B64.encode(header.to_string()), B64.encode(claims.to_string()));
    let signed = |key: &SigningKey, header: &Value, claims: &Value| {
        let text = joined(header, claims);
        format!("{text}.{}", B64.encode(key.sign(text.as_bytes()).to_bytes()))
    };
    let but = |of: &Value, field: &str, value: Value| {
        let mut changed = of.clone();
        changed[field] = value;
        changed
    };
    assert_eq!(me(&hub, &signed(&own, &header, &claims)).await, 200, "the test signs as the hub does");

    let public = own.verifying_key();
    let jwk = json!({"kty": "OKP", "crv": "Ed25519", "x": B64.encode(stranger.verifying_key().as_bytes())});
    let hs256 = |key: &[u8]| {
        let text = joined(&json!({"alg": "HS256", "typ": "JWT"}), &claims);
        format!("{text}.{}", B64.encode(hmac(key, text.as_bytes())))
    };
    let altered = |at: usize| {
        let mut all = parts.clone();
        let first = if all[at].starts_with('A') { "B" } else { "A" };
        let part = format!("{first}{}", &all[at][1..]);
        all[at] = &part;
        all.join(".")
    };
    let ghost = "0198c0de-0000-7000-8000-000000000000";
    let bad = [
        ("an altered header", altered(0)),
        ("altered claims", altered(1)),
        ("an altered signature", altered(2)),
        ("no signature", format!("{}.{}.", parts[0], parts[1])),
        ("two parts", format!("{}.{}", parts[0], parts[1])),
        ("four parts", format!("{genuine}.{}", parts[2])),
        ("other claims, the old signature", format!("{}.{}", joined(&header, &but(&claims, "exp", json!(9_999_999_999i64))), parts[2])),
        ("another key", signed(&stranger, &header, &claims)),
        ("expired", signed(&own, &header, &but(&claims, "exp", json!(1_000_000_000)))),
        ("without an end", signed(&own, &header, &but(&claims, "exp", Value::Null))),
        ("another audience", signed(&own, &header, &but(&claims, "aud", json!(format!("hub_{ghost}"))))),
        ("several audiences, none ours", signed(&own, &header, &but(&claims, "aud", json!([format!("hub_{ghost}"), "x"])))),
        ("no audience", signed(&own, &header, &but(&claims, "aud", Value::Null))),
        ("nobody's", signed(&own, &header, &but(&claims, "sub", json!(format!("user_{ghost}"))))),
        ("no log-in", signed(&own, &header, &but(&claims, "sid", json!(format!("login_{ghost}"))))),
        ("alg none", format!("{}.", joined(&json!({"alg": "none"}), &claims))),
        ("alg None", format!("{}.", joined(&json!({"alg": "None"}), &claims))),
        ("alg none, signed", signed(&own, &json!({"alg": "none"}), &claims)),
        ("HS256 under the public key", hs256(public.as_bytes())),
        ("HS256 under the public key as text", hs256(hex(public.as_bytes()).as_bytes())),
        ("HS256 under nothing", hs256(b"")),
        ("RS256", signed(&own, &json!({"alg": "RS256"}), &claims)),
        ("a kid that is a path", signed(&stranger, &but(&header, "kid", json!("../../../../dev/null")), &claims)),
        ("a kid that is SQL", signed(&stranger, &but(&header, "kid", json!("x' UNION SELECT 'k")), &claims)),
        ("a key of its own", signed(&stranger, &but(&header, "jwk", jwk), &claims)),
        ("a key from elsewhere", signed(&stranger, &but(&header, "jku", json!(format!("{}/keys", hub.http))), &claims)),
        ("a huge token", format!("{genuine}{}", "A".repeat(20_000))),
        ("a huge header", signed(&own, &but(&header, "kid", json!("k".repeat(10_000))), &claims)),
        ("a refresh token", text(&log_in(&hub, "b").await, "refresh_token")),
        ("an API key that nobody made", format!("cmk_{}", "A".repeat(43))),
        ("nothing", "x".into()),
    ];
    let mut said = vec![];
    for (what, token) in &bad {
        let (status, problem) = with(&hub, token, "GET", "/api/v1/auth/me", None).await;
        assert_eq!((status, &problem["code"]), (401, &json!("unauthenticated")), "{what}: {problem}");
        said.push(text(&problem, "detail"));
    }
    said.dedup();
    assert_eq!(said.len(), 1, "no answer tells which part was wrong: {said:?}");
    let log = hub.process.log();
    for (what, token) in &bad[..bad.len() - 1] {
        assert!(!log.contains(&token[..token.len().min(200)]), "{what} is in the log");
    }
    assert_eq!(me(&hub, &genuine).await, 200, "the genuine one is as good as before");

    // Never in a URL.
    let r = web().get(format!("{}/api/v1/auth/me?access_token={genuine}", hub.http)).send().await.unwrap();
    assert_eq!(r.status(), 401);
}

fn u256(hex: &str) -> [u8; 32] {
    let bytes: Vec<u8> = (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect();
    bytes.try_into().unwrap()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Each described call, with credentials that do not count: the same refusal, whatever is asked for.
#[tokio::test(flavor = "multi_thread")]
async fn no_call_answers_without_credentials_that_count() {
    let hub = Hub::start().await;
    let ended = log_in(&hub, "ended").await;
    let ended = text(&ended, "access_token");
    assert_eq!(with(&hub, &ended, "POST", "/api/v1/auth/logout", None).await.0, 204);
    let (_, key) = hub.call("POST", "/api/v1/api-keys", Some(json!({"name": "gone", "scopes": ["*"]}))).await;
    assert_eq!(hub.call("DELETE", &format!("/api/v1/api-keys/{}", text(&key, "id")), None).await.0, 204);
    let (_, low) = hub.call("POST", "/api/v1/api-keys", Some(json!({"name": "low", "scopes": ["agents:manage"]}))).await;
    let (gone, low) = (text(&key, "secret"), text(&low, "secret"));

    // By hand: what a stranger may ask for. It may only shrink.
    let mut open = vec![
        "GET /",
        "GET /docs",
        "GET /docs/{file}",
        "GET /docs/skill.md",
        "GET /llms.txt",
        "GET /healthz",
        "GET /openapi.json",
        "GET /readyz",
        "GET /api/v1/downloads",
        "GET /api/v1/downloads/{target}/cortex-node",
        "POST /api/v1/auth/login",
        "POST /api/v1/auth/refresh",
        "POST /api/v1/auth/accept",
        // JSON-RPC asks for credentials by method.
        "POST /",
        "POST /rpc",
        "GET /rpc/ws",
    ];
    // What a key may always do: say whose it is and what that person has, and go.
    let own = ["GET /api/v1/auth/me", "POST /api/v1/auth/logout", "GET /api/v1/api-keys", "GET /api/v1/grants", "GET /api/v1/system/info"];
    let described = hub.get("/openapi.json").await;
    let ghost = "0198c0de-0000-7000-8000-000000000000";
    for (path, item) in described["paths"].as_object().unwrap() {
        for method in item.as_object().unwrap().keys().map(|m| m.to_uppercase()) {
            let call = format!("{method} {path}");
            if let Some(at) = open.iter().position(|o| *o == call) {
                open.remove(at);
                continue;
            }
            let noun = ["nodes/invites", "api-keys", "devices", "nodes", "sessions", "users", "grants", "agents"].iter();
            let noun = noun.zip(["inv", "key", "dev", "node", "sess", "user", "grant", "agent"]);
            let prefix = noun.into_iter().find(|(n, _)| path.contains(&format!("/{n}/"))).map_or("task", |(_, p)| p);
            let url = path.replace("{id}", &format!("{prefix}_{ghost}")).replace(['{', '}'], "");
            let ask = async |token: Option<&str>| {
                let mut r = web().request(method.parse().unwrap(), format!("{}{url}", hub.http)).json(&json!({}));
                if let Some(token) = token {
                    r = r.bearer_auth(token);
                }
                answer(&method, &url, r).await
            };
            for token in [None, Some(&ended), Some(&gone)] {
                let (status, said) = ask(token.map(|t| t.as_str())).await;
                assert_eq!((status, &said["code"]), (401, &json!("unauthenticated")), "{call}: {said}");
            }
            if !own.contains(&&call[..]) {
                let (status, said) = ask(Some(&low)).await;
                assert!((400..500).contains(&status) && status != 401, "{call} with a key for something else: {status} {said}");
            }
        }
    }
    assert!(open.is_empty(), "described no more, or not open: {open:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn devices_are_log_ins_that_can_be_named_trusted_and_ended() {
    let hub = Hub::start().await;
    let (first, second) = (log_in(&hub, "desk").await, log_in(&hub, "\u{202e}attic\n").await);
    let (own, other) = (text(&first, "access_token"), text(&second, "access_token"));
    let (_, list) = with(&hub, &own, "GET", "/api/v1/devices", None).await;
    let devices = list["items"].as_array().unwrap();
    let names: Vec<&str> = devices.iter().map(|d| d["name"].as_str().unwrap()).collect();
    assert_eq!(&names[..2], ["attic", "desk"], "newest first: {list}");
    let desk = &devices[1];
    assert!(desk["new"] == true && desk["trusted"] == false && desk["current"] == true && devices[0]["current"] == false, "{list}");
    assert_eq!((&desk["address"], &desk["first_address"]), (&json!("127.0.0.1"), &json!("127.0.0.1")));
    let (_, page) = with(&hub, &own, "GET", "/api/v1/devices?limit=1", None).await;
    let next = format!("/api/v1/devices?limit=1&cursor={}", text(&page, "next_cursor"));
    assert_eq!(with(&hub, &own, "GET", &next, None).await.1["items"][0]["id"], desk["id"]);
    assert_eq!(with(&hub, &own, "GET", "/api/v1/api-keys?cursor=AAAA", None).await.0, 400);

    // A session names the device that it was made on; one of a key names none.
    let (_, session) = with(&hub, &own, "POST", "/api/v1/sessions", Some(json!({"name": "s"}))).await;
    assert_eq!(session["device_id"], desk["id"]);
    let shown = hub.get(&format!("/api/v1/sessions/{}", text(&session, "id"))).await;
    assert_eq!(shown["device_id"], desk["id"]);
    let (_, key) = hub.call("POST", "/api/v1/api-keys", Some(json!({"name": "k", "scopes": ["*"]}))).await;
    let key = text(&key, "secret");
    let (_, session) = with(&hub, &key, "POST", "/api/v1/sessions", Some(json!({"name": "t"}))).await;
    assert_eq!(session["device_id"], Value::Null);

    let attic = format!("/api/v1/devices/{}", text(&devices[0], "id"));
    let (status, trusted) = with(&hub, &own, "PATCH", &attic, Some(json!({"trusted": true, "name": "loft"}))).await;
    assert_eq!((status, &trusted["trusted"], &trusted["new"], &trusted["name"]), (200, &json!(true), &json!(false), &json!("loft")));
    let (_, not) = with(&hub, &own, "PATCH", &attic, Some(json!({"trusted": false}))).await;
    assert!(not["trusted"] == false && not["new"] == false && not["name"] == "loft", "{not}");
    for (bad, status) in
        [(json!({"name": ""}), 422), (json!({"name": "a\u{202e}b"}), 422), (json!({"trusted": 1}), 400), (json!({"id": "x"}), 400)]
    {
        assert_eq!(with(&hub, &own, "PATCH", &attic, Some(bad.clone())).await.0, status, "{bad}");
    }
    // A key knows nothing of devices.
    for (method, path, body) in [("GET", "/api/v1/devices", None), ("PATCH", &attic[..], Some(json!({}))), ("DELETE", &attic[..], None)] {
        assert_eq!(with(&hub, &key, method, path, body).await.0, 403, "{method}");
    }
    for absent in ["/api/v1/devices/dev_0198c0de-0000-7000-8000-000000000000", "/api/v1/devices/x", "/api/v1/devices/..%2f"] {
        assert_eq!(with(&hub, &own, "DELETE", absent, None).await.0, 404, "{absent}");
    }

    // Ended: no token of it counts any more.
    assert_eq!(me(&hub, &other).await, 200);
    assert_eq!(with(&hub, &own, "DELETE", &attic, None).await.0, 204);
    assert_eq!(me(&hub, &other).await, 401, "at once");
    let refresh = json!({"refresh_token": second["refresh_token"]});
    assert_eq!(hub.call("POST", "/api/v1/auth/refresh", Some(refresh)).await.0, 401);
    assert_eq!(with(&hub, &own, "DELETE", &attic, None).await.0, 404);
    assert_eq!(me(&hub, &own).await, 200, "other devices stay");
    let (_, list) = with(&hub, &own, "GET", "/api/v1/devices", None).await;
    assert!(list["items"].as_array().unwrap().iter().all(|d| d["name"] != "loft"), "{list}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_replaced_or_taken_back_counts_no_more() {
    let hub = Hub::start().await;
    let refresh = async |token: &Value| hub.call("POST", "/api/v1/auth/refresh", Some(json!({"refresh_token": token}))).await;
    // A refresh token that comes again: it was stolen, and nobody knows which of the two is the thief.
    let first = log_in(&hub, "a").await;
    let (status, second) = refresh(&first["refresh_token"]).await;
    assert_eq!(status, 200);
    let (old, new) = (text(&first, "access_token"), text(&second, "access_token"));
    assert_eq!((me(&hub, &old).await, me(&hub, &new).await), (200, 200));
    assert_eq!(refresh(&first["refresh_token"]).await.0, 401);
    assert_eq!((me(&hub, &old).await, me(&hub, &new).await), (401, 401), "both copies, at once");
    assert_eq!(refresh(&second["refresh_token"]).await.0, 401);

    // A key that was removed, and one whose end comes.
    let end = time::OffsetDateTime::now_utc() + time::Duration::seconds(15);
    let end = end.format(&time::format_description::well_known::Rfc3339).unwrap();
    let (_, ending) = hub.call("POST", "/api/v1/api-keys", Some(json!({"name": "e", "scopes": ["*"], "expires_at": end}))).await;
    let (_, removed) = hub.call("POST", "/api/v1/api-keys", Some(json!({"name": "r", "scopes": ["*"]}))).await;
    let secret = text(&removed, "secret");
    assert_eq!(me(&hub, &secret).await, 200);
    assert_eq!(hub.call("DELETE", &format!("/api/v1/api-keys/{}", text(&removed, "id")), None).await.0, 204);
    assert_eq!(me(&hub, &secret).await, 401, "at once");
    let secret = text(&ending, "secret");
    until("the key's end", async || (me(&hub, &secret).await == 401).then_some(())).await;

    // A password that was changed: all log-ins end but the one that changed it.
    let (own, other) = (log_in(&hub, "own").await, log_in(&hub, "other").await);
    let own_access = text(&own, "access_token");
    let change = async |new: &str| {
        let body = json!({"current_password": PASSWORD, "new_password": new});
        with(&hub, &own_access, "POST", "/api/v1/auth/password", Some(body)).await
    };
    for bad in ["", "elf letters", &"x".repeat(257), &"é".repeat(257)] {
        let (status, said) = change(bad).await;
        assert_eq!((status, &said["code"]), (422, &json!("bad_password")), "{bad}");
    }
    let (_, key) = hub.call("POST", "/api/v1/api-keys", Some(json!({"name": "k", "scopes": ["*"]}))).await;
    let body = json!({"current_password": PASSWORD, "new_password": "a much better one"});
    assert_eq!(with(&hub, &text(&key, "secret"), "POST", "/api/v1/auth/password", Some(body)).await.0, 403, "no key changes passwords");
    let longest = "é".repeat(256);
    assert_eq!(change(&longest).await.0, 204);
    assert_eq!((me(&hub, &own_access).await, me(&hub, &text(&other, "access_token")).await), (200, 401));
    assert_eq!(refresh(&other["refresh_token"]).await.0, 401);
    assert_eq!(refresh(&own["refresh_token"]).await.0, 200);
    assert_eq!(hub.call("POST", "/api/v1/auth/login", Some(json!({"username": "admin", "password": longest}))).await.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scope_is_a_whole_word_and_no_more_than_its_owner_has() {
    let hub = Hub::start().await;
    let make = async |scopes: &[&str]| hub.call("POST", "/api/v1/api-keys", Some(json!({"name": "k", "scopes": scopes}))).await;
    let bad = [
        "nodes:*x",
        "*:",
        "*:*",
        "**",
        "",
        " ",
        "nodes",
        "nodes:",
        ":read",
        "nodes:readx",
        "xnodes:read",
        "nodes:rea",
        "NODES:READ",
        "nodes:read ",
        "nodes:read,tasks:read",
        "tasks:approve",
        "nodes*",
        "*nodes:read",
        "@/etc/passwd",
    ];
    for scope in bad {
        for scopes in [&[scope][..], &["nodes:read", scope][..]] {
            let (status, said) = make(scopes).await;
            assert_eq!((status, &said["code"]), (422, &json!("bad_scope")), "{scopes:?}: {said}");
        }
    }
    assert_eq!(make(&[]).await.1["code"], "bad_scope");
    let (_, twice) = make(&["nodes:read", "*", "nodes:read"]).await;
    assert_eq!(twice["scopes"], json!(["nodes:read", "*"]));

    let may = async |scopes: &[&str]| {
        let (status, key) = make(scopes).await;
        assert_eq!(status, 201, "{key}");
        let (_, me) = with(&hub, &text(&key, "secret"), "GET", "/api/v1/auth/me", None).await;
        me["permissions"].as_array().unwrap().iter().map(|p| p.as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let all = may(&["*"]).await;
    assert!(all.contains(&"nodes:manage".into()) && all.iter().all(|p| !p.starts_with("system:") && p != "tasks:approve"), "{all:?}");
    assert_eq!(may(&["system:*"]).await, ["system:administer"]);
    assert_eq!(may(&["system:audit"]).await, ["system:audit"]);
    assert_eq!(may(&["tasks:*"]).await, ["tasks:read", "tasks:dispatch"]);

    // A key makes nothing that outlives it.
    let (_, key) = make(&["*", "system:*"]).await;
    let secret = text(&key, "secret");
    let (status, _) = with(&hub, &secret, "POST", "/api/v1/api-keys", Some(json!({"name": "l", "scopes": ["nodes:read"]}))).await;
    assert_eq!(status, 403);
    let (_, used) = hub.call("GET", "/api/v1/api-keys?limit=1", None).await;
    assert!(used["items"][0]["last_used_at"].is_string() && used["items"][0]["secret"].is_null(), "{used}");
    let stored = std::fs::read(hub.data().join("hub.db")).unwrap();
    assert!(!stored.windows(secret.len()).any(|w| w == secret.as_bytes()), "the secret is not in the database");
}

/// What a page of the hub does: a cookie that it cannot read, and the token that says it may use it.
struct Page {
    web: Client,
    url: String,
    origin: String,
    cookie: String,
    csrf: String,
}

/// The value of the cookie that an answer sets.
fn cookie_of(r: &Response) -> String {
    let all: Vec<&str> = r.headers().get_all("set-cookie").iter().map(|v| v.to_str().unwrap()).collect();
    let [one] = all[..] else { panic!("one cookie, not {all:?}") };
    let (pair, attributes) = one.split_once("; ").unwrap();
    let mut attributes: Vec<&str> = attributes.split("; ").filter(|a| !a.starts_with("Max-Age=")).collect();
    attributes.sort_unstable();
    assert_eq!(attributes, ["HttpOnly", "Path=/", "SameSite=Strict", "Secure"], "{one}");
    let (name, value) = pair.split_once('=').unwrap();
    assert_eq!(name, "__Host-cortex");
    value.to_owned()
}

impl Page {
    async fn open(hub: &Hub) -> Self {
        let login = format!("{}/api/v1/auth/login?cookie=true", hub.http);
        let r = web().post(login).header("origin", &hub.http).json(&json!({"username": "admin", "password": PASSWORD}));
        let r = r.send().await.unwrap();
        let cookie = cookie_of(&r);
        let (status, body) = checked("POST", "/api/v1/auth/login?cookie=true", r).await;
        let body: Value = serde_json::from_slice(&body).unwrap();
        let mut fields: Vec<&str> = body.as_object().unwrap().keys().map(String::as_str).collect();
        fields.sort_unstable();
        assert_eq!((status, &fields[..]), (200, &["csrf_token", "expires_in"][..]), "no token in the body");
        assert_eq!(body["expires_in"], 600);
        Self { web: web(), url: hub.http.clone(), origin: hub.http.clone(), cookie, csrf: text(&body, "csrf_token") }
    }
    /// A call with the cookie alone.
    fn bare(&self, method: &str, path: &str) -> RequestBuilder {
        let method: Method = method.parse().unwrap();
        self.web.request(method, format!("{}{path}", self.url)).header("cookie", format!("x=1; __Host-cortex={}", self.cookie))
    }
    /// As the page's own script makes it.
    fn call(&self, method: &str, path: &str) -> RequestBuilder {
        self.bare(method, path).header("origin", &self.origin).header("x-csrf-token", &self.csrf)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_logs_in_by_cookie_and_shows_that_it_asks() {
    let hub = Hub::start_with(&[("CORTEX_PUBLIC_URL", "https://hub.example.org")], &[]).await;
    let mut page = Page::open(&hub).await;
    let other = Page::open(&hub).await;
    let me = "/api/v1/auth/me";
    let make = |r: RequestBuilder| r.json(&json!({"name": "s"}));
    let sessions = "/api/v1/sessions";
    let (status, said) = answer("GET", me, page.bare("GET", me)).await;
    assert_eq!((status, &said["csrf_token"]), (200, &json!(page.csrf)), "a page that was loaded anew learns its token");
    assert!(hub.get(me).await["csrf_token"].is_null(), "without a cookie there is none");
    assert_eq!(answer("POST", sessions, make(page.call("POST", sessions))).await.0, 201);

    // Each of these would do something that a page of somebody else asks for.
    let csrf = |token: &str| page.bare("POST", sessions).header("origin", &page.origin).header("x-csrf-token", token);
    let from = |origin: &str| page.bare("POST", sessions).header("origin", origin).header("x-csrf-token", &page.csrf);
    let refused = [
        ("no token", page.bare("POST", sessions).header("origin", &page.origin), "bad_csrf_token"),
        ("an empty token", csrf(""), "bad_csrf_token"),
        ("another log-in's token", csrf(&other.csrf), "bad_csrf_token"),
        ("half a token", csrf(&page.csrf[..32]), "bad_csrf_token"),
        ("two tokens", page.call("POST", sessions).header("x-csrf-token", &page.csrf), "bad_csrf_token"),
        ("no origin", page.bare("POST", sessions).header("x-csrf-token", &page.csrf), "foreign_origin"),
        ("no origin that is one", from("null"), "foreign_origin"),
        ("a foreign origin", from("https://evil.test"), "foreign_origin"),
        ("one that begins like ours", from("https://hub.example.org.evil.test"), "foreign_origin"),
        ("one that ends like ours", from("https://evil-hub.example.org"), "foreign_origin"),
        ("one below ours", from("https://x.hub.example.org"), "foreign_origin"),
        ("another port", from("http://127.0.0.1:1"), "foreign_origin"),
        ("ours, as anybody on the way could be", from("http://hub.example.org"), "foreign_origin"),
        ("ours and another", page.call("POST", sessions).header("origin", "https://evil.test"), "foreign_origin"),
    ];
    for (what, r, code) in refused {
        let (status, said) = answer("POST", sessions, make(r)).await;
        assert_eq!((status, &said["code"]), (403, &json!(code)), "{what}: {said}");
    }
    assert_eq!(hub.get(sessions).await["items"].as_array().unwrap().len(), 1, "none of them made one");
    for method in ["PATCH", "DELETE", "PUT"] {
        let path = format!("{sessions}/sess_0198c0de-0000-7000-8000-000000000000");
        let status = page.bare(method, &path).json(&json!({})).send().await.unwrap().status();
        assert!([403, 405, 501].contains(&status.as_u16()), "{method} {status}");
    }
    assert_eq!(answer("GET", me, page.bare("GET", me).header("origin", "https://evil.test")).await.0, 403, "nor may it read");
    assert_eq!(answer("POST", sessions, make(from("https://hub.example.org"))).await.0, 201, "the public address");
    let forged = page.web.get(format!("{}{me}", page.url)).header("cookie", format!("__Host-cortex=x.{}", "y".repeat(99)));
    assert_eq!(answer("GET", me, forged).await.0, 401);
    let (_, key) = hub.call("POST", "/api/v1/api-keys", Some(json!({"name": "k", "scopes": ["*"]}))).await;
    let keyed = page.web.get(format!("{}{me}", page.url)).header("cookie", format!("__Host-cortex=x.{}", text(&key, "secret")));
    assert_eq!(answer("GET", me, keyed).await.0, 401, "an API key is no cookie");
    // A log-in from a foreign page would make its reader act as somebody else.
    let r = web().post(format!("{}/api/v1/auth/login?cookie=true", hub.http)).header("origin", "https://evil.test");
    assert_eq!(r.json(&json!({"username": "admin", "password": PASSWORD})).send().await.unwrap().status(), 403);

    // Renewed, it is another cookie for the same log-in.
    let refresh = "/api/v1/auth/refresh";
    for r in [
        page.bare("POST", refresh),
        page.bare("POST", refresh).header("origin", &page.origin),
        page.bare("POST", refresh).header("x-csrf-token", &page.csrf),
    ] {
        assert_eq!(answer("POST", refresh, r).await.0, 403);
    }
    assert_eq!(answer("POST", refresh, page.web.post(format!("{}{refresh}", page.url))).await.0, 401);
    let r = page.call("POST", refresh).send().await.unwrap();
    let fresh = cookie_of(&r);
    let (status, body) = checked("POST", refresh, r).await;
    let body: Value = serde_json::from_slice(&body).unwrap();
    assert_eq!((status, &body["csrf_token"], &body["access_token"]), (200, &json!(page.csrf), &Value::Null));
    assert_ne!(fresh, page.cookie);
    let old = std::mem::replace(&mut page.cookie, fresh);
    assert_eq!(answer("GET", me, page.bare("GET", me)).await.0, 200);
    let devices = hub.get("/api/v1/devices").await;
    assert_eq!(devices["items"].as_array().unwrap().len(), 3, "the test's own, and one for each page: {devices}");

    // Logged out: the cookie is taken back, and what it held counts no more.
    let logout = "/api/v1/auth/logout";
    assert_eq!(answer("POST", logout, page.bare("POST", logout)).await.0, 403);
    let r = page.call("POST", logout).send().await.unwrap();
    assert_eq!((r.status().as_u16(), &cookie_of(&r)[..]), (204, ""));
    assert!(r.headers()["set-cookie"].to_str().unwrap().contains("Max-Age=0"));
    for cookie in [&old, &page.cookie] {
        let r = page.web.get(format!("{}{me}", page.url)).header("cookie", format!("__Host-cortex={cookie}"));
        assert_eq!(answer("GET", me, r).await.0, 401);
    }
    // One that comes back after it was renewed ends the log-in, by cookie too.
    let mut page = other;
    let r = page.call("POST", refresh).send().await.unwrap();
    let stolen = std::mem::replace(&mut page.cookie, cookie_of(&r));
    let r = page.web.post(format!("{}{refresh}", page.url)).header("cookie", format!("__Host-cortex={stolen}"));
    assert_eq!(answer("POST", refresh, r.header("origin", &page.origin).header("x-csrf-token", &page.csrf)).await.0, 401);
    assert_eq!(answer("GET", me, page.bare("GET", me)).await.0, 401, "both copies");
    let log = hub.process.log();
    assert!(!log.contains(&page.csrf) && !log.contains(&stolen) && !log.contains("cmr_"), "no secret is in the log");
}

/// As much as comes at once: what it costs is bounded, and others are served meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_log_ins_at_once_cost_little_memory() {
    // Its connections and those of the tests beside it.
    let mut files = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    files.current = files.maximum;
    rustix::process::setrlimit(rustix::process::Resource::Nofile, files).unwrap();
    let hub = Hub::start().await;
    let web = web();
    let one = async |n: u32| {
        let name = if n.is_multiple_of(2) { "admin".to_owned() } else { format!("nobody{n}") };
        let r = web.post(format!("{}/api/v1/auth/login", hub.http)).json(&json!({"username": name, "password": "wrong password 1"}));
        // Of so many connections some may be refused by the system itself.
        r.send().await.ok().map(|r| (r.status().as_u16(), r.headers().get("retry-after").cloned()))
    };
    let all = futures::future::join_all((0..1000).map(one));
    let meanwhile = async {
        for _ in 0..20 {
            hub.get("/api/v1/auth/me").await;
        }
    };
    let (answers, ()) = futures::join!(all, meanwhile);
    let answers: Vec<_> = answers.into_iter().flatten().collect();
    assert!(answers.iter().any(|(status, _)| *status == 401));
    for (status, retry_after) in &answers {
        assert!([401, 429, 503].contains(status), "{status}");
        assert!(*status == 401 || retry_after.is_some(), "{status} says when to come again");
    }
    let status = std::fs::read_to_string(format!("/proc/{}/status", hub.process.id())).unwrap();
    let peak = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap().trim().trim_end_matches(" kB").parse::<u64>().unwrap();
    // A thousand hashes would be 19 GiB.
    assert!(peak < 400 << 10, "{peak} KiB");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_program_lists_trusts_and_ends_devices() {
    let hub = Hub::start().await;
    hub.cli_login();
    let far = log_in(&hub, "far away").await;
    let run = |args: &[&str]| -> Output { hub.cli().args(args).output().unwrap() };
    let out = run(&["device", "ls"]);
    let said = shown(&out);
    assert!(out.status.success() && said.contains("far away") && said.contains("new") && said.contains("yes"), "{said}");
    let out = run(&["device", "trust", "far away"]);
    assert!(out.status.success() && shown(&out).contains("trusted"), "{}", shown(&out));
    let out = run(&["device", "trust", "far away", "--off", "--output", "json"]);
    let device: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert!(device["trusted"] == false && device["new"] == false, "{device}");
    let out = run(&["device", "rm", &text(&device, "id")]);
    assert!(out.status.success(), "{}", shown(&out));
    assert_eq!(me(&hub, &text(&far, "access_token")).await, 401);
    let out = run(&["device", "rm", "far away"]);
    assert!(out.status.code() == Some(1) && shown(&out).contains("cortex device ls"), "{}", shown(&out));

    // Words that begin with @ are words.
    let secret = hub.dir.path().join("secret");
    std::fs::write(&secret, "the content of a file").unwrap();
    let at = format!("@{}", secret.display());
    for args in
        [&["session", "new", &at][..], &["key", "add", &at, "--scope", "nodes:read"], &["device", "rm", &at], &["node", "show", &at]]
    {
        let out = run(args);
        assert!(!shown(&out).contains("the content of a file"), "{}", shown(&out));
    }
    assert_eq!(hub.get("/api/v1/sessions").await["items"][0]["name"], at.as_str());
}
