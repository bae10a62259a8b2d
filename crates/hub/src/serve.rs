//! Wiring: from settings to a hub that serves, and back down.

use crate::certificates::{Certificates, Own};
use crate::config::Config;
use crate::doors::https::{self, DoorTls, Tls};
use crate::doors::listener::{self, Accept, Limits, Shares};
use crate::doors::rest::{self, Binaries, Door, Facts, RestState};
use crate::keys::{Argon2Passwords, KeyError, Keys};
use crate::link::{self, LinkContext, tls};
use crate::machine::Machine;
use crate::metrics;
use crate::reach::Reach;
use anyhow::{Context, anyhow};
use axum::Router;
use hub_engine::accounts::{self, Accounts};
use hub_engine::agents::Agents;
use hub_engine::audit::{self, Log};
use hub_engine::bus::EVENTS_KEPT;
use hub_engine::delivery::Delivery;
use hub_engine::events::Events;
use hub_engine::expiry::{Expiry, Unsettled};
use hub_engine::grants::Grants;
use hub_engine::idempotency::Idempotency;
use hub_engine::leaving::Departures;
use hub_engine::links::Links;
use hub_engine::manage::Management;
use hub_engine::memory::Memory;
use hub_engine::messages::Messages;
use hub_engine::nodes::{self, Nodes};
use hub_engine::pool::{Pool, Queue};
use hub_engine::ports::{self, Meta};
use hub_engine::records::HubMeta;
use hub_engine::restore::Recovery;
use hub_engine::retention::Retention;
use hub_engine::rights::Rights;
use hub_engine::rotation::Rotation;
use hub_engine::sessions::Sessions;
use hub_engine::state::State;
use hub_engine::stats::{self, Remembered, Statistics};
use hub_engine::tasks::TaskService;
use hub_engine::throttle::{Rates, Throttle};
use hub_engine::users::Users;
use hub_engine::watch::Watchers;
use hub_store::{RedisBus, RedisPlan, Store};
use mesh_core::permission::Via;
use mesh_process::{SharedClock, Tasks, files};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpSocket, UnixListener};
use tokio::time::Instant;

/// How long a stop waits for work under way, and how much of that the store has at least, which is last.
const STOP_GRACE: Duration = Duration::from_secs(10);
const STORE_GRACE: Duration = Duration::from_secs(5);
/// How long a start waits for Redis, so that whoever comes back at once is not told of a loss.
const REDIS_WAIT: Duration = Duration::from_secs(3);
/// How often the registry notes who is here.
const SEEN_EVERY: Duration = Duration::from_secs(15);
/// How often idempotency keys of yesterday are thrown away.
const FORGET_EVERY: Duration = Duration::from_secs(3600);
/// Connections that wait to be accepted.
const BACKLOG: u32 = 1024;
/// Connections of the small listeners.
const SOCKET_CONNECTIONS: usize = 256;
const METRICS_CONNECTIONS: usize = 32;

/// A hub that runs. Dropping it does not stop it; [`Hub::stop`] does.
pub struct Hub {
    pub http: SocketAddr,
    /// Do the doors speak HTTPS?
    pub https: bool,
    pub node: SocketAddr,
    pub metrics: SocketAddr,
    /// What invites name.
    pub reach: Reach,
    pub socket: PathBuf,
    pub data_dir: PathBuf,
    /// Made and printed once, at the very first start.
    pub made_password: Option<String>,
    pub store: Arc<Store>,
    pub keys: Arc<Keys>,
    audit: Arc<Log>,
    doors: Tasks,
    work: Tasks,
    store_tasks: Tasks,
    _lock: files::Lock,
}

/// In the data folder: the password that the first start made, until it is changed.
pub const MADE_PASSWORD: &str = "admin-password";

/// The digest that orders name until policies are built: permissive, network full.
fn built_in_policy() -> mesh_core::Digest {
    mesh_core::sha256(b"cortexmesh built-in policy 1: mode permissive, network full")
}

