//! The store: what is open of it, and how reads and writes go in.

use crate::audit::Effect;
use crate::dialect::{Conn, Connector, Database, Lane, Readers, Row, postgres, sqlite};
use crate::output::Outputs;
use crate::rows::{Columns, Id};
use crate::sql::{Rows, Sql, Value, sql};
use crate::writer::Writer;
use futures::future::BoxFuture;
use hub_engine::ports::{StoreError, Stored, Window};
use hub_engine::records::Part;
use mesh_process::Tasks;
use sqlx::migrate::{MigrateError, Migrator};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Why a store could not be opened. A database's address stands here without its password.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("the data folder {path}: {why}")]
    Folder { path: PathBuf, why: std::io::Error },
    #[error("the database {database}: {why}")]
    Database { database: String, why: Failed },
    #[error(
        "the database {database} has migration {found}, and this version knows those up to {newest}: \
         a later version of the hub wrote it; start that version, or restore a backup of this one"
    )]
    Newer { database: String, found: i64, newest: i64 },
    #[error("bringing the database {database} up to date: {why}")]
    Migrate { database: String, why: MigrateError },
    #[error(
        "the schema of the database {database} is about to change, and a copy of it as it is now could not be put beside it: \
         {why}; the start is refused so that nothing changes without a copy (is there room for one?)"
    )]
    Copy { database: String, why: Failed },
    #[error("a thread for writing to the database: {0}")]
    Thread(std::io::Error),
}

/// Why a job or a read failed; the operation is added where it is known.
pub(crate) type Failed = Box<dyn std::error::Error + Send + Sync>;

pub(crate) fn failed<E: Into<Failed>>(operation: &'static str) -> impl FnOnce(E) -> StoreError {
    move |source| StoreError::new(operation, source)
}

/// A database whose schema is that of this version.
pub(crate) struct Opened {
    pub conn: Conn,
    pub connector: Connector,
    pub read: Readers,
}

/// Names the database in what became of its migrations, and refuses one from a later version.
pub(crate) fn migrated(known: &Migrator, outcome: Result<(), MigrateError>, database: &str) -> Result<(), OpenError> {
    let newest = known.iter().map(|m| m.version).max().unwrap_or(0);
    let database = database.to_owned();
    match outcome {
        Ok(()) => Ok(()),
        Err(MigrateError::VersionMissing(found)) => Err(OpenError::Newer { database, found, newest }),
        Err(why) => Err(OpenError::Migrate { database, why }),
    }
}

/// Counted before anything is written; from then on carried along.
async fn bytes_in_files(read: &Readers) -> Result<u64, Failed> {
    let q = sql("SELECT CAST(COALESCE(SUM(kept_len), 0) AS BIGINT) FROM outputs WHERE kept_len > 0");
    read.row(q, |row| Columns::of(row).unsigned()).await?.ok_or_else(|| "a sum has one row".into())
}

/// Everything one hub keeps, except keys: rows in its database, output in its data folder.
#[derive(Debug)]
pub struct Store {
    pub(crate) writer: Writer,
    pub(crate) read: Readers,
    pub(crate) outputs: Arc<Outputs>,
}

impl Store {
    /// Opens the database and brings its schema up to date; makes the one in `data_dir` when it is
    /// not there.
    ///
    /// The writer ends with `tasks`, once it has committed what was waiting; a write after that
    /// fails. So `tasks` should end after everything that writes.
    pub async fn open(data_dir: &Path, database: &Database, tasks: &Tasks) -> Result<Arc<Self>, OpenError> {
        let (opened, beside) = match database {
            Database::Sqlite => sqlite::open(data_dir).await.map(|(opened, beside)| (opened, Some(beside)))?,
            Database::Postgres(url) => {
                let folder = |why| OpenError::Folder { path: data_dir.to_owned(), why };
                mesh_process::files::private_dir(data_dir).map_err(folder)?;
                (postgres::open(url).await?, None)
            }
        };
        let Opened { conn, connector, read } = opened;
        let writer = Writer::start(conn, connector, tasks).map_err(OpenError::Thread)?;
        if let Some(conn) = beside {
            sqlite::checkpoints(conn, writer.clone(), tasks);
        }
        let in_files = bytes_in_files(&read).await.map_err(|why| OpenError::Database { database: database.to_string(), why })?;
        let outputs = Outputs::new(data_dir.join("output"), read.clone(), writer.clone(), tasks.clone(), in_files);
        Ok(Arc::new(Self { writer, read, outputs }))
    }

    /// How many transactions have been committed since the store was opened.
    pub fn commits(&self) -> u64 {
        self.writer.commits()
    }

