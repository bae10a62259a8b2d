//! PostgreSQL: a server that several hubs may share, and that may go away and come back.

use super::{Conn, Connector, Readers, unbound};
use crate::sql::{Rows, Sql, Value};
use crate::store::{Failed, OpenError, Opened, migrated};
use sqlx::migrate::Migrator;
use sqlx::postgres::{PgArguments, PgConnectOptions, PgConnection, PgPool, PgPoolOptions, PgRow, PgSslMode};
use sqlx::{Arguments, AssertSqlSafe, ConnectOptions};
use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

static MIGRATIONS: Migrator = sqlx::migrate!("migrations/postgres");

const READ_CONNECTIONS: u32 = 8;
/// For the server to take a connection.
const CONNECT: Duration = Duration::from_secs(5);
/// For a read to get a connection.
const ACQUIRE: Duration = Duration::from_secs(3);
/// For a transaction or a read; the server's own limits come first, so this is a network gone silent.
const SILENCE: Duration = Duration::from_secs(30);

/// Of every connection. Statements go by key or by index, whatever the planner thinks of tables that
/// have just begun to grow. A server that is set to forget the newest commits is told not to.
const SESSION: &str = "SET statement_timeout = '20s'; SET lock_timeout = '10s'; SET idle_in_transaction_session_timeout = '20s'; \
    SET jit = off; SET enable_seqscan = off; SET enable_hashjoin = off; SET enable_mergejoin = off; \
    SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'";
const READING: &str = "SET default_transaction_read_only = on";

/// What an address may say behind its question mark.
const PARAMETERS: &[&str] =
    &["sslmode", "sslrootcert", "sslcert", "sslkey", "host", "port", "dbname", "user", "password", "application_name", "options"];

/// The address of a database. Its text never shows the password.
#[derive(Clone)]
pub struct Url {
    options: Box<PgConnectOptions>,
    shown: String,
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown)
    }
}
impl fmt::Debug for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown)
    }
}

impl Url {
    /// A part that was not escaped may end up in any other, so errors repeat none.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let form = "postgres://user:password@host:port/database";
        if !["postgres://", "postgresql://"].iter().any(|s| text.starts_with(s)) {
            return Err(format!("only PostgreSQL is known here, as {form}; without this setting the hub uses SQLite"));
        }
        if text.contains('#') {
            return Err("a # must be written as %23".into());
        }
        let query = text.split_once('?').map_or("", |(_, query)| query);
        let parameters: Vec<&str> = query.split('&').filter(|p| !p.is_empty()).map(|p| p.split('=').next().unwrap_or(p)).collect();
        if !parameters.iter().all(|p| PARAMETERS.contains(p)) {
            return Err(format!("an unknown parameter; there is {} (a ? in a password is written as %3F)", PARAMETERS.join(", ")));
        }
        let options: PgConnectOptions = text.parse().map_err(|e| match e {
            sqlx::Error::Configuration(_) if parameters.contains(&"sslmode") => {
                format!("bad; sslmode is disable, prefer, require, verify-ca or verify-full, and the form {form}")
            }
            sqlx::Error::Configuration(why) => format!("{why}; the form is {form}, with / : @ ? # % in a part written as %2F, %3A, …"),
            _ => format!("it is not of the form {form}"),
        })?;
        let database = match options.get_database() {
            None => return Err(format!("it names no database; the form is {form}")),
            Some(name) if name.contains(['@', '/', ':']) => return Err(format!("/ : @ in a part are written as %2F, %3A, %40; {form}")),
            Some(name) => name,
        };
        let (user, host, port) = (options.get_username(), options.get_host(), options.get_port());
        let shown = match options.get_socket() {
            Some(socket) => format!("postgres://{user}@{}:{port}/{database}", socket.display()),
            None => format!("postgres://{user}@{host}:{port}/{database}"),
        };
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        let local = options.get_socket().is_some() || bare == "localhost" || bare.parse().is_ok_and(|ip: IpAddr| ip.is_loopback());
        let mut options = options.disable_statement_logging();
        if !local && !parameters.contains(&"sslmode") {
            options = options.ssl_mode(PgSslMode::VerifyFull);
        }
        if options.get_application_name().is_none() {
            options = options.application_name("cortex-hub");
        }
        Ok(Self { options: Box::new(options), shown })
    }
}

