//! The program and the client against a small hub that speaks real HTTP and does as it is told.

mod fake;

use cortex::cli::args::Format;
use cortex::cli::commands::run::{Plan, run};
use cortex::rest::{DispatchRequest, ShellRequest};
use cortex::{Client, Credentials, OutputItem, OutputQuery, Resume, TaskFilter};
use fake::{Hub, Step, TASK, output, task};
use futures::StreamExt as _;
use serde_json::json;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Output, Stdio};
use tokio::sync::watch;

/// Runs the program with an environment that holds the hub and a folder, and nothing else.
async fn cortex(hub: &Hub, dir: &Path, stdin: &str, args: &[&str]) -> Output {
    let (url, dir, stdin) = (hub.url.clone(), dir.to_owned(), stdin.to_owned());
    let args: Vec<_> = args.iter().map(|a| (*a).to_owned()).collect();
    tokio::task::spawn_blocking(move || {
        #[expect(clippy::disallowed_methods, reason = "a test of the program runs the program")]
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_cortex"));
        command.args(args).env_clear().env("CORTEX_URL", url).env("CORTEX_CONFIG_DIR", &dir).current_dir(&dir);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        // A program that does not read may have ended already.
        let _ = std::io::Write::write_all(&mut child.stdin.take().unwrap(), stdin.as_bytes());
        child.wait_with_output().unwrap()
    })
    .await
    .unwrap()
}

/// What the program said, as one text.
fn said(o: &Output) -> String {
    format!("code {}\n{}{}", o.status.code().unwrap_or(-1), String::from_utf8_lossy(&o.stdout), String::from_utf8_lossy(&o.stderr))
}

async fn log_in(hub: &Hub, dir: &Path) {
    let o = cortex(hub, dir, "correct horse\n", &["login", "--username", "ada", "--password-stdin"]).await;
    assert_eq!(o.status.code(), Some(0), "{}", said(&o));
}

fn plan() -> Plan {
    let shell = ShellRequest { argv: Some(vec!["true".into()]), ..ShellRequest::default() };
    let request = DispatchRequest { shell: Some(shell), ..DispatchRequest::default() };
    Plan { session: None, request, idempotency_key: None, detach: false, input: None, format: Format::Table, with_key: false }
}

/// Runs a plan inside the test; gives code, standard output, standard error.
async fn run_here(hub: &Hub, plan: Plan, interrupts: watch::Receiver<u32>) -> (u8, String, String) {
    let client = Client::new(&hub.url, Credentials::ApiKey("key".into())).unwrap();
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let code = run(&client, plan, &mut cortex::cli::Io { out: &mut out, err: &mut err }, interrupts).await;
    (code, String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap())
}

#[tokio::test]
async fn a_log_in_is_kept_privately_and_ended() {
    let (hub, dir) = (Hub::start().await, tempfile::tempdir().unwrap());
    log_in(&hub, dir.path()).await;
    let file = dir.path().join("login.json");
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    let kept = std::fs::read_to_string(&file).unwrap();
    assert!(kept.contains("access-1") && kept.contains(&hub.url) && !kept.contains("correct horse"), "{kept}");

    let o = cortex(&hub, dir.path(), "", &["whoami"]).await;
    assert!(said(&o).starts_with("code 0\nuser  ada\n"), "{}", said(&o));
    let o = cortex(&hub, dir.path(), "", &["whoami", "--output", "json"]).await;
    assert_eq!(serde_json::from_slice::<serde_json::Value>(&o.stdout).unwrap()["user"]["username"], "ada");

    let o = cortex(&hub, dir.path(), "", &["logout"]).await;
    assert_eq!(o.status.code(), Some(0), "{}", said(&o));
    assert!(!std::fs::read_to_string(&file).unwrap().contains("access-1"));
    let o = cortex(&hub, dir.path(), "", &["whoami"]).await;
    assert!(said(&o).starts_with("code 1\ncortex: no credentials (401 unauthenticated)\n  log in with: cortex login"), "{}", said(&o));

    let o = cortex(&hub, dir.path(), "wrong", &["login", "--username", "ada", "--password-stdin"]).await;
    assert!(said(&o).starts_with("code 1\ncortex: ") && said(&o).contains("did not take that user name"), "{}", said(&o));
    let o = cortex(&hub, dir.path(), "", &["login"]).await;
    assert!(said(&o).starts_with("code 2\n") && said(&o).contains("--password-stdin"), "{}", said(&o));
}

