//! What a daemon orders, and the writing that must come before it is done.

use super::*;

impl Warden {
    pub(super) fn on_start(&mut self, grant: Grant) {
        let key = (grant.task(), grant.attempt());
        if let Some(a) = self.attempts.get(&key) {
            let same = a.spec.is_none_or(|d| d == *grant.spec());
            let ended = matches!(a.state, State::Ended { .. });
            let running = matches!(a.state, State::Running(_)) && a.started_at != 0;
            self.pending.add(key, |n| {
                n.conflict |= !same;
                n.ended |= same && ended;
                n.started |= same && running;
            });
            return;
        }
        // Told nothing, the daemon asks the next warden.
        if self.stopping {
            return;
        }
        if self.attempts.len() >= MAX_KNOWN {
            let reason = Reason::new(ReasonCode::SpoolFull, "too many ends wait for the hub's acknowledgement");
            let outcome = Outcome::NeverStarted(NeverStarted::Refused(reason));
            if self.oneoff.len() < MAX_KNOWN {
                let (task, attempt) = key;
                let (output_end, last_seq, at_ms, leftover) = (0, 0, unix_ms(), 0);
                let digests = None;
                self.oneoff.push_back(Event::Ended { task, attempt, outcome, output_end, last_seq, at_ms, leftover, digests });
            }
            return;
        }
        let mut attempt = Attempt::new(Some(*grant.spec()));
        if grant.place().ephemeral {
            attempt.ephemeral = Some(PathBuf::from(&grant.place().workspace));
        }
        self.attempts.insert(key, attempt);
        match self.prepare(&grant) {
            Ok((program, cwd)) => {
                let ephemeral = grant.place().ephemeral.then(|| grant.place().workspace.clone());
                let (spec, at) = (*grant.spec(), unix_ms());
                self.spool.journal.append(&Record::Starting { key, spec, at, ephemeral });
                self.ready.push(Ready { grant, program, cwd, cancelled: false });
            }
            Err(reason) => {
                let outcome = Outcome::NeverStarted(NeverStarted::Refused(reason));
                self.refuse(key, Some(*grant.spec()), outcome);
            }
        }
    }

    pub(super) fn prepare(&self, grant: &Grant) -> Result<(Program, OwnedFd), Reason> {
        if self.tree == TreeKill::None {
            let why = "sandbox_unavailable: neither pid namespaces nor control groups work on this node";
            return Err(Reason::new(ReasonCode::PolicyDenied, why));
        }
        let denied = |why: &str| Err(Reason::new(ReasonCode::PolicyDenied, why));
        match grant.place().run_as {
            None if self.root => return denied("a task never runs as root; the node must name a user for it"),
            Some(uid) if !self.root && uid != self.uid => {
                return denied("sandbox_unavailable: the node is not root and cannot run a task as another user");
            }
            _ => {}
        }
        let program = Program::prepare(grant)?;
        let cwd = workspace::enter(grant)?;
        Ok((program, cwd))
    }

    /// Writes down that an attempt was not started and never will be.
    pub(super) fn refuse(&mut self, key: Key, spec: Option<Digest>, outcome: Outcome) {
        let at = unix_ms();
        self.spool.journal.append(&Record::Refused { key, spec, outcome: outcome.clone(), at });
        self.settled.push(Settled { key, outcome, at });
    }

    pub(super) fn on_cancel(&mut self, key: Key) {
        match self.attempts.get(&key).map(|a| a.state.clone()) {
            None => {
                if self.attempts.len() < MAX_KNOWN {
                    self.attempts.insert(key, Attempt::new(None));
                    self.refuse(key, None, Outcome::NeverStarted(NeverStarted::Cancelled));
                }
            }
            Some(State::Deciding) => {
                for ready in self.ready.iter_mut().filter(|r| (r.grant.task(), r.grant.attempt()) == key) {
                    ready.cancelled = true;
                }
            }
            Some(State::Running(slot)) => self.terminate(slot, Cause::Cancel, clock::now()),
            Some(State::Ended { .. }) => self.pending.add(key, |n| n.ended = true),
        }
    }

    /// As a cancel, whose time is over at once; also for one that is being ended already.
    pub(super) fn on_kill(&mut self, key: Key) {
        self.on_cancel(key);
        if let Some(State::Running(slot)) = self.attempts.get(&key).map(|a| a.state.clone())
            && self.runs[slot].as_ref().is_some_and(|run| run.cause.is_some() && run.end.is_none())
        {
            self.set_deadline(slot, Some(clock::now()));
        }
    }

