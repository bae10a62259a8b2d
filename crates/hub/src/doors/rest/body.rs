//! Bodies and queries that say what is wrong with them.

use super::App;
use super::problem::Refusal;
use super::requests;
use super::who::{Known, Who};
use axum::extract::{FromRequest, FromRequestParts, OriginalUri, Path, Request};
use axum::http::request::Parts;
use axum::http::{StatusCode, header};
use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use hub_engine::idempotency::Keyed;
use mesh_core::{Digest, sha256};
use serde::de::{DeserializeOwned, Deserializer, Visitor};
use serde::forward_to_deserialize_any;

/// A JSON body. Unknown fields are refused by the types themselves.
pub struct Body<T>(pub T);

impl<T: DeserializeOwned> FromRequest<App> for Body<T> {
    type Rejection = Refusal;
    async fn from_request(request: Request, app: &App) -> Result<Self, Refusal> {
        parse(&json(request, app).await?).map(Body)
    }
}

/// The JSON body of a call that makes something, and the `Idempotency-Key` that it may come with.
pub struct Creating<T> {
    pub body: T,
    key: Option<Key>,
}

struct Key {
    text: String,
    /// Method and path.
    call: String,
    /// Of the body's meaning: the order of its fields and its spaces do not count.
    request: Digest,
}

impl<T: DeserializeOwned> FromRequest<App> for Creating<T> {
    type Rejection = Refusal;
    async fn from_request(request: Request, app: &App) -> Result<Self, Refusal> {
        let text = key(&request)?;
        let path = request.extensions().get::<OriginalUri>().map_or(request.uri(), |u| &u.0).path();
        let call = format!("{} {path}", request.method());
        let bytes = json(request, app).await?;
        let body = parse(&bytes)?;
        let key = match text {
            None => None,
            // Maps of this type are sorted.
            Some(text) => Some(Key { text, call, request: sha256(parse::<serde_json::Value>(&bytes)?.to_string().as_bytes()) }),
        };
        Ok(Self { body, key })
    }
}

impl<T> Creating<T> {
    /// Without a key: each time it comes it makes another.
    pub fn unkeyed(body: T) -> Self {
        Self { body, key: None }
    }
    /// With the key that another door was given for its call.
    pub fn keyed(body: T, call: String, text: Option<String>) -> Result<Self, Refusal>
    where
        T: serde::Serialize,
    {
        let key = match text {
            None => None,
            Some(text) if is_key(&text) => {
                let whole = serde_json::to_value(&body).map_err(|e| Refusal::bad_request("bad_field", e))?;
                Some(Key { text, call, request: sha256(whole.to_string().as_bytes()) })
            }
            Some(_) => return Err(bad_key("an idempotency key")),
        };
        Ok(Self { body, key })
    }
    /// What the engine needs to make one thing of it, however often it comes.
    pub fn split(self, app: &App, who: &Who) -> (T, Option<Keyed>) {
        (self.body, self.key.map(|k| app.idempotency.keyed(who.caller(), &k.call, &k.text, k.request)))
    }
}

pub const IDEMPOTENCY_KEY: &str = "idempotency-key";
pub const MAX_KEY: usize = 255;

fn key(request: &Request) -> Result<Option<String>, Refusal> {
    let mut values = request.headers().get_all(IDEMPOTENCY_KEY).iter();
    let Some(value) = values.next() else { return Ok(None) };
    match (value.to_str().ok().filter(|v| is_key(v)), values.next()) {
        (Some(text), None) => Ok(Some(text.to_owned())),
        _ => Err(bad_key("Idempotency-Key is given once and")),
    }
}

fn is_key(text: &str) -> bool {
    (1..=MAX_KEY).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic())
}

fn bad_key(what: &str) -> Refusal {
    Refusal::bad_request("bad_idempotency_key", format!("{what} has 1 to {MAX_KEY} visible ASCII characters"))
}

