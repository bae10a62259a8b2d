//! The connection to one hub: credentials, their renewal, and how an answer becomes a value.

use crate::error::Error;
use crate::rest::{Problem, RefreshRequest, TokenReply};
use mesh_process::Tasks;
use mesh_process::proxy::is_loopback;
use reqwest::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderValue, LOCATION, RETRY_AFTER};
use reqwest::{Method, Response, StatusCode, Url};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Mutex, oneshot};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// For calls that are not streams; the hub gives up on a request after the same time.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// How long another holder of the store may take to renew the log-in.
const STORE_LOCK_TRIES: u32 = 800;
const STORE_LOCK_PAUSE: Duration = Duration::from_millis(50);

/// Who the caller is.
#[derive(Clone)]
pub enum Credentials {
    /// For the few calls that need none.
    None,
    ApiKey(String),
    /// From a log-in. Renewed by the client when the hub no longer takes the access token.
    Tokens(Tokens),
}

/// The pair that a log-in gives.
#[derive(Clone, PartialEq, Eq, Serialize, serde::Deserialize)]
pub struct Tokens {
    pub access_token: String,
    pub refresh_token: String,
}

impl From<TokenReply> for Tokens {
    fn from(r: TokenReply) -> Self {
        Self { access_token: r.access_token, refresh_token: r.refresh_token }
    }
}

/// Keeps the tokens of a log-in over the life of a process, and between processes.
///
/// A refresh token is used once: a second use ends the whole log-in. Processes that share a store
/// must therefore renew one after the other, and look first whether another one already has.
pub trait TokenStore: Send + Sync {
    /// Takes the store for this process alone until the value is dropped; `None`: another has it.
    fn try_lock(&self) -> std::io::Result<Option<Box<dyn Send>>>;
    /// What is stored now; `None` when somebody logged out.
    fn load(&self) -> std::io::Result<Option<Tokens>>;
    /// Replaces what is stored, as a whole.
    fn save(&self, tokens: &Tokens) -> std::io::Result<()>;
}

enum Auth {
    None,
    Key(String),
    Tokens { current: Mutex<Tokens>, store: Option<Box<dyn TokenStore>> },
}

/// A client of one hub. Cloning shares connections and credentials.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

struct Inner {
    http: reqwest::Client,
    base: Url,
    auth: Auth,
    /// Renewals under way.
    renewals: Tasks,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("url", &self.url()).finish_non_exhaustive()
    }
}
impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::None => "None",
            Self::ApiKey(_) => "ApiKey(…)",
            Self::Tokens(_) => "Tokens(…)",
        })
    }
}
impl std::fmt::Debug for Tokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Tokens(…)")
    }
}

/// One request, kept so that it can be sent again with renewed credentials.
pub(crate) struct Call {
    method: Method,
    url: Url,
    body: Option<Vec<u8>>,
    accept: &'static str,
    last_event_id: Option<String>,
    idempotency_key: Option<String>,
    headers: Vec<(&'static str, String)>,
    timeout: Option<Duration>,
    anonymous: bool,
}

impl Call {
    pub(crate) fn json<T: Serialize>(mut self, body: &T) -> Self {
        // The documents of the door are maps with text keys, which always serialise.
        self.body = Some(serde_json::to_vec(body).expect("a document serialises"));
        self
    }
    /// Leaves out what is `None`.
    pub(crate) fn query(mut self, key: &str, value: Option<impl ToString>) -> Self {
        if let Some(v) = value {
            self.url.query_pairs_mut().append_pair(key, &v.to_string());
        }
        self
    }
    pub(crate) fn accept(mut self, media_type: &'static str) -> Self {
        self.accept = media_type;
        self
    }
    pub(crate) fn last_event_id(mut self, id: Option<&str>) -> Self {
        self.last_event_id = id.map(str::to_owned);
        self
    }
    pub(crate) fn idempotency_key(mut self, key: Option<&str>) -> Self {
        self.idempotency_key = key.map(str::to_owned);
        self
    }
    /// A header that only this call has.
    pub(crate) fn header(mut self, name: &'static str, value: Option<String>) -> Self {
        self.headers.extend(value.map(|v| (name, v)));
        self
    }
    pub(crate) fn wait_at_most(mut self, time: Option<Duration>) -> Self {
        self.timeout = time;
        self
    }
    pub(crate) fn longer_by(mut self, time: Duration) -> Self {
        self.timeout = self.timeout.map(|t| t + time);
        self
    }
    pub(crate) fn anonymous(mut self) -> Self {
        self.anonymous = true;
        self
    }
    fn name(&self) -> String {
        format!("{} {}", self.method, self.url.path())
    }
}

impl Client {
    /// A client of the hub at `url` (scheme, host, port, and a path where a proxy adds one). Nothing
    /// is sent yet. Renewed tokens are kept in memory alone: see [`Client::with_store`].
    pub fn new(url: &str, credentials: Credentials) -> Result<Self, Error> {
        Self::build(url, credentials, None)
    }
    /// As [`Client::new`], with tokens that are shared with other processes.
    pub fn with_store(url: &str, tokens: Tokens, store: Box<dyn TokenStore>) -> Result<Self, Error> {
        Self::build(url, Credentials::Tokens(tokens), Some(store))
    }