    pub(super) fn on_acked(&mut self, key: Key, offset: u64) {
        let Some(a) = self.attempts.get_mut(&key) else { return };
        let offset = offset.min(a.output_end);
        if offset <= a.acked {
            return;
        }
        self.unacked -= offset - a.acked;
        a.acked = offset;
        if let State::Running(slot) = a.state
            && offset - a.freed >= self.config.spool_attempt_bytes / FREE_PART
            && let Some(output) = self.runs[slot].as_ref().and_then(|r| r.output.as_ref())
            && let Some(seq) = output.frame_at(offset)
        {
            a.freed = offset;
            self.spool.journal.append(&Record::Acked { key, offset, seq });
            self.frees.push((key, offset, seq));
        }
        self.resume_reading();
    }

    pub(super) fn on_forget(&mut self, key: Key) {
        if !matches!(self.attempts.get(&key), Some(Attempt { state: State::Ended { .. }, .. })) {
            return;
        }
        if let Some(a) = self.attempts.remove(&key) {
            self.unacked -= a.unacked();
            if a.output_end > 0 {
                self.spool.remove_output(&key);
            }
            self.spool.journal.append_idle(&Record::Forgotten { key });
            self.resume_reading();
        }
    }

    /// Makes durable what this turn has brought, then acts on it. What acting brings about (a clone
    /// that fails) is written in another round.
    pub(super) fn settle(&mut self) {
        if self.retry_at.is_some() && self.spool.journal.has_failed() {
            return;
        }
        loop {
            self.note_ends();
            if !self.spool.journal.is_dirty() {
                return;
            }
            if let Err(e) = self.spool.journal.commit() {
                // Nothing was promised: neither a start nor an end is acted upon until this works.
                say!("warden: the journal cannot be written: {e}");
                self.retry_at = Some(clock::now() + RETRY);
                return;
            }
            for (key, offset, seq) in std::mem::take(&mut self.frees) {
                self.give_back(key, offset, seq);
            }
            for s in std::mem::take(&mut self.settled) {
                if let Some(a) = self.attempts.get_mut(&s.key) {
                    a.state = State::Ended { outcome: s.outcome, at: s.at };
                    if let Some(path) = &a.ephemeral {
                        self.remover.remove(path, &mark_of(&s.key));
                    }
                    self.pending.add(s.key, |n| n.ended = true);
                }
            }
            for ready in std::mem::take(&mut self.ready) {
                self.start(ready);
            }
        }
    }

    /// Syncs the output of all tasks that have ended, then notes their ends.
    pub(super) fn note_ends(&mut self) {
        let mut ended = std::mem::take(&mut self.ended);
        let mut any = false;
        for run in &ended {
            if let Some(output) = &run.output {
                output.push_out();
                any = true;
            }
        }
        let mut failed = false;
        for output in ended.iter_mut().filter_map(|r| r.output.as_mut()) {
            if let Err(e) = output.sync() {
                say!("warden: output cannot be synced: {e}");
                failed = true;
            }
        }
        if any && let Err(e) = self.spool.sync_names() {
            say!("warden: output cannot be synced: {e}");
            failed = true;
        }
        // A disk that fails must not keep an end from being told for ever; it is still in the cache.
        let _ = failed;
        for run in ended {
            let outcome = outcome(&run);
            let at = unix_ms();
            let Some(a) = self.attempts.get_mut(&run.key) else { continue };
            // What has not run wrote nothing that anybody would compare.
            let ran = !matches!(outcome, Outcome::NeverStarted(_));
            a.digests = ran.then(|| run.output.as_ref().map_or_else(Digests::of_nothing, OutputWriter::digests));
            self.spool.journal.append(&Record::Exit {
                key: run.key,
                outcome: outcome.clone(),
                output_end: a.output_end,
                last_seq: a.last_seq,
                at,
                started_at: a.started_at,
                digests: a.digests,
            });
            self.settled.push(Settled { key: run.key, outcome, at });
        }
    }

    pub(super) fn give_back(&mut self, key: Key, offset: u64, seq: u64) {
        let Some(Attempt { state: State::Running(slot), .. }) = self.attempts.get(&key) else { return };
        if let Some(output) = self.runs[*slot].as_mut().and_then(|r| r.output.as_mut())
            && let Err(e) = output.free(offset, seq)
        {
            say!("warden: space cannot be given back: {e}");
        }
    }

