//! Schemas of arguments and results, derived and made plain: not every model's host reads all of JSON Schema.

use rmcp::model::JsonObject;
use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde_json::Value;
use std::sync::Arc;

/// The schema of arguments.
pub fn taken<T: JsonSchema>() -> Arc<JsonObject> {
    let mut value = of::<T>(settings());
    plain(&mut value);
    bare(value)
}

/// The schema of what a tool gives.
pub fn given<T: JsonSchema>() -> Arc<JsonObject> {
    bare(of::<T>(settings().for_serialize()))
}

fn settings() -> SchemaSettings {
    SchemaSettings::draft2020_12().with(|s| {
        s.inline_subschemas = true;
        s.meta_schema = None;
    })
}

fn of<T: JsonSchema>(settings: SchemaSettings) -> Value {
    let mut value = settings.into_generator().into_root_schema_for::<T>().to_value();
    widths(&mut value);
    value
}

/// Its name is that of a type in this house.
fn bare(value: Value) -> Arc<JsonObject> {
    let mut object = match value {
        Value::Object(object) => object,
        _ => JsonObject::new(),
    };
    object.remove("title");
    object.remove("description");
    Arc::new(object)
}

/// Widths of integers are no format that validators know.
fn widths(value: &mut Value) {
    match value {
        Value::Object(map) => {
            if map.get("format").and_then(Value::as_str).is_some_and(|f| f.starts_with("int") || f.starts_with("uint")) {
                map.remove("format");
            }
            map.values_mut().for_each(widths);
        }
        Value::Array(all) => all.iter_mut().for_each(widths),
        _ => {}
    }
}

/// What may be left out is not required, which says enough: no type beside null, no default null.
fn plain(value: &mut Value) {
    match value {
        Value::Object(map) => {
            if map.get("default") == Some(&Value::Null) {
                map.remove("default");
            }
            if let Some(Value::Array(types)) = map.get_mut("type") {
                types.retain(|t| t != "null");
                if let [only] = types.as_slice() {
                    let only = only.clone();
                    map.insert("type".into(), only);
                }
            }
            map.values_mut().for_each(plain);
        }
        Value::Array(all) => all.iter_mut().for_each(plain),
        _ => {}
    }
}
