//! Invites, and the nodes that came by them.

use crate::dialect::{Conn, Row};
use crate::rows::{Columns, INVITE_COLUMNS, Id, NODE_COLUMNS, all, invite, list_text, map_text, node};
use crate::sql::{IdBytes, Rows, Sql, Value, sql, values};
use crate::store::{Failed, Store};
use async_trait::async_trait;
use hub_engine::ports::{NodeDirectory, Stored, Window};
use hub_engine::records::{Claim, Invite, Node, NodeCertificate, NodeChange, NodeCounts, RegistryChanges, Within};
use mesh_core::capability::Capabilities;
use mesh_core::{InviteId, NodeId, UnixMs};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// A notice is a line for people; a stranger who tries all day adds no more than this many.
const MAX_NOTICES: usize = 20;

#[async_trait]
impl NodeDirectory for Store {
    async fn add_invite(&self, i: &Invite) -> Stored<()> {
        self.insert("nodes.add_invite", "invites", INVITE_COLUMNS, invite_row(i)).await
    }

    async fn invite(&self, id: InviteId) -> Stored<Option<Invite>> {
        self.one("nodes.invite", sql(format!("SELECT {INVITE_COLUMNS} FROM invites WHERE id = $1")).bind(id.blob()), invite).await
    }

    async fn invites(&self, within: Option<&Within>, window: Window<InviteId>) -> Stored<Vec<Invite>> {
        let narrow = |q: Sql| match within {
            Some(w) => q.and_any(self.read.dialect(), [("owner", all(&w.owner))]),
            None => q,
        };
        self.page("nodes.invites", (INVITE_COLUMNS, "invites"), narrow, window, invite).await
    }

    async fn revoke_invite(&self, id: InviteId, now: UnixMs) -> Stored<bool> {
        // The first revocation keeps its time.
        let q = sql("UPDATE invites SET revoked_at = COALESCE(revoked_at, $1) WHERE id = $2 AND used_at IS NULL");
        Ok(self.execute("nodes.revoke_invite", q.bind(now).bind(id.blob())).await? == 1)
    }

    async fn claim_invite(&self, id: InviteId, node: &Node, now: UnixMs, again_ms: i64) -> Stored<Claim> {
        self.write("nodes.claim_invite", (id, node.clone(), now, again_ms), |conn, (id, node, now, again_ms)| {
            Box::pin(claim(conn, *id, node, *now, *again_ms))
        })
        .await
    }

    async fn node(&self, id: NodeId) -> Stored<Option<Node>> {
        self.one("nodes.node", sql(format!("SELECT {NODE_COLUMNS} FROM nodes WHERE id = $1")).bind(id.blob()), node).await
    }

    async fn nodes(&self, within: Option<&Within>, window: Window<NodeId>) -> Stored<Vec<Node>> {
        let narrow = |q: Sql| match within {
            Some(w) => q.and_any(self.read.dialect(), [("owner", all(&w.owner)), ("id", all(&w.nodes))]),
            None => q,
        };
        self.page("nodes.nodes", (NODE_COLUMNS, "nodes"), narrow, window, node).await
    }

    async fn count_nodes(&self) -> Stored<NodeCounts> {
        let count = |row: &Row| {
            let c = &mut Columns::of(row);
            Ok(NodeCounts { known: u64::try_from(c.get::<i64>()?)?, revoked: u64::try_from(c.get::<i64>()?)? })
        };
        let counted = self.one("nodes.count", sql("SELECT COUNT(*), COUNT(revoked_at) FROM nodes"), count).await?;
        Ok(counted.unwrap_or_default())
    }
    async fn nodes_named(&self, name: &str) -> Stored<Vec<Node>> {
        let q = sql(format!("SELECT {NODE_COLUMNS} FROM nodes WHERE name = $1 ORDER BY id DESC"));
        self.all("nodes.nodes_named", q.bind(name), node).await
    }

    async fn register(&self, id: NodeId, version: &str, capabilities: &Capabilities) -> Stored<()> {
        let q = sql("UPDATE nodes SET version = $1, capabilities = $2 WHERE id = $3");
        self.execute("nodes.register", q.bind(version).bind(capabilities.encode()).bind(id.blob())).await.map(drop)
    }

    async fn raise_generation(&self, id: NodeId, now: UnixMs) -> Stored<Option<u64>> {
        self.write("nodes.raise_generation", (id, now), |conn, (id, now)| {
            Box::pin(async move {
                let q = sql("UPDATE nodes SET generation = generation + 1, last_seen_at = $1 \
                     WHERE id = $2 AND revoked_at IS NULL RETURNING generation");
                conn.row(&q.bind(*now).bind(id.blob()), |row| Columns::of(row).unsigned()).await
            })
        })
        .await
    }

    async fn seen(&self, ids: &[NodeId], now: UnixMs) -> Stored<()> {
        let list = self.read.dialect().listed("$2");
        let mut ids: Vec<IdBytes> = ids.iter().map(Id::blob).collect();
        ids.sort_unstable();
        let q = sql(format!("UPDATE nodes SET last_seen_at = $1 WHERE id IN ({list})"));
        self.execute("nodes.seen", q.bind(now).bind(Value::List(ids))).await.map(drop)
    }