/// The first bytes of an answer that is not ours, as text.
pub async fn read_text(body: axum::body::Body, limit: usize) -> String {
    let bytes = axum::body::to_bytes(body, limit).await.unwrap_or_default();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The bytes of a body that says it is JSON.
pub async fn json(request: Request, app: &App) -> Result<Bytes, Refusal> {
    let (parts, bytes) = whole(request, app).await?;
    says_json(&parts)?;
    Ok(bytes)
}

/// Reads a body to its end, and looks again who sends it.
async fn whole(request: Request, app: &App) -> Result<(Parts, Bytes), Refusal> {
    let (parts, body) = request.into_parts();
    let bytes = read(body, app.facts.body_bytes).await?;
    if let Some(known) = parts.extensions.get::<Known>() {
        known.again(app).await?;
    }
    Ok((parts, bytes))
}

fn says_json(parts: &Parts) -> Result<(), Refusal> {
    let kind = parts.headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim();
    if !kind.eq_ignore_ascii_case("application/json") {
        let detail = format!("the body must be application/json, not {kind:?}");
        return Err(Refusal::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", detail));
    }
    Ok(())
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Refusal> {
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let read = T::deserialize(Named(&mut json)).and_then(|body| json.end().map(|()| body));
    read.map_err(|e| {
        let code = if e.is_data() { "bad_field" } else { "bad_json" };
        Refusal::bad_request(code, e)
    })
}

/// Takes a shape by the names of its fields alone; a list of their values would do as well otherwise.
struct Named<D>(D);

impl<'de, D: Deserializer<'de>> Deserializer<'de> for Named<D> {
    type Error = D::Error;
    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
        self.0.deserialize_any(visitor)
    }
    fn deserialize_struct<V: Visitor<'de>>(self, _: &'static str, _: &'static [&'static str], visitor: V) -> Result<V::Value, D::Error> {
        self.0.deserialize_map(visitor)
    }
    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 u8 u16 u32 u64 f32 f64 char str string bytes byte_buf option unit unit_struct newtype_struct
        seq tuple tuple_struct map enum identifier ignored_any
    }
}

/// A JSON body that may be left out.
pub struct OptionalBody<T>(pub T);

impl<T: DeserializeOwned + Default> FromRequest<App> for OptionalBody<T> {
    type Rejection = Refusal;
    async fn from_request(request: Request, app: &App) -> Result<Self, Refusal> {
        let (parts, bytes) = whole(request, app).await?;
        if bytes.is_empty() {
            return Ok(Self(T::default()));
        }
        says_json(&parts)?;
        parse(&bytes).map(Self)
    }
}

/// How much beyond the limit is read and thrown away, so that the caller hears why instead of a
/// broken connection.
const DRAIN_BYTES: usize = 16 << 20;

/// Collects a body up to `limit`.
pub async fn read(body: axum::body::Body, limit: usize) -> Result<Bytes, Refusal> {
    let mut body = body.into_data_stream();
    let (mut kept, mut seen) = (BytesMut::new(), 0usize);
    while let Some(piece) = body.next().await {
        let piece = piece.map_err(|e| {
            requests::too_slow(&e).unwrap_or_else(|| Refusal::bad_request("bad_body", format!("the body did not arrive whole: {e}")))
        })?;
        seen += piece.len();
        if seen <= limit {
            kept.extend_from_slice(&piece);
        } else if seen > limit.saturating_add(DRAIN_BYTES) {
            break;
        }
    }
    if seen > limit {
        let detail = format!("the body is larger than limits.body_bytes, {limit}");
        return Err(Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", detail));
    }
    Ok(kept.freeze())
}

/// A query string into a type that denies unknown fields.
pub struct Query<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Query<T> {
    type Rejection = Refusal;
    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Refusal> {
        let q = axum::extract::Query::<T>::try_from_uri(&parts.uri);
        q.map(|q| Self(q.0)).map_err(|e| Refusal::bad_request("bad_query", e.body_text()))
    }
}

/// A part of the path, as text.
pub struct PathText(pub String);

impl<S: Send + Sync> FromRequestParts<S> for PathText {
    type Rejection = Refusal;
    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        let text = Path::<String>::from_request_parts(parts, state).await;
        text.map(|Path(text)| Self(text)).map_err(|e| Refusal::bad_request("bad_path", e.body_text()))
    }
}

/// Two parts of the path, as text.
pub struct PathTexts(pub String, pub String);

impl<S: Send + Sync> FromRequestParts<S> for PathTexts {
    type Rejection = Refusal;
    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        let texts = Path::<(String, String)>::from_request_parts(parts, state).await;
        texts.map(|Path((a, b))| Self(a, b)).map_err(|e| Refusal::bad_request("bad_path", e.body_text()))
    }
}

/// An id in the path; one that cannot be one is as absent as an unknown one.
pub struct PathId<T>(pub T);

impl<T: std::str::FromStr<Err = mesh_core::BadId>> PathId<T> {
    pub fn of(text: &str) -> Result<Self, Refusal> {
        text.parse().map(Self).map_err(|e: mesh_core::BadId| Refusal::new(StatusCode::NOT_FOUND, "not_found", e))
    }
}

impl<S: Send + Sync, T> FromRequestParts<S> for PathId<T>
where
    T: std::str::FromStr<Err = mesh_core::BadId> + Send,
{
    type Rejection = Refusal;
    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        let PathText(text) = PathText::from_request_parts(parts, state).await?;
        Self::of(&text)
    }
}
