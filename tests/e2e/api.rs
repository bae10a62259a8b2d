//! The hub's description of its own API: that it is served and valid, that the router and it agree, and
//! that requests made from it find nothing that breaks.
#![expect(clippy::disallowed_methods, reason = "tests start the real binaries and watch the real clock")]

use mesh_tests::{Hub, Node, program, shown, text};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests lie in the repository")
}

/// A Python program that `scripts/setup test` installed.
fn python(name: &str) -> PathBuf {
    let path = repository().join("target/python/bin").join(name);
    assert!(path.exists(), "{} is missing; run: scripts/setup test", path.display());
    path
}

fn outside() -> reqwest::Client {
    reqwest::Client::builder().no_proxy().redirect(reqwest::redirect::Policy::none()).build().unwrap()
}

fn operations(doc: &Value) -> Vec<(String, String, Value)> {
    let items = doc["paths"].as_object().unwrap().iter();
    items.flat_map(|(path, item)| item.as_object().unwrap().iter().map(|(m, o)| (m.to_uppercase(), path.clone(), o.clone()))).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_description_is_served_printed_and_valid() {
    let hub = Hub::start().await;
    let web = outside();
    let answer = web.get(format!("{}/openapi.json", hub.http)).send().await.unwrap();
    assert_eq!((answer.status().as_u16(), &answer.headers()["content-type"]), (200, &"application/json".parse().unwrap()));
    let served: Value = answer.json().await.unwrap();
    assert!(served["openapi"].as_str().unwrap().starts_with("3.1."));
    assert_eq!(served["servers"][0]["url"], "/", "it names no host");

    let out = Command::new(program("cortex-hub")).arg("openapi").output().unwrap();
    assert!(out.status.success(), "{}", shown(&out));
    assert_eq!(serde_json::from_slice::<Value>(&out.stdout).unwrap(), served);
    let file = hub.dir.path().join("openapi.json");
    std::fs::write(&file, &out.stdout).unwrap();
    let out = Command::new(python("openapi-spec-validator")).arg(&file).output().unwrap();
    assert!(out.status.success(), "{}", shown(&out));

    // Each described call is there, and asks for credentials exactly where it says so.
    let ghost = "0198c0de-0000-7000-8000-000000000000";
    for (method, path, operation) in operations(&served) {
        let url = path.replace("{id}", &format!("task_{ghost}")).replace("{node_id}", "x").replace("{target}", "x").replace("{file}", "x");
        let r = web.request(method.parse().unwrap(), format!("{}{url}", hub.http)).send().await.unwrap();
        let (status, said) = mesh_tests::checked(&method, &url, r).await;
        let said = String::from_utf8_lossy(&said);
        assert!(![405, 501].contains(&status) && !said.contains("there is nothing at"), "{method} {path}: {status} {said}");
        if operation["security"].as_array().is_some_and(|s| s.len() > 1 && s.contains(&json!({}))) {
            // JSON-RPC asks by method.
        } else if operation["security"] != json!([{}]) {
            assert_eq!(status, 401, "{method} {path} is said to need credentials: {said}");
        } else if !path.contains("/auth/") {
            assert_ne!(status, 401, "{method} {path} is said to need none");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_asks_no_foreign_host() {
    let hub = Hub::start().await;
    let web = outside();
    let page = web.get(format!("{}/docs", hub.http)).send().await.unwrap();
    assert_eq!(page.status(), 200);
    assert_eq!(page.headers()["content-type"], "text/html; charset=utf-8");
    let policy = page.headers()["content-security-policy"].to_str().unwrap().to_owned();
    assert!(policy.contains("default-src 'none'") && policy.contains("connect-src 'self'"), "{policy}");
    for source in policy.split([' ', ';']).filter(|s| !s.is_empty() && !s.ends_with("-src") && !s.starts_with('\'')) {
        assert!(["data:", "base-uri", "form-action", "frame-ancestors"].contains(&source), "{source} in {policy}");
    }
    let html = page.text().await.unwrap();
    assert!(!html.contains("<script>") && !html.contains(" on"), "the policy lets no inline script run");
    let links: Vec<&str> = html.split(['"']).filter(|t| t.starts_with("docs/") || t.contains("//")).collect();
    assert_eq!(links, ["docs/favicon-32x32.png", "docs/swagger-ui.css", "docs/swagger-ui-bundle.js", "docs/start.js"]);
    for link in links {
        let r = web.get(format!("{}/{link}", hub.http)).send().await.unwrap();
        assert_eq!(r.status(), 200, "{link}");
        let kind = r.headers()["content-type"].to_str().unwrap().to_owned();
        assert!(link.ends_with(".css") == (kind == "text/css") && link.ends_with(".js") == (kind == "text/javascript"), "{link}: {kind}");
        let bytes = r.bytes().await.unwrap();
        assert!(!bytes.is_empty());
        if link.ends_with("start.js") {
            let said = String::from_utf8_lossy(&bytes);
            assert!(said.contains("url: \"openapi.json\"") && said.contains("validatorUrl: null") && !said.contains("//"), "{said}");
        }
    }
    for absent in ["docs/index.html", "docs/oauth2-redirect.html", "docs/..%2fhub.db"] {
        assert_eq!(web.get(format!("{}/{absent}", hub.http)).send().await.unwrap().status(), 404, "{absent}");
    }
}

/// Requests made from the description, valid and not, with an admin's key against a real hub. Its node has
/// been there and is away, so whatever is dispatched only waits.
#[tokio::test(flavor = "multi_thread")]
async fn made_up_requests_break_nothing() {
    let mut hub = Hub::start().await;
    let mut node = Node::join(&hub, "n").await;
    let task = hub.sh("echo out; echo err >&2").await;
    assert!(node.command(&["stop"]).output().unwrap().status.success());
    node.daemon().ended().await;
    node.offline(&hub).await;
    let (_, session) = hub.call("POST", "/api/v1/sessions", Some(json!({"name": "s"}))).await;
    let (status, key) = hub.call("POST", "/api/v1/api-keys", Some(json!({"name": "fuzz", "scopes": ["*"]}))).await;
    assert_eq!(status, 201, "{key}");
    let known = json!({"node": node.id, "task": task["id"], "sess": session["id"]});

    let run = || {
        let mut c = Command::new(python("schemathesis"));
        c.arg("--config-file").arg(repository().join("tests/api/schemathesis.toml"));
        c.args(["run", &format!("{}/openapi.json", hub.http), "--no-color", "--checks", "all", "--phases", "examples,coverage,fuzzing"]);
        c.args(["--header", &format!("Authorization: Bearer {}", text(&key, "secret"))]);
        // A stream without an end, and upgrades that this client cannot make.
        c.args(["--exclude-path", "/api/v1/events", "--exclude-path", "/api/v1/ws", "--exclude-path", "/rpc/ws"]);
        // Until all is built, 501 stands where 405 will.
        c.args(["--exclude-checks", "unsupported_method"]);
        // The same requests each time, whatever the machine has else to do.
        c.args(["--generation-deterministic", "--max-examples", "25", "--no-shrink", "--continue-on-failure"]);
        c.args(["--request-timeout", "30", "--warnings", "off"]);
        c.env("SCHEMATHESIS_HOOKS", "hooks").env("PYTHONPATH", repository().join("tests/api")).env("CORTEX_TEST_KNOWN", known.to_string());
        c.env("PYTHONDONTWRITEBYTECODE", "1").current_dir(hub.dir.path()).output().expect("schemathesis runs")
    };
    let out: Output = tokio::task::block_in_place(run);
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.success(), "{}", shown(&out));
    // All but those three and the description itself.
    let selected = operations(&hub.get("/openapi.json").await).len() - 4;
    assert!(said.contains(&format!("Tested: {selected}")), "not every call was tried: {said}");
    assert!(hub.process.is_running());
    let health = hub.get("/readyz").await;
    assert_eq!(health["status"], "ready");
    assert!(!hub.process.log().contains("panicked"), "{}", hub.process.log());
}