    async fn add_notice(&self, id: NodeId, words: &str, now: UnixMs) -> Stored<()> {
        self.write("nodes.add_notice", (id, words.to_owned(), now), |conn, (id, words, now)| {
            Box::pin(async move {
                conn.lock("nodes", vec![id.blob()]).await?;
                let Some(mut node) = row_of(conn, *id).await?.filter(|n| n.notices.len() < MAX_NOTICES) else { return Ok(()) };
                node.notices.push(dated(words, *now)?);
                let q = sql("UPDATE nodes SET notices = $1 WHERE id = $2");
                conn.execute(&q.bind(list_text(&node.notices)).bind(id.blob())).await.map(drop)
            })
        })
        .await
    }

    async fn note_bundle(&self, id: NodeId, seq: u64) -> Stored<()> {
        let q = sql("UPDATE nodes SET bundle_seq = $1 WHERE id = $2 AND bundle_seq < $1");
        self.execute("nodes.note_bundle", q.bind(seq).bind(id.blob())).await.map(drop)
    }

    async fn renew(&self, id: NodeId, c: &NodeCertificate) -> Stored<bool> {
        let q = sql("UPDATE nodes SET cert_spki = $1, cert_der = $2, cert_not_after = $3, cert_counter = $4 \
             WHERE id = $5 AND cert_counter + 1 = $4 AND revoked_at IS NULL");
        let q = q.bind(c.spki).bind(&c.der[..]).bind(c.not_after).bind(c.counter).bind(id.blob());
        Ok(self.execute("nodes.renew", q).await? == 1)
    }

    async fn change_node(&self, id: NodeId, change: &NodeChange) -> Stored<Option<Node>> {
        self.write("nodes.change_node", (id, change.clone()), |conn, (id, change)| {
            Box::pin(async move {
                let epoch = raise_epoch(conn).await?;
                let q = sql("UPDATE nodes SET name = COALESCE($1, name), labels = COALESCE($2, labels), \
                     slots = CASE WHEN $3 THEN $4 ELSE slots END, task_limit = CASE WHEN $5 THEN $6 ELSE task_limit END, \
                     draining = COALESCE($7, draining), epoch = $8 WHERE id = $9 AND revoked_at IS NULL")
                .bind(change.name.clone())
                .bind(change.labels.as_ref().map(map_text))
                .bind(change.slots.is_some())
                .bind(change.slots.as_ref().and_then(Option::as_ref).map(map_text))
                .bind(change.task_limit.is_some())
                .bind(change.task_limit.flatten())
                .bind(change.draining)
                .bind(epoch)
                .bind(id.blob());
                if conn.execute(&q).await? == 0 { Ok(None) } else { row_of(conn, *id).await }
            })
        })
        .await
    }

    async fn revoke_node(&self, id: NodeId, now: UnixMs) -> Stored<Option<Node>> {
        self.write("nodes.revoke_node", (id, now), |conn, (id, now)| {
            Box::pin(async move {
                let epoch = raise_epoch(conn).await?;
                let q = sql("UPDATE nodes SET revoked_at = COALESCE(revoked_at, $1), epoch = $2 WHERE id = $3");
                conn.execute(&q.bind(*now).bind(epoch).bind(id.blob())).await?;
                row_of(conn, *id).await
            })
        })
        .await
    }

    async fn remove_node(&self, id: NodeId, now: UnixMs) -> Stored<bool> {
        self.write("nodes.remove_node", (id, now), |conn, (id, now)| {
            Box::pin(async move {
                let epoch = raise_epoch(conn).await?;
                if conn.execute(&sql("DELETE FROM nodes WHERE id = $1").bind(id.blob())).await? == 0 {
                    return Ok(false);
                }
                conn.execute(&sql("DELETE FROM session_nodes WHERE node = $1").bind(id.blob())).await?;
                conn.execute(&sql("DELETE FROM grants WHERE node = $1").bind(id.blob())).await?;
                let row = values![id.blob(), *now, epoch];
                conn.insert("removed_nodes", "id, removed_at, epoch", &Rows::of([row]), "").await?;
                Ok(true)
            })
        })
        .await
    }

    async fn was_removed(&self, id: NodeId) -> Stored<bool> {
        let q = sql("SELECT id FROM removed_nodes WHERE id = $1").bind(id.blob());
        Ok(self.one("nodes.was_removed", q, only_id).await?.is_some())
    }

    async fn living(&self, ids: &[NodeId]) -> Stored<Vec<NodeId>> {
        let list = self.read.dialect().listed("$1");
        let q = sql(format!("SELECT id FROM nodes WHERE revoked_at IS NULL AND id IN ({list})"));
        self.all("nodes.living", q.bind(Value::List(ids.iter().map(Id::blob).collect())), only_id).await
    }

