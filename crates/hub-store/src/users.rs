//! The people of the hub: how they come, change and leave.

use crate::accounts::end_log_ins;
use crate::dialect::{Conn, Row};
use crate::nodes::raise_epoch;
use crate::rows::{Columns, Id, USER_COLUMNS};
use crate::sql::{Rows, Sql, sql, values};
use crate::store::{Failed, Store};
use async_trait::async_trait;
use hub_engine::ports::{Stored, Users, Window};
use hub_engine::records::{Leaving, Removal, Standing, User, UserChange, UserChanged, UserEntry, UserInvite};
use mesh_core::permission::Role;
use mesh_core::{Digest, UnixMs, UserId};

/// Of a row of `users`: the person may log in.
pub(crate) const MAY_ACT: &str = "disabled_at IS NULL AND password_hash <> ''";

const ENTRY: &str = "SELECT id, username, role, created_at, CAST(NULL AS BIGINT), disabled_at IS NOT NULL, password_hash = '', \
     (SELECT expires_at FROM user_invites i WHERE i.\"user\" = u.id) FROM users u WHERE TRUE";
const REMOVED: &str = "SELECT id, username, role, created_at, removed_at, FALSE, FALSE, CAST(NULL AS BIGINT) FROM removed_users WHERE TRUE";

fn entry(row: &Row) -> Result<UserEntry, Failed> {
    let c = &mut Columns::of(row);
    let (id, username, role, created_at) = (c.id()?, c.get()?, c.word(Role::parse)?, c.get()?);
    let (removed, off, bare, until): (Option<i64>, bool, bool, Option<i64>) = (c.get()?, c.get()?, c.get()?, c.get()?);
    let standing = match removed {
        Some(at) => Standing::Removed { at },
        None if off => Standing::Disabled,
        None if bare => Standing::Invited { until: until.unwrap_or(created_at) },
        None => Standing::Active,
    };
    Ok(UserEntry { id, username, role, standing, created_at })
}

#[async_trait]
impl Users for Store {
    async fn create_user(&self, user: &User, invite: Option<&UserInvite>) -> Stored<bool> {
        self.write("users.create", (user.clone(), invite.copied()), |conn, (user, invite)| Box::pin(insert(conn, user, invite.as_ref())))
            .await
    }

    async fn user_entry(&self, id: UserId) -> Stored<Option<UserEntry>> {
        match self.one("users.entry", sql(ENTRY).and(" AND id = ", id.blob()), entry).await? {
            None => self.one("users.entry", sql(REMOVED).and(" AND id = ", id.blob()), entry).await,
            found => Ok(found),
        }
    }

    async fn entry_named(&self, username: &str) -> Stored<Option<UserEntry>> {
        let named = format!(" AND {} = ", self.read.dialect().username());
        self.one("users.entry_named", sql(ENTRY).and(&named, username.to_ascii_lowercase()), entry).await
    }

    async fn user_entries(&self, window: Window<UserId>) -> Stored<Vec<UserEntry>> {
        let mut q = sql(ENTRY);
        if let Some(before) = window.before {
            q = q.and(" AND id < ", before.blob());
        }
        self.all("users.entries", q.and(" ORDER BY id DESC LIMIT ", window.limit), entry).await
    }

    async fn change_user(&self, id: UserId, to: &UserChange, now: UnixMs) -> Stored<UserChanged> {
        self.write("users.change", (id, to.clone(), now), |conn, (id, to, now)| Box::pin(change(conn, *id, to, *now))).await
    }

    async fn invited(&self, mac: &Digest, now: UnixMs) -> Stored<Option<UserId>> {
        self.one("users.invited", usable("i.\"user\"", mac, now), |row| Columns::of(row).id()).await
    }

