//! Sharing by the command line, and what the door says of requests that cannot be.

use mesh_tests::{Hub, Node, shown, text};
use serde_json::{Value, json};

fn cortex(hub: &Hub, line: &str) -> (Option<i32>, String, String) {
    let out = hub.cli().args(line.split(' ')).output().expect("cortex runs");
    let say = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    (out.status.code(), say(&out.stdout), say(&out.stderr))
}

fn listed(hub: &Hub) -> Vec<Value> {
    let (code, out, err) = cortex(hub, "grant ls --output json");
    assert_eq!(code, Some(0), "{err}");
    let page: Value = serde_json::from_str(&out).expect("a document");
    page["items"].as_array().expect("a list").clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn things_are_shared_by_their_names_and_taken_back() {
    let hub = Hub::start().await;
    hub.cli_login();
    let (_, yaml) = hub.invite(json!({"name": "build-7"})).await;
    let node = Node::prepare("build-7", &yaml);
    let out = node.command(&["join", "invite.yaml", "--enroll-only"]).output().unwrap();
    assert!(out.status.success(), "{}", shown(&out));
    let node = text(&hub.get("/api/v1/nodes").await["items"][0], "id");
    let (status, session) = hub.call("POST", "/api/v1/sessions", Some(json!({"name": "release"}))).await;
    assert_eq!(status, 201);

    let mut made = vec![];
    for (line, resource) in [
        ("grant add guest nodes:read tasks:dispatch --node build-7", json!(node)),
        ("grant add developer sessions:read --session release --expires-at 2999-01-01T00:00:00Z", session["id"].clone()),
        ("grant add guest nodes:read --label os=linux --label zone=a=b", json!({"labels": {"os": "linux", "zone": "a=b"}})),
    ] {
        let (code, out, err) = cortex(&hub, line);
        assert_eq!(code, Some(0), "{line}: {err}");
        assert!(out.starts_with("grant_"), "{out}");
        let found = listed(&hub).into_iter().find(|g| g["id"] == out.as_str()).expect("it is listed");
        assert_eq!(found["resource"], resource, "{line}");
        made.push(out);
    }
    assert_eq!(listed(&hub).len(), 3);
    let (code, _, err) = cortex(&hub, &format!("grant rm {}", made[0]));
    assert_eq!(code, Some(0), "{err}");
    assert_eq!(listed(&hub).len(), 2);
    for (line, says) in [
        (format!("grant rm {}", made[0]), "grant"),
        ("grant add nobody nodes:read --node build-7".to_owned(), "user"),
        ("grant add guest nodes:manage --node build-7".to_owned(), "cannot be granted"),
        ("grant add guest nodes:read --node other".to_owned(), "no node"),
        ("grant add guest agents:read --agent ghost".to_owned(), "agent"),
    ] {
        let (code, _, err) = cortex(&hub, &line);
        assert_eq!(code, Some(1), "{line}: {err}");
        assert!(err.contains(says), "{line}: {err}");
    }
    assert_eq!(cortex(&hub, "grant add guest nodes:read").0, Some(2));

    let ask = async |body: Value| {
        let (status, v) = hub.call("POST", "/api/v1/grants", Some(body)).await;
        (status, v["code"].as_str().unwrap_or_default().to_owned())
    };
    let with = |resource: Value| json!({"subject": "guest", "resource": resource, "permissions": ["nodes:read"]});
    for (body, want) in [
        (with(json!({"labels": {}})), (422, "bad_label")),
        (with(json!({})), (400, "bad_field")),
        (with(json!({"labels": {"a": "b"}, "more": 1})), (400, "bad_field")),
        (with(json!([{"a": "b"}])), (400, "bad_field")),
        (with(json!(7)), (400, "bad_field")),
        (with(json!("node_7")), (404, "not_found")),
        (json!({"subject": "guest", "resource": node, "permissions": []}), (422, "bad_permission")),
        (
            json!({"subject": "guest", "resource": node, "permissions": ["nodes:read"], "expires_at": "2001-01-01T00:00:00Z"}),
            (422, "bad_time"),
        ),
        (json!({"subject": "guest", "resource": node, "permissions": ["nodes:read"], "expires_at": "soon"}), (422, "bad_time")),
        (json!({"subject": "admin", "resource": node}), (400, "bad_field")),
    ] {
        let (status, code) = ask(body.clone()).await;
        assert_eq!((status, code.as_str()), want, "{body}");
    }
    // With its node a grant is gone.
    let (status, _) = hub.call("POST", "/api/v1/grants", Some(with(json!(node)))).await;
    assert_eq!(status, 201);
    assert_eq!(listed(&hub).len(), 3);
    assert_eq!(hub.call("DELETE", &format!("/api/v1/nodes/{node}"), None).await.0, 204);
    assert_eq!(listed(&hub).len(), 2);
}