    async fn changed_since(&self, epoch: u64) -> Stored<RegistryChanges> {
        // The epoch first: what is committed after it was read may be among the rest, and comes again.
        let now = self.registry_epoch().await?;
        if now == epoch {
            return Ok(RegistryChanges { epoch, ..Default::default() });
        }
        let q = sql(format!("SELECT {NODE_COLUMNS} FROM nodes WHERE epoch > $1 ORDER BY epoch")).bind(epoch);
        let nodes = self.all("nodes.changed_since", q, node).await?;
        let q = sql("SELECT id FROM removed_nodes WHERE epoch > $1 ORDER BY epoch").bind(epoch);
        let removed = self.all("nodes.changed_since", q, only_id).await?;
        let q = sql("SELECT id FROM users WHERE epoch > $1 UNION ALL SELECT id FROM removed_users WHERE epoch > $1").bind(epoch);
        let users = self.all("nodes.changed_since", q, |row| Columns::of(row).id()).await?;
        Ok(RegistryChanges { epoch: now, nodes, removed, users })
    }

    async fn registry_epoch(&self) -> Stored<u64> {
        let q = sql("SELECT epoch FROM registry WHERE one = 1");
        Ok(self.one("nodes.registry_epoch", q, |row| Columns::of(row).unsigned()).await?.unwrap_or(0))
    }
}

fn only_id(row: &Row) -> Result<NodeId, Failed> {
    Columns::of(row).id()
}

/// Its row is locked until the commit, so that epochs are committed in their order.
pub(crate) async fn raise_epoch(conn: &mut Conn) -> Result<u64, Failed> {
    let q = sql("UPDATE registry SET epoch = epoch + 1 WHERE one = 1 RETURNING epoch");
    conn.row(&q, |row| Columns::of(row).unsigned()).await?.ok_or_else(|| "the registry has no epoch".into())
}

async fn row_of(conn: &mut Conn, id: NodeId) -> Result<Option<Node>, Failed> {
    conn.row(&sql(format!("SELECT {NODE_COLUMNS} FROM nodes WHERE id = $1")).bind(id.blob()), node).await
}

async fn claim(conn: &mut Conn, id: InviteId, n: &Node, now: UnixMs, again_ms: i64) -> Result<Claim, Failed> {
    conn.lock("invites", vec![id.blob()]).await?;
    let taken = sql("UPDATE invites SET used_at = $1, used_spki = $2, used_node = $3 \
         WHERE id = $4 AND used_at IS NULL AND revoked_at IS NULL AND expires_at > $1");
    if conn.execute(&taken.bind(now).bind(n.certificate.spki).bind(n.id.blob()).bind(id.blob())).await? == 1 {
        conn.insert("nodes", NODE_COLUMNS, &Rows::of([node_row(n)]), "").await?;
        return Ok(Claim::Claimed);
    }
    let q = sql(format!("SELECT {INVITE_COLUMNS} FROM invites WHERE id = $1")).bind(id.blob());
    let Some(mut invite) = conn.row(&q, invite).await? else { return Ok(Claim::Unknown) };
    let Some(used) = invite.used else {
        return Ok(if invite.revoked_at.is_some() { Claim::Revoked } else { Claim::Expired });
    };
    let same = used.spki == n.certificate.spki;
    if same && now.saturating_sub(used.at) <= again_ms {
        return Ok(match row_of(conn, used.node).await? {
            Some(node) => Claim::Again { node: Box::new(node) },
            None => Claim::Removed,
        });
    }
    if invite.notices.len() < MAX_NOTICES {
        let words = if same { "used again by the same key, too late," } else { "used again by another key" };
        invite.notices.push(dated(words, now)?);
        let q = sql("UPDATE invites SET notices = $1 WHERE id = $2");
        conn.execute(&q.bind(list_text(&invite.notices)).bind(id.blob())).await?;
    }
    Ok(Claim::Used)
}

fn dated(words: &str, now: UnixMs) -> Result<String, Failed> {
    Ok(format!("{words} at {}", OffsetDateTime::from_unix_timestamp(now.div_euclid(1000))?.format(&Rfc3339)?))
}

pub(crate) fn invite_row(i: &Invite) -> [Value<'_>; 12] {
    values![
        i.id.blob(),
        i.owner.blob(),
        i.public_key,
        i.name.as_deref(),
        map_text(&i.labels),
        i.created_at,
        i.expires_at,
        i.revoked_at,
        i.used.as_ref().map(|u| u.at),
        i.used.as_ref().map(|u| u.spki),
        i.used.as_ref().map(|u| u.node.blob()),
        list_text(&i.notices),
    ]
}

fn node_row(n: &Node) -> [Value<'_>; 21] {
    values![
        n.id.blob(),
        n.name.as_str(),
        n.owner.blob(),
        map_text(&n.labels),
        n.max_tasks,
        n.version.as_str(),
        n.capabilities.encode(),
        n.created_at,
        n.last_seen_at,
        n.generation,
        n.certificate.spki,
        &n.certificate.der[..],
        n.certificate.not_after,
        n.certificate.counter,
        n.revoked_at,
        list_text(&n.notices),
        n.slots.as_ref().map(map_text),
        n.task_limit,
        n.draining,
        n.epoch,
        n.bundle_seq,
    ]
}
