//! People: users, log-ins, API keys.

use crate::dialect::{Conn, Row};
use crate::rows::{Columns, Id, KEY_COLUMNS, USER_COLUMNS, blob, key, list_text, user};
use crate::sql::{Rows, Sql, Value, sql, values};
use crate::store::{Failed, Store};
use crate::users::MAY_ACT;
use async_trait::async_trait;
use hub_engine::ports::{Accounts, Stored, Window};
use hub_engine::records::{ApiKey, Device, DeviceChange, RefreshToken, Rotation, User};
use mesh_core::permission::Role;
use mesh_core::{ApiKeyId, DeviceId, Digest, LoginId, UnixMs, UserId};
use std::net::IpAddr;

const DEVICE_COLUMNS: &str = "id, \"user\", name, user_agent, first_address, address, last_seen_at, trusted";
/// The log-ins with a token that can still be used at `$2`.
const LIVING: &str = "SELECT login FROM refresh_tokens WHERE used_at IS NULL AND NOT ended AND expires_at > $2";
const REFRESH_COLUMNS: &str = "mac, login, \"user\", expires_at";

#[async_trait]
impl Accounts for Store {
    async fn add_user(&self, user: &User) -> Stored<bool> {
        let q = sql(format!(
            "INSERT INTO users ({USER_COLUMNS}) VALUES ($1, $2, $3, $4, $5) ON CONFLICT ({}) DO NOTHING",
            self.read.dialect().username()
        ));
        let q = q.bind(user.id.blob()).bind(user.username.as_str()).bind(user.role.as_str());
        let q = q.bind(user.password_hash.as_str()).bind(user.created_at);
        Ok(self.execute("accounts.add_user", q).await? == 1)
    }

    async fn user(&self, id: UserId) -> Stored<Option<User>> {
        let q = sql(format!("SELECT {USER_COLUMNS} FROM users WHERE id = $1 AND {MAY_ACT}"));
        self.one("accounts.user", q.bind(id.blob()), user).await
    }

    async fn user_named(&self, username: &str) -> Stored<Option<User>> {
        let q = sql(format!("SELECT {USER_COLUMNS} FROM users WHERE {} = $1 AND {MAY_ACT}", self.read.dialect().username()));
        self.one("accounts.user_named", q.bind(username.to_ascii_lowercase()), user).await
    }

    async fn oldest_admin(&self) -> Stored<Option<User>> {
        let q = sql(format!("SELECT {USER_COLUMNS} FROM users WHERE role = $1 AND {MAY_ACT} ORDER BY id LIMIT 1"));
        self.one("accounts.oldest_admin", q.bind(Role::Admin.as_str()), user).await
    }

    async fn count_users(&self) -> Stored<u64> {
        let count = self.one("accounts.count_users", sql("SELECT count(*) FROM users"), |row| Columns::of(row).unsigned()).await?;
        Ok(count.unwrap_or(0))
    }

    async fn set_password(&self, id: UserId, was: &str, hash: &str, keep: Option<LoginId>) -> Stored<bool> {
        self.write("accounts.set_password", (id, was.to_owned(), hash.to_owned(), keep), |conn, (id, was, hash, keep)| {
            Box::pin(async move {
                let q = sql("UPDATE users SET password_hash = $1 WHERE id = $2 AND password_hash = $3");
                if conn.execute(&q.bind(hash.as_str()).bind(id.blob()).bind(was.as_str())).await? == 0 {
                    return Ok(false);
                }
                end_log_ins(conn, *id, *keep).await?;
                Ok(true)
            })
        })
        .await
    }