    async fn accept_invite(&self, mac: &Digest, hash: &str, now: UnixMs) -> Stored<Option<UserEntry>> {
        self.write("users.accept_invite", (*mac, hash.to_owned(), now), |conn, (mac, hash, now)| {
            Box::pin(async move {
                deciding(conn).await?;
                let user = conn.row(&usable("i.\"user\"", mac, *now), |row| Columns::of(row).id::<UserId>()).await?;
                let Some(user) = user else { return Ok(None) };
                conn.execute(&sql("UPDATE users SET password_hash = $1 WHERE id = $2").bind(hash.as_str()).bind(user.blob())).await?;
                conn.execute(&sql("DELETE FROM user_invites WHERE \"user\" = $1").bind(user.blob())).await?;
                entry_of(conn, user).await
            })
        })
        .await
    }

    async fn remove_user(&self, leaving: &Leaving) -> Stored<Removal> {
        self.write("users.remove", leaving.clone(), |conn, leaving| Box::pin(remove(conn, leaving))).await
    }

    async fn hand_over(&self, user: UserId, limit: u32) -> Stored<bool> {
        self.write("users.hand_over", (user, limit), |conn, (user, limit)| Box::pin(hand_over(conn, *user, *limit))).await
    }

    async fn leaving(&self, limit: u32) -> Stored<Vec<Leaving>> {
        let q = sql("SELECT id, successor, cancel, username IS NULL, removed_at FROM removed_users WHERE leaving ORDER BY id LIMIT $1")
            .bind(limit);
        let leaving = |row: &Row| {
            let c = &mut Columns::of(row);
            Ok(Leaving { user: c.id()?, successor: c.id()?, cancel: c.get()?, purge: c.get()?, at: c.get()? })
        };
        self.all("users.leaving", q, leaving).await
    }

    async fn left(&self, user: UserId) -> Stored<()> {
        self.execute("users.left", sql("UPDATE removed_users SET leaving = FALSE WHERE id = $1").bind(user.blob())).await.map(drop)
    }

    async fn erase_user(&self, id: UserId) -> Stored<bool> {
        let q = sql("UPDATE removed_users SET username = NULL WHERE id = $1").bind(id.blob());
        Ok(self.execute("users.erase", q).await? == 1)
    }
}

/// What hangs on who else is there is decided by one hub at a time.
async fn deciding(conn: &mut Conn) -> Result<(), Failed> {
    conn.alone(sql("SELECT $1").bind(mesh_core::sha256(b"users"))).await
}

/// False when the name is taken.
pub(crate) async fn insert(conn: &mut Conn, u: &User, invite: Option<&UserInvite>) -> Result<bool, Failed> {
    deciding(conn).await?;
    let row = values![u.id.blob(), u.username.as_str(), u.role.as_str(), u.password_hash.as_str(), u.created_at];
    let taken = format!(" ON CONFLICT ({}) DO NOTHING", conn.dialect().username());
    if conn.insert_counted("users", USER_COLUMNS, &Rows::of([row]), &taken).await? == 0 {
        return Ok(false);
    }
    if let Some(invite) = invite {
        set_invite(conn, u.id, invite).await?;
    }
    Ok(true)
}

async fn set_invite(conn: &mut Conn, user: UserId, invite: &UserInvite) -> Result<(), Failed> {
    conn.execute(&sql("DELETE FROM user_invites WHERE \"user\" = $1").bind(user.blob())).await?;
    let row = values![user.blob(), &invite.mac, invite.expires_at];
    conn.insert("user_invites", "\"user\", mac, expires_at", &Rows::of([row]), "").await
}

/// Of the link with this mac, if it can be used.
fn usable(what: &str, mac: &Digest, now: UnixMs) -> Sql {
    let q = format!(
        "SELECT {what} FROM user_invites i JOIN users u ON u.id = i.\"user\" \
         WHERE i.mac = $1 AND i.expires_at > $2 AND u.password_hash = '' AND u.disabled_at IS NULL"
    );
    sql(q).bind(mac).bind(now)
}

async fn entry_of(conn: &mut Conn, id: UserId) -> Result<Option<UserEntry>, Failed> {
    conn.row(&sql(ENTRY).and(" AND id = ", id.blob()), entry).await
}

/// Is there an admin who may act, beside this one?
async fn other_admin(conn: &mut Conn, id: UserId) -> Result<bool, Failed> {
    let q = sql(format!("SELECT 1 FROM users WHERE role = $1 AND id <> $2 AND {MAY_ACT} LIMIT 1"));
    Ok(conn.row(&q.bind(Role::Admin.as_str()).bind(id.blob()), |_| Ok(())).await?.is_some())
}

