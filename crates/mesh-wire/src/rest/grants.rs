//! Grants: what somebody may do with something that is not theirs.

use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;

#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct GrantRequest {
    /// The id or the name of a user, or a role. A name that is a role's means the role.
    pub subject: String,
    pub resource: GrantResource,
    pub permissions: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<String>,
}

/// The id of a node or session, the name of an agent, or the labels of nodes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(untagged)]
pub enum GrantResource {
    One(String),
    Labels(GrantLabels),
}

/// All nodes that have all of these labels at the time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct GrantLabels {
    pub labels: BTreeMap<String, String>,
}

impl<'de> Deserialize<'de> for GrantResource {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        match Value::deserialize(d)? {
            Value::String(one) => Ok(Self::One(one)),
            Value::Object(fields) => GrantLabels::deserialize(Value::Object(fields)).map(Self::Labels).map_err(D::Error::custom),
            _ => Err(D::Error::custom("resource is an id, the name of an agent, or an object with labels")),
        }
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct GrantView {
    pub id: String,
    /// The id of a user, or a role.
    pub subject: String,
    pub resource: GrantResource,
    pub permissions: Vec<String>,
    /// Who made it.
    pub created_by: String,
    pub created_at: String,
    pub expires_at: Option<String>,
}
