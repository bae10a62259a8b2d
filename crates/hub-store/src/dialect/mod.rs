//! All that differs between SQLite and PostgreSQL: how a database is opened, which errors mean what,
//! how rows go by the hundred, and the few words that the two spell differently.

pub(crate) mod postgres;
pub(crate) mod sqlite;

use crate::sql::{IdBytes, Rows, Sql, Value, sql};
use crate::store::Failed;
use postgres::Url;
use rusqlite::types::{FromSql, ValueRef};
use sqlx::postgres::{PgConnection, PgPool, PgRow};
use sqlx::{AssertSqlSafe, Connection, Postgres};
use std::path::PathBuf;
use std::sync::Arc;

/// Where a hub keeps its rows.
#[derive(Debug, Clone, Default)]
pub enum Database {
    /// `hub.db` in the data folder.
    #[default]
    Sqlite,
    Postgres(Url),
}

impl Database {
    /// Reads a setting. An error says what is wrong and never repeats what may be secret.
    pub fn parse(text: &str) -> Result<Self, String> {
        Url::parse(text).map(Self::Postgres)
    }
}

impl std::fmt::Display for Database {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Sqlite => f.write_str("hub.db"),
            Self::Postgres(url) => write!(f, "{url}"),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dialect {
    Sqlite,
    Postgres,
}

impl Dialect {
    /// A query that gives the members of the [`Value::List`] behind `placeholder`.
    pub(crate) fn listed(self, placeholder: &str) -> String {
        match self {
            Self::Sqlite => format!("SELECT unhex(value) FROM json_each({placeholder})"),
            Self::Postgres => format!("SELECT unnest({placeholder})"),
        }
    }
    pub(crate) fn hex(self, column: &str) -> String {
        match self {
            Self::Sqlite => format!("hex({column})"),
            Self::Postgres => format!("encode({column}, 'hex')"),
        }
    }
    /// Stands behind a table that must be read by one index. The other database knows better by itself.
    pub(crate) fn by_index(self, name: &str) -> String {
        match self {
            Self::Sqlite => format!(" INDEXED BY {name}"),
            Self::Postgres => String::new(),
        }
    }
    /// What is unique in `users`, and equal for names that differ only in the case of ASCII.
    pub(crate) fn username(self) -> &'static str {
        match self {
            // Its collation is NOCASE.
            Self::Sqlite => "username",
            Self::Postgres => "lower(username)",
        }
    }
    /// A query for the bytes that the database takes on its disk, and how many of them are in use.
    ///
    /// PostgreSQL does not tell the second: it is added up from the rows that it counts as alive and the
    /// stored size of some of them. After a crash of the server it counts anew, from 0, which errs on
    /// the side of keeping.
    pub(crate) fn sizes(self) -> &'static str {
        match self {
            Self::Sqlite => {
                "SELECT page_count * page_size, (page_count - freelist_count) * page_size \
                 FROM pragma_page_count(), pragma_freelist_count(), pragma_page_size()"
            }
            Self::Postgres => {
                "SELECT pg_database_size(current_database()), CAST(COALESCE(SUM(s.n_live_tup * w.width), 0) AS BIGINT) FROM ( \
                 SELECT 'tasks' AS relname, 1000 + AVG(pg_column_size(t.spec) + COALESCE(pg_column_size(t.result), 0)) AS width \
                 FROM (SELECT spec, result FROM tasks LIMIT 200) t \
                 UNION ALL SELECT 'task_events', 100 + AVG(pg_column_size(e.detail)) FROM (SELECT detail FROM task_events LIMIT 200) e \
                 UNION ALL SELECT 'task_specs', 100 + AVG(pg_column_size(p.spec)) FROM (SELECT spec FROM task_specs LIMIT 200) p \
                 UNION ALL SELECT 'outputs', 200 + AVG(pg_column_size(o.held)) FROM (SELECT held FROM outputs LIMIT 200) o \
                 ) w JOIN pg_stat_user_tables s ON s.relname = w.relname AND s.schemaname = current_schema()"
            }
        }
    }
}

/// What an error within a transaction is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The job alone; the transaction goes on without it.
    Job,
    /// Others were in the way: the whole transaction may be done again, and will then succeed.
    Again,
    /// The transaction, for all of its jobs.
    Transaction,
    /// The connection too.
    Connection,
}