    async fn add_login(&self, device: &Device, token: &RefreshToken) -> Stored<()> {
        self.write("accounts.add_login", (device.clone(), token.clone()), |conn, (d, token)| {
            Box::pin(async move {
                let ended = format!("DELETE FROM refresh_tokens WHERE \"user\" = $1 AND login NOT IN ({LIVING} AND \"user\" = $1)");
                conn.execute(&sql(ended).bind(d.user.blob()).bind(d.last_seen_at)).await?;
                let gone = "DELETE FROM devices WHERE \"user\" = $1 AND id NOT IN (SELECT login FROM refresh_tokens WHERE \"user\" = $1)";
                conn.execute(&sql(gone).bind(d.user.blob())).await?;
                let (first, last) = (d.first_address.map(|a| a.to_string()), d.address.map(|a| a.to_string()));
                let row =
                    values![d.id.blob(), d.user.blob(), d.name.as_str(), d.user_agent.as_deref(), first, last, d.last_seen_at, d.trusted];
                conn.insert("devices", DEVICE_COLUMNS, &Rows::of([row]), "").await?;
                conn.insert("refresh_tokens", REFRESH_COLUMNS, &Rows::of([refresh_row(token)]), "").await?;
                Ok(())
            })
        })
        .await
    }

    async fn rotate_refresh(&self, old: &Digest, new_mac: &Digest, new_expires_at: UnixMs, now: UnixMs) -> Stored<Rotation> {
        self.write("accounts.rotate_refresh", (*old, *new_mac, new_expires_at, now), |conn, (old, new, new_expires_at, now)| {
            Box::pin(async move {
                conn.alone(sql("SELECT \"user\" FROM refresh_tokens WHERE mac = $1").bind(old)).await?;
                let q = sql("SELECT login, \"user\", expires_at, used_at, ended FROM refresh_tokens WHERE mac = $1").bind(old);
                let found = conn.row(&q, |row| {
                    let c = &mut Columns::of(row);
                    let whose: (LoginId, UserId) = (c.id()?, c.id()?);
                    Ok((whose, c.get::<i64>()?, c.get::<Option<i64>>()?, c.get::<bool>()?))
                });
                let Some(((login, user), expires_at, used_at, ended)) = found.await? else { return Ok(Rotation::Unknown) };
                if ended {
                    return Ok(Rotation::Unknown);
                }
                if used_at.is_some() {
                    end_login(conn, login).await?;
                    return Ok(Rotation::Reused { user, login });
                }
                if expires_at <= *now {
                    return Ok(Rotation::Unknown);
                }
                conn.execute(&sql("UPDATE refresh_tokens SET used_at = $1 WHERE mac = $2").bind(*now).bind(old)).await?;
                let next = RefreshToken { mac: *new, login, user, expires_at: *new_expires_at };
                conn.insert("refresh_tokens", REFRESH_COLUMNS, &Rows::of([refresh_row(&next)]), "").await?;
                Ok(Rotation::Rotated { user, login })
            })
        })
        .await
    }

    async fn refresh_of(&self, mac: &Digest) -> Stored<Option<(UserId, LoginId)>> {
        let q = sql("SELECT \"user\", login FROM refresh_tokens WHERE mac = $1").bind(mac);
        self.one("accounts.refresh_of", q, |row| {
            let c = &mut Columns::of(row);
            Ok((c.id()?, c.id()?))
        })
        .await
    }

    async fn end_login(&self, login: LoginId) -> Stored<()> {
        self.write("accounts.end_login", login, |conn, login| Box::pin(end_login(conn, *login))).await
    }

    async fn device(&self, id: DeviceId, now: UnixMs) -> Stored<Option<Device>> {
        let q = sql(format!("SELECT {DEVICE_COLUMNS} FROM devices d WHERE id = $1 AND EXISTS ({LIVING} AND login = d.id)"));
        self.one("accounts.device", q.bind(id.blob()).bind(now), device).await
    }

    async fn devices(&self, user: UserId, now: UnixMs, window: Window<DeviceId>) -> Stored<Vec<Device>> {
        let narrow = |q: Sql| {
            let mut q = q.bind(user.blob()).bind(now);
            q.text.to_mut().push_str(&format!(" AND \"user\" = $1 AND EXISTS ({LIVING} AND login = d.id)"));
            q
        };
        self.page("accounts.devices", (DEVICE_COLUMNS, "devices d"), narrow, window, device).await
    }

    async fn change_device(&self, id: DeviceId, change: &DeviceChange) -> Stored<()> {
        let q = sql("UPDATE devices SET name = COALESCE($1, name), trusted = COALESCE($2, trusted) WHERE id = $3");
        let q = q.bind(change.name.as_deref()).bind(change.trusted).bind(id.blob());
        self.execute("accounts.change_device", q).await.map(drop)
    }

