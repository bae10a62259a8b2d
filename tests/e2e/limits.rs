//! How often anybody may ask, seen from outside.

use futures::{SinkExt, StreamExt};
use mesh_tests::{Hub, PASSWORD, PATIENCE, text, until};
use reqwest::header::RETRY_AFTER;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;

/// One token a second: no machine is so slow that it would never run out of them.
const SLOW: &[(&str, &str)] = &[("CORTEX_LIMITS_API_PER_SECOND", "1"), ("CORTEX_LIMITS_API_BURST", "20")];

fn web() -> reqwest::Client {
    reqwest::Client::builder().no_proxy().build().unwrap()
}

/// Status, code and Retry-After of a call with this bearer, if any.
async fn ask(web: &reqwest::Client, url: &str, bearer: Option<&str>) -> (u16, String, Option<u64>) {
    let mut r = web.get(url);
    if let Some(token) = bearer {
        r = r.bearer_auth(token);
    }
    let answer = r.send().await.expect("the hub answers");
    let status = answer.status().as_u16();
    let retry = answer.headers().get(RETRY_AFTER).map(|v| v.to_str().unwrap().parse().unwrap());
    let body: Value = answer.json().await.unwrap_or_default();
    (status, body["code"].as_str().unwrap_or_default().to_owned(), retry)
}

async fn until_limited(what: &str, web: &reqwest::Client, url: &str, bearer: Option<&str>) -> usize {
    let mut before = 0;
    until(what, async || {
        for _ in 0..50 {
            let (status, code, retry) = ask(web, url, bearer).await;
            if status == 429 {
                assert_eq!((code.as_str(), retry), ("rate_limited", Some(1)));
                return Some(before);
            }
            before += 1;
        }
        None
    })
    .await
}

async fn metrics(hub: &Hub) -> String {
    let facts: Value = serde_json::from_slice(&std::fs::read(hub.data().join("hub.json")).unwrap()).unwrap();
    web().get(format!("http://{}/metrics", text(&facts, "metrics"))).send().await.unwrap().text().await.unwrap()
}

