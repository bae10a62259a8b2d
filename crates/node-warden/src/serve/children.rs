//! Children: their start as they tell it, their streams, their end.

use super::*;

impl Warden {
    pub(super) fn on_status(&mut self) {
        let mut records = [0u8; 4096];
        // Records are eight bytes and written whole, so that a read never cuts one.
        while let Ok(n) = rustix::io::read(&self.status, &mut records) {
            for r in records[..n].chunks_exact(8) {
                let word = |i: usize| u32::from_ne_bytes(r[i..i + 4].try_into().expect("four bytes"));
                let (slot, generation) = (word(0) as usize, word(4));
                if self.is_current(slot, generation) {
                    self.note_started(slot);
                }
            }
            if n < records.len() {
                return;
            }
        }
    }

    pub(super) fn note_started(&mut self, slot: usize) {
        let Some(run) = self.runs[slot].as_mut() else { return };
        let failed = run.child.as_ref().is_some_and(Child::exec_failed);
        if run.started || failed {
            return;
        }
        run.started = true;
        if let Some(a) = self.attempts.get_mut(&run.key) {
            a.started_at = unix_ms();
        }
        self.pending.add(run.key, |n| n.started = true);
    }

    pub(super) fn on_exit(&mut self, slot: usize) {
        let Some(run) = self.runs[slot].as_mut() else { return };
        let Some(child) = run.child.take() else { return };
        let _ = epoll::delete(&self.epoll, child.pidfd());
        let end = self.spawner.reap(child);
        if let Some(group) = &run.cgroup {
            cgroup::kill(group);
        }
        let generation = run.generation;
        self.close_stdin(slot);
        let Some(run) = self.runs[slot].as_mut() else { return };
        if matches!(end, RawEnd::Status(_)) && !run.started {
            // The word of its exec is still in the pipe.
            run.started = true;
            if let Some(a) = self.attempts.get_mut(&run.key) {
                a.started_at = unix_ms();
            }
            self.pending.add(run.key, |n| n.started = true);
        }
        let Some(run) = self.runs[slot].as_mut() else { return };
        run.end = Some(end);
        self.set_deadline(slot, Some(clock::now() + LINGER));
        for i in 0..2 {
            if self.is_current(slot, generation) {
                self.read_pipe(slot, i);
            }
        }
        if self.is_current(slot, generation) {
            self.check_complete(slot);
        }
    }

    /// Gives a finished run's slot away; its end is written at the end of this turn.
    pub(super) fn check_complete(&mut self, slot: usize) {
        let done = |r: &Run| r.end.is_some() && r.pipes.iter().all(Option::is_none) && r.stuck.is_none();
        if !self.runs[slot].as_ref().is_some_and(done) {
            return;
        }
        self.set_deadline(slot, None);
        if let Some(run) = self.runs[slot].take() {
            if let Some(group) = &run.cgroup {
                cgroup::remove(group);
            }
            self.free.push(slot);
            self.ended.push(run);
        }
    }

    /// Whether more may be taken from a task's pipes. What a dead task has left in them, at most two
    /// pipes full, always is.
    pub(super) fn may_read(&self, run: &Run) -> bool {
        let within = || {
            let of = self.attempts.get(&run.key).map_or(0, Attempt::unacked);
            of < self.config.spool_attempt_bytes && self.unacked < self.config.spool_node_bytes
        };
        run.stuck.is_none() && (run.end.is_some() || within())
    }

    pub(super) fn read_pipe(&mut self, slot: usize, i: usize) {
        // One busy task must not keep the others waiting. A dead one leaves at most its pipes full;
        // more can only come from a process outside that it has given its pipe to.
        const READS: usize = 8;
        const LAST_READS: usize = 64;
        let stream = [Stream::Stdout, Stream::Stderr][i];
        let mut reads = 0;
        loop {
            let Some(run) = self.runs[slot].as_ref() else { return };
            let Some(fd) = &run.pipes[i] else { return };
            if !self.may_read(run) {
                return self.pause(slot);
            }
            if reads == if run.end.is_some() { LAST_READS } else { READS } {
                return self.rewatch(slot);
            }
            reads += 1;
            match rustix::io::read(fd, &mut self.buffer[FRAME_HEAD..]) {
                Ok(0) => break,
                Ok(n) => self.keep(slot, stream, n),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return self.rewatch(slot),
                Err(e) => {
                    say!("warden: a pipe cannot be read: {e}");
                    break;
                }
            }
        }
        let Some(run) = self.runs[slot].as_mut() else { return };
        if let Some(fd) = run.pipes[i].take()
            && run.watched[i]
        {
            let _ = epoll::delete(&self.epoll, &fd);
        }
        self.check_complete(slot);
    }

