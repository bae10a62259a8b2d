//! The connections of daemons: whom to believe, what to tell, and never to wait for a reader.

use crate::Key;
use crate::frames::{Decoder, Event, FrameError, Request};
use rustix::event::epoll;
use rustix::io::Errno;
use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;

/// Bytes that wait for the socket before further events stay as mere flags.
const OUT_BYTES: usize = 256 << 10;

/// What is to be told about an attempt.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct News {
    pub started: bool,
    pub output: bool,
    pub ended: bool,
    pub conflict: bool,
}

/// News per attempt in the order of their first cause; at most one entry an attempt.
#[derive(Default)]
pub(crate) struct Pending {
    order: VecDeque<Key>,
    news: HashMap<Key, News>,
}

impl Pending {
    pub fn add(&mut self, key: Key, set: impl FnOnce(&mut News)) {
        let entry = self.news.entry(key).or_insert_with(|| {
            self.order.push_back(key);
            News::default()
        });
        set(entry);
    }
    pub fn clear(&mut self) {
        self.order.clear();
        self.news.clear();
    }
    fn pop(&mut self) -> Option<(Key, News)> {
        let key = self.order.pop_front()?;
        Some((key, self.news.remove(&key).unwrap_or_default()))
    }
    pub fn is_empty(&self) -> bool {
        self.order.is_empty()
    }
}

pub(crate) struct Conn {
    pub fd: OwnedFd,
    pub generation: u32,
    pub greeted: bool,
    /// What both speak.
    version: u32,
    decoder: Decoder<Request>,
    out: Vec<u8>,
    sent: usize,
    pub wants_write: bool,
}

impl Conn {
    pub fn new(fd: OwnedFd, generation: u32) -> Self {
        Self { fd, generation, greeted: false, version: 1, decoder: Decoder::new(), out: vec![], sent: 0, wants_write: false }
    }

    /// Reads once; false at the end of the stream.
    pub fn fill(&mut self, buffer: &mut [u8]) -> bool {
        match rustix::net::recv(&self.fd, &mut *buffer, rustix::net::RecvFlags::DONTWAIT) {
            Ok((0, _)) => false,
            Ok((n, _)) => {
                self.decoder.push(&buffer[..n]);
                true
            }
            Err(Errno::AGAIN | Errno::INTR) => true,
            Err(_) => false,
        }
    }

    pub fn next(&mut self) -> Result<Option<Request>, FrameError> {
        self.decoder.pop()
    }

    pub fn greet(&mut self, version: u32) {
        (self.greeted, self.version) = (true, version);
    }

    pub fn tell(&mut self, event: Event) {
        self.out.extend_from_slice(&event.for_version(self.version).encode());
    }

    pub fn has_room(&self) -> bool {
        self.out.len() - self.sent < OUT_BYTES
    }

    /// Turns news into events while there is room; `describe` knows the newest state.
    pub fn take_news(&mut self, pending: &mut Pending, mut describe: impl FnMut(Key, News) -> Vec<Event>) {
        while self.has_room() {
            let Some((key, news)) = pending.pop() else { return };
            for event in describe(key, news) {
                self.tell(event);
            }
        }
    }

    /// Writes what the socket takes; false when the peer is gone.
    pub fn flush(&mut self) -> bool {
        while self.sent < self.out.len() {
            let flags = rustix::net::SendFlags::DONTWAIT | rustix::net::SendFlags::NOSIGNAL;
            match rustix::net::send(&self.fd, &self.out[self.sent..], flags) {
                Ok(n) => self.sent += n,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return true,
                Err(_) => return false,
            }
        }
        self.out.clear();
        self.out.shrink_to(OUT_BYTES);
        self.sent = 0;
        true
    }

    pub fn has_unsent(&self) -> bool {
        !self.out.is_empty()
    }

    /// Follows the need to hear when the socket takes more.
    pub fn watch(&mut self, epoll: &OwnedFd, token: u64) {
        if self.has_unsent() != self.wants_write {
            self.wants_write = self.has_unsent();
            let mut flags = epoll::EventFlags::IN;
            flags.set(epoll::EventFlags::OUT, self.wants_write);
            let _ = epoll::modify(epoll, &self.fd, epoll::EventData::new_u64(token), flags);
        }
    }
}
