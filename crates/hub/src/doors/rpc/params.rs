//! Between JSON-RPC and the handlers of REST: parameters into extractors, answers into results.

use crate::doors::rest::{Creating, OptionalBody, PathId, PathTexts, Query, Refusal};
use axum::Json;
use axum::http::StatusCode;
use mesh_core::BadId;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Map, Value};
use std::str::FromStr;

/// The parameters of a call, by name. All of them are known to the method.
pub struct Params(pub Map<String, Value>);

fn bad(detail: impl ToString) -> Refusal {
    Refusal::bad_request("bad_params", detail)
}

impl Params {
    /// Takes one out: null is as good as absent.
    fn take(&mut self, name: &str) -> Option<Value> {
        self.0.remove(name).filter(|v| !v.is_null())
    }
    pub fn text_if_given(&mut self, name: &str) -> Result<Option<String>, Refusal> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(bad(format!("{name} is a string"))),
        }
    }
    pub fn text(&mut self, name: &str) -> Result<String, Refusal> {
        self.text_if_given(name)?.ok_or_else(|| bad(format!("{name} is missing")))
    }
    /// One that cannot be an id is as absent as an unknown one.
    pub fn id<T: FromStr<Err = BadId>>(&mut self, name: &str) -> Result<PathId<T>, Refusal> {
        PathId::of(&self.text(name)?)
    }
    pub fn id_if_given<T: FromStr<Err = BadId>>(&mut self, name: &str) -> Result<Option<PathId<T>>, Refusal> {
        self.text_if_given(name)?.map(|text| PathId::of(&text)).transpose()
    }
    pub fn texts(&mut self, one: &str, other: &str) -> Result<PathTexts, Refusal> {
        Ok(PathTexts(self.text(one)?, self.text(other)?))
    }
    /// All that are left, as a shape.
    pub fn read<T: DeserializeOwned>(self) -> Result<T, Refusal> {
        serde_json::from_value(Value::Object(self.0)).map_err(bad)
    }
    pub fn query<T: DeserializeOwned>(self) -> Result<Query<T>, Refusal> {
        self.read().map(Query)
    }
    pub fn optional_body<T: DeserializeOwned>(self) -> Result<OptionalBody<T>, Refusal> {
        self.read().map(OptionalBody)
    }
    pub fn creating<T: DeserializeOwned>(self) -> Result<Creating<T>, Refusal> {
        self.read().map(Creating::unkeyed)
    }
}

/// What a handler answers, as a result: its body, and null where it has none.
pub trait Said {
    fn said(self) -> Result<Box<RawValue>, Refusal>;
}

fn json(value: &impl Serialize) -> Result<Box<RawValue>, Refusal> {
    to_raw_value(value).map_err(|e| {
        tracing::error!(error = %e, "an answer cannot be written as JSON");
        Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", "the answer cannot be written")
    })
}

impl<T: Serialize> Said for Json<T> {
    fn said(self) -> Result<Box<RawValue>, Refusal> {
        json(&self.0)
    }
}
impl<T: Serialize> Said for (StatusCode, Json<T>) {
    fn said(self) -> Result<Box<RawValue>, Refusal> {
        self.1.said()
    }
}
impl<H, T: Serialize> Said for (StatusCode, H, Json<T>) {
    fn said(self) -> Result<Box<RawValue>, Refusal> {
        self.2.said()
    }
}
impl Said for StatusCode {
    fn said(self) -> Result<Box<RawValue>, Refusal> {
        json(&())
    }
}