    fn build(url: &str, credentials: Credentials, store: Option<Box<dyn TokenStore>>) -> Result<Self, Error> {
        let base = parse_url(url)?;
        let auth = match credentials {
            Credentials::None => Auth::None,
            Credentials::ApiKey(key) => {
                bearer(&key)?;
                Auth::Key(key)
            }
            Credentials::Tokens(t) => {
                bearer(&t.access_token)?;
                Auth::Tokens { current: Mutex::new(t), store }
            }
        };
        let mut builder = reqwest::Client::builder()
            .user_agent(concat!("cortex/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIMEOUT)
            // A redirect would turn a POST into a GET; the answer names the right URL instead.
            .redirect(reqwest::redirect::Policy::none());
        if is_loopback(base.host_str().unwrap_or_default()) {
            builder = builder.no_proxy();
        }
        let http = builder.build().map_err(|e| Error::transport(base.as_str(), e))?;
        Ok(Self { inner: Arc::new(Inner { http, base, auth, renewals: Tasks::new() }) })
    }

    /// The hub's URL in its one spelling: lower case, no slash at the end.
    pub fn url(&self) -> &str {
        self.inner.base.as_str().trim_end_matches('/')
    }

    /// Begins a call of `/api/v1`; each segment is one part of the path and is escaped.
    pub(crate) fn call(&self, method: Method, segments: &[&str]) -> Call {
        self.outside(method, &[&["api", "v1"], segments].concat())
    }
    /// The same outside `/api/v1`.
    pub(crate) fn outside(&self, method: Method, segments: &[&str]) -> Call {
        let mut url = self.inner.base.clone();
        if let Ok(mut path) = url.path_segments_mut() {
            path.pop_if_empty().extend(segments);
        }
        Call {
            method,
            url,
            body: None,
            accept: "application/json",
            last_event_id: None,
            idempotency_key: None,
            headers: vec![],
            timeout: Some(CALL_TIMEOUT),
            anonymous: false,
        }
    }

    /// Sends a call and reads its JSON answer.
    pub(crate) async fn fetch<T: DeserializeOwned>(&self, call: Call) -> Result<T, Error> {
        let response = self.send(&call).await?;
        self.decode(&call, response).await
    }
    async fn decode<T: DeserializeOwned>(&self, call: &Call, response: Response) -> Result<T, Error> {
        let status = Some(response.status().as_u16());
        let body = response.bytes().await.map_err(|e| Error::transport(self.url(), e))?;
        serde_json::from_slice(&body).map_err(|e| Error::Protocol {
            call: call.name(),
            reason: format!("the answer is not what this version of cortex expects: {e}"),
            status,
        })
    }
    /// Sends a call whose answer says nothing more than that it worked.
    pub(crate) async fn perform(&self, call: Call) -> Result<(), Error> {
        self.send(&call).await.map(drop)
    }

    /// Sends a call; renews the log-in once when the hub no longer takes it. Gives only 2xx answers.
    pub(crate) async fn send(&self, call: &Call) -> Result<Response, Error> {
        self.judge(call, self.ask(call).await?).await
    }

    /// The same, and gives whatever is answered.
    pub(crate) async fn ask(&self, call: &Call) -> Result<Response, Error> {
        let token = match &self.inner.auth {
            _ if call.anonymous => None,
            Auth::None => None,
            Auth::Key(key) => Some(key.clone()),
            Auth::Tokens { current, .. } => Some(current.lock().await.access_token.clone()),
        };
        let response = self.send_once(call, token.as_deref()).await?;
        if let (StatusCode::UNAUTHORIZED, false, Auth::Tokens { .. }, Some(stale)) =
            (response.status(), call.anonymous, &self.inner.auth, token)
        {
            let fresh = self.renew_to_the_end(stale).await?;
            return self.send_once(call, Some(&fresh)).await;
        }
        Ok(response)
    }

    async fn send_once(&self, call: &Call, token: Option<&str>) -> Result<Response, Error> {
        let mut request = self.inner.http.request(call.method.clone(), call.url.clone()).header(ACCEPT, call.accept);
        if let Some(token) = token {
            request = request.header(AUTHORIZATION, bearer(token)?);
        }
        if let Some(id) = &call.last_event_id {
            request = request.header("Last-Event-ID", id);
        }
        if let Some(key) = &call.idempotency_key {
            let value = HeaderValue::from_str(key).map_err(|_| Error::Setting("an idempotency key has visible ASCII characters".into()))?;
            request = request.header("Idempotency-Key", value);
        }
        for (name, value) in &call.headers {
            request = request.header(*name, value);
        }
        if let Some(body) = &call.body {
            request = request.header(CONTENT_TYPE, "application/json").body(body.clone());
        }
        if let Some(timeout) = call.timeout {
            request = request.timeout(timeout);
        }
        request.send().await.map_err(|e| Error::transport(self.url(), e))
    }

    /// [`Client::renew`], which goes on when the caller stops waiting: a refresh token that was used
    /// and whose successor was not kept would end the log-in.
    async fn renew_to_the_end(&self, stale: String) -> Result<String, Error> {
        let (tell, told) = oneshot::channel();
        let client = self.clone();
        self.inner.renewals.spawn("renew log-in", async move {
            // The caller may have left; what was renewed is kept all the same.
            let _ = tell.send(client.renew(&stale).await);
        });
        told.await.unwrap_or_else(|_| Err(Error::Interrupted { url: self.url().to_owned(), reason: "the process ends".into() }))
    }

    /// Waits for renewals of the log-in that nobody waits for any more, at most `grace`. For the end
    /// of a process that shares its log-in with others.
    pub async fn settle(&self, grace: Duration) {
        self.inner.renewals.end(grace).await;
    }

    /// Gives an access token that is not `stale`.
    async fn renew(&self, stale: &str) -> Result<String, Error> {
        let Auth::Tokens { current, store } = &self.inner.auth else { return Err(Error::Setting("there is no log-in to renew".into())) };
        let mut current = current.lock().await;
        if current.access_token != stale {
            return Ok(current.access_token.clone());
        }
        let _held = match store {
            Some(store) => Some(hold(store.as_ref()).await?),
            None => None,
        };
        if let Some(store) = store {
            // Nobody is logged in any more: the hub is asked all the same, and its answer says so.
            if let Some(kept) = store.load().map_err(Error::Store)?
                && kept.access_token != stale
            {
                *current = kept;
                return Ok(current.access_token.clone());
            }
        }
        let fresh: Tokens = self.refresh(&current.refresh_token).await?.into();
        *current = fresh;
        if let Some(store) = store {
            store.save(&current).map_err(Error::Store)?;
        }
        Ok(current.access_token.clone())
    }

    /// Exchanges a refresh token for a new pair; the old one must not be used again.
    pub async fn refresh(&self, refresh_token: &str) -> Result<TokenReply, Error> {
        let body = RefreshRequest { refresh_token: Some(refresh_token.to_owned()) };
        let call = self.call(Method::POST, &["auth", "refresh"]).anonymous().json(&body);
        // Not by `send`, which may itself come here.
        let response = self.judge(&call, self.send_once(&call, None).await?).await?;
        self.decode(&call, response).await
    }

    pub(crate) async fn judge(&self, call: &Call, response: Response) -> Result<Response, Error> {
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let header = |name| response.headers().get(name).and_then(|v: &HeaderValue| v.to_str().ok()).map(str::to_owned);
        let (retry_after, location) = (header(RETRY_AFTER).and_then(|v| v.parse().ok()), header(LOCATION));
        let body = response.bytes().await.unwrap_or_default();
        if let Ok(problem) = serde_json::from_slice::<Problem>(&body) {
            return Err(Error::Problem { problem: Box::new(problem), retry_after });
        }
        let reason = match location {
            Some(to) if status.is_redirection() => format!("the hub is elsewhere ({status} to {to}); use that address"),
            _ => format!("answered {status} without saying why; is {} a cortex hub?", self.url()),
        };
        Err(Error::Protocol { call: call.name(), reason, status: Some(status.as_u16()) })
    }
}

async fn hold(store: &dyn TokenStore) -> Result<Box<dyn Send>, Error> {
    for _ in 0..STORE_LOCK_TRIES {
        if let Some(held) = store.try_lock().map_err(Error::Store)? {
            return Ok(held);
        }
        tokio::time::sleep(STORE_LOCK_PAUSE).await;
    }
    Err(Error::Store(std::io::Error::other("another process has held it for too long")))
}

fn bearer(token: &str) -> Result<HeaderValue, Error> {
    let mut value = HeaderValue::from_str(&format!("Bearer {token}"))
        .map_err(|_| Error::Setting("the credential holds characters that no key or token has; was it copied whole?".into()))?;
    value.set_sensitive(true);
    Ok(value)
}

fn parse_url(text: &str) -> Result<Url, Error> {
    let bad = |why: &str| Error::Setting(format!("{text:?} is not the URL of a hub: {why}"));
    let mut url = Url::parse(text.trim()).map_err(|e| bad(&format!("{e}; write it like http://127.0.0.1:8080")))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(bad("it begins with neither http:// nor https://"));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(bad("it holds a user name or password, which belong into a log-in"));
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(bad("it ends with a query or a fragment"));
    }
    let path = url.path().trim_end_matches('/').to_owned();
    url.set_path(&path);
    Ok(url)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls() {
        let check = |input: &str, expect: Result<&str, &str>| match (Client::new(input, Credentials::None), expect) {
            (Ok(c), Ok(url)) => assert_eq!(c.url(), url),
            (Err(e), Err(part)) => assert!(e.to_string().contains(part), "{input}: {e}"),
            (got, want) => panic!("{input}: {got:?}, not {want:?}"),
        };
        check("http://127.0.0.1:8080", Ok("http://127.0.0.1:8080"));
        check("HTTPS://Hub.Example.org/", Ok("https://hub.example.org"));
        check("https://example.org/cortex/", Ok("https://example.org/cortex"));
        check("127.0.0.1:8080", Err("write it like"));
        check("localhost:8080", Err("neither http:// nor"));
        check("http://me:secret@hub", Err("log-in"));
        check("http://hub?x=1", Err("query"));
    }

    #[test]
    fn paths_are_escaped() {
        let c = Client::new("http://hub/base/", Credentials::None).unwrap();
        let call = c.call(Method::GET, &["nodes", "a/b ?"]).query("x", Some("1&2")).query("y", None::<u8>);
        assert_eq!(call.url.as_str(), "http://hub/base/api/v1/nodes/a%2Fb%20%3F?x=1%262");
    }

    #[test]
    fn secrets_are_not_printed() {
        let t = Tokens { access_token: "abc".into(), refresh_token: "def".into() };
        assert!(!format!("{t:?} {:?} {:?}", Credentials::Tokens(t.clone()), Credentials::ApiKey("abc".into())).contains("abc"));
        assert!(Client::new("http://hub", Credentials::ApiKey("a\nb".into())).is_err());
    }
}