fn administers(e: &UserEntry) -> bool {
    e.role == Role::Admin && e.standing == Standing::Active
}

async fn change(conn: &mut Conn, id: UserId, to: &UserChange, now: UnixMs) -> Result<UserChanged, Failed> {
    deciding(conn).await?;
    let Some(before) = entry_of(conn, id).await? else { return Ok(UserChanged::Unknown) };
    if let Some(name) = &to.username {
        let q = sql(format!("SELECT 1 FROM users WHERE {} = $1 AND id <> $2", conn.dialect().username()));
        if conn.row(&q.bind(name.to_ascii_lowercase()).bind(id.blob()), |_| Ok(())).await?.is_some() {
            return Ok(UserChanged::NameTaken);
        }
    }
    let stays = to.role.unwrap_or(before.role) == Role::Admin && to.disabled != Some(true);
    if administers(&before) && !stays && !other_admin(conn, id).await? {
        return Ok(UserChanged::LastAdmin);
    }
    if let Some(invite) = &to.invite {
        let q = sql("SELECT 1 FROM users WHERE id = $1 AND password_hash = ''").bind(id.blob());
        if conn.row(&q, |_| Ok(())).await?.is_none() {
            return Ok(UserChanged::HasPassword);
        }
        set_invite(conn, id, invite).await?;
    }
    let epoch = match to.role.is_some() || to.disabled.is_some() {
        true => Some(raise_epoch(conn).await?),
        false => None,
    };
    let q = sql("UPDATE users SET username = COALESCE($1, username), role = COALESCE($2, role), epoch = COALESCE($3, epoch), \
         password_hash = COALESCE($8, password_hash), disabled_at = CASE WHEN $4 THEN COALESCE(disabled_at, $5) WHEN $6 THEN NULL ELSE disabled_at END WHERE id = $7")
    .bind(to.username.clone())
    .bind(to.role.map(|r| r.as_str()))
    .bind(epoch)
    .bind(to.disabled == Some(true))
    .bind(now)
    .bind(to.disabled == Some(false))
    .bind(id.blob())
    .bind(to.password_hash.clone());
    conn.execute(&q).await?;
    if to.disabled == Some(true) || to.password_hash.is_some() {
        end_log_ins(conn, id, None).await?;
    }
    if to.disabled == Some(true) || to.role.is_some_and(|r| !matches!(r, Role::Admin | Role::Developer)) {
        // Who may have no machines invites none.
        revoke_invites(conn, id, now).await?;
    }
    let now = entry_of(conn, id).await?.ok_or("a person is gone within a write")?;
    Ok(UserChanged::Done { before, now })
}

async fn remove(conn: &mut Conn, l: &Leaving) -> Result<Removal, Failed> {
    deciding(conn).await?;
    let Some(before) = entry_of(conn, l.user).await? else { return Ok(Removal::Unknown) };
    if administers(&before) && !other_admin(conn, l.user).await? {
        return Ok(Removal::LastAdmin);
    }
    let successor = entry_of(conn, l.successor).await?.filter(|s| s.id != l.user && s.standing == Standing::Active);
    if !successor.is_some_and(|s| matches!(s.role, Role::Admin | Role::Developer)) {
        return Ok(Removal::NoSuccessor);
    }
    let epoch = raise_epoch(conn).await?;
    conn.execute(&sql("DELETE FROM users WHERE id = $1").bind(l.user.blob())).await?;
    conn.execute(&sql("DELETE FROM user_invites WHERE \"user\" = $1").bind(l.user.blob())).await?;
    let columns = "id, username, role, created_at, removed_at, successor, cancel, leaving, epoch";
    let row = values![
        l.user.blob(),
        before.username.as_deref().filter(|_| !l.purge),
        before.role.as_str(),
        before.created_at,
        l.at,
        l.successor.blob(),
        l.cancel,
        true,
        epoch
    ];
    conn.insert("removed_users", columns, &Rows::of([row]), "").await?;
    // What they were granted is nobody's now; what they granted stays with who owns the thing.
    conn.execute(&sql("DELETE FROM grants WHERE subject = $1").bind(l.user.blob())).await?;
    // What was to come to this one goes on to the next.
    let q = sql("UPDATE removed_users SET successor = $1 WHERE successor = $2 AND leaving");
    conn.execute(&q.bind(l.successor.blob()).bind(l.user.blob())).await?;
    end_credentials(conn, l.user).await?;
    revoke_invites(conn, l.user, l.at).await?;
    Ok(Removal::Done)
}

