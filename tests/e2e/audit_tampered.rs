//! An audit log that somebody has changed: in the database file, behind the hub's back, and in an export.
#![expect(clippy::disallowed_methods, reason = "tests start the real binaries")]

use mesh_core::audit::{Head, Row};
use mesh_core::{AuditId, ChainId};
use mesh_tests::{Hub, program, shown, text};
use rusqlite::{Connection, params};
use serde_json::{Value, json};
use std::path::Path;
use std::process::{Command, Output};

/// A hub with some forty entries, of which the first twenty-some are signed.
async fn hub() -> Hub {
    let mut hub = Hub::start().await;
    for n in 0..20 {
        hub.call("POST", "/api/v1/sessions", Some(json!({"name": format!("s{n}")}))).await;
    }
    assert_eq!(hub.process.terminate().await.code(), Some(0));
    hub.restart().await;
    for n in 0..20 {
        hub.call("POST", "/api/v1/sessions", Some(json!({"name": format!("t{n}")}))).await;
    }
    hub
}

fn open(hub: &Hub) -> Connection {
    let db = Connection::open(hub.data().join("hub.db")).unwrap();
    db.busy_timeout(std::time::Duration::from_secs(40)).unwrap();
    db
}

const TRIGGERS: [&str; 5] =
    ["audit_stays", "audit_is_not_changed", "audit_is_only_erased", "audit_checkpoints_stay", "audit_checkpoints_are_not_changed"];

async fn verified(hub: &Hub) -> Value {
    hub.get("/api/v1/audit/verify").await
}

/// Somebody with the database changes `from` and all rows behind it up to `to`, and makes their hashes anew.
fn restamp(db: &Connection, from: i64, to: i64) {
    let chain: [u8; 16] = db.query_row("SELECT chain FROM audit LIMIT 1", [], |r| r.get(0)).unwrap();
    let hash_of = |seq: i64| db.query_row("SELECT hash FROM audit WHERE seq = ?1", [seq], |r| r.get::<_, [u8; 32]>(0)).unwrap();
    let mut prev = hash_of(from - 1);
    for seq in from..=to {
        let q = "SELECT id, at, kind, action, user, key, agent, door, resource_kind, resource_id, outcome, session, person_digest, detail_digest \
                 FROM audit WHERE seq = ?1";
        let row = db.query_row(q, [seq], |r| {
            let id = |n: usize| r.get::<_, Option<[u8; 16]>>(n);
            Ok(Row {
                chain: ChainId::from_bytes(chain),
                seq: seq as u64,
                id: AuditId::from_bytes(r.get(0)?),
                at: r.get(1)?,
                kind: r.get(2)?,
                action: r.get(3)?,
                user: id(4)?.map(mesh_core::UserId::from_bytes),
                key: id(5)?.map(mesh_core::ApiKeyId::from_bytes),
                agent: r.get(6)?,
                door: r.get(7)?,
                resource_kind: r.get(8)?,
                resource_id: r.get(9)?,
                outcome: r.get(10)?,
                session: id(11)?.map(mesh_core::SessionId::from_bytes),
                person_digest: r.get(12)?,
                detail_digest: r.get(13)?,
                prev,
                hash: [0; 32],
                person: None,
                detail: None,
            })
        });
        let hash = row.unwrap().digest();
        db.execute("UPDATE audit SET prev = ?1, hash = ?2 WHERE seq = ?3", params![prev, hash, seq]).unwrap();
        prev = hash;
    }
}

