//! How others reach a hub: on all addresses, over HTTPS, on one port, by IPv6; and who does not.
#![expect(clippy::disallowed_methods, reason = "tests start the real binaries and watch the real clock")]

use mesh_tests::{Hub, Node, checked, folder, program, shown, text, until};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// An authority of a company, and where it puts certificates.
struct Company {
    issuer: Issuer<'static, KeyPair>,
    dir: tempfile::TempDir,
}

impl Company {
    fn new() -> Self {
        let dir = folder();
        let key = KeyPair::generate().unwrap();
        let mut p = CertificateParams::new(Vec::<String>::new()).unwrap();
        p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        std::fs::write(dir.path().join("ca.pem"), p.self_signed(&key).unwrap().pem()).unwrap();
        Self { issuer: Issuer::new(p, key), dir }
    }
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
    /// Writes `hub.pem` and `hub.key`, each in one step; gives the certificate.
    fn certify(&self, names: &[&str], ends_in_days: i64) -> Vec<u8> {
        let key = KeyPair::generate().unwrap();
        let mut p = CertificateParams::new(names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>()).unwrap();
        p.not_after = time::OffsetDateTime::now_utc() + time::Duration::days(ends_in_days);
        p.not_before = p.not_after - time::Duration::days(90);
        let leaf = p.signed_by(&key, &self.issuer).unwrap();
        for (name, content) in [("hub.pem", leaf.pem()), ("hub.key", key.serialize_pem())] {
            std::fs::write(self.path("new"), content).unwrap();
            std::fs::rename(self.path("new"), self.path(name)).unwrap();
        }
        leaf.der().to_vec()
    }
    fn env(&self) -> [(&'static str, String); 2] {
        let path = |name: &str| self.path(name).display().to_string();
        [("CORTEX_HTTP_TLS_CERT", path("hub.pem")), ("CORTEX_HTTP_TLS_KEY", path("hub.key"))]
    }
    async fn hub(&self) -> Hub {
        let [(cert, at), (key, key_at)] = self.env();
        Hub::start_with(&[(cert, &at), (key, &key_at)], &[]).await
    }
}

fn facts(hub: &Hub) -> Value {
    serde_json::from_slice(&std::fs::read(hub.data().join("hub.json")).unwrap()).unwrap()
}

/// The certificate that a port shows, whatever it is worth.
async fn shows(address: &str) -> Vec<u8> {
    let connected = reqwest::Client::builder().no_proxy().tls_danger_accept_invalid_certs(true).tls_info(true).build().unwrap();
    let answer = connected.get(format!("https://{address}/healthz")).send().await.unwrap();
    answer.extensions().get::<reqwest::tls::TlsInfo>().unwrap().peer_certificate().unwrap().to_vec()
}

/// One raw request; the answer's head and body.
async fn raw(address: &str, head: &str) -> String {
    let mut io = TcpStream::connect(address).await.unwrap();
    io.write_all(format!("{head}\r\nConnection: close\r\n\r\n").as_bytes()).await.unwrap();
    let mut said = vec![];
    let read = tokio::time::timeout(mesh_tests::PATIENCE, io.read_to_end(&mut said));
    read.await.expect("an answer").unwrap();
    String::from_utf8_lossy(&said).into_owned()
}

fn hub_program(args: &[&str], env: &[(&str, &str)]) -> Output {
    let dir = folder();
    let mut c = Command::new(program("cortex-hub"));
    c.args(args).current_dir(dir.path()).env_clear().envs(env.iter().copied()).output().unwrap()
}

/// Where the system has it switched off there is nothing to try.
fn has_ipv6() -> bool {
    let there = std::net::TcpListener::bind("[::1]:0").is_ok();
    if !there {
        eprintln!("IPv6 is switched off here: what needs it is not tried");
    }
    there
}

#[tokio::test(flavor = "multi_thread")]
async fn with_lan_a_hub_is_reached_at_all_addresses_by_who_trusts_its_authority() {
    let hub = Hub::start_with(&[], &["--lan"]).await;
    let facts = facts(&hub);
    let bound: SocketAddr = text(&facts, "http").parse().unwrap();
    assert!(bound.ip().is_unspecified() && facts["https"] == facts["http"], "{facts}");
    assert!(text(&facts, "grpc").parse::<SocketAddr>().unwrap().ip().is_unspecified(), "{facts}");

    // Programs trust what `ca show` prints, and nothing less.
    let shown_ca = Command::new(program("cortex-hub")).args(["ca", "show", "--data-dir"]).arg(hub.data()).output().unwrap();
    let ca = hub.dir.path().join("ca.pem");
    std::fs::write(&ca, &shown_ca.stdout).unwrap();
    let mut own: Vec<String> = vec![format!("127.0.0.1:{}", bound.port()), format!("localhost:{}", bound.port())];
    if bound.is_ipv6() && has_ipv6() {
        own.push(format!("[::1]:{}", bound.port()));
    }
    let machine = hub::machine::Machine::look();
    own.extend(machine.addresses.iter().filter(|a| a.is_ipv4() || bound.is_ipv6()).map(|a| SocketAddr::new(*a, bound.port()).to_string()));
    for address in &own {
        let mut login = hub.cli();
        login.env("CORTEX_URL", format!("https://{address}")).env("SSL_CERT_FILE", &ca).args(["doctor", "--output", "json"]);
        login.env("NO_PROXY", "*");
        let out = login.output().unwrap();
        let report: Value = serde_json::from_slice(&out.stdout).unwrap();
        assert_eq!(report["failed"], "credentials", "{address}: all hops before are fine: {report:#}");
    }
    let out = hub.cli().env("NO_PROXY", "*").args(["doctor", "--output", "json"]).output().unwrap();
    let report: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(report["failed"], "tls", "{report:#}");
    hub.get("/readyz").await;

    // A password that is sent in the clear gets no further than here.
    let said = raw(hub.address(), "POST /api/v1/auth/login HTTP/1.1\r\nHost: localhost").await;
    assert!(said.starts_with("HTTP/1.1 400 ") && said.ends_with("speaks HTTPS, not HTTP\n"), "{said}");

    // The invite works as it is; the line to paste pins the hub's key for its download.
    let (status, invite) = hub.call("POST", "/api/v1/nodes/invites", Some(json!({"name": "n"}))).await;
    assert_eq!(status, 201);
    let (yaml, line) = (text(&invite, "config_yaml"), text(&invite, "join_command"));
    let first = machine.addresses.iter().find(|a| a.is_ipv4() || bound.is_ipv6());
    assert_eq!(yaml.contains("is loopback"), first.is_none(), "{yaml}");
    if let Some(first) = first {
        assert!(yaml.contains(&format!("grpc: \"{}:", host(*first))) && text(&invite, "download_url").contains(&host(*first)), "{yaml}");
    }
    let pin = line.split_once("--pinnedpubkey '").and_then(|(_, rest)| rest.split_once('\'')).map(|(pin, _)| pin.to_owned());
    let pin = pin.unwrap_or_else(|| panic!("{line}"));
    let curl = |pin: &str| {
        let url = format!("{}/healthz", hub.http);
        Command::new("curl").args(["-sS", "-k", "--noproxy", "*", "--pinnedpubkey", pin, &url]).output().expect("curl is there")
    };
    assert!(curl(&pin).status.success(), "{}", shown(&curl(&pin)));
    assert_eq!(curl("sha256//AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=").status.code(), Some(90), "another key is not taken");
    let mut node = Node::prepare("n", &yaml);
    let out = node.command(&["join", "invite.yaml", "--enroll-only"]).env("NO_PROXY", "*").output().unwrap();
    assert!(out.status.success(), "{}", shown(&out));
    let log = node.dir.path().join("node.log");
    let mut run = node.command(&["run"]);
    node.process = Some(mesh_tests::Process::start(run.env("NO_PROXY", "*"), log));
    node.online(&hub).await;
    assert_eq!(hub.sh("echo hi").await["stdout"], "hi\n");
}

fn host(ip: std::net::IpAddr) -> String {
    SocketAddr::new(ip, 0).to_string().trim_end_matches(":0").to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn one_port_serves_requests_and_links() {
    let company = Company::new();
    company.certify(&["localhost", "127.0.0.1"], 30);
    let mut hub = company.hub().await;
    let link = |node: &Node, args: &[&str], address: &str| {
        let mut c = node.command(args);
        c.env("CORTEX_NODE_HUB_GRPC", address);
        c
    };
    // A node that knows the port of the doors alone enrols, links and works there.
    let (_, yaml) = hub.invite(json!({"name": "n"})).await;
    let mut node = Node::prepare("n", &yaml);
    let out = link(&node, &["join", "invite.yaml", "--enroll-only"], hub.address()).output().unwrap();
    assert!(out.status.success(), "{}", shown(&out));
    let log = node.dir.path().join("node.log");
    node.process = Some(mesh_tests::Process::start(&mut link(&node, &["run"], hub.address()), log));
    node.online(&hub).await;
    assert_eq!(hub.sh("echo hi").await["stdout"], "hi\n");

    // With one setting for both there is one port, and invites name it.
    let both = hub.address().to_owned();
    hub.process.terminate().await;
    hub.node = both.clone();
    hub.restart().await;
    assert_eq!((hub.address(), hub.node.as_str()), (both.as_str(), both.as_str()));
    node.online(&hub).await;
    let (_, yaml) = hub.invite(json!({"name": "second"})).await;
    assert!(yaml.contains(&format!("grpc: \"{both}\"")), "{yaml}");
    let mut second = Node::prepare("second", &yaml);
    let out = second.command(&["join", "invite.yaml", "--enroll-only"]).output().unwrap();
    assert!(out.status.success(), "{}", shown(&out));
    second.run();
    second.online(&hub).await;
    let t = hub.dispatch(json!({"node": "second", "shell": {"argv": ["echo", "there"]}, "wait_secs": 30})).await;
    assert_eq!(hub.finished(&text(&t, "id")).await["stdout"], "there\n");
    // Who asks for no name of a node's is served pages, with the certificate that was given.
    assert_eq!(shows(&both).await, std::fs::read(company.path("hub.pem")).map(|pem| der(&pem)).unwrap());
}

fn der(pem: &[u8]) -> Vec<u8> {
    use rustls::pki_types::pem::PemObject;
    rustls::pki_types::CertificateDer::from_pem_slice(pem).unwrap().to_vec()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_given_certificate_is_checked_at_the_start_and_replaced_while_the_hub_runs() {
    let company = Company::new();
    let [(cert, at), (key, key_at)] = company.env();
    let none = ("CORTEX_LOG_LEVEL", "info");
    let refused = |more: (&str, &str), words: &[&str]| {
        for command in [&["config", "check"][..], &["serve"]] {
            let any = "127.0.0.1:0";
            let ports = [("CORTEX_HTTP_ADDR", any), ("CORTEX_NODE_ADDR", any), ("CORTEX_METRICS_ADDR", any)];
            let out = hub_program(command, &[&ports[..], &[(cert, &at), (key, &key_at), more]].concat());
            let said = String::from_utf8_lossy(&out.stderr);
            assert!(out.status.code() == Some(2) && words.iter().all(|w| said.contains(w)), "{command:?} {words:?}: {}", shown(&out));
        }
    };
    refused(none, &["CORTEX_HTTP_TLS_CERT: http.tls_cert: ", "there is no file"]);
    company.certify(&["hub.example"], -1);
    refused(none, &["http.tls_cert: ", "ended at 20", "put a new one there"]);
    company.certify(&["hub.example"], 30);
    refused(("CORTEX_PUBLIC_URL", "https://other.example"), &["http.tls_cert: ", "for hub.example", "not for other.example"]);
    std::fs::write(company.path("hub.key"), KeyPair::generate().unwrap().serialize_pem()).unwrap();
    refused(none, &["http.tls_key: ", "does not fit the certificate"]);

    let first = company.certify(&["hub.example", "127.0.0.1"], 30);
    let hub = company.hub().await;
    assert_eq!(facts(&hub)["https"], hub.address());
    assert_eq!(shows(hub.address()).await, first);
    // Clients that know the company's authority go in, by each name in the certificate.
    let web = |ca: &Path| {
        let ca = reqwest::Certificate::from_pem(&std::fs::read(ca).unwrap()).unwrap();
        let to = hub.address().parse().unwrap();
        reqwest::Client::builder().no_proxy().tls_certs_only([ca]).resolve("hub.example", to).build().unwrap()
    };
    let port = hub.address().rsplit_once(':').unwrap().1;
    let answer = web(&company.path("ca.pem")).get(format!("https://hub.example:{port}/healthz")).send().await.unwrap();
    assert_eq!(answer.status(), 200);
    assert!(web(&company.path("hub.pem")).get(format!("{}/healthz", hub.http)).send().await.is_err());

    // What cannot be used changes nothing; what can is taken without a restart.
    std::fs::write(company.path("hub.key"), "half a key").unwrap();
    until("the hub to have looked", async || hub.process.log().contains("the doors keep their certificate").then_some(())).await;
    assert_eq!(shows(hub.address()).await, first);
    let second = company.certify(&["hub.example", "127.0.0.1"], 60);
    until("the new certificate", async || (shows(hub.address()).await == second).then_some(())).await;
}

#[test]
fn plain_http_is_for_loopback_unless_it_is_asked_for() {
    for address in ["0.0.0.0:0", "[::]:0", "192.0.2.1:0", "[fd00::1]:80"] {
        let out = hub_program(&["serve"], &[("CORTEX_HTTP_ADDR", address)]);
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.code() == Some(2), "{}", shown(&out));
        assert!(["http.addr: ", "http.tls_cert", "--lan", "--insecure-http"].iter().all(|w| said.contains(w)), "{said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_of_a_foreign_host_reaches_nothing() {
    let hub = Hub::start_with(&[("CORTEX_HTTP_ALLOWED_HOSTS", "hub.lan, *.hub.example")], &[]).await;
    for host in ["evil.example", "127.0.0.1.evil.example", "hub.example", "192.0.2.55"] {
        let answer = hub.request("GET", "/api/v1/nodes").header("Host", host).send().await.unwrap();
        let (status, body) = checked("GET", "/api/v1/nodes", answer).await;
        let problem: Value = serde_json::from_slice(&body).unwrap();
        assert_eq!((status, problem["code"].as_str()), (421, Some("foreign_host")), "{host}: {problem}");
        assert!(text(&problem, "detail").contains("http.allowed_hosts") && !problem.to_string().contains(host), "{problem}");
    }
    for host in ["hub.lan", "HUB.lan:9", "a.hub.example", "localhost", "127.0.0.1:1"] {
        assert_eq!(hub.request("GET", "/api/v1/nodes").header("Host", host).send().await.unwrap().status(), 200, "{host}");
    }
    // Every path and listener, and a WebSocket before anything is said on it.
    let upgrade = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==";
    for path in ["/healthz", "/openapi.json", "/docs", "/nowhere", "/api/v1/ws"] {
        let said = raw(hub.address(), &format!("GET {path} HTTP/1.1\r\nHost: evil.example\r\n{upgrade}")).await;
        assert!(said.starts_with("HTTP/1.1 421 ") && said.contains("foreign_host"), "{path}: {said}");
    }
    let said = raw(hub.address(), "GET http://evil.example/healthz HTTP/1.1\r\nHost: localhost").await;
    assert!(said.starts_with("HTTP/1.1 421 "), "{said}");
    for head in ["GET /healthz HTTP/1.1", "GET /healthz HTTP/1.1\r\nHost: localhost\r\nHost: evil.example"] {
        let said = raw(hub.address(), head).await;
        assert!(said.starts_with("HTTP/1.1 400 "), "{said}");
    }
    let metrics = text(&facts(&hub), "metrics");
    assert!(raw(&metrics, "GET /metrics HTTP/1.1\r\nHost: evil.example").await.starts_with("HTTP/1.1 421 "));
    assert!(raw(&metrics, "GET /metrics HTTP/1.1\r\nHost: hub.lan").await.starts_with("HTTP/1.1 200 "));
}

#[tokio::test(flavor = "multi_thread")]
async fn only_a_trusted_proxy_says_where_a_request_came_from() {
    if !has_ipv6() {
        return;
    }
    let env = [
        ("CORTEX_HTTP_ADDR", "[::]:0"),
        ("CORTEX_HTTP_TRUSTED_PROXIES", "127.0.0.1, 10.0.0.0/8"),
        ("CORTEX_LOG_LEVEL", "info,cortex_hub=debug"),
        ("CORTEX_LOG_FORMAT", "json"),
    ];
    let hub = Hub::start_with(&env, &["--insecure-http"]).await;
    let port = hub.address().rsplit_once(':').unwrap().1.to_owned();
    let seen = async |id: &str, from: &str, forwarded: &[&str]| {
        let lines: String = forwarded.iter().map(|f| format!("X-Forwarded-For: {f}\r\n")).collect();
        let said = raw(&format!("{from}:{port}"), &format!("GET /healthz HTTP/1.1\r\nHost: localhost\r\n{lines}X-Request-Id: {id}")).await;
        assert!(said.starts_with("HTTP/1.1 200 "), "{said}");
        until("the request's line in the log", async || {
            let log = hub.process.log();
            let line = log.lines().find(|l| l.contains("answered") && l.contains(&format!("\"{id}\"")))?;
            let line: Value = serde_json::from_str(line).unwrap();
            Some(text(&line["span"], "address"))
        })
        .await
    };
    assert_eq!(seen("r1", "127.0.0.1", &[]).await, "127.0.0.1");
    assert_eq!(seen("r2", "127.0.0.1", &["198.51.100.7, 10.0.0.3"]).await, "198.51.100.7");
    assert_eq!(seen("r3", "127.0.0.1", &["192.0.2.1", "198.51.100.7"]).await, "198.51.100.7", "what a client wrote itself is not believed");
    assert_eq!(seen("r4", "127.0.0.1", &["nonsense"]).await, "127.0.0.1");
    // A stranger, by the other family.
    assert_eq!(seen("r5", "[::1]", &["198.51.100.7"]).await, "::1");
    assert_eq!(seen("r6", "[::1]", &["127.0.0.1", "10.0.0.1"]).await, "::1");
}

#[tokio::test(flavor = "multi_thread")]
async fn all_of_it_works_by_ipv6() {
    if !has_ipv6() {
        return;
    }
    let any = "[::1]:0";
    let hub = Hub::start_with(&[("CORTEX_HTTP_ADDR", any), ("CORTEX_NODE_ADDR", any), ("CORTEX_METRICS_ADDR", any)], &[]).await;
    assert!(hub.http.starts_with("http://[::1]:") && hub.node.starts_with("[::1]:"));
    let (_, yaml) = hub.invite(json!({})).await;
    assert!(yaml.contains(&format!("grpc: \"{}\", url: \"{}\"", hub.node, hub.http)) && yaml.contains("loopback"), "{yaml}");
    let mut node = Node::join(&hub, "six").await;
    hub.cli_login();
    let out = hub.cli().args(["run", "--node", "six", "--", "echo", "hi"]).output().unwrap();
    assert_eq!((out.status.code(), out.stdout.as_slice()), (Some(0), &b"hi\n"[..]), "{}", shown(&out));
    let out = hub.cli().arg("doctor").output().unwrap();
    assert!(out.status.success(), "{}", shown(&out));
    let metrics = text(&facts(&hub), "metrics");
    assert!(raw(&metrics, &format!("GET /metrics HTTP/1.1\r\nHost: {metrics}")).await.starts_with("HTTP/1.1 200 "));
    // The doctor takes the literal as well, and so does the variable.
    let status = || std::fs::read_to_string(node.data().join("status.json")).is_ok_and(|s| s.contains("\"up\""));
    until("the link to be up", async || status().then_some(())).await;
    let out = node.command(&["doctor"]).output().unwrap();
    assert!(out.status.success(), "{}", shown(&out));
    node.daemon().terminate().await;
    let out = node.command(&["doctor", "--output", "json"]).env("CORTEX_NODE_HUB_GRPC", &hub.node).output().unwrap();
    let report: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(report["failed"], "daemon", "{report:#}");
}