/// Opens connections for the writer.
#[derive(Debug, Clone)]
pub(crate) enum Connector {
    Sqlite(PathBuf),
    Postgres(Url),
}

impl Connector {
    pub(crate) async fn connect(&self) -> Result<Conn, Failed> {
        match self {
            Self::Sqlite(path) => Ok(Conn::Sqlite(sqlite::writing(path)?)),
            Self::Postgres(url) => Ok(Conn::Postgres(postgres::connect(url).await?)),
        }
    }
    pub(crate) fn verdict(&self, error: &Failed) -> Verdict {
        match self {
            Self::Sqlite(_) => Verdict::Job,
            Self::Postgres(_) => postgres::verdict(error),
        }
    }
    /// `work`, given up with a clear error when a database on a network falls silent.
    pub(crate) async fn in_time<T>(&self, work: impl Future<Output = Result<T, Failed>>) -> Result<T, Failed> {
        match self {
            Self::Sqlite(_) => work.await,
            Self::Postgres(_) => postgres::in_time(work).await,
        }
    }
}

/// The writer's connection. On SQLite nothing here waits: the writer has a thread for itself.
#[derive(Debug)]
pub(crate) enum Conn {
    Sqlite(rusqlite::Connection),
    Postgres(PgConnection),
}

impl Conn {
    pub(crate) fn dialect(&self) -> Dialect {
        match self {
            Self::Sqlite(_) => Dialect::Sqlite,
            Self::Postgres(_) => Dialect::Postgres,
        }
    }

    /// Runs a statement; gives the number of rows that it changed.
    pub(crate) async fn execute(&mut self, sql: &Sql) -> Result<u64, Failed> {
        match self {
            Self::Sqlite(c) => sqlite::execute(c, sql),
            Self::Postgres(c) => {
                let query = sqlx::query_with(AssertSqlSafe(sql.text.clone()), postgres::arguments(&sql.values)?);
                Ok(query.execute(c).await?.rows_affected())
            }
        }
    }
    pub(crate) async fn rows<T>(&mut self, sql: &Sql, record: impl FnMut(&Row) -> Result<T, Failed>) -> Result<Vec<T>, Failed> {
        match self {
            Self::Sqlite(c) => sqlite::rows(c, sql, record),
            Self::Postgres(c) => {
                let query = sqlx::query_with(AssertSqlSafe(sql.text.clone()), postgres::arguments(&sql.values)?);
                Row::all(&query.fetch_all(c).await?, record)
            }
        }
    }
    /// The record in the first row.
    pub(crate) async fn row<T>(&mut self, sql: &Sql, record: impl FnMut(&Row) -> Result<T, Failed>) -> Result<Option<T>, Failed> {
        Ok(self.rows(sql, record).await?.into_iter().next())
    }
    /// The rows of `select` whose `column` is one of `ids`.
    pub(crate) async fn each<T>(
        &mut self,
        (select, column): (&str, &str),
        ids: Vec<IdBytes>,
        record: impl FnMut(&Row) -> Result<T, Failed>,
    ) -> Result<Vec<T>, Failed> {
        match self {
            Self::Sqlite(c) => sqlite::each(c, &format!("{select} WHERE {column} = $1"), &ids, record),
            Self::Postgres(_) => {
                let list = self.dialect().listed("$1");
                let q = sql(format!("{select} WHERE {column} IN ({list})")).bind(Value::List(ids));
                self.rows(&q, record).await
            }
        }
    }