impl Hub {
    /// Starts everything and writes `hub.json` once all of it is ready.
    pub async fn start(config: Config, clock: SharedClock) -> anyhow::Result<Self> {
        let dir = config.data_dir.clone();
        files::private_dir(&dir).with_context(|| format!("data folder {}", dir.display()))?;
        std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o700)).with_context(|| format!("data folder {}", dir.display()))?;
        let lock = files::Lock::try_take(&dir.join("hub.lock"))
            .with_context(|| format!("lock in {}", dir.display()))?
            .ok_or_else(|| anyhow!("the data folder {} is in use by another hub; stop it, or use another --data-dir", dir.display()))?;
        if let Some(marker) = crate::backup::unfinished(&dir) {
            return Err(anyhow!("a restore into {} did not finish ({}); run it again", dir.display(), marker.display()));
        }
        // What a killed hub left must not be taken for this one.
        let _ = std::fs::remove_file(dir.join("hub.json"));
        metrics::install();
        raise_descriptors(config.connections);
        let now = clock.now_ms();
        let keys = Arc::new(Keys::open(&dir, now).map_err(|e: KeyError| anyhow!(e))?);
        let (doors, work, store_tasks) = (Tasks::new(), Tasks::new(), Tasks::new());
        let store = Store::open(&dir, &config.database, &store_tasks).await.context("opening the store")?;
        let meta = store.hub(HubMeta { id: keys.hub, incarnation: 1, created_at: now }).await?;
        if meta.id != keys.hub {
            return Err(anyhow!(
                "the database in {} belongs to hub {}, its keys to {}; put the right ones together",
                dir.display(),
                meta.id,
                keys.hub
            ));
        }

        let http_listener = bind(config.http_addr, "http.addr")?;
        let http = http_listener.local_addr()?;
        let node_listener = if config.one_port() { None } else { Some(bind(config.node_addr, "node.addr")?) };
        let node = node_listener.as_ref().map_or(Ok(http), TcpListener::local_addr)?;
        let metrics_listener = bind(config.metrics_addr, "metrics.addr")?;
        let metrics = metrics_listener.local_addr()?;
        let given = match &config.tls {
            Tls::Given(given) => Some((given.clone(), given.load(now)?)),
            Tls::None | Tls::Own => None,
        };
        let certified = given.as_ref().map_or(&[][..], |(_, loaded)| &loaded.names);
        let reach = Reach::of(&config, &Machine::look(), http, node, certified);

        let events = events(&config, &keys, &clock, &store_tasks).await;
        let audit = crate::audit::log(&dir, &store, &keys, meta.incarnation, clock.clone(), work.clone()).await?;
        let services = Services::build(&config, &store, &keys, &clock, meta.incarnation, (&work, &doors), events)?;
        let made_password = first_admin(&services.accounts, &config, &dir).await?;
        // What ended while the hub was away has ended before anybody can ask.
        services.agents.recover().await.context("taking up agents")?;
        let goes = audit::scope(&audit, Via::default(), services.recovery.start(), audit::Ending::of).await?;
        if !goes {
            tracing::warn!("the hub was restored from a backup: it holds back until cortex-hub restore --go");
            println!("restored from a backup: look at what it may have undone, then run: cortex-hub restore --go");
        }

        let (server_tls, certificate_end) = tls::ServerTls::new(&keys, now)?;
        let server_tls = Arc::new(server_tls);
        let context = Arc::new(LinkContext {
            keys: keys.clone(),
            nodes: services.nodes.clone(),
            audit: audit.clone(),
            delivery: services.delivery.clone(),
            clock: clock.clone(),
            tasks: work.child(),
        });
        let links = context.tasks.clone();
        let connections = config.connections as usize;
        let (gate, accepted) = tls::Gate::new(keys.hub, server_tls.clone(), connections);
        if let Some(listener) = node_listener {
            tls::accept(listener, gate.clone(), None, &links);
        }
        doors.spawn_vital("node port", link::serve(context, accepted));
        let (pool, recovery) = (services.pool.clone(), services.recovery.clone());
        let stop_pool = work.token();
        // The reconcilers begin when the hub goes: at once, or after a restore when it was told to.
        let going_on = audit.clone();
        let (went, going) = tokio::sync::watch::channel(goes);
        work.spawn_vital("pool", async move {
            let run = async {
                if !goes {
                    audit::scope(&going_on, Via::default(), recovery.wait(), |()| audit::Ending::Done).await;
                    let _ = went.send(true);
                }
                pool.run().await;
            };
            tokio::select! {
                biased;
                () = stop_pool.cancelled() => {}
                () = run => {}
            }
            Ok::<(), std::convert::Infallible>(())
        });
        let signing = audit.clone();
        work.spawn_until_cancelled("audit checkpoints", async move { signing.run().await });
        let (manage, mut gone) = (services.manage.clone(), going.clone());
        work.spawn_until_cancelled("registry", async move {
            let _ = gone.wait_for(|goes| *goes).await;
            manage.run().await;
        });
        let registry = services.nodes.clone();
        work.spawn_until_cancelled("presence", async move {
            loop {
                tokio::time::sleep(SEEN_EVERY).await;
                if let Err(error) = registry.note_seen().await {
                    tracing::warn!(%error, "noting who is here failed");
                }
            }
        });
        let (expiry, mut gone) = (services.expiry.clone(), going.clone());
        work.spawn_until_cancelled("session ends", async move {
            let _ = gone.wait_for(|goes| *goes).await;
            expiry.run().await;
        });
        let (departures, mut gone) = (services.departures.clone(), going.clone());
        work.spawn_until_cancelled("departures", async move {
            let _ = gone.wait_for(|goes| *goes).await;
            departures.run().await;
        });
        let (agents, mut gone) = (services.agents.clone(), going.clone());
        work.spawn_until_cancelled("agents", async move {
            let _ = gone.wait_for(|goes| *goes).await;
            agents.run().await;
        });
        let (retention, mut gone) = (services.retention.clone(), going);
        work.spawn_until_cancelled("retention", async move {
            let _ = gone.wait_for(|goes| *goes).await;
            retention.run().await;
        });
        let statistics = services.statistics.clone();
        work.spawn_until_cancelled("statistics", async move {
            loop {
                if let Err(error) = statistics.sample().await {
                    tracing::warn!(%error, "sampling the statistics failed");
                }
                tokio::time::sleep(stats::SAMPLE_EVERY).await;
            }
        });
        let keys_of_callers = services.idempotency.clone();
        work.spawn_until_cancelled("idempotency keys", async move {
            loop {
                if let Err(error) = keys_of_callers.forget_old().await {
                    tracing::warn!(%error, "forgetting old idempotency keys failed");
                }
                tokio::time::sleep(FORGET_EVERY).await;
            }
        });
        let https = match given {
            Some((given, loaded)) => {
                let doors_tls = Arc::new(DoorTls::given(&loaded));
                let (follows, clock) = (doors_tls.clone(), clock.clone());
                work.spawn_until_cancelled("given certificate", async move { follows.follow(given, loaded, clock).await });
                Some((doors_tls, None))
            }
            None if config.tls == Tls::Own => {
                let own = Own { key: Keys::door_key(&dir)?, names: reach.names.clone() };
                Some((Arc::new(DoorTls::own(&keys, &own.key, &own.names, now)?), Some(own)))
            }
            None => None,
        };
        let pin = https.as_ref().and_then(|(_, own)| own.as_ref()).map(|own| Keys::door_pin(&own.key)).transpose()?;
        let (doors_tls, own) = https.unzip();
        let certificates =
            Certificates::new(keys.clone(), server_tls, doors_tls.clone().zip(own.flatten()), certificate_end, clock.clone());
        let certificates = Arc::new(certificates);
        let keeper = certificates.clone();
        work.spawn_until_cancelled("hub certificate", async move { keeper.keep().await });
        let rotation = Rotation { nodes: store.clone(), authority: certificates, clock: clock.clone(), one: Default::default() };

        let own_dir = std::env::current_exe().ok().and_then(|p| p.parent().map(Path::to_owned)).unwrap_or_default();
        let scraped =
            metrics::Scraped { pool: services.pool.clone(), store: store.clone(), limits: config.retention, data_dir: dir.clone() };
        let app = rest::router(Arc::new(RestState {
            accounts: services.accounts,
            grants: services.grants,
            users: services.users,
            departures: services.departures,
            audit: audit.clone(),
            nodes: services.nodes,
            memory: Memory { store: store.clone(), sessions: services.sessions.clone(), clock: clock.clone() },
            messages: Messages { store: store.clone(), sessions: services.sessions.clone(), clock: clock.clone() },
            state: State { store: store.clone(), clock: clock.clone() },
            expiry: services.expiry,
            statistics: services.statistics,
            retention: services.retention.clone(),
            manage: services.manage,
            sessions: services.sessions,
            tasks: services.tasks,
            agents: services.agents,
            idempotency: services.idempotency,
            events: services.events,
            streams: doors.clone(),
            meta: store.clone(),
            recovery: services.recovery,
            rotation,
            rates: Arc::new(Rates::new(config.api_per_second, config.api_burst, clock.clone())),
            waiting: Default::default(),
            keys: keys.clone(),
            binaries: Binaries::beside(&own_dir),
            clock,
            stop: doors.token(),
            facts: Facts {
                public_url: reach.url.clone(),
                node_address: reach.node.clone(),
                node_also: reach.also.clone(),
                download_pin: pin,
                hosts: reach.hosts.clone(),
                trusted_proxies: config.trusted_proxies.clone(),
                started_at_ms: now,
                body_bytes: config.body_bytes as usize,
                request_secs: config.request_secs,
                made_password_file: dir.join(MADE_PASSWORD),
                data_dir: dir.clone(),
            },
        }));
        let https = doors_tls.is_some();
        match doors_tls {
            Some(doors_tls) => {
                let (door, shaken) = https::Door::new(doors_tls);
                tls::accept(http_listener, gate, Some(door), &doors);
                serve_http(&doors, shaken, app.clone(), &config);
            }
            None => serve_http(&doors, http_listener, app.clone(), &config),
        }
        let socket = dir.join("hub.sock");
        serve_socket(&doors, &socket, app)?;
        metrics::fold(&doors);
        serve_metrics(&doors, metrics_listener, metrics::router(scraped, reach.hosts.clone()));
        // Links end by the token of the doors as well, so that nodes hear a reason.
        let (stop, group) = (doors.token(), links);
        work.spawn("links end", async move {
            stop.cancelled().await;
            group.end(STOP_GRACE).await;
        });
        let hub = Self {
            http,
            https,
            node,
            metrics,
            reach,
            socket,
            data_dir: dir,
            made_password,
            store,
            keys,
            audit,
            doors,
            work,
            store_tasks,
            _lock: lock,
        };
        hub.write_hub_json()?;
        tracing::info!(%http, https, %node, hub = %hub.keys.hub, "the hub is ready");
        Ok(hub)
    }

    fn write_hub_json(&self) -> anyhow::Result<()> {
        let mut facts = serde_json::json!({
            "http": self.http.to_string(),
            "grpc": self.node.to_string(),
            "metrics": self.metrics.to_string(),
            "socket": self.socket,
            "pid": std::process::id(),
            "version": rest::VERSION,
        });
        if self.https {
            facts["https"] = facts["http"].clone();
        }
        files::write_private(&self.data_dir.join("hub.json"), facts.to_string().as_bytes()).context("writing hub.json")
    }

    /// Waits until vital work has failed: a port, the pool or the store's writer is gone.
    pub async fn failed(&self) {
        let [doors, work, store] = [&self.doors, &self.work, &self.store_tasks].map(Tasks::token);
        tokio::select! {
            () = doors.cancelled() => {}
            () = work.cancelled() => {}
            () = store.cancelled() => {}
        }
    }

    /// Stops in order: doors and links first, then the work behind them, the store last. Says how it
    /// ended; false when the time was up and something was cut off.
    pub async fn stop(self) -> bool {
        let begun = Instant::now();
        let _ = std::fs::remove_file(self.data_dir.join("hub.json"));
        let _ = std::fs::remove_file(&self.socket);
        let mut cut = vec![];
        for (name, group, least) in
            [("doors and links", self.doors, Duration::ZERO), ("work", self.work, Duration::ZERO), ("store", self.store_tasks, STORE_GRACE)]
        {
            let left = || STOP_GRACE.saturating_sub(begun.elapsed()).max(least);
            if name == "store" {
                let unsigned = match tokio::time::timeout(left(), self.audit.checkpoint()).await {
                    Ok(Ok(_)) => None,
                    Ok(Err(error)) => Some(error.to_string()),
                    Err(_) => Some("the store does not answer".to_owned()),
                };
                if let Some(error) = unsigned {
                    tracing::warn!(error, "the last entries of the audit log are not signed; the next start does it");
                }
            }
            let left = left();
            if let mesh_process::tasks::Ended::Left(n) = group.end(left).await {
                cut.push(format!("{n} of {name}"));
            }
        }
        let took_ms = begun.elapsed().as_millis() as u64;
        if cut.is_empty() {
            tracing::info!(took_ms, "stopped: all that was under way has ended");
        } else {
            tracing::warn!(took_ms, cut = cut.join(", "), "stopped: the time was up, and some work was cut off");
        }
        cut.is_empty()
    }
}

