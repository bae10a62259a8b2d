//! What a caller's key has made: written in the commit of the thing itself.

use crate::accounts::key_row;
use crate::agents;
use crate::dialect::Conn;
use crate::grants;
use crate::journal::Accept;
use crate::nodes::invite_row;
use crate::rows::{Columns, INVITE_COLUMNS, KEY_COLUMNS};
use crate::sessions;
use crate::sql::{Rows, sql};
use crate::store::{Failed, Store};
use crate::users;
use crate::writer::Bulk;
use async_trait::async_trait;
use hub_engine::ports::{Creation, Idempotency, Known, Once, Stored};
use hub_engine::records::Spawned;
use mesh_core::{Digest, UnixMs};

#[async_trait]
impl Idempotency for Store {
    async fn create(&self, thing: Creation, once: &Once) -> Stored<Option<Known>> {
        // Another hub may be making things of the same keys: both take them in one order.
        let place = Some(once.scope);
        self.writer
            .run("idempotency.create", place, (thing, *once), |conn, (thing, once)| Box::pin(create(conn, thing, once)))
            .await
            .map(|made| made.0)
    }

    async fn known(&self, scope: &Digest, since: UnixMs) -> Stored<Option<Known>> {
        let q = sql("SELECT request, thing FROM idempotency WHERE scope = $1 AND created_at > $2");
        self.one("idempotency.known", q.bind(*scope).bind(since), known).await
    }

    async fn forget(&self, until: UnixMs, limit: u32) -> Stored<u64> {
        let q = sql("DELETE FROM idempotency WHERE scope IN \
             (SELECT scope FROM idempotency WHERE created_at <= $1 ORDER BY created_at LIMIT $2)");
        self.execute("idempotency.forget", q.bind(until).bind(limit)).await
    }
}

fn known(row: &crate::dialect::Row) -> Result<Known, Failed> {
    let c = &mut Columns::of(row);
    Ok(Known { request: c.bytes()?, thing: c.get()? })
}

/// None when the thing was made; else what was there before.
pub(crate) struct Made(pub Option<Known>);

async fn create(conn: &mut Conn, thing: &Creation, once: &Once) -> Result<Made, Failed> {
    // A hub that is about to commit the same scope is waited for by the statement itself.
    let taken = sql("INSERT INTO idempotency (scope, request, thing, created_at) VALUES ($1, $2, $3, $4) \
         ON CONFLICT (scope) DO UPDATE SET request = excluded.request, thing = excluded.thing, created_at = excluded.created_at \
         WHERE idempotency.created_at <= $5");
    let taken = taken.bind(once.scope).bind(once.request).bind(thing.id()).bind(once.at).bind(once.since);
    if conn.execute(&taken).await? == 0 {
        let q = sql("SELECT request, thing FROM idempotency WHERE scope = $1").bind(once.scope);
        return conn.row(&q, known).await?.ok_or_else(|| "what a key has made is gone".into()).map(|known| Made(Some(known)));
    }
    match thing {
        Creation::Task(task) => drop(Accept::write(conn, &[&Accept::One(task.clone())]).await?),
        Creation::Fan(fan) => drop(Accept::write(conn, &[&Accept::Fan(fan.clone())]).await?),
        Creation::Session(s) => sessions::insert(conn, s).await?,
        Creation::Invite(i) => conn.insert("invites", INVITE_COLUMNS, &Rows::of([invite_row(i)]), "").await?,
        Creation::Grant(g) => grants::insert(conn, g).await?,
        Creation::User(u, invite) => drop(users::insert(conn, u, invite.as_ref()).await?.then_some(()).ok_or("the user name is taken")?),
        Creation::Agent(a) => match agents::insert(conn, a).await? {
            Spawned::Done => {}
            Spawned::NameTaken | Spawned::Foreign => return Err("the name of the agent is taken".into()),
        },
        Creation::Key(k) => conn.insert("api_keys", KEY_COLUMNS, &Rows::of([key_row(k)]), "").await?,
    }
    Ok(Made(None))
}
