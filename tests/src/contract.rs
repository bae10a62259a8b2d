//! Answers against the hub's own description: whatever a test asks, the answer must be one that
//! `/openapi.json` names, and of the shape that it gives.

use jsonschema::Validator;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock};

/// The description of the hub under test; the same for all hubs of one test program.
pub struct Contract {
    doc: Value,
    /// By the place of the schema in the description.
    validators: Mutex<HashMap<String, Arc<Validator>>>,
}

static CONTRACT: OnceLock<Contract> = OnceLock::new();

/// The description, once a hub has told it.
pub fn get() -> Option<&'static Contract> {
    CONTRACT.get()
}

/// Keeps what `/openapi.json` answered.
pub fn learn(doc: Value) {
    CONTRACT.get_or_init(|| Contract::new(doc));
}

/// An answer as it came.
pub struct Answer<'a> {
    pub status: u16,
    pub content_type: &'a str,
    pub body: &'a [u8],
}

impl Contract {
    pub fn new(mut doc: Value) -> Self {
        if let Some(schemas) = doc["components"]["schemas"].as_object_mut() {
            schemas.values_mut().for_each(close);
        }
        Self { doc, validators: Mutex::default() }
    }

    /// Says what is wrong with an answer to a call.
    pub fn check(&self, method: &str, path: &str, answer: &Answer) -> Result<(), String> {
        let path = path.split(['?', '#']).next().unwrap_or_default();
        let at = format!("{method} {path} answered {}", answer.status);
        let Some((template, operation)) = self.operation(method, path) else {
            // Nothing is there, it is elsewhere, the method is wrong, or it comes later.
            return match answer.status {
                308 => Ok(()),
                404 | 405 | 501 => self.valid(&at, "/components/schemas/Problem", answer.body),
                _ => Err(format!("{at}, and the description has no such call; give its handler #[utoipa::path]")),
            };
        };
        let place = format!("/paths/{}/{}/responses/{}", escape(template), method.to_lowercase(), answer.status);
        let Some(mut response) = operation["responses"].get(answer.status.to_string()) else {
            return Err(format!(
                "{at}, which its description does not name; add the status to `responses` in #[utoipa::path] of its handler. {}",
                String::from_utf8_lossy(answer.body)
            ));
        };
        let mut place = place;
        if let Some(r) = response["$ref"].as_str() {
            place = r.trim_start_matches('#').to_owned();
            response = self.doc.pointer(&place).ok_or_else(|| format!("{r} leads nowhere"))?;
        }
        let kind = answer.content_type.split(';').next().unwrap_or_default().trim();
        let Some(content) = response["content"].as_object() else {
            return if answer.body.is_empty() { Ok(()) } else { Err(format!("{at} with a body, and its description has none")) };
        };
        if !content.contains_key(kind) {
            return Err(format!("{at} as {kind:?}; its description names {:?}", content.keys().collect::<Vec<_>>()));
        }
        if !(kind == "application/json" || kind.ends_with("+json")) {
            return Ok(());
        }
        self.valid(&at, &format!("{place}/content/{}/schema", escape(kind)), answer.body)
    }

    /// The operation that a path leads to: fixed parts weigh more than parameters, as in the router.
    fn operation(&self, method: &str, path: &str) -> Option<(&str, &Value)> {
        let parts: Vec<&str> = path.split('/').collect();
        let fits = |template: &str| {
            let other: Vec<&str> = template.split('/').collect();
            let same = |(a, b): (&&str, &&str)| a == b || (a.starts_with('{') && !b.is_empty());
            (other.len() == parts.len() && other.iter().zip(&parts).all(same)).then(|| template.matches('{').count())
        };
        let paths = self.doc["paths"].as_object()?;
        let (template, item) =
            paths.iter().filter_map(|(t, item)| Some((fits(t)?, t, item))).min_by_key(|(n, ..)| *n).map(|(_, t, i)| (t, i))?;
        let method = if method == "HEAD" { "get".to_owned() } else { method.to_lowercase() };
        Some((template, item.get(method)?))
    }

    fn valid(&self, at: &str, place: &str, body: &[u8]) -> Result<(), String> {
        let value: Value = serde_json::from_slice(body).map_err(|e| format!("{at} with what is no JSON: {e}"))?;
        let validator = self.validator(place)?;
        let wrong: Vec<String> = validator.iter_errors(&value).map(|e| format!("  at {:?}: {e}", e.instance_path().to_string())).collect();
        if wrong.is_empty() {
            return Ok(());
        }
        Err(format!("{at}, and this is not its described shape ({place}):\n{}\n{value:#}", wrong.join("\n")))
    }