#[tokio::test]
async fn a_log_in_renews_itself_once_for_all() {
    let (hub, dir) = (Hub::start().await, tempfile::tempdir().unwrap());
    log_in(&hub, dir.path()).await;
    hub.expire_access_tokens();
    // A refresh token is used once: of several programs at once, one alone may renew.
    let all = futures::future::join_all((0..4).map(|_| cortex(&hub, dir.path(), "", &["whoami"]))).await;
    for o in all {
        assert_eq!(o.status.code(), Some(0), "{}", said(&o));
    }
    assert_eq!(hub.refreshes(), 1);
    let kept = std::fs::read_to_string(dir.path().join("login.json")).unwrap();
    assert!(kept.contains("access-2") && kept.contains("refresh-2") && !kept.contains("refresh-1"), "{kept}");
    assert_eq!(std::fs::metadata(dir.path().join("login.json")).unwrap().permissions().mode() & 0o777, 0o600);

    hub.expire_access_tokens();
    hub.revoke_refresh_tokens();
    let o = cortex(&hub, dir.path(), "", &["whoami"]).await;
    assert!(said(&o).starts_with("code 1\n") && said(&o).contains("log in with: cortex login"), "{}", said(&o));
}

#[tokio::test]
async fn run_streams_and_ends_as_the_command_did() {
    let (hub, dir) = (Hub::start().await, tempfile::tempdir().unwrap());
    log_in(&hub, dir.path()).await;
    hub.script([vec![
        output(1, "stdout", b"out\n"),
        Step::Text(": ping\n\n".into()),
        output(2, "stderr", b"err\n"),
        output(3, "stdout", b"\xff\x00end"),
        Step::end(task("failed", Some(("exit", "")), Some(7))),
    ]]);
    let o = cortex(&hub, dir.path(), "in put", &["run", "--stdin", "--env", "A=b", "--node", "n", "--", "cat", "-"]).await;
    assert_eq!((o.status.code(), &o.stdout[..], &o.stderr[..]), (Some(7), &b"out\n\xff\x00end"[..], &b"err\n"[..]));
    let sent = hub.dispatched();
    assert_eq!(sent["shell"], json!({"argv": ["cat", "-"], "env": {"A": "b"}, "stdin_base64": "aW4gcHV0"}));
    assert_eq!((&sent["node"], &sent["queue_secs"], &sent["wait_secs"]), (&json!("n"), &json!(60), &json!(0)));

    hub.script([vec![Step::end(task("failed", Some(("not_found", "program")), None))]]);
    let o = cortex(&hub, dir.path(), "", &["run", "--script", "nope"]).await;
    assert_eq!(said(&o), format!("code 127\ncortex: {TASK} failed (not_found: program)\n"));
    assert_eq!(hub.dispatched()["shell"], json!({"command": "nope"}));

    hub.script([vec![output(1, "stdout", b"x"), Step::end(task("failed", Some(("timeout", "")), None))]]);
    let o = cortex(&hub, dir.path(), "", &["run", "--output", "json", "--", "x"]).await;
    let document: serde_json::Value = serde_json::from_slice(&o.stdout).unwrap();
    assert_eq!((o.status.code(), &document["reason"]["code"]), (Some(124), &json!("timeout")));

    let o = cortex(&hub, dir.path(), "", &["run", "--detach", "--", "x"]).await;
    assert_eq!(said(&o), format!("code 0\n{TASK}\n"));
}

#[tokio::test]
async fn run_follows_over_cuts_without_loss_or_repeats() {
    let hub = Hub::start().await;
    hub.script([
        // Cut within an event; then a new connection that repeats; then one that is refused; then the rest.
        vec![output(1, "stdout", b"a"), output(2, "stdout", b"b"), Step::Text("id: 3\nevent: output\ndata: {\"seq\":3".into()), Step::Cut],
        vec![output(2, "stdout", b"b"), output(3, "stdout", b"c"), Step::Cut],
        vec![Step::Status(503)],
        vec![output(4, "stdout", b"d"), Step::gap(5, 6), Step::end(task("succeeded", None, Some(0)))],
    ]);
    let (_keep, interrupts) = watch::channel(0);
    let (code, out, err) = run_here(&hub, plan(), interrupts).await;
    assert_eq!((code, out.as_str()), (0, "abcd"), "{err}");
    assert_eq!(hub.resumed_after(), [None, Some("2".to_owned()), Some("3".to_owned()), Some("3".to_owned())]);
    assert!(err.contains("the task goes on, trying again") && err.contains("connected again"), "{err}");
    assert!(err.contains("output 5 to 6 is missing: limit"), "{err}");
}

