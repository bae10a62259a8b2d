//! One machine: what its processes share, and who starts and ends them.

use crate::daemon::Daemon;
use crate::hub::Hub;
use crate::warden::{Spool, ToWarden, Warden};
use crate::world::{World, lock};
use mesh_core::ceiling::Closed;
use mesh_core::{NodeId, SpoolId};
use mesh_process::{Clock, Tasks};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use tokio::sync::{mpsc, watch};

use crate::net::Wire;
use crate::plan::Break;

/// Words under way between daemon and warden.
const WORDS: usize = 8192;

pub struct Machine {
    pub n: usize,
    pub id: NodeId,
    pub max_tasks: u32,
    pub world: Arc<World>,
    pub hub: watch::Receiver<Option<Arc<Hub>>>,
    pub spool: Mutex<Spool>,
    first_spool: SpoolId,
    warden: Mutex<Option<(Tasks, mpsc::Sender<ToWarden>)>>,
    warden_life: AtomicU64,
    daemon: Mutex<Option<Tasks>>,
    daemon_life: AtomicU64,
    pub revoked: AtomicBool,
    /// The newest link session, on disk.
    pub session: Mutex<Vec<u8>>,
    /// Connections, newest last; a fault picks one.
    pub wires: Mutex<Vec<Arc<Wire>>>,
    pub wire_no: AtomicU64,
    /// What the next daemon is asked to do: swap its link for a second one, or end tasks and warden.
    pub swap: AtomicBool,
    pub stop: AtomicBool,
    /// By its owner's word: it takes no work.
    pub closed: AtomicBool,
}

impl Machine {
    pub fn new(world: &Arc<World>, n: usize, id: NodeId, max_tasks: u32, hub: watch::Receiver<Option<Arc<Hub>>>) -> Arc<Self> {
        let spool = fresh_spool(world);
        Arc::new(Self {
            n,
            id,
            max_tasks,
            world: world.clone(),
            hub,
            first_spool: spool.id,
            spool: Mutex::new(spool),
            warden: Mutex::default(),
            warden_life: AtomicU64::new(0),
            daemon: Mutex::default(),
            daemon_life: AtomicU64::new(0),
            session: Mutex::default(),
            revoked: AtomicBool::new(false),
            wires: Mutex::default(),
            wire_no: AtomicU64::new(0),
            swap: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            closed: AtomicBool::new(false),
        })
    }
    pub fn now_ms(&self) -> i64 {
        // The machine's own clock has nothing to do with the hub's.
        self.world.clock().now_ms() + 12_345
    }
    pub fn closed(&self) -> Option<Closed> {
        self.closed.load(Ordering::SeqCst).then_some(Closed::Disabled)
    }
    /// The spool's id as the hello tells it.
    pub fn spool_id(&self) -> SpoolId {
        if self.world.is(Break::ForgetSpool) { self.first_spool } else { lock(&self.spool).id }
    }

    pub fn note_wire(&self, wire: &Arc<Wire>) {
        let mut wires = lock(&self.wires);
        wires.push(wire.clone());
        if wires.len() > 4 {
            wires.remove(0);
        }
    }

    // ---- the warden ----

    /// Starts the warden unless one runs, and gives the way to it.
    pub fn warden(self: &Arc<Self>) -> mpsc::Sender<ToWarden> {
        let mut warden = lock(&self.warden);
        if let Some((_, way)) = &*warden {
            return way.clone();
        }
        let life = self.warden_life.fetch_add(1, Ordering::SeqCst) + 1;
        let (way, inbox) = mpsc::channel(WORDS);
        let tasks = Tasks::new();
        let own = Warden::open(self.clone(), life);
        tasks.spawn_until_cancelled("warden", own.run(inbox));
        self.world.note(format_args!("warden {life} of node {} runs", self.n));
        warden.insert((tasks, way)).1.clone()
    }
    pub fn warden_life(&self) -> u64 {
        if lock(&self.warden).is_some() { self.warden_life.load(Ordering::SeqCst) } else { 0 }
    }
    pub fn kill_warden(&self) {
        if let Some((tasks, _)) = lock(&self.warden).take() {
            self.world.note(format_args!("warden of node {} is dead", self.n));
            tasks.token().cancel();
        }
    }
    /// It ended by itself, having been asked to.
    pub fn warden_ended(&self, life: u64) {
        if self.warden_life() == life {
            lock(&self.warden).take();
        }
    }

    // ---- the daemon ----

    pub fn start_daemon(self: &Arc<Self>) {
        let mut daemon = lock(&self.daemon);
        if daemon.is_some() {
            return;
        }
        let life = self.daemon_life.fetch_add(1, Ordering::SeqCst) + 1;
        let tasks = Tasks::new();
        let own = Daemon::new(self.clone(), life, tasks.clone());
        tasks.spawn_until_cancelled("daemon", own.run());
        self.world.note(format_args!("daemon {life} of node {} runs", self.n));
        *daemon = Some(tasks);
    }
    pub fn kill_daemon(&self) {
        if let Some(tasks) = lock(&self.daemon).take() {
            self.world.note(format_args!("daemon of node {} is dead", self.n));
            tasks.token().cancel();
        }
    }
    /// It ended by itself.
    pub fn daemon_ended(&self, life: u64) {
        if self.daemon_life.load(Ordering::SeqCst) == life {
            lock(&self.daemon).take();
        }
    }
    pub fn has_daemon(&self) -> bool {
        lock(&self.daemon).is_some()
    }

    // ---- the machine ----

    pub fn power_cut(&self) {
        // Nobody says goodbye.
        for wire in lock(&self.wires).drain(..) {
            wire.cut(None, None);
        }
        self.kill_daemon();
        self.kill_warden();
        lock(&self.spool).cut();
    }
    /// Its disk was replaced, or somebody removed the folder.
    pub fn replace_spool(&self) {
        self.kill_daemon();
        self.kill_warden();
        *lock(&self.spool) = fresh_spool(&self.world);
    }
    /// Nothing is kept here any more.
    pub fn is_at_rest(&self) -> bool {
        lock(&self.spool).is_empty()
    }
}

fn fresh_spool(world: &World) -> Spool {
    let random = world.rng(|r| r.bytes());
    Spool::new(SpoolId::from_parts(world.clock().now_ms(), random))
}