struct Services {
    accounts: Arc<Accounts>,
    grants: Arc<Grants>,
    users: Arc<Users>,
    departures: Arc<Departures>,
    nodes: Arc<Nodes>,
    manage: Arc<Management>,
    sessions: Arc<Sessions>,
    pool: Arc<Pool>,
    delivery: Arc<Delivery>,
    tasks: Arc<TaskService>,
    agents: Arc<Agents>,
    expiry: Arc<Expiry>,
    statistics: Arc<Statistics>,
    retention: Arc<Retention>,
    idempotency: Arc<Idempotency>,
    recovery: Arc<Recovery>,
    events: Events,
}

impl Services {
    fn build(
        config: &Config,
        store: &Arc<Store>,
        keys: &Arc<Keys>,
        clock: &SharedClock,
        incarnation: u32,
        (work, doors): (&Tasks, &Tasks),
        events: Events,
    ) -> anyhow::Result<Self> {
        let keyring: Arc<dyn ports::Keyring> = keys.clone();
        let (links, watchers) = (Arc::new(Links::telling(events.clone())), Watchers::default());
        let rights = Arc::new(Rights::new(store.clone(), store.clone(), clock.clone()));
        let accounts = Arc::new(Accounts {
            recent: accounts::Recent::default(),
            store: store.clone(),
            rights: rights.clone(),
            keyring: keyring.clone(),
            passwords: Arc::new(Argon2Passwords::new()?),
            clock: clock.clone(),
            events: events.clone(),
            lifetimes: accounts::Lifetimes { access_secs: config.access_secs, refresh_days: config.refresh_days },
            throttle: Throttle::new(config.login_per_minute_address, config.login_per_minute_account, clock.clone()),
            work: work.clone(),
        });
        let nodes = Arc::new(Nodes {
            hub: keys.hub,
            store: store.clone(),
            keyring: keyring.clone(),
            links: links.clone(),
            events: events.clone(),
            history: Default::default(),
            recoveries: Default::default(),
            clock: clock.clone(),
            lifetimes: nodes::Lifetimes { certificate_ms: config.certificate.as_millis() as i64, invite_secs: config.invite_secs },
        });
        let pool = Arc::new(Pool {
            journal: store.clone(),
            sessions: store.clone(),
            accounts: store.clone(),
            rights,
            keyring: keyring.clone(),
            links: links.clone(),
            watchers: watchers.clone(),
            events: events.clone(),
            clock: clock.clone(),
            incarnation,
            policy: built_in_policy(),
            queue: Queue::default(),
        });
        let sessions = Arc::new(Sessions {
            store: store.clone(),
            nodes: nodes.clone(),
            pool: pool.clone(),
            events: events.clone(),
            clock: clock.clone(),
            session_hours: config.session_hours,
        });
        let delivery = Arc::new(Delivery {
            journal: store.clone(),
            output: store.clone(),
            nodes: store.clone(),
            links: links.clone(),
            pool: pool.clone(),
            clock: clock.clone(),
            output_bytes: config.output_bytes,
        });
        let manage = Arc::new(Management {
            nodes: nodes.clone(),
            journal: store.clone(),
            pool: pool.clone(),
            work: work.clone(),
            seen: Default::default(),
        });
        let tasks = Arc::new(TaskService {
            journal: store.clone(),
            output: store.clone(),
            keyring,
            nodes: nodes.clone(),
            sessions: sessions.clone(),
            links,
            pool: pool.clone(),
            watchers,
            clock: clock.clone(),
            work: work.clone(),
            stop: doors.token(),
        });
        let agents =
            Arc::new(Agents { store: store.clone(), tasks: tasks.clone(), output_bytes: config.output_bytes, rests: Default::default() });
        let users = Arc::new(Users { store: store.clone(), accounts: accounts.clone(), pool: Some(pool.clone()) });
        let departures = Arc::new(Departures {
            users: users.clone(),
            journal: store.clone(),
            audit: store.clone(),
            tasks: tasks.clone(),
            manage: manage.clone(),
            agents: agents.clone(),
        });
        let expiry = Arc::new(Expiry {
            sessions: sessions.clone(),
            tasks: tasks.clone(),
            purges: store.clone(),
            clock: clock.clone(),
            unsettled: Unsettled::default(),
        });
        let retention = Arc::new(Retention {
            store: store.clone(),
            agents: store.clone(),
            purges: store.clone(),
            gauges: store.clone(),
            clock: clock.clone(),
            limits: config.retention,
            warned: Default::default(),
        });
        let statistics = Arc::new(Statistics {
            gauges: store.clone(),
            nodes: nodes.clone(),
            pool: pool.clone(),
            clock: clock.clone(),
            remembered: Remembered::default(),
        });
        let grants = Arc::new(Grants {
            store: store.clone(),
            nodes: store.clone(),
            sessions: store.clone(),
            state: store.clone(),
            accounts: accounts.clone(),
            pool: pool.clone(),
            clock: clock.clone(),
            work: work.clone(),
        });
        let idempotency = Arc::new(Idempotency { store: store.clone(), clock: clock.clone() });
        let recovery = Arc::new(Recovery {
            meta: store.clone(),
            journal: store.clone(),
            links: pool.links.clone(),
            pool: pool.clone(),
            manage: manage.clone(),
            expiry: expiry.clone(),
            agents: agents.clone(),
        });
        Ok(Self {
            accounts,
            grants,
            users,
            departures,
            nodes,
            manage,
            sessions,
            pool,
            delivery,
            tasks,
            agents,
            expiry,
            statistics,
            retention,
            idempotency,
            recovery,
            events,
        })
    }
}