#[tokio::test]
async fn run_is_cancelled_by_the_first_interrupt_and_left_by_the_second() {
    let hub = Hub::start().await;
    hub.script([vec![
        output(1, "stdout", b"a"),
        Step::UntilCancelled,
        Step::end(task("cancelled", Some(("cancelled_by_user", "")), None)),
    ]]);
    let (press, interrupts) = watch::channel(0);
    let (got, ()) = tokio::join!(run_here(&hub, plan(), interrupts), async {
        hub.followed().await;
        press.send_modify(|n| *n += 1);
    });
    assert_eq!((got.0, got.1.as_str()), (130, "a"), "{}", got.2);
    assert!(got.2.contains("cancelling"), "{}", got.2);

    let hub = Hub::start().await;
    hub.refuse_cancel();
    hub.script([vec![Step::UntilCancelled]]);
    let (press, interrupts) = watch::channel(0);
    let (got, ()) = tokio::join!(run_here(&hub, plan(), interrupts), async {
        hub.followed().await;
        press.send_modify(|n| *n += 1);
        hub.cancel_asked().await;
        press.send_modify(|n| *n += 1);
    });
    assert_eq!(got.0, 130, "{}", got.2);
    assert!(got.2.contains("the task may go on"), "{}", got.2);
}

/// A pipe whose reader has left.
struct Gone;
impl std::io::Write for Gone {
    fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
        Err(std::io::ErrorKind::BrokenPipe.into())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn run_ends_quietly_with_its_reader() {
    let hub = Hub::start().await;
    hub.script([vec![output(1, "stdout", b"a"), Step::UntilCancelled]]);
    let client = Client::new(&hub.url, Credentials::ApiKey("key".into())).unwrap();
    let (_keep, interrupts) = watch::channel(0);
    let mut err = Vec::new();
    let code = run(&client, plan(), &mut cortex::cli::Io { out: &mut Gone, err: &mut err }, interrupts).await;
    assert_eq!((code, String::from_utf8(err).unwrap().as_str()), (141, ""));
    hub.cancel_asked().await;
}

#[tokio::test]
async fn a_real_interrupt_cancels_the_task() {
    let (hub, dir) = (Hub::start().await, tempfile::tempdir().unwrap());
    hub.script([vec![
        output(1, "stdout", b"a"),
        Step::UntilCancelled,
        output(2, "stdout", b"b"),
        Step::end(task("cancelled", Some(("cancelled_by_user", "")), None)),
    ]]);
    let command = format!("\"$0\" run --api-key k --url {} -- true & pid=$!; read x; kill -INT $pid; wait $pid", hub.url);
    // A shell without job control (-m) starts what is in the background deaf to interrupts.
    #[expect(clippy::disallowed_methods, reason = "a test of the program runs the program")]
    let mut shell = std::process::Command::new("sh");
    shell.args(["-m", "-c", &command, env!("CARGO_BIN_EXE_cortex")]).env("CORTEX_CONFIG_DIR", dir.path());
    let mut shell = shell.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    hub.followed().await;
    std::io::Write::write_all(&mut shell.stdin.take().unwrap(), b"go\n").unwrap();
    let o = tokio::task::spawn_blocking(move || shell.wait_with_output().unwrap()).await.unwrap();
    assert_eq!((o.status.code(), &o.stdout[..]), (Some(130), &b"ab"[..]), "{}", said(&o));
}

#[tokio::test]
async fn run_says_why_it_waits() {
    let hub = Hub::start().await;
    hub.task_shows("pending", "node web-1 is offline\u{1b}[2J");
    hub.script([vec![Step::UntilLooked(3), Step::end(task("failed", Some(("no_node", "node_offline")), None))]]);
    let (_keep, interrupts) = watch::channel(0);
    let (code, out, err) = run_here(&hub, plan(), interrupts).await;
    assert_eq!((code, out.as_str()), (125, ""));
    assert_eq!(err.matches("waiting: node web-1 is offline").count(), 1, "once per change: {err}");
    assert!(!err.contains('\u{1b}') && err.contains("(no_node: node_offline)"), "{err}");
}

#[tokio::test]
async fn run_says_how_the_mesh_failed() {
    let (hub, dir) = (Hub::start().await, tempfile::tempdir().unwrap());
    let o = cortex(&hub, dir.path(), "", &["run", "--", "true"]).await;
    assert_eq!(said(&o), "code 125\ncortex: no credentials (401 unauthenticated)\n  log in with: cortex login\n");
    hub.refuse_dispatch(403, "forbidden");
    let o = cortex(&hub, dir.path(), "", &["run", "--api-key", "k", "--output", "json", "--", "true"]).await;
    assert_eq!(
        (o.status.code(), serde_json::from_slice::<serde_json::Value>(&o.stdout).unwrap()["code"].clone()),
        (Some(126), json!("forbidden"))
    );
    hub.refuse_dispatch(422, "bad_request");
    let o = cortex(&hub, dir.path(), "", &["run", "--api-key", "k", "--", "true"]).await;
    assert_eq!(said(&o), "code 125\ncortex: told to refuse (422 bad_request)\n");
    // Nobody listens on the discard port.
    let o = cortex(&hub, dir.path(), "", &["run", "--url", "http://127.0.0.1:9", "--", "true"]).await;
    assert!(said(&o).starts_with("code 125\ncortex: cannot reach http://127.0.0.1:9") && said(&o).contains("CORTEX_URL"), "{}", said(&o));
    let o = cortex(&hub, dir.path(), "", &["run", "--url", "nonsense", "--", "true"]).await;
    assert_eq!(o.status.code(), Some(2), "{}", said(&o));
}

#[tokio::test]
async fn an_invite_is_written_once_and_never_over_a_file() {
    let (hub, dir) = (Hub::start().await, tempfile::tempdir().unwrap());
    log_in(&hub, dir.path()).await;
    let o = cortex(&hub, dir.path(), "", &["node", "add", "box", "--label", "os=linux", "--ttl", "60"]).await;
    assert_eq!(o.status.code(), Some(0), "{}", said(&o));
    assert_eq!(o.stdout, b"paste me\n");
    assert!(said(&o).contains("cortex-node join box.yaml"), "{}", said(&o));
    let file = dir.path().join("box.yaml");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "invite: {}\n");
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(hub.invites(), [json!({"name": "box", "labels": {"os": "linux"}, "ttl_secs": 60})]);