    /// How many writes wait for the next transaction.
    pub fn waiting(&self) -> usize {
        self.writer.waiting()
    }

    /// Does one job in the writer's next transaction; returns once that is committed. When others
    /// were in its way the transaction is done again, so `work` may run more than once on `with`.
    pub(crate) async fn write<A, T>(
        &self,
        operation: &'static str,
        with: A,
        work: for<'c> fn(&'c mut Conn, &'c A) -> BoxFuture<'c, Result<T, Failed>>,
    ) -> Stored<T>
    where
        A: Send + Sync + 'static,
        T: Effect + Send + 'static,
    {
        self.writer.run(operation, None, with, work).await
    }
    /// A job of one statement; gives the number of rows that it changed.
    pub(crate) async fn execute(&self, operation: &'static str, sql: Sql) -> Stored<u64> {
        self.write(operation, sql, |conn, sql| Box::pin(conn.execute(sql))).await
    }
    /// A job that adds one row.
    pub(crate) async fn insert<const N: usize>(
        &self,
        operation: &'static str,
        table: &'static str,
        columns: &'static str,
        row: [Value<'_>; N],
    ) -> Stored<()> {
        self.write(operation, (table, columns, Rows::of([row]).into_owned()), |conn, (table, columns, rows)| {
            Box::pin(conn.insert(table, columns, rows, ""))
        })
        .await
    }

    /// The record in the first row, if there is one.
    pub(crate) async fn one<T: Send + 'static>(
        &self,
        operation: &'static str,
        sql: Sql,
        record: fn(&Row) -> Result<T, Failed>,
    ) -> Stored<Option<T>> {
        self.read.row(sql, record).await.map_err(failed(operation))
    }
    pub(crate) async fn all<T: Send + 'static>(
        &self,
        operation: &'static str,
        sql: Sql,
        record: fn(&Row) -> Result<T, Failed>,
    ) -> Stored<Vec<T>> {
        self.read.rows(Lane::Long, sql, record).await.map_err(failed(operation))
    }
    /// A page by id, newest first, of all rows or of those whose `column` is `of`.
    pub(crate) async fn page<I: Id, T: Send + 'static>(
        &self,
        operation: &'static str,
        (columns, table): (&str, &str),
        narrow: impl FnOnce(Sql) -> Sql,
        window: Window<I>,
        record: fn(&Row) -> Result<T, Failed>,
    ) -> Stored<Vec<T>> {
        let mut q = narrow(sql(format!("SELECT {columns} FROM {table} WHERE TRUE")));
        if let Some(before) = window.before {
            q = q.and(" AND id < ", before.blob());
        }
        self.all(operation, q.and(" ORDER BY id DESC LIMIT ", window.limit), record).await
    }
    /// A page by id, newest first, of those rows that `filter` names, cut where their `sized` column
    /// comes to more than `max_bytes`. The sizes are read first, so that no more than that is held.
    pub(crate) async fn part<I: Id, T: Send + 'static>(
        &self,
        operation: &'static str,
        (columns, table, sized): (&str, &str, &str),
        filter: impl Fn() -> Sql,
        window: Window<I>,
        max_bytes: u64,
        record: fn(&Row) -> Result<T, Failed>,
    ) -> Stored<Part<T>> {
        let select = |what: &str| {
            let Sql { text, values } = filter();
            let q = Sql { text: format!("SELECT {what} FROM {table} {text}").into(), values };
            match window.before {
                Some(before) => q.and(" AND id < ", before.blob()),
                None => q,
            }
        };
        let sizes = select(&format!("id, CAST(length({sized}) AS BIGINT)")).and(" ORDER BY id DESC LIMIT ", window.limit.saturating_add(1));
        let found = self.all(operation, sizes, |row| Ok((Columns::of(row).bytes::<16>()?, row.get::<i64>(1)?))).await?;
        let mut bytes = 0u64;
        let fits = |(n, (_, size)): &(usize, &([u8; 16], i64))| {
            bytes = bytes.saturating_add(*size as u64);
            *n == 0 || (*n < window.limit as usize && bytes <= max_bytes)
        };
        let Some((_, (last, _))) = found.iter().enumerate().take_while(fits).last() else {
            return Ok(Part { items: vec![], more: false });
        };
        let count = found.iter().position(|(id, _)| id == last).map_or(0, |n| n + 1);
        // What was added meanwhile stands above the first and is not of this page.
        let page = select(columns).and(" AND id >= ", last.to_vec()).and(" AND id <= ", found[0].0.to_vec());
        let items = self.all(operation, page.and(" ORDER BY id DESC LIMIT ", count as i64), record).await?;
        Ok(Part { items, more: found.len() > count })
    }
}