    /// Adds `rows`, whose values are those of `columns`.
    pub(crate) async fn insert(&mut self, table: &str, columns: &str, rows: &Rows<'_>, after: &str) -> Result<(), Failed> {
        self.insert_counted(table, columns, rows, after).await.map(drop)
    }
    /// The same; gives how many rows were written.
    pub(crate) async fn insert_counted(&mut self, table: &str, columns: &str, rows: &Rows<'_>, after: &str) -> Result<u64, Failed> {
        if rows.values.is_empty() {
            return Ok(0);
        }
        match self {
            Self::Sqlite(c) => {
                let places = vec!["?"; rows.width].join(", ");
                sqlite::for_each(c, &format!("INSERT INTO {table} ({columns}) VALUES ({places}){after}"), rows)
            }
            Self::Postgres(c) => postgres::over(c, &format!("INSERT INTO {table} ({columns}) "), rows, after).await,
        }
    }
    /// Sets `columns` of the rows with an id. Each of `rows` has the values of `columns`, then the id.
    pub(crate) async fn update(&mut self, table: &str, columns: &[&str], rows: &Rows<'_>) -> Result<(), Failed> {
        if rows.values.is_empty() {
            return Ok(());
        }
        debug_assert_eq!(rows.width, columns.len() + 1);
        match self {
            Self::Sqlite(c) => {
                let set = columns.join(" = ?, ");
                sqlite::for_each(c, &format!("UPDATE {table} SET {set} = ? WHERE id = ?"), rows).map(drop)
            }
            Self::Postgres(c) => {
                let set: Vec<String> = columns.iter().zip(1..).map(|(column, n)| format!("{column} = v.column{n}")).collect();
                let before = format!("UPDATE {table} SET {} FROM (", set.join(", "));
                postgres::over(c, &before, rows, &format!(") AS v WHERE {table}.id = v.column{}", rows.width)).await.map(drop)
            }
        }
    }

    /// Keeps rows from being changed by other hubs until the transaction ends. What is read later in
    /// the transaction is what they left.
    pub(crate) async fn lock(&mut self, table: &str, ids: Vec<IdBytes>) -> Result<(), Failed> {
        match self.dialect() {
            // One writer at a time, from BEGIN on.
            Dialect::Sqlite => Ok(()),
            Dialect::Postgres => {
                // In one order, so that two hubs do not wait for each other.
                let text = format!("SELECT 1 FROM {table} WHERE id IN (SELECT unnest($1)) ORDER BY id FOR NO KEY UPDATE");
                self.execute(&sql(text).bind(Value::List(ids))).await.map(drop)
            }
        }
    }
    /// Waits until no other hub is in a transaction about the same thing, and keeps others out until
    /// this one ends: for what is decided by more than one row. `what` gives blobs that name it.
    pub(crate) async fn alone(&mut self, what: Sql) -> Result<(), Failed> {
        match self.dialect() {
            Dialect::Sqlite => Ok(()),
            Dialect::Postgres => {
                let text = format!("SELECT pg_advisory_xact_lock(hashtextextended(encode(v, 'hex'), 0)) FROM ({}) AS what (v)", what.text);
                self.execute(&Sql { text: text.into(), values: what.values }).await.map(drop)
            }
        }
    }

    /// Begins a transaction and its first job. One that is not `synced` is seen by all once it is
    /// committed, and durable with the next one that is.
    pub(crate) async fn begin(&mut self, synced: bool) -> Result<(), Failed> {
        match self {
            Self::Sqlite(c) => {
                // It counts when it is compiled, so it is never one of the prepared statements.
                c.execute_batch(if synced { "PRAGMA synchronous = FULL" } else { "PRAGMA synchronous = NORMAL" })?;
                self.control(["BEGIN IMMEDIATE", "SAVEPOINT job"]).await
            }
            Self::Postgres(_) if synced => self.control(["BEGIN", "SAVEPOINT job"]).await,
            Self::Postgres(_) => self.control(["BEGIN", "SET LOCAL synchronous_commit = off", "SAVEPOINT job"]).await,
        }
    }
    /// What was done so far stays, whatever becomes of the next job.
    pub(crate) async fn next_job(&mut self) -> Result<(), Failed> {
        self.control(["RELEASE job", "SAVEPOINT job"]).await
    }
    pub(crate) async fn undo_job(&mut self) -> Result<(), Failed> {
        self.control(["ROLLBACK TO job"]).await
    }
    /// RELEASE fails when the transaction is gone (SQLite ends it by itself on a full disk) or broken
    /// (PostgreSQL would take COMMIT for ROLLBACK, without an error).
    pub(crate) async fn commit(&mut self) -> Result<(), Failed> {
        self.control(["RELEASE job", "COMMIT"]).await
    }
    pub(crate) async fn rollback(&mut self) -> Result<(), Failed> {
        self.control(["ROLLBACK"]).await
    }
    async fn control<const N: usize>(&mut self, statements: [&'static str; N]) -> Result<(), Failed> {
        match self {
            Self::Sqlite(c) => statements.into_iter().try_for_each(|s| sqlite::execute(c, &sql(s)).map(drop)),
            // One way there and back for all of them.
            Self::Postgres(c) => Ok(sqlx::raw_sql(AssertSqlSafe(statements.join("; "))).execute(c).await.map(drop)?),
        }
    }

    /// Catches up with what waits to be moved into the database proper.
    pub(crate) async fn checkpoint(&mut self) -> Result<(), Failed> {
        match self {
            Self::Sqlite(c) => sqlite::checkpoint(c).map(drop),
            Self::Postgres(_) => Ok(()),
        }
    }
    pub(crate) async fn close(self) -> Result<(), Failed> {
        match self {
            Self::Sqlite(c) => Ok(c.close().map_err(|(_, error)| error)?),
            Self::Postgres(c) => Ok(c.close().await?),
        }
    }
}

/// How long a read may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lane {
    /// A row or a few, by their key.
    Quick,
    /// Pages, specs: what may take a while, and must not keep the quick ones waiting.
    Long,
}