    fn validator(&self, place: &str) -> Result<Arc<Validator>, String> {
        let mut kept = self.validators.lock().expect("no test panics with it");
        if let Some(v) = kept.get(place) {
            return Ok(v.clone());
        }
        let mut schema = self.doc.pointer(place).ok_or_else(|| format!("the description has nothing at {place}"))?.clone();
        schema["components"] = json!({ "schemas": self.doc["components"]["schemas"] });
        let made = jsonschema::options().should_validate_formats(true).build(&schema).map_err(|e| format!("{place}: {e}"))?;
        Ok(kept.entry(place.to_owned()).or_insert(Arc::new(made)).clone())
    }
}

/// A path or media type as a part of a JSON pointer.
fn escape(text: &str) -> String {
    text.replace('~', "~0").replace('/', "~1")
}

/// The description lets replies grow; a test does not, or a field could come without its description.
fn close(schema: &mut Value) {
    let Some(object) = schema.as_object_mut() else { return };
    if object.contains_key("properties") && !object.contains_key("additionalProperties") {
        object.insert("additionalProperties".into(), json!(false));
    }
    object.values_mut().for_each(|v| match v {
        Value::Array(all) => all.iter_mut().for_each(close),
        v => close(v),
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contract() -> Contract {
        Contract::new(json!({
            "paths": {
                "/things/{id}": { "get": { "responses": {
                    "200": { "content": { "application/json": { "schema": { "$ref": "#/components/schemas/Thing" } } } },
                    "404": { "$ref": "#/components/responses/NotFound" },
                } }, "delete": { "responses": { "204": { "description": "gone" } } } },
                "/things/own": { "get": { "responses": { "200": { "content": { "text/plain": {} } } } } },
            },
            "components": {
                "responses": { "NotFound": { "content": { "application/problem+json": { "schema": { "$ref": "#/components/schemas/Problem" } } } } },
                "schemas": {
                    "Problem": { "type": "object", "required": ["code"], "properties": { "code": { "type": "string" } } },
                    "Thing": { "type": "object", "required": ["at", "part"], "properties": {
                        "at": { "type": "string", "format": "date-time" },
                        "part": { "oneOf": [{ "$ref": "#/components/schemas/Problem" }, { "type": "null" }] },
                    } },
                },
            },
        }))
    }

    #[test]
    fn answers_are_held_to_the_description() {
        let c = contract();
        let check = |method: &str, path: &str, status: u16, kind: &str, body: Value| {
            let body = if body.is_null() { vec![] } else { body.to_string().into_bytes() };
            c.check(method, path, &Answer { status, content_type: kind, body: &body })
        };
        let (json_kind, problem) = ("application/json", "application/problem+json");
        let good = json!({"at": "2026-01-01T00:00:00Z", "part": null});
        for (method, path, status, kind, body) in [
            ("GET", "/things/7?x=1", 200, json_kind, good.clone()),
            ("GET", "/things/7", 200, json_kind, json!({"at": "2026-01-01T00:00:00Z", "part": {"code": "x"}})),
            ("GET", "/things/7", 404, problem, json!({"code": "x"})),
            ("GET", "/things/own", 200, "text/plain; charset=utf-8", json!("x")),
            ("DELETE", "/things/7", 204, "", Value::Null),
            ("GET", "/elsewhere", 404, problem, json!({"code": "x"})),
            ("POST", "/things/7", 405, problem, json!({"code": "x"})),
        ] {
            check(method, path, status, kind, body).unwrap();
        }
        for (method, path, status, kind, body, says) in [
            ("GET", "/things/7", 200, json_kind, json!({"at": "2026-01-01T00:00:00Z", "part": null, "new": 1}), "new"),
            ("GET", "/things/7", 200, json_kind, json!({"at": "2026-01-01T00:00:00Z", "part": {"code": "x", "new": 1}}), "/part"),
            ("GET", "/things/7", 200, json_kind, json!({"at": "2026-01-01T00:00:00Z"}), "part"),
            ("GET", "/things/7", 200, json_kind, json!({"at": "today", "part": null}), "date-time"),
            ("GET", "/things/7", 200, "text/html", good, "text/html"),
            ("GET", "/things/7", 418, problem, json!({"code": "x"}), "does not name"),
            ("GET", "/things/7", 404, problem, json!({"code": 7}), "/code"),
            ("DELETE", "/things/7", 204, json_kind, json!({}), "with a body"),
            ("GET", "/elsewhere", 200, json_kind, json!({}), "no such call"),
            ("GET", "/elsewhere", 404, problem, json!({}), "code"),
        ] {
            let wrong = check(method, path, status, kind, body).expect_err(path);
            assert!(wrong.contains(says), "{says}: {wrong}");
        }
    }
}
