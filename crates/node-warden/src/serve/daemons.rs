//! Daemons: whom to hear, what they order, what they are told.

use super::*;

impl Warden {
    pub(super) fn has_daemon(&self) -> bool {
        self.conns.iter().flatten().any(|c| c.greeted)
    }

    pub(super) fn accept(&mut self) {
        loop {
            let flags = rustix::net::SocketFlags::CLOEXEC | rustix::net::SocketFlags::NONBLOCK;
            let fd = match rustix::net::accept_with(&self.listener, flags) {
                Ok(fd) => fd,
                Err(Errno::INTR) => continue,
                Err(_) => return,
            };
            match rustix::net::sockopt::socket_peercred(&fd) {
                Ok(peer) if peer.uid.as_raw() == self.uid => {}
                _ => continue,
            }
            let slot = match self.conns.iter().position(Option::is_none) {
                Some(slot) => slot,
                None if self.conns.len() < MAX_CONNS => {
                    self.conns.push(None);
                    self.conns.len() - 1
                }
                None => continue,
            };
            self.generation = self.generation.wrapping_add(1);
            let generation = self.generation;
            if self.watch(&fd, token(Source::Conn, slot, generation), epoll::EventFlags::IN).is_ok() {
                self.conns[slot] = Some(Conn::new(fd, generation));
            }
        }
    }

    pub(super) fn hang_up(&mut self, slot: usize) {
        if let Some(conn) = self.conns[slot].take() {
            // A child between clone and exec may hold a copy, and a copy keeps a registration.
            let _ = epoll::delete(&self.epoll, &conn.fd);
            if conn.greeted {
                self.alone_since = clock::now();
            }
        }
    }

    pub(super) fn on_conn(&mut self, slot: usize, generation: u32) {
        let Some(conn) = self.conns.get_mut(slot).and_then(Option::as_mut).filter(|c| c.generation == generation) else {
            return;
        };
        let alive = conn.fill(&mut self.buffer);
        loop {
            let Some(conn) = self.conns[slot].as_mut().filter(|c| c.generation == generation) else { return };
            match conn.next() {
                Ok(Some(Request::Hello { version })) => self.on_hello(slot, version),
                Ok(Some(request)) if conn.greeted => self.on_request(request),
                Ok(None) => break,
                Ok(Some(_)) => return self.hang_up(slot),
                Err(e) => {
                    say!("warden: a daemon is cut off: {e}");
                    return self.hang_up(slot);
                }
            }
        }
        if !alive {
            self.hang_up(slot);
        }
    }

    pub(super) fn on_hello(&mut self, slot: usize, version: u32) {
        if version != VERSION {
            say!("warden: a daemon speaks version {version}, this warden {VERSION}");
        }
        for other in 0..self.conns.len() {
            if other != slot && self.conns[other].as_ref().is_some_and(|c| c.greeted) {
                self.hang_up(other);
            }
        }
        // The list says it all, and answers belong to who asked.
        self.pending.clear();
        self.answers.clear();
        let attempts = self.attempts.iter().map(|(key, a)| known(key, a)).collect();
        let version = version.clamp(1, VERSION);
        let welcome = Event::Welcome { version, spool: self.spool.id, attempts };
        if let Some(conn) = self.conns[slot].as_mut() {
            conn.greet(version);
            conn.tell(welcome);
        }
    }

    pub(super) fn on_request(&mut self, request: Request) {
        match request {
            Request::Hello { .. } => {}
            Request::Start { grant } => self.on_start(grant),
            Request::Cancel { task, attempt } => self.on_cancel((task, attempt)),
            Request::Kill { task, attempt } => self.on_kill((task, attempt)),
            Request::Acked { task, attempt, offset } => self.on_acked((task, attempt), offset),
            Request::Forget { task, attempt } => self.on_forget((task, attempt)),
            Request::Stop => self.stop(),
            Request::Input { task, attempt, request, seq, data, eof } => {
                self.on_input(&Piece { key: (task, attempt), request, seq, data, eof });
            }
        }
    }

    pub(super) fn tell(&mut self) {
        let Some(slot) = self.conns.iter().position(|c| c.as_ref().is_some_and(|c| c.greeted)) else { return };
        let Some(conn) = self.conns[slot].as_mut() else { return };
        while conn.has_room()
            && let Some(event) = self.oneoff.pop_front().or_else(|| self.answers.pop_front())
        {
            conn.tell(event);
        }
        let attempts = &self.attempts;
        conn.take_news(&mut self.pending, |key, news| attempts.get(&key).map_or(vec![], |a| describe(key, a, news)));
        let token = token(Source::Conn, slot, conn.generation);
        if conn.flush() {
            conn.watch(&self.epoll, token);
        } else {
            self.hang_up(slot);
        }
    }

    /// Gives a daemon that reads a second to hear the last ends; they are kept if it does not.
    pub(super) fn say_goodbye(&mut self) {
        if let Err(e) = self.spool.journal.commit() {
            say!("warden: the journal cannot be written: {e}");
        }
        let begun = clock::now();
        while begun.elapsed() < Duration::from_secs(1) {
            self.tell();
            let unsent = self.conns.iter().flatten().any(|c| c.greeted && c.has_unsent());
            if !unsent && (self.pending.is_empty() || !self.has_daemon()) {
                return;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

fn known((task, attempt): &Key, a: &Attempt) -> Known {
    let state = match &a.state {
        State::Ended { outcome, .. } => KnownState::Ended(outcome.clone()),
        State::Deciding | State::Running(_) => KnownState::Running,
    };
    let (task, attempt) = (*task, *attempt);
    let (output_end, last_seq, started_at_ms, digests) = (a.output_end, a.last_seq, a.started_at, a.digests);
    Known { task, attempt, state, output_end, last_seq, started_at_ms, digests }
}

fn describe((task, attempt): Key, a: &Attempt, news: News) -> Vec<Event> {
    let mut events = vec![];
    if news.conflict {
        events.push(Event::Conflict { task, attempt });
    }
    if news.started {
        events.push(Event::Started { task, attempt, at_ms: a.started_at });
    }
    match &a.state {
        // An end tells where the output ends, too.
        State::Ended { outcome, at } if news.ended => events.push(Event::Ended {
            task,
            attempt,
            outcome: outcome.clone(),
            output_end: a.output_end,
            last_seq: a.last_seq,
            at_ms: *at,
            leftover: 0,
            digests: a.digests,
        }),
        _ if news.output => events.push(Event::Output { task, attempt, end: a.output_end, last_seq: a.last_seq }),
        _ => {}
    }
    events
}