/// The connections that read, each on the newest commit.
#[derive(Debug, Clone)]
pub(crate) enum Readers {
    Sqlite(Arc<sqlite::Pool>),
    Postgres(PgPool),
}

impl Readers {
    pub(crate) fn dialect(&self) -> Dialect {
        match self {
            Self::Sqlite(_) => Dialect::Sqlite,
            Self::Postgres(_) => Dialect::Postgres,
        }
    }
    pub(crate) async fn rows<T, F>(&self, lane: Lane, sql: Sql, record: F) -> Result<Vec<T>, Failed>
    where
        T: Send + 'static,
        F: FnMut(&Row) -> Result<T, Failed> + Send + 'static,
    {
        match self {
            Self::Sqlite(pool) => sqlite::Pool::rows(pool, lane, sql, record).await,
            Self::Postgres(pool) => Row::all(&postgres::read(pool, sql).await?, record),
        }
    }
    /// The record in the first row.
    pub(crate) async fn row<T, F>(&self, sql: Sql, record: F) -> Result<Option<T>, Failed>
    where
        T: Send + 'static,
        F: FnMut(&Row) -> Result<T, Failed> + Send + 'static,
    {
        Ok(self.rows(Lane::Quick, sql, record).await?.into_iter().next())
    }
}

/// A row of either database, where it lies.
pub(crate) enum Row<'r> {
    Sqlite(&'r rusqlite::Row<'r>),
    Postgres(&'r PgRow),
}

impl<'r> Row<'r> {
    fn all<T>(rows: &[PgRow], mut record: impl FnMut(&Row) -> Result<T, Failed>) -> Result<Vec<T>, Failed> {
        rows.iter().map(|row| record(&Row::Postgres(row))).collect()
    }
    pub(crate) fn get<T: Get<'r>>(&self, column: usize) -> Result<T, Failed> {
        match self {
            Self::Sqlite(row) => T::of(row.get_ref(column)?).map_err(|e| format!("column {column}: {e}").into()),
            Self::Postgres(row) => Ok(sqlx::Row::try_get(*row, column)?),
        }
    }
}

/// A type that columns of both databases are read as.
pub(crate) trait Get<'r>: Sized + sqlx::Decode<'r, Postgres> + sqlx::Type<Postgres> {
    fn of(value: ValueRef<'r>) -> Result<Self, Failed>;
}

macro_rules! get {
    ($($owned:ty),*) => {$(
        impl<'r> Get<'r> for $owned {
            fn of(value: ValueRef<'r>) -> Result<Self, Failed> {
                Ok(Self::column_result(value)?)
            }
        }
    )*};
}
get!(i64, bool, String, Vec<u8>);

impl<'r> Get<'r> for &'r str {
    fn of(value: ValueRef<'r>) -> Result<Self, Failed> {
        Ok(value.as_str()?)
    }
}
impl<'r> Get<'r> for &'r [u8] {
    fn of(value: ValueRef<'r>) -> Result<Self, Failed> {
        Ok(value.as_blob()?)
    }
}
impl<'r, T: Get<'r>> Get<'r> for Option<T> {
    fn of(value: ValueRef<'r>) -> Result<Self, Failed> {
        if value == ValueRef::Null { Ok(None) } else { T::of(value).map(Some) }
    }
}

fn unbound(error: sqlx::error::BoxDynError) -> sqlx::Error {
    sqlx::Error::Encode(error)
}
