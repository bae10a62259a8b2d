//! Streams outlive their token, but not the rights behind it; and a socket by cookie is for own pages.

use futures::StreamExt;
use mesh_tests::{Hub, Node, PASSWORD, PATIENCE, text};
use reqwest::Client;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::http::HeaderValue;
use tokio_tungstenite::tungstenite::{Error, Message};

fn web() -> Client {
    Client::builder().no_proxy().build().unwrap()
}

/// Opens a WebSocket with these headers; the status where the hub refuses.
async fn ws(hub: &Hub, headers: &[(&'static str, &str)]) -> Result<WebSocketStream<TcpStream>, u16> {
    let host = hub.http.trim_start_matches("http://");
    let mut request = format!("ws://{host}/api/v1/ws").into_client_request().unwrap();
    for (name, value) in headers {
        request.headers_mut().append(*name, HeaderValue::try_from(*value).unwrap());
    }
    let tcp = TcpStream::connect(host).await.unwrap();
    match tokio_tungstenite::client_async(request, tcp).await {
        Ok((socket, _)) => Ok(socket),
        Err(Error::Http(answer)) => Err(answer.status().as_u16()),
        Err(e) => panic!("{e}"),
    }
}

/// A body that is read on behind; whole says whether it came to its own end.
struct Body {
    text: String,
    whole: bool,
}

/// Everything that one token can listen to, all of it under way.
struct Ears {
    raw: futures::stream::BoxStream<'static, reqwest::Result<Vec<u8>>>,
    output: futures::stream::BoxStream<'static, reqwest::Result<Vec<u8>>>,
    events: futures::stream::BoxStream<'static, reqwest::Result<Vec<u8>>>,
    socket: WebSocketStream<TcpStream>,
}

impl Ears {
    async fn open(hub: &Hub, token: &str, task: &str) -> Self {
        let stream = async |path: String, accept: &str| {
            let r = web().get(format!("{}/api/v1{path}", hub.http)).bearer_auth(token).header("accept", accept);
            let r = r.send().await.unwrap();
            assert_eq!(r.status(), 200, "{path}");
            let mut body = r.bytes_stream().map(|b| b.map(|b| b.to_vec())).boxed();
            let first = tokio::time::timeout(PATIENCE, body.next()).await.expect("it begins").unwrap().unwrap();
            assert!(!first.is_empty());
            body
        };
        Self {
            raw: stream(format!("/tasks/{task}/output?follow=true"), "*/*").await,
            output: stream(format!("/tasks/{task}/output"), "text/event-stream").await,
            events: stream("/events".into(), "text/event-stream").await,
            socket: ws(hub, &[("authorization", &format!("Bearer {token}"))]).await.unwrap(),
        }
    }

    /// Each is cut, and says why where it can.
    async fn cut(mut self) {
        let end = tokio::time::timeout(PATIENCE, async {
            let raw = read(&mut self.raw).await;
            assert!(!raw.whole, "a cut body tells the reader that this was not the end");
            let output = read(&mut self.output).await;
            assert!(output.text.contains("event: denied") && output.text.contains("\"rights\""), "{}", output.text);
            let events = read(&mut self.events).await;
            assert!(events.text.contains("event: end") && events.text.contains("\"rights\""), "{}", events.text);
            loop {
                match self.socket.next().await {
                    Some(Ok(Message::Close(Some(frame)))) => return u16::from(frame.code),
                    Some(Ok(_)) => {}
                    other => panic!("{other:?}"),
                }
            }
        });
        assert_eq!(end.await.expect("every stream is cut"), 1008);
    }
}

async fn read(body: &mut futures::stream::BoxStream<'static, reqwest::Result<Vec<u8>>>) -> Body {
    let mut text = vec![];
    loop {
        let whole = match body.next().await {
            Some(Ok(piece)) => {
                text.extend(piece);
                continue;
            }
            Some(Err(_)) => false,
            None => true,
        };
        return Body { text: String::from_utf8_lossy(&text).into_owned(), whole };
    }
}

async fn log_in(hub: &Hub) -> Value {
    let r = web().post(format!("{}/api/v1/auth/login", hub.http)).json(&json!({"username": "admin", "password": PASSWORD}));
    r.send().await.unwrap().json().await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_end_with_the_rights_behind_them() {
    let hub = Hub::start().await;
    let _node = Node::join(&hub, "n").await;
    let body = json!({"shell": {"argv": ["sh", "-c", "echo begun; while :; do sleep 1; done"]}});
    let task = text(&hub.dispatch(body).await, "id");
    hub.task_when(&task, "to run", |t| t["state"] == "running").await;

    // A device that is revoked, by another of the same person.
    let (own, bystander) = (log_in(&hub).await, log_in(&hub).await);
    let (own, bystander) = (text(&own, "access_token"), text(&bystander, "access_token"));
    let ears = Ears::open(&hub, &own, &task).await;
    let mut stays = Ears::open(&hub, &bystander, &task).await;
    let r = web().get(format!("{}/api/v1/devices", hub.http)).bearer_auth(&own).send().await.unwrap();
    let devices: Value = r.json().await.unwrap();
    let current = devices["items"].as_array().unwrap().iter().find(|d| d["current"] == true).unwrap();
    assert_eq!(hub.call("DELETE", &format!("/api/v1/devices/{}", text(current, "id")), None).await.0, 204);
    ears.cut().await;

    // A key that is removed.
    let (_, key) = hub.call("POST", "/api/v1/api-keys", Some(json!({"name": "k", "scopes": ["*"]}))).await;
    let ears = Ears::open(&hub, &text(&key, "secret"), &task).await;
    assert_eq!(hub.call("DELETE", &format!("/api/v1/api-keys/{}", text(&key, "id")), None).await.0, 204);
    ears.cut().await;

    // A log-in whose refresh token came a second time.
    let stolen = log_in(&hub).await;
    let ears = Ears::open(&hub, &text(&stolen, "access_token"), &task).await;
    for status in [200, 401] {
        let refresh = json!({"refresh_token": stolen["refresh_token"]});
        assert_eq!(hub.call("POST", "/api/v1/auth/refresh", Some(refresh)).await.0, status);
    }
    ears.cut().await;

    // Who has lost nothing goes on listening, all that time.
    assert_eq!(hub.call("POST", &format!("/api/v1/tasks/{task}/cancel"), None).await.0, 202);
    let raw = tokio::time::timeout(PATIENCE, read(&mut stays.raw)).await.unwrap();
    assert!(raw.whole);
    let output = tokio::time::timeout(PATIENCE, read(&mut stays.output)).await.unwrap();
    assert!(output.whole && output.text.contains("event: end") && !output.text.contains("denied"), "{}", output.text);
}

/// A token that expires cuts nothing: it was good when the stream began.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_outlives_its_token() {
    let hub = Hub::start_with(&[("CORTEX_AUTH_ACCESS_SECS", "25")], &[]).await;
    // A machine that stood still for the whole of a token's life takes another.
    let (token, mut socket) = mesh_tests::until("a socket by a good token", async || {
        let token = text(&log_in(&hub).await, "access_token");
        let socket = ws(&hub, &[("authorization", &format!("Bearer {token}"))]).await.ok()?;
        Some((token, socket))
    })
    .await;
    let me = async || web().get(format!("{}/api/v1/auth/me", hub.http)).bearer_auth(&token).send().await.unwrap().status().as_u16();
    mesh_tests::until("the token's end", async || (me().await == 401).then_some(())).await;
    // Something to hear: by a caller whose rights do not end.
    mesh_tests::until("a session by a good token", async || {
        let made = web().post(format!("{}/api/v1/sessions", hub.http)).bearer_auth(text(&log_in(&hub).await, "access_token"));
        (made.json(&json!({"name": "s"})).send().await.unwrap().status() == 201).then_some(())
    })
    .await;
    let heard = tokio::time::timeout(PATIENCE, async {
        loop {
            match socket.next().await {
                Some(Ok(Message::Text(text))) if text.contains("\"created\"") => return true,
                Some(Ok(Message::Text(_) | Message::Ping(_))) => {}
                other => panic!("{other:?}"),
            }
        }
    });
    assert!(heard.await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_by_cookie_is_for_pages_of_this_hub() {
    let hub = Hub::start().await;
    let login = web().post(format!("{}/api/v1/auth/login?cookie=true", hub.http));
    let r = login.json(&json!({"username": "admin", "password": PASSWORD})).send().await.unwrap();
    let set = r.headers()["set-cookie"].to_str().unwrap().to_owned();
    let cookie = set.split(';').next().unwrap();
    let token = cookie.split_once('.').unwrap().1;
    let bearer = format!("Bearer {token}");
    for (what, headers, expected) in [
        ("own page", &[("cookie", cookie), ("origin", &hub.http)][..], None),
        ("no page", &[("cookie", cookie)], Some(403)),
        ("a sandboxed page", &[("cookie", cookie), ("origin", "null")], Some(403)),
        ("an empty origin", &[("cookie", cookie), ("origin", "")], Some(403)),
        ("a foreign page", &[("cookie", cookie), ("origin", "https://evil.test")], Some(403)),
        ("another port", &[("cookie", cookie), ("origin", "http://127.0.0.1:1")], Some(403)),
        ("one that begins like ours", &[("cookie", cookie), ("origin", &format!("{}.evil.test", hub.http))], Some(403)),
        ("own and foreign", &[("cookie", cookie), ("origin", &hub.http), ("origin", "https://evil.test")], Some(403)),
        ("a program with a header", &[("authorization", &bearer)], None),
        ("a foreign page with a header", &[("authorization", &bearer), ("origin", "https://evil.test")], Some(403)),
        ("nobody", &[("origin", &hub.http)], Some(401)),
    ] {
        assert_eq!(ws(&hub, headers).await.err(), expected, "{what}");
    }
    let url = format!("{}/api/v1/ws?access_token={token}", hub.http);
    let r = web().get(url).header("upgrade", "websocket").header("connection", "upgrade").send().await.unwrap();
    assert_eq!(r.status(), 401, "never by a URL");
}
