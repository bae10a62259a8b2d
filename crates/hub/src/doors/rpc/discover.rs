//! The description of the methods: OpenRPC 1.3, made of the table and of the description of REST, whose shapes
//! it takes as they are.

use super::failure;
use super::methods::{METHODS, Method, Run, Shape};
use crate::doors::rest::{VERSION, document};
use serde_json::{Map, Value, json};
use std::sync::LazyLock;

/// Parameters of a path that may be left out here: without them it is another path.
const OPTIONAL: &[(&str, &str)] = &[("task.dispatch", "session_id")];

/// What the id in a path is called here, by the first part of the path.
const IDS: &[(&str, &str)] =
    &[("nodes", "node_id"), ("sessions", "session_id"), ("tasks", "task_id"), ("agents", "agent_id"), ("users", "user_id")];

/// The whole description.
pub fn document_of_methods() -> &'static Value {
    static DOCUMENT: LazyLock<Value> = LazyLock::new(|| {
        let methods: Vec<Value> = METHODS.iter().map(describe).collect();
        let mut schemas = Map::new();
        collect(&json!(methods), &mut schemas);
        json!({
            "openrpc": "1.3.2",
            "info": {
                "title": "Cortex Mesh hub",
                "version": VERSION,
                "description": "The calls of REST by name. `error.data` is the problem object that REST would answer.",
                "license": { "name": "Apache-2.0" },
            },
            "servers": [{ "name": "http", "url": "/rpc" }, { "name": "websocket", "url": "/rpc/ws" }],
            "methods": methods,
            "components": { "schemas": schemas },
        })
    });
    &DOCUMENT
}

fn describe(m: &Method) -> Value {
    let given = params(m);
    let one = |name: &&str| given.get(*name).cloned().unwrap_or_else(|| json!({ "name": name, "required": false, "schema": true }));
    let params: Vec<Value> = m.params.iter().map(one).collect();
    let mut errors: Vec<Value> = failure::CODES.iter().map(|(code, message)| json!({ "code": code, "message": message })).collect();
    if matches!(m.run, Run::Open(_)) {
        errors.retain(|e| ![-32001, -32002].contains(&e["code"].as_i64().unwrap_or(0)));
    }
    let mut described = json!({
        "name": m.name,
        "summary": m.summary,
        "paramStructure": "either",
        "params": params,
        "result": { "name": "result", "schema": result(m) },
        "errors": errors,
    });
    if let Run::Socket(_) = m.run {
        described["description"] = json!("Over a WebSocket alone");
    }
    described
}

/// An operation of the description of REST, as `GET /nodes/{id}` names it.
fn operation(call: &str) -> Option<&'static Value> {
    let (method, path) = call.split_once(' ')?;
    document()["paths"].get(format!("/api/v1{path}"))?.get(method.to_lowercase())
}

fn reference(shape: &str) -> Value {
    json!({ "$ref": format!("#/components/schemas/{shape}") })
}

/// What a reference leads to, in the description of REST.
fn led_to(schema: &Value) -> Option<&'static Value> {
    document().pointer(schema["$ref"].as_str()?.strip_prefix('#')?)
}

fn result(m: &Method) -> Value {
    match m.shape {
        Shape::Like(_, shape) | Shape::Own(_, shape) => reference(shape),
        Shape::Rest(call) => {
            let responses = operation(call).and_then(|o| o["responses"].as_object());
            let good = responses.into_iter().flatten().find(|(status, _)| status.starts_with('2'));
            let schema = good.and_then(|(_, r)| r.pointer("/content/application~1json/schema"));
            schema.cloned().unwrap_or_else(|| json!({ "type": "null" }))
        }
    }
}