/// Connects and brings the schema up to date, alone among the hubs that start.
pub(crate) async fn open(url: &Url) -> Result<Opened, OpenError> {
    let failed = |why: Failed| OpenError::Database { database: url.to_string(), why };
    let mut conn = plain(url).await.map_err(failed)?;
    let durable = async {
        let settings: Vec<(String, String)> =
            sqlx::query_as("SELECT name, setting FROM pg_settings WHERE name IN ('fsync', 'full_page_writes')")
                .fetch_all(&mut conn)
                .await?;
        for (name, _) in settings.iter().filter(|(_, on)| on == "off") {
            tracing::warn!(database = %url, setting = name, "is off on this server: a power cut there loses acknowledged work");
        }
        Ok::<_, sqlx::Error>(())
    };
    durable.await.map_err(|e| failed(e.into()))?;
    migrated(&MIGRATIONS, MIGRATIONS.run(&mut conn).await, &url.shown)?;
    begin_session(&mut conn, &[SESSION]).await.map_err(|e| failed(e.into()))?;
    let read = PgPoolOptions::new()
        .max_connections(READ_CONNECTIONS)
        .acquire_timeout(ACQUIRE)
        .idle_timeout(None)
        .test_before_acquire(false)
        .after_connect(|conn, _| Box::pin(begin_session(conn, &[SESSION, READING])))
        .connect_lazy_with((*url.options).clone());
    Ok(Opened { conn: Conn::Postgres(conn), connector: Connector::Postgres(url.clone()), read: Readers::Postgres(read) })
}

/// One read on a connection of its own.
pub(crate) async fn mark(url: &Url, query: &'static str) -> Result<Option<(i64, i64, bool)>, Failed> {
    let mut conn = plain(url).await?;
    Ok(sqlx::query_as(query).fetch_optional(&mut conn).await?)
}

/// One statement on a connection of its own, committed on the disk.
pub(crate) async fn once(url: &Url, statement: &'static str) -> Result<(), Failed> {
    let mut conn = plain(url).await?;
    begin_session(&mut conn, &[SESSION]).await?;
    sqlx::query(statement).execute(&mut conn).await?;
    Ok(())
}

async fn plain(url: &Url) -> Result<PgConnection, Failed> {
    match tokio::time::timeout(CONNECT, url.options.connect()).await {
        Ok(Ok(conn)) => Ok(conn),
        Ok(Err(error)) => Err(format!("the database cannot be reached: {error}").into()),
        Err(_) => Err(format!("the database cannot be reached: no answer in {} s", CONNECT.as_secs()).into()),
    }
}

async fn begin_session(conn: &mut PgConnection, settings: &[&str]) -> Result<(), sqlx::Error> {
    sqlx::raw_sql(AssertSqlSafe(settings.join("; "))).execute(conn).await.map(drop)
}

/// A connection for the writer.
pub(super) async fn connect(url: &Url) -> Result<PgConnection, Failed> {
    let mut conn = plain(url).await?;
    in_time(async { Ok(begin_session(&mut conn, &[SESSION]).await?) }).await?;
    Ok(conn)
}

/// Nothing was heard for longer than the server may take.
#[derive(Debug, thiserror::Error)]
#[error("the database has not answered for {} s", SILENCE.as_secs())]
struct Silent;

pub(super) async fn in_time<T>(work: impl Future<Output = Result<T, Failed>>) -> Result<T, Failed> {
    tokio::time::timeout(SILENCE, work).await.unwrap_or_else(|_| Err(Silent.into()))
}

pub(super) fn verdict(error: &Failed) -> super::Verdict {
    use super::Verdict::*;
    if error.is::<Silent>() {
        return Connection;
    }
    match error.downcast_ref::<sqlx::Error>() {
        None => Job,
        Some(error) if lost(error) => Connection,
        Some(sqlx::Error::Database(told)) => match told.code().as_deref() {
            Some("40001" | "40P01") => Again,
            // Read-only: the server has changed places with its standby; the next one may be the right one.
            Some("25006") => Connection,
            // Timeouts (55P03, 57014) and what is wrong with the server or the transaction itself.
            Some(code) if ["25", "53", "54", "55", "57", "58", "XX"].iter().any(|class| code.starts_with(class)) => Transaction,
            _ => Job,
        },
        Some(_) => Job,
    }
}

