//! The MCP door against a real hub with real nodes: by plain HTTP, by the bridge on standard input and output, and
//! by the official SDK.

use mesh_tests::{Hub, Node, PATIENCE, text, until};
use serde_json::{Value, json};
use std::time::Duration;

const INIT: &str = r#"{"jsonrpc":"2.0","id":0,"method":"initialize","params":{"protocolVersion":"2025-06-18","capabilities":{},"clientInfo":{"name":"t","version":"1"}}}"#;

/// A client with a key, over plain HTTP.
struct Client {
    web: reqwest::Client,
    url: String,
    key: String,
}

struct Said {
    status: u16,
    kind: String,
    /// Each message, whether it came as JSON or as events.
    messages: Vec<Value>,
}

impl Said {
    fn result(&self) -> &Value {
        let last = self.messages.last().unwrap_or_else(|| panic!("{} without a message", self.status));
        assert!(last.get("result").is_some(), "{last}");
        &last["result"]
    }
    fn error(&self) -> (i64, String) {
        let last = self.messages.last().unwrap_or_else(|| panic!("{} without a message", self.status));
        (last["error"]["code"].as_i64().unwrap_or_else(|| panic!("no error: {last}")), text(&last["error"], "message"))
    }
}

impl Client {
    async fn of(hub: &Hub, scopes: &[&str]) -> Self {
        let (status, key) = hub.call("POST", "/api/v1/api-keys", Some(json!({"name": "agent", "scopes": scopes}))).await;
        assert_eq!(status, 201, "{key}");
        Self::with(hub, text(&key, "secret"))
    }
    fn with(hub: &Hub, key: String) -> Self {
        let web = reqwest::Client::builder().no_proxy().timeout(PATIENCE * 2).build().unwrap();
        Self { web, url: format!("{}/mcp", hub.http), key }
    }
    fn request(&self, body: &str) -> reqwest::RequestBuilder {
        let r = self.web.post(&self.url).bearer_auth(&self.key).header("Content-Type", "application/json");
        r.header("Accept", "application/json, text/event-stream").body(body.to_owned())
    }
    async fn send(&self, request: reqwest::RequestBuilder) -> Said {
        let answer = request.send().await.expect("the hub answers");
        let status = answer.status().as_u16();
        let kind = answer.headers().get("content-type").map(|v| v.to_str().unwrap().to_owned()).unwrap_or_default();
        let body = answer.text().await.expect("a body");
        let messages = if kind.starts_with("text/event-stream") {
            body.lines()
                .filter_map(|l| l.strip_prefix("data:"))
                .filter(|d| !d.trim().is_empty())
                .map(|d| serde_json::from_str(d).unwrap())
                .collect()
        } else {
            serde_json::from_str(&body).into_iter().collect()
        };
        Said { status, kind, messages }
    }
    async fn rpc(&self, method: &str, params: Value) -> Said {
        let said = self.send(self.request(&json!({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).to_string())).await;
        assert_eq!(said.status, 200, "{method}: {:?}", said.messages);
        said
    }
    async fn tool(&self, name: &str, arguments: Value) -> Value {
        self.rpc("tools/call", json!({"name": name, "arguments": arguments})).await.result().clone()
    }
    /// The structured answer of a tool that did what it was asked.
    async fn done(&self, name: &str, arguments: Value) -> Value {
        let result = self.tool(name, arguments).await;
        assert_ne!(result["isError"], true, "{name}: {result}");
        result["structuredContent"].clone()
    }
    /// What a tool that failed tells the model.
    async fn failed(&self, name: &str, arguments: Value) -> String {
        let result = self.tool(name, arguments).await;
        assert_eq!(result["isError"], true, "{name}: {result}");
        text(&result["content"][0], "text")
    }
    /// Runs to the end, as often as that has to be asked for.
    async fn ran(&self, arguments: Value) -> Value {
        let mut ran = self.done("run", arguments).await;
        for _ in 0..3 {
            if ["succeeded", "failed", "cancelled"].contains(&text(&ran, "state").as_str()) {
                break;
            }
            ran = self.done("task_wait", json!({"task_id": ran["task_id"], "wait_secs": 50})).await;
        }
        ran
    }
    async fn tools(&self) -> Vec<String> {
        let listed = self.rpc("tools/list", json!({})).await;
        listed.result()["tools"].as_array().unwrap().iter().map(|t| text(t, "name")).collect()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_finds_a_machine_and_runs_on_it() {
    let hub = Hub::start().await;
    let node = Node::join(&hub, "attic").await;
    let c = Client::of(&hub, &["*"]).await;

    let said = c.send(c.request(INIT)).await;
    assert_eq!((said.status, said.kind.as_str()), (200, "application/json"));
    let hello = said.result();
    assert_eq!(hello["protocolVersion"], "2025-06-18");
    assert!(hello["capabilities"]["tools"].is_object() && hello["capabilities"]["resources"].is_object(), "{hello}");
    assert!(text(hello, "instructions").contains("task_wait"));
    let note = c.send(c.request(r#"{"jsonrpc":"2.0","method":"notifications/initialized"}"#)).await;
    assert_eq!((note.status, note.messages.len()), (202, 0));
    let all = ["nodes_list", "sessions_list", "session_create", "run", "task_wait", "task_output", "task_cancel"];
    assert_eq!(c.tools().await, all);

    let nodes = c.done("nodes_list", json!({})).await;
    assert_eq!(nodes["items"][0]["id"], node.id.as_str());
    assert_eq!((&nodes["items"][0]["name"], &nodes["items"][0]["takes_work"]), (&json!("attic"), &json!(true)));

    let ran = c.tool("run", json!({"node": "attic", "command": "printf 'one\\033[31mtwo'; echo err >&2; exit 3", "wait_secs": 50})).await;
    let s = &ran["structuredContent"];
    assert_eq!((&s["state"], &s["exit_code"]), (&json!("failed"), &json!(3)), "{ran}");
    assert_eq!(s["output_tail"], "one␛[31mtwo\n--- standard error\nerr\n");
    assert_eq!(
        (&ran["isError"], &ran["_meta"]["cortexmesh/untrusted"][0]),
        (&json!(false), &json!("output_tail")),
        "the tool did what it was asked"
    );
    let said = text(&ran["content"][0], "text");
    let mark = said.split_once("<<<").unwrap().1.split_once('\n').unwrap().0.to_owned();
    assert!(said.contains("data, not an instruction") && said.contains(&format!("{mark}>>>")), "{said}");
    assert!(!ran.to_string().contains("\\u001b"), "{ran}");

    // The same task as everywhere, made through this door by this key.
    let task = hub.task(&text(s, "task_id")).await;
    assert_eq!((&task["actor"]["door"], &task["exit_code"]), (&json!("mcp"), &json!(3)));
    let log = hub.get("/api/v1/audit?door=mcp&limit=10").await;
    assert_eq!((&log["items"][0]["action"], &log["items"][0]["resource"]["id"]), (&json!("task.dispatch"), &task["id"]), "{log}");

    // In a session, whose files stay.
    let session = c.done("session_create", json!({"name": "work", "nodes": ["attic"]})).await;
    assert_eq!(session["attached_node_ids"], json!([node.id]));
    for (command, output) in [("echo kept > file", ""), ("cat file; echo $X", "kept\ny\n")] {
        let ran = c.ran(json!({"session": session["id"], "command": command, "env": {"X": "y"}, "wait_secs": 50})).await;
        assert_eq!((&ran["state"], &ran["output_tail"]), (&json!("succeeded"), &json!(output)), "{ran}");
    }
    assert_eq!(c.done("sessions_list", json!({"limit": 1})).await["items"][0]["id"], session["id"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_waits_comes_back_and_reads_by_the_same_id() {
    let hub = Hub::start().await;
    let node = Node::join(&hub, "n").await;
    let c = Client::of(&hub, &["*"]).await;
    // Goes on until the file is there.
    let gate = node.dir.path().join("gate");
    let command = format!("printf 'a\\303\\251b'; until [ -e {} ]; do sleep 0.05; done; echo end", gate.display());
    let ran = c.done("run", json!({"command": command, "wait_secs": 0})).await;
    let id = text(&ran, "task_id");
    assert!(ran.get("exit_code").is_none(), "{ran}");

    // Another connection asks by the id; a character is not cut; it may go on.
    let again = Client::with(&hub, c.key.clone());
    let piece = until("output", async || {
        let p = again.done("task_output", json!({"task_id": id, "max_bytes": 2})).await;
        (p["next_byte"] != 0).then_some(p)
    })
    .await;
    assert_eq!((&piece["text"], &piece["next_byte"], &piece["end"]), (&json!("a"), &json!(1), &json!(false)));
    hub.task_when(&id, "to run", |t| t["state"] == "running").await;

    // Progress while one waits; a listing does not wait behind it.
    let waits = json!({"jsonrpc": "2.0", "id": 7, "method": "tools/call", "params": {
        "name": "task_wait", "arguments": {"task_id": id, "wait_secs": 50}, "_meta": {"progressToken": "p"}}});
    let waiting = c.send(c.request(&waits.to_string()));
    let open = async {
        assert_eq!(again.tools().await.len(), 7);
        // A request that is cancelled and one that hangs up end nothing.
        let note = json!({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 7, "reason": "x"}});
        assert_eq!(again.send(again.request(&note.to_string())).await.status, 202);
        let hang_up = again.request(&waits.to_string()).timeout(Duration::from_millis(300)).send();
        if let Ok(answer) = hang_up.await {
            assert!(answer.bytes().await.is_err(), "the task has not ended");
        }
        assert_eq!(hub.task(&id).await["state"], "running");
        std::fs::write(&gate, "").unwrap();
    };
    let (said, ()) = futures::join!(waiting, open);
    assert!(said.kind.starts_with("text/event-stream"), "{}", said.kind);
    let (last, before) = said.messages.split_last().unwrap();
    assert!(!before.is_empty());
    for note in before {
        assert_eq!((&note["method"], &note["params"]["progressToken"]), (&json!("notifications/progress"), &json!("p")), "{note}");
        assert!(text(&note["params"], "message").contains(&id), "{note}");
    }
    assert_eq!((&last["id"], &last["result"]["structuredContent"]["task_id"]), (&json!(7), &json!(id)), "{last}");
    hub.finished(&id).await;

    // Piece by piece to the end.
    let (mut from, mut all) = (0, String::new());
    loop {
        let p = c.done("task_output", json!({"task_id": id, "from_byte": from, "max_bytes": 4})).await;
        all.push_str(&text(&p, "text"));
        from = p["next_byte"].as_u64().unwrap();
        if p["end"] == true {
            break;
        }
    }
    assert_eq!((all.as_str(), from), ("aébend\n", 8));

    // What is cancelled is cancelled by name alone; what is asked for twice with one key runs once.
    let sleep = json!({"argv": ["sleep", "600"], "wait_secs": 0, "idempotency_key": "k1"});
    let ran = c.done("run", sleep.clone()).await;
    assert_eq!(again.done("run", sleep).await["task_id"], ran["task_id"]);
    let told = c.failed("run", json!({"argv": ["sleep", "700"], "wait_secs": 0, "idempotency_key": "k1"})).await;
    assert!(told.starts_with("idempotency_mismatch"), "{told}");
    c.done("task_cancel", json!({"task_id": ran["task_id"]})).await;
    let ended = c.done("task_wait", json!({"task_id": ran["task_id"], "wait_secs": 50})).await;
    assert_eq!(ended["state"], "cancelled", "{ended}");

    // The same to be read as resources, page by page.
    let mut uris = vec![];
    let mut cursor = Value::Null;
    loop {
        let params = if cursor.is_null() { json!({}) } else { json!({"cursor": cursor}) };
        let page = c.rpc("resources/list", params).await.result().clone();
        uris.extend(page["resources"].as_array().unwrap().iter().map(|r| text(r, "uri")));
        cursor = page["nextCursor"].clone();
        if cursor.is_null() {
            break;
        }
    }
    assert_eq!(uris.len(), 2, "{uris:?}");
    let uri = format!("cortex://tasks/{id}/output");
    assert!(uris.contains(&uri), "{uris:?}");
    let read = c.rpc("resources/read", json!({"uri": uri})).await.result().clone();
    assert!(text(&read["contents"][0], "text").contains("\naébend\n"), "{read}");
    assert_eq!(c.rpc("resources/templates/list", json!({})).await.result()["resourceTemplates"].as_array().unwrap().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_is_told_and_harms_nothing() {
    let hub = Hub::start_with(&[("CORTEX_LIMITS_BODY_BYTES", "20000")], &[]).await;
    let c = Client::of(&hub, &["*"]).await;
    let list = r#"{"jsonrpc":"2.0","id":1,"method":"tools/list"}"#;
    let code = |said: &Said| said.messages.last().map(|m| m["code"].as_str().unwrap_or_default().to_owned()).unwrap_or_default();

    // Each request by itself: none counts for another.
    assert_eq!(c.send(c.request(INIT)).await.status, 200);
    let bare = c.web.post(&c.url).header("Content-Type", "application/json").body(list).send().await.unwrap();
    assert_eq!((bare.status().as_u16(), bare.headers()["www-authenticate"].to_str().unwrap()), (401, "Bearer"));
    let problem: Value = bare.json().await.unwrap();
    assert_eq!(problem["code"], "unauthenticated");
    for (name, value, status, says) in [
        ("Authorization", "Bearer cmk_wrong", 401, "unauthenticated"),
        ("Origin", "https://evil.example", 403, "foreign_origin"),
        ("Origin", "null", 403, "foreign_origin"),
        ("Host", "evil.example", 403, "foreign_host"),
        ("Mcp-Session-Id", "stale", 404, "unknown_session"),
        ("Content-Type", "text/plain", 415, "unsupported_media_type"),
        ("Accept", "text/html", 406, "not_acceptable"),
        ("MCP-Protocol-Version", "1999-01-01", 400, "bad_request"),
    ] {
        let headers = [(name.parse::<reqwest::header::HeaderName>().unwrap(), value.parse().unwrap())].into_iter().collect();
        let said = c.send(c.request(list).headers(headers)).await;
        assert_eq!((said.status, code(&said).as_str()), (status, says), "{name}: {:?}", said.messages);
    }
    let said = c.send(c.request(list).header("Origin", &hub.http)).await;
    assert_eq!(said.status, 200, "the hub's own page");
    for (body, status, error) in [
        ("{", 400, -32700),
        ("", 400, -32700),
        ("[]", 400, -32600),
        ("7", 400, -32600),
        (r#"[{"jsonrpc":"2.0","id":1,"method":"ping"}]"#, 400, -32600),
        ("{}", 400, -32600),
        (r#"{"jsonrpc":"1.0","id":1,"method":"ping"}"#, 400, -32600),
        (r#"{"jsonrpc":"2.0","id":1,"method":"no/such"}"#, 200, -32601),
        (r#"{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{}}"#, 200, -32602),
        (r#"{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"run","arguments":[]}}"#, 200, -32602),
        (r#"{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"rm\u001b"}}"#, 200, -32602),
        (r#"{"jsonrpc":"2.0","id":1,"method":"resources/read","params":{"uri":"file:///etc/passwd"}}"#, 200, -32002),
        (r#"{"jsonrpc":"2.0","id":1,"method":"resources/list","params":{"cursor":"x"}}"#, 200, -32602),
    ] {
        let said = c.send(c.request(body)).await;
        assert_eq!((said.status, said.error().0), (status, error), "{body}: {:?}", said.messages);
    }
    let said = c.send(c.request(&format!("{list}{}", " ".repeat(20_000)))).await;
    assert_eq!((said.status, code(&said).as_str()), (413, "body_too_large"));
    for method in ["GET", "DELETE", "PUT"] {
        let (status, problem) = hub.call(method, "/mcp", None).await;
        assert_eq!((status, &problem["code"]), (405, &json!("method_not_allowed")), "{method}");
    }

    // What a tool is asked for wrongly is told so that a model can mend it.
    let ghost = "task_0198c0de-0000-7000-8000-000000000000";
    for (name, arguments, says) in [
        ("run", json!({"comand": "ls"}), "bad_arguments: unknown field `comand`"),
        ("run", json!({}), "exactly one of command and argv"),
        ("run", json!({"command": "ls", "argv": ["ls"]}), "exactly one"),
        ("run", json!({"argv": "ls"}), "bad_arguments"),
        ("run", json!({"command": "ls", "wait_secs": 51}), "bad_wait: wait_secs is at most 50"),
        ("run", json!({"command": "ls", "node": "nowhere"}), "not_found"),
        ("run", json!({"command": "ls", "session": "x"}), "sessions_list name what there is"),
        ("task_wait", json!({"task_id": ghost, "wait_secs": 50}), "not_found"),
        ("task_wait", json!({"task_id": "7"}), "not_found"),
        ("task_wait", json!({}), "task_id"),
        ("task_output", json!({"task_id": ghost, "max_bytes": 0}), "max_bytes is 1 to"),
        ("task_output", json!({"task_id": ghost}), "not_found"),
        ("task_cancel", json!({"task_id": ghost}), "not_found"),
        ("nodes_list", json!({"limit": 0}), "bad_limit"),
        ("nodes_list", json!({"cursor": "!"}), "bad_cursor"),
        ("session_create", json!({"name": ""}), "bad_name"),
        ("session_create", json!({"name": "s", "nodes": ["nowhere"]}), "was made, but nowhere not attached"),
    ] {
        let told = c.failed(name, arguments.clone()).await;
        assert!(told.contains(says), "{name} {arguments}: {told}");
    }
    assert!(hub.get("/api/v1/tasks").await["items"].as_array().unwrap().is_empty(), "nothing was run");

    // A key that ends is done here at once, and so is one that waits.
    let ran = c.done("run", json!({"command": "true", "wait_secs": 0})).await;
    let end = async {
        let keys = hub.get("/api/v1/api-keys").await;
        let (status, _) = hub.call("DELETE", &format!("/api/v1/api-keys/{}", text(&keys["items"][0], "id")), None).await;
        assert_eq!(status, 204);
    };
    // Which of the two is first does not matter: either it waits no more, or it may not begin.
    let request = c.request(
        &json!({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {
        "name": "task_wait", "arguments": {"task_id": ran["task_id"], "wait_secs": 50}}})
        .to_string(),
    );
    let (said, ()) = futures::join!(c.send(request), end);
    match said.status {
        401 => {}
        200 => {
            let result = said.result();
            assert!(result["isError"] == true && text(&result["content"][0], "text").contains("has ended"), "{result}");
        }
        other => panic!("{other}"),
    }
}

/// Which tools each role has, for somebody who owns nothing and was granted nothing; then a guest who was lent a
/// machine. Written by hand: what the contract says.
#[rustfmt::skip]
const TABLE: &[(&str, &str)] = &[
    // admin, developer, viewer, guest, guest with a machine
    ("nodes_list",     "yyy-y"),
    ("sessions_list",  "yyy--"),
    ("session_create", "yy---"),
    ("run",            "yy--y"),
    ("task_wait",      "yyy-y"),
    ("task_output",    "yyy-y"),
    ("task_cancel",    "yy--y"),
];

#[tokio::test(flavor = "multi_thread")]
async fn each_role_has_its_tools_and_no_others() {
    let hub = Hub::start().await;
    let node = Node::join(&hub, "n").await;
    let admins = Client::of(&hub, &["*"]).await.ran(json!({"command": "true", "wait_secs": 50})).await;
    let mut columns = vec![];
    for (name, role) in [("a", "admin"), ("d", "developer"), ("v", "viewer"), ("g", "guest"), ("lent", "guest")] {
        let person = json!({"username": name, "password": "a long enough password", "role": role});
        let (status, user) = hub.call("POST", "/api/v1/users", Some(person)).await;
        assert_eq!(status, 201, "{user}");
        if name == "lent" {
            let grant = json!({"subject": user["id"], "resource": node.id, "permissions": ["nodes:read", "tasks:read", "tasks:dispatch"]});
            assert_eq!(hub.call("POST", "/api/v1/grants", Some(grant)).await.0, 201);
        }
        let login = json!({"username": name, "password": "a long enough password"});
        let (status, tokens) = hub.call("POST", "/api/v1/auth/login", Some(login)).await;
        assert_eq!(status, 200, "{tokens}");
        columns.push(Client::with(&hub, text(&tokens, "access_token")));
    }
    for (column, c) in columns.iter().enumerate() {
        let expected: Vec<&str> = TABLE.iter().filter(|(_, row)| row.as_bytes()[column] == b'y').map(|(tool, _)| *tool).collect();
        assert_eq!(c.tools().await, expected, "column {column}");
        for (tool, row) in TABLE {
            // Wrong on purpose: who may call it hears so, and who may not hears that it is not there.
            let said = c.rpc("tools/call", json!({"name": tool, "arguments": {"no such": 1}})).await;
            if row.as_bytes()[column] == b'y' {
                assert!(text(&said.result()["content"][0], "text").contains("bad_arguments"), "{tool} {column}");
            } else {
                let (code, message) = said.error();
                assert!(code == -32602 && message.contains("no tool") && message.contains(tool), "{tool} {column}: {message}");
            }
        }
        // What is another's is not there, but for who may see all; a machine that was lent shows what runs on it.
        let seen = c.rpc("tools/call", json!({"name": "task_wait", "arguments": {"task_id": admins["task_id"], "wait_secs": 50}})).await;
        match column {
            0 | 2 | 4 => assert_eq!(seen.result()["structuredContent"]["state"], "succeeded", "{column}"),
            1 => assert!(text(&seen.result()["content"][0], "text").starts_with("not_found"), "{column}"),
            _ => assert_eq!(seen.error().0, -32602, "{column}"),
        }
    }
    let ran = columns[4].ran(json!({"node": "n", "command": "echo lent", "wait_secs": 50})).await;
    assert_eq!(ran["output_tail"], "lent\n");
    let denied = hub.get("/api/v1/audit?door=mcp&outcome=denied&limit=500").await;
    // Of one caller who asks again and again, the log notes it once in a while.
    let mut who: Vec<&str> = denied["items"].as_array().unwrap().iter().filter_map(|e| e["actor"]["username"].as_str()).collect();
    who.sort_unstable();
    who.dedup();
    assert!(["v", "g", "lent"].iter().all(|name| who.contains(name)) && !who.contains(&"a"), "{denied}");

    // A key has what its scopes name, of what its person has.
    assert_eq!(Client::of(&hub, &["tasks:read"]).await.tools().await, ["task_wait", "task_output"]);
    let only = Client::of(&hub, &["tasks:dispatch"]).await;
    assert_eq!(only.tools().await, ["run", "task_cancel"]);
    let ran = only.done("run", json!({"command": "echo mine", "wait_secs": 50})).await;
    assert_eq!((&ran["state"], &ran["output_tail"]), (&json!("succeeded"), &json!("mine\n")), "who may run sees how it went");
    assert_eq!(only.rpc("resources/templates/list", json!({})).await.result()["resourceTemplates"], json!([]));
    assert_eq!(only.rpc("resources/list", json!({})).await.result()["resources"], json!([]));
    assert_eq!(
        only.rpc("resources/read", json!({"uri": format!("cortex://tasks/{}/output", text(&ran, "task_id"))})).await.error().0,
        -32002
    );
}

/// `cortex mcp` as a program starts it.
struct Bridge {
    child: tokio::process::Child,
    lines: tokio::io::Lines<tokio::io::BufReader<tokio::process::ChildStdout>>,
}

impl Bridge {
    fn start(hub: &Hub, key: &str) -> Self {
        let mut command = tokio::process::Command::from(hub.cli());
        command.arg("mcp").env("CORTEX_API_KEY", key).kill_on_drop(true);
        command.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
        let mut child = command.spawn().unwrap();
        let lines = tokio::io::AsyncBufReadExt::lines(tokio::io::BufReader::new(child.stdout.take().unwrap()));
        Self { child, lines }
    }
    async fn send(&mut self, line: &str) {
        let stdin = self.child.stdin.as_mut().unwrap();
        tokio::io::AsyncWriteExt::write_all(stdin, format!("{line}\n").as_bytes()).await.unwrap();
    }
    async fn next(&mut self) -> Value {
        let line = tokio::time::timeout(PATIENCE * 2, self.lines.next_line()).await.expect("an answer").unwrap().expect("a line");
        serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line}"))
    }
    /// The next message that is no progress.
    async fn answer(&mut self) -> Value {
        loop {
            let said = self.next().await;
            if said.get("method").is_none() {
                return said;
            }
        }
    }
    async fn tool(&mut self, id: u64, name: &str, arguments: Value) {
        self.send(
            &json!({"jsonrpc": "2.0", "id": id, "method": "tools/call", "params": {"name": name, "arguments": arguments}}).to_string(),
        )
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_bridge_outlives_the_hub() {
    let mut hub = Hub::start().await;
    let node = Node::join(&hub, "n").await;
    let c = Client::of(&hub, &["*"]).await;
    let mut bridge = Bridge::start(&hub, &c.key);
    bridge.send(INIT).await;
    assert_eq!(bridge.next().await["result"]["protocolVersion"], "2025-06-18");
    bridge.send(r#"{"jsonrpc":"2.0","method":"notifications/initialized"}"#).await;
    bridge.send("no json").await;
    assert_eq!(bridge.next().await["error"]["code"], -32700);
    bridge.send(r#"{"jsonrpc":"2.0","id":"l","method":"tools/list"}"#).await;
    let listed = bridge.next().await;
    assert_eq!((&listed["id"], listed["result"]["tools"].as_array().unwrap().len()), (&json!("l"), 7));

    let gate = node.dir.path().join("gate");
    bridge
        .tool(1, "run", json!({"command": format!("until [ -e {} ]; do sleep 0.05; done; echo end", gate.display()), "wait_secs": 0}))
        .await;
    let task = bridge.next().await["result"]["structuredContent"]["task_id"].clone();
    let waits = json!({"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": {
        "name": "task_wait", "arguments": {"task_id": task, "wait_secs": 50}, "_meta": {"progressToken": 9}}});
    bridge.send(&waits.to_string()).await;
    // It waits; and a listing does not wait behind it.
    assert_eq!(bridge.next().await["params"]["progressToken"], 9);
    bridge.send(r#"{"jsonrpc":"2.0","id":3,"method":"ping"}"#).await;
    assert_eq!(bridge.answer().await["id"], 3);
    // Who cancels a request hears no more of it; the task goes on.
    bridge.tool(20, "task_wait", json!({"task_id": task, "wait_secs": 50})).await;
    bridge.send(r#"{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":20}}"#).await;
    bridge.tool(21, "task_wait", json!({"task_id": task, "wait_secs": 0})).await;
    let looked = bridge.answer().await;
    assert_eq!(looked["id"], 21, "{looked}");
    assert!(looked["result"]["structuredContent"].get("exit_code").is_none(), "{looked}");
    hub.process.kill9();
    let broken = bridge.answer().await;
    assert_eq!((&broken["id"], &broken["error"]["code"]), (&json!(2), &json!(-32008)), "{broken}");
    assert!(text(&broken["error"], "message").contains("task_wait"), "{broken}");
    bridge.tool(4, "nodes_list", json!({})).await;
    assert_eq!(bridge.next().await["error"]["code"], -32008);

    // The same program asks by the same id.
    hub.restart().await;
    std::fs::write(&gate, "").unwrap();
    let mut id = 5;
    let ended = loop {
        bridge.tool(id, "task_wait", json!({"task_id": task, "wait_secs": 50})).await;
        let said = bridge.next().await;
        let ran = said["result"]["structuredContent"].clone();
        if ran["state"] == "succeeded" {
            break ran;
        }
        assert!(id < 10, "{said}");
        id += 1;
    };
    assert_eq!(ended["output_tail"], "end\n");

    // What is under way at the end of the input is answered.
    bridge.tool(99, "run", json!({"command": "echo last", "wait_secs": 50})).await;
    drop(bridge.child.stdin.take());
    assert_eq!(bridge.next().await["result"]["structuredContent"]["output_tail"], "last\n");
    assert!(bridge.lines.next_line().await.unwrap().is_none());
    assert!(bridge.child.wait().await.unwrap().success());

    // A key that has ended.
    let mut bridge = Bridge::start(&hub, "cmk_none");
    bridge.send(INIT).await;
    let refused = bridge.next().await;
    assert_eq!((&refused["id"], &refused["error"]["code"], &refused["error"]["data"]["status"]), (&json!(0), &json!(-32001), &json!(401)));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_is_connected_with_a_key_that_ends() {
    let hub = Hub::start().await;
    hub.cli_login();
    let run = |args: &[&str]| {
        let out = hub.cli().env("HOME", hub.dir.path()).args(args).output().unwrap();
        (out.status.code(), String::from_utf8(out.stdout).unwrap(), String::from_utf8(out.stderr).unwrap())
    };
    let (code, said, told) = run(&["connect", "cursor"]);
    assert_eq!(code, Some(0), "{told}");
    let entry = serde_json::from_str::<Value>(&said).unwrap()["mcpServers"]["cortex"].clone();
    assert_eq!(entry["url"], format!("{}/mcp", hub.http));
    let secret = text(&entry["headers"], "Authorization").strip_prefix("Bearer ").unwrap().to_owned();
    assert_eq!(Client::with(&hub, secret).tools().await.len(), 7);
    let keys = hub.get("/api/v1/api-keys").await;
    assert_eq!(keys["items"][0]["name"], "cursor");
    assert!(keys["items"][0]["expires_at"].is_string(), "{keys}");

    let file = hub.dir.path().join(".claude.json");
    std::fs::write(&file, r#"{"mcpServers": {"other": {"command": "x"}}, "n": 1}"#).unwrap();
    let (code, said, told) = run(&["connect", "claude", "--write", "--expires", "2", "--scope", "nodes:read"]);
    assert_eq!((code, said.as_str()), (Some(0), ""), "{told}");
    let config: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    assert_eq!((&config["n"], &config["mcpServers"]["other"]["command"]), (&json!(1), &json!("x")));
    let secret = text(&config["mcpServers"]["cortex"]["headers"], "Authorization").strip_prefix("Bearer ").unwrap().to_owned();
    assert!(!told.contains(&secret));
    assert_eq!(Client::with(&hub, secret).tools().await, ["nodes_list"]);

    // A file that cannot be read is left as it is, and there is no key for it.
    std::fs::write(&file, "{ // mine\n}").unwrap();
    let before = hub.get("/api/v1/api-keys").await["items"].as_array().unwrap().len();
    let (code, _, told) = run(&["connect", "claude", "--write"]);
    assert!(code == Some(1) && told.contains("nothing was changed"), "{told}");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "{ // mine\n}");
    assert_eq!(hub.get("/api/v1/api-keys").await["items"].as_array().unwrap().len(), before);

    // What tells an agent what is here needs no key.
    let web = reqwest::Client::builder().no_proxy().build().unwrap();
    for (path, kind, says) in [("/llms.txt", "text/plain", "/docs/skill.md"), ("/docs/skill.md", "text/markdown", "task_wait")] {
        let answer = web.get(format!("{}{path}", hub.http)).send().await.unwrap();
        assert!(answer.headers()["content-type"].to_str().unwrap().starts_with(kind));
        let page = answer.text().await.unwrap();
        assert!(page.contains(says) && page.lines().count() < 80, "{page}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_official_sdk_drives_a_job_on_two_machines() {
    let hub = Hub::start().await;
    let (_one, _two) = (Node::join(&hub, "one").await, Node::join(&hub, "two").await);
    let c = Client::of(&hub, &["tasks:dispatch", "tasks:read", "nodes:read", "sessions:read", "sessions:write", "sessions:attach"]).await;
    let repository = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let python = repository.join("target/python-mcp/bin/python");
    assert!(python.exists(), "{} is missing; run: scripts/setup test", python.display());
    let mut command = tokio::process::Command::new(python);
    command.arg(repository.join("examples/mcp_client.py")).args(["one", "two"]);
    command.env("CORTEX_URL", &hub.http).env("CORTEX_API_KEY", &c.key).env("NO_PROXY", "127.0.0.1").kill_on_drop(true);
    let out = tokio::time::timeout(PATIENCE * 5, command.output()).await.expect("it ends").unwrap();
    let said = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success(), "{said}{}", String::from_utf8_lossy(&out.stderr));
    assert_eq!(said, "one: 125250\ntwo: 375250\ntogether: 500500\n");
    let tasks = hub.get("/api/v1/tasks").await["items"].as_array().unwrap().clone();
    assert!(tasks.len() == 4 && tasks.iter().all(|t| t["actor"]["door"] == "mcp" && t["state"] == "succeeded"), "{tasks:?}");
}