/// One change at a time under a hub that runs, each taken back before the next.
#[tokio::test(flavor = "multi_thread")]
async fn whatever_is_changed_in_the_database_is_found() {
    let hub = hub().await;
    let db = open(&hub);
    let first = verified(&hub).await;
    let (rows, signed) = (first["rows"].as_u64().unwrap(), first["heads"][0]["signed_seq"].as_u64().unwrap());
    assert!(first["ok"] == true && first["first_bad_seq"].is_null() && signed > 20 && rows > signed + 15, "{first}");
    for statement in
        ["UPDATE audit SET outcome = 'ok'", "DELETE FROM audit", "UPDATE audit SET person = x'00'", "DELETE FROM audit_checkpoints"]
    {
        let refused = db.execute(statement, []).unwrap_err().to_string();
        assert!(refused.contains("append-only"), "{statement}: {refused}");
    }
    TRIGGERS.iter().for_each(|t| db.execute_batch(&format!("DROP TRIGGER {t}")).unwrap());
    let changes = [
        ("a word", 7, "UPDATE audit SET outcome = 'denied' WHERE seq = 7"),
        ("a time that is none", 7, "UPDATE audit SET at = 'soon' WHERE seq = 7"),
        ("an id of no length", 8, "UPDATE audit SET id = x'00' WHERE seq = 8"),
        ("who it was", 9, "UPDATE audit SET user = x'00112233445566778899aabbccddeeff' WHERE seq = 9"),
        ("a detail", 10, "UPDATE audit SET detail = (SELECT detail FROM audit WHERE seq = 11) WHERE seq = 10"),
        ("a person", 12, "UPDATE audit SET person = x'0901' WHERE seq = 12"),
        ("a row that is gone", 13, "DELETE FROM audit WHERE seq = 13"),
        (
            "one that is gone, with the others moved up",
            13,
            "DELETE FROM audit WHERE seq = 13; UPDATE audit SET seq = seq - 1 WHERE seq > 13",
        ),
        (
            "two that changed places",
            14,
            "UPDATE audit SET seq = 1000000 WHERE seq = 14; UPDATE audit SET seq = 14 WHERE seq = 15; \
                                         UPDATE audit SET seq = 15 WHERE seq = 1000000",
        ),
        ("the last row", rows, "UPDATE audit SET action = 'x' WHERE seq = (SELECT MAX(seq) FROM audit)"),
        ("a signature", signed, "UPDATE audit_checkpoints SET signature = x'00'"),
        ("a signature by another key", signed, "UPDATE audit_checkpoints SET key = hash"),
        ("a checkpoint of other rows", signed, "UPDATE audit_checkpoints SET hash = key"),
    ];
    for (what, seq, change) in changes {
        let base = db.query_row("SELECT MAX(seq) FROM audit", [], |r| r.get::<_, i64>(0)).unwrap() as u64;
        db.execute_batch("CREATE TABLE kept AS SELECT * FROM audit; CREATE TABLE kept_checkpoints AS SELECT * FROM audit_checkpoints")
            .unwrap();
        db.execute_batch(&format!("BEGIN IMMEDIATE; {change}; COMMIT")).unwrap();
        // It leaves an entry of its own, which stays.
        let report = verified(&hub).await;
        db.execute_batch(&format!(
            "BEGIN IMMEDIATE; DELETE FROM audit WHERE seq <= {base}; INSERT INTO audit SELECT * FROM kept; DELETE FROM audit_checkpoints; \
             INSERT INTO audit_checkpoints SELECT * FROM kept_checkpoints; DROP TABLE kept; DROP TABLE kept_checkpoints; COMMIT"
        ))
        .unwrap();
        assert_eq!(report["ok"], false, "{what} was not found: {report}");
        let bad = report["first_bad_seq"].as_u64().unwrap();
        let expected = if what == "the last row" { base } else { seq };
        assert!(bad == expected || (what.contains("sign") || what.contains("checkpoint")) && bad <= signed, "{what}: {report}");
        assert!(report["heads"][0]["problem"].is_string(), "{report}");
        let export = hub.request("GET", "/api/v1/audit/export").send().await.unwrap().text().await.unwrap();
        assert!(export.trim_end().lines().last().unwrap().contains("\"checkpoint\":{"), "what is whole again is signed: {what}");
    }
    assert_eq!(verified(&hub).await["ok"], true, "all is as it was");
    // What is not whole is not signed, however it is asked for.
    db.execute_batch("UPDATE audit SET outcome = 'denied' WHERE seq = 7").unwrap();
    let file = hub.dir.path().join("bad.jsonl");
    std::fs::write(&file, hub.request("GET", "/api/v1/audit/export").send().await.unwrap().bytes().await.unwrap()).unwrap();
    let out = offline(&file, &[]);
    assert!(out.status.code() == Some(1) && shown(&out).contains("did not sign"), "{}", shown(&out));
}