async fn revoke_invites(conn: &mut Conn, owner: UserId, at: UnixMs) -> Result<(), Failed> {
    let q = sql("UPDATE invites SET revoked_at = COALESCE(revoked_at, $1) WHERE owner = $2 AND used_at IS NULL");
    conn.execute(&q.bind(at).bind(owner.blob())).await?;
    Ok(())
}

async fn end_credentials(conn: &mut Conn, user: UserId) -> Result<(), Failed> {
    conn.alone(sql("SELECT $1").bind(user.blob())).await?;
    conn.execute(&sql("DELETE FROM refresh_tokens WHERE \"user\" = $1").bind(user.blob())).await?;
    // With the names and addresses by which a person could be told.
    conn.execute(&sql("DELETE FROM devices WHERE \"user\" = $1").bind(user.blob())).await?;
    conn.execute(&sql("DELETE FROM api_keys WHERE \"user\" = $1").bind(user.blob())).await?;
    Ok(())
}

async fn hand_over(conn: &mut Conn, user: UserId, limit: u32) -> Result<bool, Failed> {
    deciding(conn).await?;
    let q = sql("SELECT successor FROM removed_users WHERE id = $1").bind(user.blob());
    let successor = conn.row(&q, |row| Columns::of(row).id::<UserId>()).await?;
    let Some(successor) = successor else { return Ok(true) };
    end_credentials(conn, user).await?;
    // An invite that was being made in that moment.
    let q = sql("UPDATE invites SET revoked_at = (SELECT removed_at FROM removed_users WHERE id = $1) \
         WHERE owner = $1 AND used_at IS NULL AND revoked_at IS NULL");
    conn.execute(&q.bind(user.blob())).await?;
    let mut moved = 0;
    let q = sql("SELECT 1 FROM nodes WHERE owner = $1 LIMIT 1").bind(user.blob());
    if conn.row(&q, |_| Ok(())).await?.is_some() {
        let epoch = raise_epoch(conn).await?;
        let q = sql("UPDATE nodes SET owner = $1, epoch = $2 WHERE id IN (SELECT id FROM nodes WHERE owner = $3 ORDER BY id LIMIT $4)");
        moved += conn.execute(&q.bind(successor.blob()).bind(epoch).bind(user.blob()).bind(limit)).await?;
    }
    let q = sql("UPDATE sessions SET owner = $1 WHERE id IN (SELECT id FROM sessions WHERE owner = $2 ORDER BY id LIMIT $3)");
    moved += conn.execute(&q.bind(successor.blob()).bind(user.blob()).bind(limit)).await?;
    let q = sql("SELECT agent FROM agent_state WHERE owner = $1 UNION ALL SELECT name FROM agents WHERE owner = $1 LIMIT 1");
    if let Some(agent) = conn.row(&q.bind(user.blob()), |row| Columns::of(row).get::<String>()).await? {
        // Whose an agent is hangs on all of its rows.
        conn.alone(sql("SELECT $1").bind(mesh_core::sha256(agent.as_bytes()))).await?;
        for q in [
            "UPDATE agent_state SET owner = $1 WHERE agent = $2 AND owner = $3",
            // What runs may finish; nothing begins again under the rights of who inherits it.
            "UPDATE agents SET owner = $1, restart_policy = CASE WHEN ended_at IS NULL THEN 'never' ELSE restart_policy END \
             WHERE name = $2 AND owner = $3",
        ] {
            moved += conn.execute(&sql(q).bind(successor.blob()).bind(agent.as_str()).bind(user.blob())).await?;
        }
    }
    Ok(moved == 0)
}