/// Over Redis where that is set. A hub starts without it too: the store holds the truth.
async fn events(config: &Config, keys: &Keys, clock: &SharedClock, tasks: &Tasks) -> Events {
    let keep_for = Duration::from_secs(config.events_replay_secs);
    let Some(url) = config.redis.clone() else { return Events::local(keep_for, clock.clone()) };
    let (hub, key, clock) = (keys.hub, keys.bus_key(), clock.clone());
    let bus = RedisBus::start(RedisPlan { url, hub, key, keep: EVENTS_KEPT, keep_for, clock: clock.clone() }, tasks);
    if !bus.connected(REDIS_WAIT).await {
        tracing::warn!("the hub starts without Redis and goes on trying; until then other hubs do not hear its events");
    }
    Events::new(Arc::new(bus), clock)
}

/// Asks the system for as many open files as it allows: connections need one each.
fn raise_descriptors(connections: u64) {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
    if let Some(most) = getrlimit(Resource::Nofile).current.filter(|most| *most < connections) {
        tracing::warn!(most, connections, "fewer files may be open than limits.connections; raise the service's limit (LimitNOFILE)");
    }
}

/// All addresses are those of both families, where the machine has both.
fn bind(address: SocketAddr, key: &str) -> anyhow::Result<TcpListener> {
    let listen = |address: SocketAddr| -> std::io::Result<TcpListener> {
        let socket = if address.is_ipv6() { TcpSocket::new_v6()? } else { TcpSocket::new_v4()? };
        if address.is_ipv6() {
            rustix::net::sockopt::set_ipv6_v6only(&socket, !address.ip().is_unspecified())?;
        }
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.listen(BACKLOG)
    };
    let listening = listen(address).or_else(|e| {
        // A kernel without IPv6.
        let none = matches!(rustix::io::Errno::from_io_error(&e), Some(rustix::io::Errno::AFNOSUPPORT | rustix::io::Errno::ADDRNOTAVAIL));
        if none && address.is_ipv6() && address.ip().is_unspecified() {
            return listen(SocketAddr::from(([0, 0, 0, 0], address.port())));
        }
        Err(e)
    });
    listening.with_context(|| format!("{key}: cannot listen on {address}"))
}

