//! Facts about the deployment itself.

use crate::dialect::Row;
use crate::rows::{Columns, Id};
use crate::sql::{Rows, sql, values};
use crate::store::{Failed, Store, failed};
use async_trait::async_trait;
use hub_engine::ports::{Meta, Stored};
use hub_engine::records::HubMeta;

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

    async fn ping(&self) -> Stored<()> {
        self.read.row(sql("SELECT 1"), |_| Ok(())).await.map_err(failed("meta.ping")).map(drop)
    }
}

fn facts(row: &Row) -> Result<HubMeta, Failed> {
    let c = &mut Columns::of(row);
    Ok(HubMeta { id: c.id()?, incarnation: u32::try_from(c.get::<i64>()?)?, created_at: c.get()? })
}