fn counted(metrics: &str, series: &str) -> f64 {
    metrics.lines().find_map(|l| l.strip_prefix(series)?.strip_prefix(' ')?.parse().ok()).unwrap_or_else(|| panic!("no {series}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn each_principal_has_a_rate_of_its_own() {
    let hub = Hub::start_with(SLOW, &[]).await;
    let (web, me) = (web(), format!("{}/api/v1/auth/me", hub.http));
    let (_, login) = hub.call("POST", "/api/v1/auth/login", Some(json!({"username": "admin", "password": PASSWORD}))).await;
    let user = text(&login, "access_token");
    let (_, key) = hub.call("POST", "/api/v1/api-keys", Some(json!({"name": "k", "scopes": ["*"]}))).await;
    let key = text(&key, "secret");

    let before = until_limited("the user to be limited", &web, &me, Some(&user)).await;
    assert!(before >= 15, "a burst is allowed: {before}");
    assert_eq!(ask(&web, &me, Some(&key)).await.0, 200, "a key has a rate of its own");

    // Without credentials that count, the address has one: whatever it asks for, and with whatever token.
    let description = format!("{}/openapi.json", hub.http);
    until_limited("the address to be limited", &web, &description, None).await;
    until_limited("calls without a token", &web, &me, None).await;
    until_limited("calls with a bad token", &web, &me, Some("cmk_nobody")).await;
    until_limited("a bad token at what needs none", &web, &description, Some("cmk_nobody")).await;
    until_limited("what is not there", &web, &format!("{}/nothing", hub.http), None).await;
    assert_eq!(ask(&web, &me, Some(&key)).await.0, 200, "which is no matter of those that count");

    until_limited("the key to be limited", &web, &me, Some(&key)).await;
    for probe in ["/healthz", "/readyz"] {
        for _ in 0..30 {
            assert_eq!(ask(&web, &format!("{}{probe}", hub.http), None).await.0, 200, "{probe} always answers");
        }
    }

    let m = metrics(&hub).await;
    for principal in ["user", "key", "address"] {
        assert!(counted(&m, &format!("cortex_rate_limited_total{{principal=\"{principal}\"}}")) >= 1.0);
    }
    until("the user's tokens to come back", async || (ask(&web, &me, Some(&user)).await.0 == 200).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_websocket_says_counts() {
    let hub = Hub::start_with(SLOW, &[]).await;
    let (_, key) = hub.call("POST", "/api/v1/api-keys", Some(json!({"name": "k", "scopes": ["*"]}))).await;
    let host = hub.http.trim_start_matches("http://");
    let mut request = format!("ws://{host}/api/v1/ws").into_client_request().unwrap();
    request.headers_mut().insert("authorization", format!("Bearer {}", text(&key, "secret")).try_into().unwrap());
    let (socket, _) = tokio_tungstenite::client_async(request, TcpStream::connect(host).await.unwrap()).await.unwrap();
    let (mut to, mut from) = socket.split();
    let chatter = async {
        // The hub may have hung up already.
        for _ in 0..500 {
            if to.send(Message::text("?")).await.is_err() {
                return;
            }
        }
    };
    let end = async {
        loop {
            match from.next().await {
                Some(Ok(Message::Close(Some(frame)))) => return Some((u16::from(frame.code), frame.reason.to_string())),
                Some(Ok(_)) => {}
                other => panic!("it ends with a reason: {other:?}"),
            }
        }
    };
    let ((), end) = tokio::time::timeout(PATIENCE, futures::future::join(chatter, end)).await.expect("the hub ends it");
    assert!(end.as_ref().is_some_and(|(code, why)| *code == 1008 && why.contains("api_per_second")), "{end:?}");
}

/// What a process had at most, in bytes.
fn peak(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_wrong_passwords_cost_little_and_the_right_one_is_taken_after() {
    const DEFAULTS: &[(&str, &str)] = &[("CORTEX_LIMITS_LOGIN_PER_MINUTE_ADDRESS", "10"), ("CORTEX_LIMITS_LOGIN_PER_MINUTE_ACCOUNT", "5")];
    let mut files = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    files.current = files.maximum;
    rustix::process::setrlimit(rustix::process::Resource::Nofile, files).unwrap();
    let hub = Hub::start_with(DEFAULTS, &[]).await;
    let (web, url) = (web(), format!("{}/api/v1/auth/login", hub.http));
    let before = peak(hub.process.id());
    let tries = (0..1_000).map(|n| {
        let r = web.post(&url).json(&json!({"username": "admin", "password": format!("a wrong password {n}")}));
        async move {
            let answer = r.send().await.expect("the hub answers");
            let retry = answer.headers().contains_key(RETRY_AFTER);
            let status = answer.status().as_u16();
            assert_eq!(retry, status != 401, "{status}");
            status
        }
    });
    let begun = tokio::time::Instant::now();
    let mut by_status = BTreeMap::<u16, u64>::new();
    for status in futures::future::join_all(tries).await {
        *by_status.entry(status).or_default() += 1;
    }
    // One more comes back every 12 s, should this take so long.
    let most = 6 + begun.elapsed().as_secs() / 12;
    let looked_at = by_status.remove(&401).unwrap_or(0);
    assert!((1..=most).contains(&looked_at), "{looked_at} were looked at");
    assert!(by_status.keys().all(|s| [429, 503].contains(s)), "{by_status:?}");
    let grown = peak(hub.process.id()) - before;
    println!("{looked_at} hashes, then {by_status:?}; {} MiB more", grown >> 20);
    assert!(grown < 200 << 20, "{grown} bytes more");
    until("the right password to be taken", async || {
        let r = web.post(&url).json(&json!({"username": "Admin", "password": PASSWORD})).send().await.unwrap();
        (r.status() == 200).then_some(())
    })
    .await;
    assert!(counted(&metrics(&hub).await, "cortex_logins_throttled_total{by=\"account\"}") >= 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_throttled_log_in_tells_nothing_of_the_account() {
    // One a minute, which nobody has to wait for: each has its second answer long before.
    let hub = Hub::start_with(&[("CORTEX_LIMITS_LOGIN_PER_MINUTE_ACCOUNT", "1")], &[]).await;
    let mut answers = vec![];
    for name in ["admin", "nobody"] {
        for _ in 0..2 {
            let body = json!({"username": name, "password": "a wrong password"});
            let (status, v) = hub.call("POST", "/api/v1/auth/login", Some(body)).await;
            let detail = text(&v, "detail");
            let words = detail.split(" in ").next().unwrap().to_owned();
            answers.push((status, text(&v, "code"), words));
        }
    }
    assert_eq!((answers[0].0, answers[1].0, answers[1].1.as_str()), (401, 429, "rate_limited"), "{answers:?}");
    assert_eq!(answers[..2], answers[2..]);
}