    let o = cortex(&hub, dir.path(), "", &["node", "add", "box"]).await;
    assert!(said(&o).starts_with("code 1\ncortex: box.yaml is there already"), "{}", said(&o));
    assert_eq!(hub.invites().len(), 1, "no invite was made for it");
    let o = cortex(&hub, dir.path(), "", &["node", "add", "../box"]).await;
    assert_eq!(o.status.code(), Some(2), "{}", said(&o));
}

#[tokio::test]
async fn things_are_listed_and_named() {
    let (hub, dir) = (Hub::start().await, tempfile::tempdir().unwrap());
    log_in(&hub, dir.path()).await;
    let o = cortex(&hub, dir.path(), "", &["session", "ls"]).await;
    let text = String::from_utf8_lossy(&o.stdout).into_owned();
    assert_eq!(text.lines().count(), 4, "both pages and the header: {text}");
    assert!(text.starts_with("NAME") && text.contains("work"), "{text}");
    let o = cortex(&hub, dir.path(), "", &["session", "show", "work", "--output", "json"]).await;
    assert_eq!(serde_json::from_slice::<serde_json::Value>(&o.stdout).unwrap()["id"], fake::session_id(3), "{}", said(&o));
    let o = cortex(&hub, dir.path(), "", &["session", "close", "nothing"]).await;
    assert!(said(&o).starts_with("code 1\ncortex: there is no session \"nothing\""), "{}", said(&o));

    hub.script([vec![output(1, "stdout", b"one\n"), output(2, "stderr", b"two\n"), Step::end(task("succeeded", None, Some(0)))]]);
    hub.task_shows("succeeded", "");
    let o = cortex(&hub, dir.path(), "", &["task", "logs", TASK]).await;
    assert_eq!((o.status.code(), &o.stdout[..], &o.stderr[..]), (Some(0), &b"one\n"[..], &b"two\n"[..]));
    let o = cortex(&hub, dir.path(), "", &["task", "ls", "--state", "odd"]).await;
    assert_eq!(o.status.code(), Some(2), "{}", said(&o));
}