/// Whether the connection is of no more use.
fn lost(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(_) | sqlx::Error::Tls(_) | sqlx::Error::Protocol(_) | sqlx::Error::WorkerCrashed => true,
        // Connection exceptions; the server is stopping, has crashed, is starting.
        sqlx::Error::Database(told) => told.code().is_some_and(|code| code.starts_with("08") || code.starts_with("57P")),
        _ => false,
    }
}

/// Reads; again on another connection when one has been lost, since all of them may have been.
pub(super) async fn read(pool: &PgPool, sql: Sql) -> Result<Vec<PgRow>, Failed> {
    let arguments = arguments(&sql.values)?;
    let mut tries = READ_CONNECTIONS;
    loop {
        let mut conn = match pool.acquire().await {
            Ok(conn) => conn,
            Err(sqlx::Error::PoolTimedOut) => {
                return Err(format!("the database cannot be reached: no connection in {} s", ACQUIRE.as_secs()).into());
            }
            Err(error) => return Err(format!("the database cannot be reached: {error}").into()),
        };
        let query = sqlx::query_with(AssertSqlSafe(sql.text.clone()), arguments.clone());
        let read = in_time(async { Ok(query.fetch_all(&mut *conn).await?) }).await;
        let Err(error) = read else { return read };
        if verdict(&error) != super::Verdict::Connection {
            return Err(error);
        }
        // Not back to the pool, which would talk to it first.
        drop(conn.detach());
        if tries == 0 || error.is::<Silent>() {
            return Err(format!("the connection to the database was lost: {error}").into());
        }
        tries -= 1;
    }
}

pub(super) fn arguments(values: &[Value]) -> Result<PgArguments, sqlx::Error> {
    let mut all = PgArguments::default();
    all.reserve(values.len(), 0);
    for value in values {
        match value {
            Value::Int(v) => all.add(*v),
            Value::Bool(v) => all.add(*v),
            Value::Text(v) => all.add(v.as_deref().map(storable)),
            Value::Blob(v) => all.add(v.as_deref().map(<[u8]>::to_vec)),
            Value::Id(v) => all.add(v.map(|v| v.to_vec())),
            Value::List(v) => all.add(v.iter().map(|v| v.to_vec()).collect::<Vec<_>>()),
        }
        .map_err(unbound)?;
    }
    Ok(all)
}

/// PostgreSQL keeps no NUL in a text. A node's words may hold one, and must not stop its reports.
fn storable(text: &str) -> String {
    text.replace('\0', "\u{FFFD}")
}

/// One array a column, taken apart by `unnest`: one statement text, however many rows.
///
/// It stands between `before` and `after` as a query with the columns `column1`, `column2`, ….
pub(super) async fn over(conn: &mut PgConnection, before: &str, rows: &Rows<'_>, after: &str) -> Result<u64, Failed> {
    let Rows { width, values } = rows;
    let mut columns: Vec<Column> = values.iter().take(*width).map(Column::of).collect();
    for (i, value) in values.iter().enumerate() {
        columns[i % width].push(value)?;
    }
    let numbered = columns.iter().enumerate();
    let arrays: Vec<String> = numbered.map(|(i, c)| format!("${}::{}", i + 1, c.array())).collect();
    let names: Vec<String> = (1..=*width).map(|n| format!("column{n}")).collect();
    let list = format!("SELECT * FROM unnest({}) AS row ({})", arrays.join(", "), names.join(", "));
    let mut arguments = PgArguments::default();
    for column in columns {
        match column {
            Column::Ints(v) => arguments.add(v),
            Column::Bools(v) => arguments.add(v),
            Column::Texts(v) => arguments.add(v),
            Column::Blobs(v) => arguments.add(v),
        }
        .map_err(unbound)?;
    }
    let text = AssertSqlSafe([before, &list, after].concat());
    Ok(sqlx::query_with(text, arguments).execute(conn).await?.rows_affected())
}