    async fn device_seen(&self, id: DeviceId, address: Option<IpAddr>, now: UnixMs) -> Stored<()> {
        let q = sql("UPDATE devices SET address = $1, last_seen_at = $2 WHERE id = $3");
        let q = q.bind(address.map(|a| a.to_string())).bind(now).bind(id.blob());
        self.execute("accounts.device_seen", q).await.map(drop)
    }

    async fn add_key(&self, k: &ApiKey) -> Stored<()> {
        self.insert("accounts.add_key", "api_keys", KEY_COLUMNS, key_row(k)).await
    }

    async fn key_by_mac(&self, mac: &Digest) -> Stored<Option<ApiKey>> {
        self.one("accounts.key_by_mac", sql(format!("SELECT {KEY_COLUMNS} FROM api_keys WHERE mac = $1")).bind(mac), key).await
    }

    async fn key(&self, id: ApiKeyId) -> Stored<Option<ApiKey>> {
        self.one("accounts.key", sql(format!("SELECT {KEY_COLUMNS} FROM api_keys WHERE id = $1")).bind(id.blob()), key).await
    }

    async fn keys(&self, user: UserId, window: Window<ApiKeyId>) -> Stored<Vec<ApiKey>> {
        self.page("accounts.keys", (KEY_COLUMNS, "api_keys"), |q| q.and(" AND \"user\" = ", user.blob()), window, key).await
    }

    async fn remove_key(&self, id: ApiKeyId) -> Stored<bool> {
        Ok(self.execute("accounts.remove_key", sql("DELETE FROM api_keys WHERE id = $1").bind(id.blob())).await? == 1)
    }

    async fn key_used(&self, id: ApiKeyId, now: UnixMs) -> Stored<()> {
        let q = sql("UPDATE api_keys SET last_used_at = $1 WHERE id = $2");
        self.execute("accounts.key_used", q.bind(now).bind(id.blob())).await.map(drop)
    }
}

pub(crate) fn key_row(k: &ApiKey) -> [Value<'_>; 9] {
    values![
        k.id.blob(),
        k.user.blob(),
        k.name.as_str(),
        k.prefix.as_str(),
        &k.mac,
        list_text(&k.scopes),
        k.created_at,
        k.expires_at,
        k.last_used_at,
    ]
}

fn device(row: &Row) -> Result<Device, Failed> {
    let c = &mut Columns::of(row);
    Ok(Device {
        id: c.id()?,
        user: c.id()?,
        name: c.get()?,
        user_agent: c.get()?,
        first_address: c.word_or_null(|text| text.parse().ok())?,
        address: c.word_or_null(|text| text.parse().ok())?,
        last_seen_at: c.get()?,
        trusted: c.get()?,
    })
}

fn refresh_row(t: &RefreshToken) -> [Value<'_>; 4] {
    values![&t.mac, t.login.blob(), t.user.blob(), t.expires_at]
}

/// Of a user, all but `keep`.
pub(crate) async fn end_log_ins(conn: &mut Conn, user: UserId, keep: Option<LoginId>) -> Result<(), Failed> {
    conn.alone(sql("SELECT $1").bind(user.blob())).await?;
    // DISTINCT: with no log-in to keep, all differ from NULL.
    let q = sql("UPDATE refresh_tokens SET ended = TRUE WHERE \"user\" = $1 AND login IS DISTINCT FROM $2");
    conn.execute(&q.bind(user.blob()).bind(blob(keep))).await?;
    Ok(())
}

/// Who ends a family and who adds to it take turns: a token added beside would live on.
async fn end_login(conn: &mut Conn, login: LoginId) -> Result<(), Failed> {
    conn.alone(sql("SELECT \"user\" FROM refresh_tokens WHERE login = $1 LIMIT 1").bind(login.blob())).await?;
    conn.execute(&sql("UPDATE refresh_tokens SET ended = TRUE WHERE login = $1").bind(login.blob())).await?;
    Ok(())
}
