//! How much there is.

use crate::dialect::Row;
use crate::rows::Columns;
use crate::sql::sql;
use crate::store::{Failed, Store};
use async_trait::async_trait;
use hub_engine::ports::{Gauges, Stored};
use hub_engine::records::StorageUse;
use mesh_core::task::TaskState;
use std::collections::BTreeMap;

#[async_trait]
impl Gauges for Store {
    async fn tasks_by_state(&self) -> Stored<BTreeMap<TaskState, u64>> {
        // Of indexes alone: all by their state, without those that stand for others.
        let q = sql("SELECT state, CAST(SUM(n) AS BIGINT) FROM (SELECT state, COUNT(*) AS n FROM tasks GROUP BY state \
             UNION ALL SELECT state, -COUNT(*) FROM tasks WHERE children IS NOT NULL GROUP BY state) AS counts \
             GROUP BY state HAVING SUM(n) > 0");
        Ok(self.all("gauges.tasks_by_state", q, count).await?.into_iter().collect())
    }

    async fn storage(&self) -> Stored<StorageUse> {
        let sizes = |row: &Row| {
            let c = &mut Columns::of(row);
            Ok((c.unsigned()?, c.unsigned()?))
        };
        let (database_bytes, journal_bytes) =
            self.one("gauges.storage", sql(self.read.dialect().sizes()), sizes).await?.unwrap_or_default();
        let (disk_bytes, disk_free_bytes) = self.outputs.disk();
        Ok(StorageUse { database_bytes, journal_bytes, output_bytes: self.outputs.bytes_in_files(), disk_bytes, disk_free_bytes })
    }
}

fn count(row: &Row) -> Result<(TaskState, u64), Failed> {
    let c = &mut Columns::of(row);
    Ok((c.word(TaskState::parse)?, c.unsigned()?))
}