    pub(super) fn start(&mut self, ready: Ready) {
        let Ready { grant, program, cwd, cancelled } = ready;
        let key = (grant.task(), grant.attempt());
        if cancelled {
            return self.never_ran(key, NeverStarted::Cancelled);
        }
        let slot = self.free.pop().unwrap_or_else(|| {
            self.runs.push(None);
            self.runs.len() - 1
        });
        self.generation = self.generation.wrapping_add(1);
        let generation = self.generation;
        let started = self.begin(&grant, program, cwd, slot, generation);
        match started {
            Ok(run) => {
                self.runs[slot] = Some(run);
                if let Some(a) = self.attempts.get_mut(&key) {
                    a.state = State::Running(slot);
                }
                if grant.timeout_secs() > 0 {
                    // Longer than anybody waits is no limit.
                    let at = clock::now().checked_add(Duration::from_secs(grant.timeout_secs()));
                    self.set_deadline(slot, at);
                }
            }
            Err(e) => {
                self.free.push(slot);
                let reason = Reason::new(ReasonCode::Limit, format!("no further process can be made: {e}"));
                self.never_ran(key, NeverStarted::Refused(reason));
            }
        }
    }

    pub(super) fn begin(&mut self, grant: &Grant, program: Program, cwd: OwnedFd, slot: usize, generation: u32) -> std::io::Result<Run> {
        let group = match self.tree {
            TreeKill::Cgroup => Some(cgroup::make(&self.spool.name, slot, generation)?),
            _ => None,
        };
        let order = Order {
            slot: slot as u32,
            generation,
            program,
            cwd: cwd.as_fd(),
            stdin: grant.stdin(),
            stdin_open: grant.stdin_open(),
            run_as: grant.place().run_as.filter(|_| self.root),
            cgroup: group.as_ref().map(|g| g.1.as_fd()),
        };
        let started = match self.spawner.start(order) {
            Ok(s) => s,
            Err(e) => {
                if let Some((path, _)) = group {
                    cgroup::remove(&path);
                }
                return Err(e);
            }
        };
        let stdin = started.stdin.map(|(fd, at)| Stdin::new(fd, grant.stdin()[at..].to_vec(), grant.stdin_open()));
        let mut run = Run {
            key: (grant.task(), grant.attempt()),
            generation,
            child: Some(started.child),
            end: None,
            pipes: [Some(started.stdout), Some(started.stderr)],
            watched: [true; 2],
            stdin,
            input: grant.stdin_open().then(Sequence::default),
            output: None,
            stuck: None,
            cause: None,
            deadline: None,
            started: false,
            program: grant.argv()[0].clone(),
            cwd: grant.cwd().to_owned(),
            cgroup: group.map(|g| g.0),
        };
        let watched = self.watch_run(&mut run, slot);
        if let Err(e) = watched {
            // A child that cannot be watched must not go on; it is collected when the warden ends.
            say!("warden: a child cannot be watched: {e}");
            if let Some(child) = &run.child {
                child.kill();
            }
            return Err(e.into());
        }
        Ok(run)
    }

    pub(super) fn watch_run(&self, run: &mut Run, slot: usize) -> Result<(), Errno> {
        let generation = run.generation;
        let token = |source| token(source, slot, generation);
        for (i, source) in [Source::Stdout, Source::Stderr].into_iter().enumerate() {
            if let Some(fd) = &run.pipes[i] {
                self.watch(fd, token(source), epoll::EventFlags::IN)?;
            }
        }
        if let Some(stdin) = &mut run.stdin {
            stdin.watch(&self.epoll, token(Source::Stdin))?;
        }
        if let Some(child) = &run.child {
            self.watch(child.pidfd(), token(Source::Exit), epoll::EventFlags::IN)?;
        }
        Ok(())
    }

    /// The end of an attempt whose `starting` is in the journal, but that has no child.
    pub(super) fn never_ran(&mut self, key: Key, why: NeverStarted) {
        let (outcome, at) = (Outcome::NeverStarted(why), unix_ms());
        let (output_end, last_seq, started_at, digests) = (0, 0, 0, None);
        let exit = Record::Exit { key, outcome: outcome.clone(), output_end, last_seq, at, started_at, digests };
        self.spool.journal.append(&exit);
        self.settled.push(Settled { key, outcome, at });
    }
}

/// The part of a removed workspace's name that tells attempts apart.
pub(super) fn mark_of((task, attempt): &Key) -> String {
    format!("{task}-{}", attempt.0)
}