/// Somebody who has the whole machine while the hub is down, but not its key.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_signed_cannot_be_made_anew() {
    let mut first = hub().await;
    let rows = verified(&first).await["rows"].as_u64().unwrap();
    assert_eq!(first.process.terminate().await.code(), Some(0));
    let base = first.data();
    let log = std::fs::read_dir(base.join("audit")).unwrap().map(|f| f.unwrap().path()).find(|p| p.extension().is_some()).unwrap();
    let log = log.file_name().unwrap().to_owned();
    type Change = fn(&Connection, u64, &Path);
    let changes: [(&str, Change); 6] = [
        ("rows with new hashes", |db, rows, _| {
            db.execute_batch("UPDATE audit SET outcome = 'denied' WHERE seq = 10").unwrap();
            restamp(db, 10, rows as i64);
        }),
        ("rows with new hashes, and no checkpoints in the database", |db, rows, _| {
            db.execute_batch("UPDATE audit SET outcome = 'denied' WHERE seq = 10; DELETE FROM audit_checkpoints").unwrap();
            restamp(db, 10, rows as i64);
        }),
        ("a tail that was cut off", |db, rows, _| {
            db.execute_batch(&format!("DELETE FROM audit WHERE seq > {rows} - 5; DELETE FROM audit_checkpoints WHERE seq > {rows} - 5"))
                .unwrap();
        }),
        ("a log that is gone", |db, _, _| {
            db.execute_batch("DELETE FROM audit; DELETE FROM audit_checkpoints").unwrap();
        }),
        ("a checkpoint file that somebody wrote to", |_, _, file| {
            let text = std::fs::read_to_string(file).unwrap();
            let last = text.lines().last().unwrap().replace("\"seq\":", "\"seq\":1");
            std::fs::write(file, format!("{text}{last}\n")).unwrap();
        }),
        ("nothing", |_, _, file| {
            // A line that a crash cut off is nobody's fault.
            let text = std::fs::read_to_string(file).unwrap();
            std::fs::write(file, format!("{text}{}", &text[..40])).unwrap();
        }),
    ];
    for (n, (what, change)) in changes.into_iter().enumerate() {
        let data = first.dir.path().join(format!("case{n}"));
        let copied = Command::new("cp").arg("-a").args([&base, &data]).status().unwrap();
        assert!(copied.success());
        {
            let db = Connection::open(data.join("hub.db")).unwrap();
            TRIGGERS.iter().for_each(|t| db.execute_batch(&format!("DROP TRIGGER {t}")).unwrap());
            change(&db, rows, &data.join("audit").join(&log));
        }
        let hub = Hub::start_in(data.clone(), &[], &[]).await;
        let report = verified(&hub).await;
        assert_eq!(report["ok"], what == "nothing", "{what}: {report}");
        if what != "nothing" {
            assert!(report["first_bad_seq"].as_u64().unwrap() <= rows + 1, "{what}: {report}");
        }
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(data.join("audit").join(&log).metadata().unwrap().permissions().mode() & 0o777, 0o600);
    }
}

fn offline(file: &Path, more: &[&str]) -> Output {
    Command::new(program("cortex-hub")).args(["audit", "verify"]).arg(file).args(more).output().unwrap()
}

