//! Facts about the deployment itself.

use crate::dialect::Row;
use crate::rows::{Columns, Id};
use crate::sql::{Rows, sql, values};
use crate::store::{Failed, Store, failed};
use async_trait::async_trait;
use hub_engine::ports::{Meta, Stored};
use hub_engine::records::{HubMeta, Restored};
use mesh_core::UnixMs;

pub(crate) const ASK_GO: &str = "UPDATE hub SET go = TRUE WHERE restored_at IS NOT NULL";

#[async_trait]
impl Meta for Store {
    async fn hub(&self, fresh: HubMeta) -> Stored<HubMeta> {
        self.write("meta.hub", fresh, |conn, fresh| {
            Box::pin(async move {
                let row = values![1i64, fresh.id.blob(), fresh.incarnation, fresh.created_at];
                conn.insert("hub", "one, id, incarnation, created_at", &Rows::of([row]), " ON CONFLICT DO NOTHING").await?;
                let kept = conn.row(&sql("SELECT id, incarnation, created_at FROM hub"), facts).await?;
                kept.ok_or_else(|| "the row of the hub is gone".into())
            })
        })
        .await
    }

    async fn mark_restored(&self, at: UnixMs, backup_at: UnixMs, least: u32) -> Stored<HubMeta> {
        self.write("meta.mark_restored", (at, backup_at, least), |conn, (at, backup_at, least)| {
            Box::pin(async move {
                let kept = conn.row(&sql("SELECT id, incarnation, created_at FROM hub"), facts).await?.ok_or("there is no hub in it")?;
                let next = kept.incarnation.checked_add(1).ok_or("there is no higher incarnation")?.max(*least);
                let q = sql("UPDATE hub SET incarnation = $1, restored_at = $2, backup_at = $3, go = FALSE");
                conn.execute(&q.bind(next).bind(*at).bind(*backup_at)).await?;
                Ok(HubMeta { incarnation: next, ..kept })
            })
        })
        .await
    }

    async fn restored(&self) -> Stored<Option<Restored>> {
        let q = sql("SELECT restored_at, backup_at, go FROM hub WHERE restored_at IS NOT NULL AND backup_at IS NOT NULL");
        let mark = |row: &Row| {
            let c = &mut Columns::of(row);
            Ok(Restored { at: c.get()?, backup_at: c.get()?, go: c.get()? })
        };
        self.one("meta.restored", q, mark).await
    }

    async fn ask_go(&self) -> Stored<bool> {
        Ok(self.execute("meta.ask_go", sql(ASK_GO)).await? == 1)
    }

    async fn released(&self) -> Stored<()> {
        let q = sql("UPDATE hub SET restored_at = NULL, backup_at = NULL, go = FALSE");
        self.execute("meta.released", q).await.map(drop)
    }

    async fn ping(&self) -> Stored<()> {
        self.read.row(sql("SELECT 1"), |_| Ok(())).await.map_err(failed("meta.ping")).map(drop)
    }
}

fn facts(row: &Row) -> Result<HubMeta, Failed> {
    let c = &mut Columns::of(row);
    Ok(HubMeta { id: c.id()?, incarnation: u32::try_from(c.get::<i64>()?)?, created_at: c.get()? })
}
