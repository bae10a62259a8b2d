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
        // Of the index by state alone.
        let q = sql("SELECT state, COUNT(*) FROM tasks GROUP BY state");
        Ok(self.all("gauges.tasks_by_state", q, count).await?.into_iter().collect())
    }

    async fn storage(&self) -> Stored<StorageUse> {
        let size = self.one("gauges.storage", sql(self.read.dialect().size()), |row| Columns::of(row).unsigned()).await?;
        Ok(StorageUse { database_bytes: size.unwrap_or(0), output_bytes: self.outputs.bytes_in_files() })
    }
}

fn count(row: &Row) -> Result<(TaskState, u64), Failed> {
    let c = &mut Columns::of(row);
    Ok((c.word(TaskState::parse)?, c.unsigned()?))
}