/// An export is verified with nothing but itself.
#[tokio::test(flavor = "multi_thread")]
async fn whatever_is_changed_in_an_export_is_found() {
    let hub = hub().await;
    let export = hub.request("GET", "/api/v1/audit/export").send().await.unwrap().text().await.unwrap();
    let out = Command::new(program("cortex-hub")).args(["ca", "show", "--data-dir"]).arg(hub.data()).output().unwrap();
    let told = String::from_utf8(out.stdout).unwrap();
    let key = told.lines().find_map(|l| l.strip_prefix("sign")).unwrap().trim().to_owned();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("audit.jsonl");
    let check = |text: &str, more: &[&str]| {
        std::fs::write(&file, text).unwrap();
        offline(&file, more)
    };
    let good = check(&export, &["--key", &key]);
    assert!(good.status.success() && shown(&good).contains("rows, whole and as they were written"), "{}", shown(&good));
    assert!(shown(&check(&export, &[])).contains("the signer was not checked"));
    let other = "00".repeat(32);
    assert!(shown(&check(&export, &["--key", &other])).contains("pinned key"));
    assert!(shown(&check(&export, &["--key", "abc"])).contains("64 hexadecimal digits"));

    let lines: Vec<&str> = export.lines().collect();
    let n = lines.len();
    let joined = |lines: Vec<String>| lines.iter().map(|l| format!("{l}\n")).collect::<String>();
    let own = |range: &[&str]| range.iter().map(|l| l.to_string()).collect::<Vec<_>>();
    let with = |at: usize, change: &dyn Fn(&mut Value)| {
        let mut all = own(&lines);
        let mut v: Value = serde_json::from_str(&all[at]).unwrap();
        change(&mut v);
        all[at] = v.to_string();
        joined(all)
    };
    let without = |at: usize| joined([own(&lines[..at]), own(&lines[at + 1..])].concat());
    let mut exchanged = own(&lines);
    exchanged.swap(4, 5);
    let cases = [
        ("nothing at all", String::new(), "cut off"),
        ("no end", joined(own(&lines[..n - 1])), "cut off"),
        ("half a line", export[..export.len() - 9].to_owned(), "cannot be read"),
        (
            "a tail that is cut off, with the end",
            joined([own(&lines[..n - 4]), own(&lines[n - 1..])].concat()),
            "not those that were signed",
        ),
        ("rows behind the end", format!("{export}{}\n", lines[0]), "behind the checkpoint"),
        ("a row that is gone", without(4), "out of its place"),
        ("the first row gone", without(0), "out of its place"),
        ("rows that changed places", joined(exchanged), "out of its place"),
        ("a row twice", joined([own(&lines[..5]), own(&lines[4..])].concat()), "out of its place"),
        ("a word", with(4, &|v| v["outcome"] = json!("denied")), "was changed"),
        ("an action", with(4, &|v| v["action"] = json!("session.purge")), "was changed"),
        ("a time", with(4, &|v| v["at"] = json!("2026-01-01T00:00:00Z")), "was changed"),
        ("who it was", with(4, &|v| v["actor"]["user_id"] = json!("user_0198c0de-0000-7000-8000-000000000000")), "was changed"),
        ("a name", with(4, &|v| v["actor"]["username"] = json!("eve")), "detail of the row was changed"),
        ("an address", with(4, &|v| v["address"] = json!("10.0.0.1")), "detail of the row was changed"),
        ("a detail", with(4, &|v| v["detail"]["name"] = json!("x")), "detail of the row was changed"),
        ("one more detail", with(4, &|v| v["detail"]["more"] = json!("x")), "detail of the row was changed"),
        ("a name where it was erased", with(4, &|v| v["person_salt"] = Value::Null), "nothing was signed of"),
        ("a hash", with(4, &|v| v["hash"] = json!("00".repeat(32))), "was changed"),
        ("no hash", with(4, &|v| v["hash"] = json!("00")), "is not a hash"),
        ("a signature", with(n - 1, &|v| v["checkpoint"]["signature"] = json!("00".repeat(64))), "forged"),
        ("another time of the signature", with(n - 1, &|v| v["checkpoint"]["at"] = json!("2026-01-01T00:00:00Z")), "forged"),
        ("another key", with(n - 1, &|v| v["checkpoint"]["key"] = json!("11".repeat(32))), "forged"),
        ("no signature", with(n - 1, &|v| v["checkpoint"] = Value::Null), "did not sign"),
        ("no JSON", "\u{0}\u{1}".to_owned(), "not an audit entry"),
    ];
    for (what, text, says) in cases {
        let out = check(&text, &["--key", &key]);
        assert!(out.status.code() == Some(1) && shown(&out).contains(says), "{what}: {}", shown(&out));
    }
    // Made anew from one row on: every hash fits, and the signature does not.
    let mut head: Option<Head> = None;
    let mut made = vec![];
    for line in &lines[..n - 1] {
        let mut v: Value = serde_json::from_str(line).unwrap();
        if v["seq"] == 5 {
            v["action"] = json!("session.purge");
        }
        if let Some(head) = &head {
            v["prev_hash"] = json!(hex(&head.hash));
        }
        let row = row_of(&v);
        v["hash"] = json!(hex(&row.digest()));
        head = Some(Head { hash: row.digest(), ..row.head() });
        made.push(v.to_string());
    }
    made.push(lines[n - 1].to_owned());
    let out = check(&joined(made), &[]);
    assert!(out.status.code() == Some(1) && shown(&out).contains("made anew"), "{}", shown(&out));
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// What the hash of a line is made of.
fn row_of(v: &Value) -> Row {
    fn id<T: std::str::FromStr>(v: &Value) -> Option<T> {
        v.as_str().and_then(|t| t.parse().ok())
    }
    let digest = |v: &Value| {
        let text = v.as_str().unwrap();
        std::array::from_fn(|n| u8::from_str_radix(&text[2 * n..2 * n + 2], 16).unwrap())
    };
    Row {
        chain: id(&v["chain"]).unwrap(),
        seq: v["seq"].as_u64().unwrap(),
        id: id(&v["id"]).unwrap(),
        at: mesh_wire::convert::parse_rfc3339(&text(v, "at")).unwrap(),
        kind: text(v, "type"),
        action: text(v, "action"),
        user: id(&v["actor"]["user_id"]),
        key: id(&v["actor"]["key_id"]),
        agent: None,
        door: text(&v["actor"], "door"),
        resource_kind: text(&v["resource"], "kind"),
        resource_id: text(&v["resource"], "id"),
        outcome: text(v, "outcome"),
        session: id(&v["session_id"]),
        person_digest: digest(&v["person_hash"]),
        detail_digest: digest(&v["detail_hash"]),
        prev: digest(&v["prev_hash"]),
        hash: digest(&v["hash"]),
        person: None,
        detail: None,
    }
}