    /// Appends `n` bytes that stand in the buffer behind the room for a frame's head.
    pub(super) fn keep(&mut self, slot: usize, stream: Stream, n: usize) {
        let frame = &mut self.buffer[..FRAME_HEAD + n];
        let Some(run) = self.runs[slot].as_mut() else { return };
        if let Err(e) = append(&self.spool, run, stream, frame) {
            say!("warden: output of {} cannot be written: {e}", run.key.0);
            run.stuck = Some((stream, frame.to_vec()));
            self.retry_at.get_or_insert_with(|| clock::now() + RETRY);
            return;
        }
        self.note_output(slot);
    }

    pub(super) fn note_output(&mut self, slot: usize) {
        let Some(run) = self.runs[slot].as_ref() else { return };
        let (Some(output), Some(a)) = (&run.output, self.attempts.get_mut(&run.key)) else { return };
        if a.output_end == 0 {
            // The head of the file is nothing that anybody could acknowledge.
            a.acked = spool::FILE_HEAD;
            a.freed = spool::FILE_HEAD;
            a.output_end = spool::FILE_HEAD;
        }
        self.unacked += output.end() - a.output_end;
        (a.output_end, a.last_seq) = (output.end(), output.last_seq());
        self.pending.add(run.key, |n| n.output = true);
    }

    pub(super) fn retry_stuck(&mut self, slot: usize) {
        let Some(run) = self.runs[slot].as_mut() else { return };
        let Some((stream, mut frame)) = run.stuck.take() else { return };
        if append(&self.spool, run, stream, &mut frame).is_err() {
            run.stuck = Some((stream, frame));
            self.retry_at.get_or_insert_with(|| clock::now() + RETRY);
            return;
        }
        self.note_output(slot);
        self.resume(slot);
        self.check_complete(slot);
    }

    pub(super) fn pause(&mut self, slot: usize) {
        self.paused = true;
        let Some(run) = self.runs[slot].as_mut() else { return };
        for (fd, watched) in run.pipes.iter().zip(&mut run.watched) {
            if let Some(fd) = fd
                && std::mem::take(watched)
            {
                let _ = epoll::delete(&self.epoll, fd);
            }
        }
    }

    /// Watches again what a pause had let go of.
    pub(super) fn rewatch(&mut self, slot: usize) {
        let Some(run) = self.runs[slot].as_mut() else { return };
        for (i, source) in [Source::Stdout, Source::Stderr].into_iter().enumerate() {
            if let (Some(fd), false) = (&run.pipes[i], run.watched[i]) {
                let data = epoll::EventData::new_u64(token(source, slot, run.generation));
                run.watched[i] = epoll::add(&self.epoll, fd, data, epoll::EventFlags::IN).is_ok();
            }
        }
    }

    pub(super) fn resume(&mut self, slot: usize) {
        let Some(run) = self.runs[slot].as_ref() else { return };
        if run.watched == [true; 2] {
            return;
        }
        if self.may_read(run) {
            self.rewatch(slot);
        } else {
            self.paused = true;
        }
    }

    pub(super) fn resume_reading(&mut self) {
        if std::mem::take(&mut self.paused) {
            for slot in 0..self.runs.len() {
                self.resume(slot);
            }
        }
    }
}

fn append(spool: &Spool, run: &mut Run, stream: Stream, frame: &mut [u8]) -> std::io::Result<()> {
    let output = match &mut run.output {
        Some(o) => o,
        none => none.insert(OutputWriter::create(&spool.output_path(&run.key))?),
    };
    output.append(stream, frame)
}

pub(super) fn outcome(run: &Run) -> Outcome {
    match (run.end, run.cause) {
        (Some(RawEnd::NotRun { .. }), Some(Cause::Cancel)) => Outcome::NeverStarted(NeverStarted::Cancelled),
        (Some(RawEnd::NotRun { step, errno }), _) => {
            Outcome::NeverStarted(NeverStarted::Refused(refusal(step, errno, &run.program, &run.cwd)))
        }
        (_, Some(Cause::Cancel)) => Outcome::Cancelled,
        (_, Some(Cause::Timeout)) => Outcome::TimedOut,
        (Some(RawEnd::Status(s)), None) if libc::WIFEXITED(s) => Outcome::Exited(libc::WEXITSTATUS(s)),
        (Some(RawEnd::Status(s)), None) => Outcome::Signalled(libc::WTERMSIG(s)),
        // Somebody outside has killed the tree.
        (Some(RawEnd::Killed) | None, None) => Outcome::Signalled(libc::SIGKILL),
    }
}