/// Makes the first admin; a password that was made is kept in a private file until it is changed.
async fn first_admin(accounts: &Accounts, config: &Config, dir: &Path) -> anyhow::Result<Option<String>> {
    let (password, made) = match &config.admin_password {
        Some(p) => (p.clone(), false),
        None => (accounts::made_password(), true),
    };
    if made && !dir.join(MADE_PASSWORD).exists() && accounts.store.count_users().await? == 0 {
        // The file first: a crash between leaves a file without a user, and not a user without a password.
        files::write_private(&dir.join(MADE_PASSWORD), format!("{password}\n").as_bytes()).context("keeping the made password")?;
    }
    let password = match std::fs::read_to_string(dir.join(MADE_PASSWORD)) {
        Ok(kept) if made => kept.trim().to_owned(),
        _ => password,
    };
    let created = accounts.first_admin("admin", &password).await?;
    Ok((created && made).then_some(password))
}

fn serve_http(group: &Tasks, listener: impl Accept, app: Router, config: &Config) {
    let app = app.layer(axum::Extension(Door::Http));
    let limits = Limits::of(config.connections as usize);
    let shares = u32::try_from(config.connections_per_address).ok().filter(|most| *most > 0);
    let shares = shares.map(|most| Shares::new(most, config.trusted_proxies.clone()));
    group.spawn_vital("http", listener::serve("http", listener, app, limits, shares, group.clone()));
}

/// The control socket: 0600, and the peer's uid must be the hub's own.
fn serve_socket(group: &Tasks, path: &Path, app: Router) -> anyhow::Result<()> {
    let _ = std::fs::remove_file(path);
    let listener = UnixListener::bind(path).with_context(|| format!("control socket {}", path.display()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    let app = app.layer(axum::Extension(Door::Socket));
    let listener = listener::OwnUid { listener, own: rustix::process::getuid().as_raw() };
    group.spawn_vital("control socket", listener::serve("socket", listener, app, Limits::of(SOCKET_CONNECTIONS), None, group.clone()));
    Ok(())
}

fn serve_metrics(group: &Tasks, listener: TcpListener, app: Router) {
    group.spawn_vital("metrics", listener::serve("metrics", listener, app, Limits::of(METRICS_CONNECTIONS), None, group.clone()));
}
