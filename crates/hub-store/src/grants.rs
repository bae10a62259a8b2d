//! What was granted.

use crate::dialect::{Conn, Row};
use crate::rows::{Columns, Id, all, list_text, map_text};
use crate::sql::{Rows, Sql, Value, sql, values};
use crate::state;
use crate::store::{Failed, Store};
use async_trait::async_trait;
use hub_engine::ports::{Grants, Stored, Window};
use hub_engine::records::{Grant, GrantFilter, Resource, Subject};
use mesh_core::permission::{Permission, Permissions, Role};
use mesh_core::{GrantId, UnixMs};

const COLUMNS: &str = "id, subject, role, node, session, agent, labels, permissions, created_by, created_at, expires_at";

#[async_trait]
impl Grants for Store {
    async fn add_grant(&self, grant: &Grant) -> Stored<()> {
        self.write("grants.add_grant", grant.clone(), |conn, grant| Box::pin(insert(conn, grant))).await
    }

    async fn grant(&self, id: GrantId, now: UnixMs) -> Stored<Option<Grant>> {
        let q = sql(format!("SELECT {COLUMNS} FROM grants WHERE id = $1 AND (expires_at IS NULL OR expires_at > $2)"));
        self.one("grants.grant", q.bind(id.blob()).bind(now), grant).await
    }

    async fn grants(&self, filter: Option<&GrantFilter>, now: UnixMs, window: Window<GrantId>) -> Stored<Vec<Grant>> {
        let narrow = |q: Sql| {
            let q = q.and(" AND COALESCE(expires_at, 9223372036854775807) > ", now);
            let Some(f) = filter else { return q };
            let users = f.to.iter().filter_map(|s| if let Subject::User(id) = s { Some(id) } else { None });
            let roles = f.to.iter().filter_map(|s| if let Subject::Role(role) = s { Some(role.as_str().into()) } else { None });
            q.and_any(self.read.dialect(), [("created_by", all(&f.made_by)), ("subject", all(users)), ("role", roles.collect())])
        };
        self.page("grants.grants", (COLUMNS, "grants"), narrow, window, grant).await
    }

    async fn remove_grant(&self, id: GrantId) -> Stored<bool> {
        Ok(self.execute("grants.remove_grant", sql("DELETE FROM grants WHERE id = $1").bind(id.blob())).await? == 1)
    }
}

pub(crate) async fn insert(conn: &mut Conn, g: &Grant) -> Result<(), Failed> {
    // Who takes the thing away either sees this grant, or has taken it away before.
    let there = match &g.resource {
        Resource::Node(id) => {
            conn.lock("nodes", vec![id.blob()]).await?;
            Some(sql("SELECT 1 FROM nodes WHERE id = $1").bind(id.blob()))
        }
        Resource::Session(id) => {
            conn.lock("sessions", vec![id.blob()]).await?;
            Some(sql("SELECT 1 FROM sessions WHERE id = $1 AND purged_at IS NULL").bind(id.blob()))
        }
        Resource::Agent(agent) => {
            state::alone(conn, agent).await?;
            Some(state::owner(agent))
        }
        Resource::Labels(_) => None,
    };
    if let Some(q) = there
        && conn.row(&q, |_| Ok(())).await?.is_none()
    {
        return Err("what it is on is not there any more".into());
    }
    let (subject, role) = match g.subject {
        Subject::User(id) => (Some(id.blob()), None),
        Subject::Role(role) => (None, Some(role.as_str())),
    };
    let expired = sql("DELETE FROM grants WHERE (subject = $1 OR role = $2) AND expires_at <= $3");
    conn.execute(&expired.bind(subject).bind(role).bind(g.created_at)).await?;
    conn.insert("grants", COLUMNS, &Rows::of([row(g)]), "").await
}

fn row(g: &Grant) -> [Value<'_>; 11] {
    let (subject, role) = match g.subject {
        Subject::User(id) => (Some(id.blob()), None),
        Subject::Role(role) => (None, Some(role.as_str())),
    };
    let (node, session, agent, labels) = match &g.resource {
        Resource::Node(id) => (Some(id.blob()), None, None, None),
        Resource::Session(id) => (None, Some(id.blob()), None, None),
        Resource::Agent(agent) => (None, None, Some(agent.as_str()), None),
        Resource::Labels(labels) => (None, None, None, Some(map_text(labels))),
    };
    let permissions: Vec<&str> = g.permissions.iter().map(Permission::as_str).collect();
    values![
        g.id.blob(),
        subject,
        role,
        node,
        session,
        agent,
        labels,
        list_text(&permissions),
        g.created_by.blob(),
        g.created_at,
        g.expires_at,
    ]
}

fn grant(row: &Row) -> Result<Grant, Failed> {
    let c = &mut Columns::of(row);
    let id = c.id()?;
    let subject = match (c.id_or_null()?, c.word_or_null(Role::parse)?) {
        (Some(user), None) => Subject::User(user),
        (None, Some(role)) => Subject::Role(role),
        _ => return Err("a grant is to a user or a role".into()),
    };
    let resource = match (c.id_or_null()?, c.id_or_null()?, c.get::<Option<String>>()?, c.json_or_null()?) {
        (Some(node), None, None, None) => Resource::Node(node),
        (None, Some(session), None, None) => Resource::Session(session),
        (None, None, Some(agent), None) => Resource::Agent(agent),
        (None, None, None, Some(labels)) => Resource::Labels(labels),
        _ => return Err("a grant is on one thing".into()),
    };
    let permission = |name: &String| Permission::parse(name).ok_or_else(|| format!("{name:?} is no permission of this version"));
    let permissions = c.json::<Vec<String>>()?.iter().map(permission).collect::<Result<Permissions, _>>()?;
    Ok(Grant { id, subject, resource, permissions, created_by: c.id()?, created_at: c.get()?, expires_at: c.get()? })
}