#[tokio::test]
async fn terms_of_a_run_are_sent_as_written() {
    let (hub, dir) = (Hub::start().await, tempfile::tempdir().unwrap());
    log_in(&hub, dir.path()).await;
    let line = "run --detach --select os=linux,gpu --priority -5 --retries 2 --backoff 9 --not-before 2999-01-01T00:00:00Z \
        --deadline 2999-01-02T00:00:00Z --idempotency-key k-1 -- true";
    let o = cortex(&hub, dir.path(), "", &line.split_whitespace().collect::<Vec<_>>()).await;
    assert_eq!(o.status.code(), Some(0), "{}", said(&o));
    let sent = hub.dispatched();
    assert_eq!(sent["select"], serde_json::json!({"labels": {"os": "linux", "gpu": null}}));
    assert_eq!((sent["priority"].as_i64(), &sent["retries"]), (Some(-5), &serde_json::json!({"max": 2, "backoff_ms": 9})));
    assert_eq!((sent["not_before"].as_str(), sent["deadline"].as_str()), (Some("2999-01-01T00:00:00Z"), Some("2999-01-02T00:00:00Z")));
    assert_eq!(hub.key().as_deref(), Some("k-1"));
    let o = cortex(&hub, dir.path(), "", &["run", "--detach", "--", "true"]).await;
    assert_eq!((o.status.code(), hub.key()), (Some(0), None));
    assert!(["select", "priority", "retries"].iter().all(|f| hub.dispatched().get(f).is_none()));
    let o = cortex(&hub, dir.path(), "", &["run", "--select", "os=", "--", "true"]).await;
    assert_eq!(o.status.code(), Some(2), "{}", said(&o));
}

#[tokio::test]
async fn what_is_not_built_is_refused() {
    let (hub, dir) = (Hub::start().await, tempfile::tempdir().unwrap());
    for line in ["shell", "policy show", "completions bash", "events --help"] {
        let o = cortex(&hub, dir.path(), "", &line.split(' ').collect::<Vec<_>>()).await;
        assert!(said(&o).starts_with("code 2\ncortex: not yet: ") && o.stdout.is_empty(), "{line}: {}", said(&o));
    }
    assert!(!dir.path().join("login.json").exists());
}

#[tokio::test]
async fn the_client_reads_raw_output_and_lists() {
    let hub = Hub::start().await;
    let client = Client::new(&hub.url, Credentials::ApiKey("k".into())).unwrap();
    let bytes = client.output(TASK, OutputQuery { from_byte: 3, ..OutputQuery::default() }).await.unwrap();
    let all: Vec<_> = bytes.map(|b| b.unwrap().to_vec()).concat().await;
    assert_eq!(all, b"stream=all&from_byte=3");
    let e = client.tasks(&TaskFilter { state: Some("x y".into()), limit: Some(2), ..TaskFilter::default() }).await.unwrap_err();
    assert_eq!((e.status(), e.code(), e.is_transient()), (Some(501), Some("not_yet"), false));
    // An answer that is not a hub's is named as such.
    let e = client.downloads().await.unwrap_err();
    assert!(e.to_string().contains("is http://127.0.0.1:") && e.status() == Some(404), "{e}");

    hub.script([vec![output(5, "stdout", b"x"), Step::end(task("succeeded", None, Some(0)))]]);
    let mut follow = client.follow_output(TASK, Resume::FromSeq(5));
    assert!(matches!(follow.next().await.unwrap(), Some(OutputItem::Output { seq: 5, .. })));
    assert_eq!(follow.last_event_id(), Some("5"));
    assert!(matches!(follow.next().await.unwrap(), Some(OutputItem::End(_))));
    assert!(follow.next().await.unwrap().is_none());
    assert_eq!(hub.last_output_query(), "from_seq=5");
}