/// Content descriptors by name.
fn params(m: &Method) -> Map<String, Value> {
    let mut all = Map::new();
    let mut add = |name: &str, required: bool, schema: &Value, description: &Value| {
        let required = required && !OPTIONAL.contains(&(m.name, name));
        let mut descriptor = json!({ "name": name, "required": required, "schema": schema });
        if description.is_string() {
            descriptor["description"] = description.clone();
        }
        all.insert(name.to_owned(), descriptor);
    };
    let mut fields = |shape: &Value| {
        let required = shape["required"].as_array();
        for (name, schema) in shape["properties"].as_object().into_iter().flatten() {
            let required = required.is_some_and(|r| r.iter().any(|r| r == name));
            add(name, required, schema, &schema["description"]);
        }
    };
    match m.shape {
        Shape::Own(None, _) => {}
        Shape::Own(Some(shape), _) => fields(led_to(&reference(shape)).unwrap_or(&Value::Null)),
        Shape::Rest(call) | Shape::Like(call, _) => {
            let Some(o) = operation(call) else { return all };
            let body = o.pointer("/requestBody/content/application~1json/schema").unwrap_or(&Value::Null);
            fields(led_to(body).unwrap_or(body));
            let noun = call.split('/').nth(1).unwrap_or_default();
            let own_id = IDS.iter().find(|(of, _)| *of == noun).map_or("id", |(_, name)| *name);
            for p in o["parameters"].as_array().into_iter().flatten().filter(|p| p["in"] != "header") {
                let name = p["name"].as_str().unwrap_or_default();
                let name = if name == "id" { own_id } else { name };
                add(name, p["required"] == true, &p["schema"], &p["description"]);
            }
        }
    }
    all
}

/// Adds the shapes that `part` refers to, and theirs.
fn collect(part: &Value, schemas: &mut Map<String, Value>) {
    match part {
        Value::Object(members) => {
            if let Some(shape) = part["$ref"].as_str().and_then(|r| r.strip_prefix("#/components/schemas/"))
                && !schemas.contains_key(shape)
                && let Some(found) = led_to(part)
            {
                schemas.insert(shape.to_owned(), found.clone());
                collect(found, schemas);
            }
            members.values().for_each(|v| collect(v, schemas));
        }
        Value::Array(all) => all.iter().for_each(|v| collect(v, schemas)),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn each_method_is_described_by_what_is_there() {
        let mut names = BTreeSet::new();
        for m in METHODS {
            assert!(names.insert(m.name), "{} stands there twice", m.name);
            let (given, named): (BTreeSet<_>, BTreeSet<_>) =
                (params(m).into_iter().map(|(name, _)| name).collect(), m.params.iter().map(|p| (*p).to_owned()).collect());
            assert_eq!(named, given, "{}: the parameters of the table, and those that {:?} has", m.name, m.shape);
            assert_eq!(named.len(), m.params.len(), "{}: a parameter stands there twice", m.name);
            match m.shape {
                Shape::Rest(call) | Shape::Like(call, _) => assert!(operation(call).is_some(), "{}: REST has no {call}", m.name),
                Shape::Own(..) => {}
            }
            if let Shape::Like(_, shape) | Shape::Own(_, shape) = m.shape {
                assert!(led_to(&reference(shape)).is_some(), "{}: no shape {shape}; add it to `Head` in rest/openapi.rs", m.name);
            }
        }
    }

    #[test]
    fn what_is_required_comes_first() {
        for m in document_of_methods()["methods"].as_array().unwrap() {
            let required: Vec<bool> = m["params"].as_array().unwrap().iter().map(|p| p["required"] == true).collect();
            let last = required.iter().rposition(|r| *r).map_or(0, |n| n + 1);
            assert!(required[..last].iter().all(|r| *r), "{}: one could not be left out by position", m["name"]);
        }
    }

    #[test]
    fn no_reference_leads_nowhere() {
        let doc = document_of_methods();
        let text = doc.to_string();
        for part in text.split("\"$ref\":\"#").skip(1) {
            let place = part.split('"').next().unwrap();
            assert!(doc.pointer(place).is_some(), "{place}");
        }
        let task = &doc["components"]["schemas"]["TaskView"]["properties"];
        assert!(task["id"].is_object() && task["actor"]["$ref"].is_string(), "{task}");
        let of = |name: &str| doc["methods"].as_array().unwrap().iter().find(|m| m["name"] == name).unwrap().clone();
        assert_eq!(of("session.close")["result"]["schema"], json!({ "type": "null" }));
        assert_eq!(of("node.get")["params"][0]["name"], "node_id");
        assert_eq!(of("node.get")["params"][0]["required"], true);
        assert_eq!(of("task.dispatch")["params"][0]["required"], false);
        assert_eq!(of("session.create")["params"][0]["required"], true);
    }
}