enum Column {
    Ints(Vec<Option<i64>>),
    Bools(Vec<Option<bool>>),
    Texts(Vec<Option<String>>),
    Blobs(Vec<Option<Vec<u8>>>),
}

impl Column {
    fn of(first: &Value) -> Self {
        match first {
            Value::Int(_) => Self::Ints(vec![]),
            Value::Bool(_) => Self::Bools(vec![]),
            Value::Text(_) => Self::Texts(vec![]),
            Value::Blob(_) | Value::Id(_) | Value::List(_) => Self::Blobs(vec![]),
        }
    }
    fn array(&self) -> &'static str {
        match self {
            Self::Ints(_) => "bigint[]",
            Self::Bools(_) => "boolean[]",
            Self::Texts(_) => "text[]",
            Self::Blobs(_) => "bytea[]",
        }
    }
    fn push(&mut self, value: &Value) -> Result<(), sqlx::Error> {
        match (self, value) {
            (Self::Ints(all), Value::Int(v)) => all.push(*v),
            (Self::Bools(all), Value::Bool(v)) => all.push(*v),
            (Self::Texts(all), Value::Text(v)) => all.push(v.as_deref().map(storable)),
            (Self::Blobs(all), Value::Blob(v)) => all.push(v.as_deref().map(<[u8]>::to_vec)),
            (Self::Blobs(all), Value::Id(v)) => all.push(v.map(|v| v.to_vec())),
            (_, value) => return Err(unbound(format!("{value:?} in a column of another type").into())),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_shown_without_their_secrets() {
        for (text, shown) in [
            ("postgres://hub:geheim@db.example:5433/cortex", "postgres://hub@db.example:5433/cortex"),
            ("postgresql://hub@localhost/cortex?password=geheim", "postgres://hub@localhost:5432/cortex"),
            ("postgres://hub:ge%2Fhe%40im@127.0.0.1/cortex", "postgres://hub@127.0.0.1:5432/cortex"),
            ("postgres://hub:geheim@%2Frun%2Fpg/cortex", "postgres://hub@/run/pg:5432/cortex"),
        ] {
            let url = Url::parse(text).unwrap();
            assert_eq!(url.to_string(), shown);
            assert!(!format!("{:?}", super::super::Database::Postgres(url)).contains("geheim"));
        }
    }

    #[test]
    fn a_bad_address_is_refused_without_repeating_it() {
        for (text, reason) in [
            ("mysql://hub:geheim@db/cortex", "only PostgreSQL"),
            ("geheim", "only PostgreSQL"),
            ("postgres://hub:12/geheim@db/cortex", "%2F"),
            ("postgres://hub:12?geheim@db/cortex", "unknown parameter"),
            ("postgres://hub:12#geheim@db/cortex", "%23"),
            ("postgres://hub:geheim@db:port/cortex", "port"),
            ("postgres://hub@db/cortex?pasword=geheim", "unknown parameter"),
            ("postgres://hub@db/cortex?sslmode=geheim", "sslmode"),
            ("postgres://hub:geheim@db", "names no database"),
        ] {
            let refused = Url::parse(text).unwrap_err();
            assert!(refused.contains(reason) && !refused.contains("geheim"), "{text}: {refused}");
        }
    }

    #[test]
    fn another_machine_is_trusted_by_its_certificate_unless_said_otherwise() {
        let mode = |text: &str| format!("{:?}", Url::parse(text).unwrap().options.get_ssl_mode());
        assert_eq!(mode("postgres://hub@db.example/cortex"), "VerifyFull");
        assert_eq!(mode("postgres://hub@10.0.0.1/cortex"), "VerifyFull");
        assert_eq!(mode("postgres://hub@10.0.0.1/cortex?sslmode=disable"), "Disable");
        for local in ["localhost", "127.0.0.1", "[::1]", "%2Frun%2Fpg"] {
            assert_eq!(mode(&format!("postgres://hub@{local}/cortex")), "Prefer", "{local}");
        }
    }

    #[test]
    fn a_nul_is_replaced() {
        assert_eq!(storable("a\0b"), "a\u{FFFD}b");
    }
}
