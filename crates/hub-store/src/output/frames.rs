//! How frames lie in an attempt's file, and how they are found again.
//!
//! A frame is `length u32, CRC-32 u32, seq u64, t_ms i64, stream u8, data`, little-endian; the length
//! and the checksum are of all that follows them.

use bytes::Bytes;
use hub_engine::records::{OutputFrame, Stream};
use std::fs::File;
use std::io::{self, Error};
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

const HEAD: usize = 8;
const FIXED: usize = 17;
/// Bytes read from a file at a time.
const CHUNK: u64 = 256 * 1024;

pub(super) fn encode(frame: &OutputFrame, to: &mut Vec<u8>) {
    let start = to.len();
    to.extend_from_slice(&((FIXED + frame.data.len()) as u32).to_le_bytes());
    to.extend_from_slice(&[0; 4]);
    to.extend_from_slice(&frame.seq.to_le_bytes());
    to.extend_from_slice(&frame.t_ms.to_le_bytes());
    to.push(match frame.stream {
        Stream::Stdout => 1,
        Stream::Stderr => 2,
    });
    to.extend_from_slice(&frame.data);
    let sum = crc32(&to[start + HEAD..]);
    to[start + 4..start + HEAD].copy_from_slice(&sum.to_le_bytes());
}

/// The frame that `from` begins with, and its length there; or how many bytes it takes to know more.
fn decode(from: &Bytes) -> io::Result<Result<(OutputFrame, usize), usize>> {
    let damaged = |what: &str| Error::new(io::ErrorKind::InvalidData, format!("a frame is damaged: {what}"));
    let Some(head) = from.get(..HEAD) else { return Ok(Err(HEAD)) };
    let (length, sum) = (le32(&head[..4]) as usize, le32(&head[4..]));
    if length < FIXED {
        return Err(damaged("its length"));
    }
    let Some(body) = from.get(HEAD..HEAD + length) else { return Ok(Err(HEAD + length)) };
    if crc32(body) != sum {
        return Err(damaged("its checksum"));
    }
    let stream = match body[16] {
        1 => Stream::Stdout,
        2 => Stream::Stderr,
        _ => return Err(damaged("its stream")),
    };
    let word = |at: usize| u64::from_le_bytes(body[at..at + 8].try_into().expect("eight bytes"));
    let data = from.slice(HEAD + FIXED..HEAD + length);
    Ok(Ok((OutputFrame { seq: word(0), t_ms: word(8) as i64, stream, data }, HEAD + length)))
}

fn le32(four: &[u8]) -> u32 {
    u32::from_le_bytes(four.try_into().expect("four bytes"))
}

/// What is kept of an attempt at one moment: the beginning of its file, then `held`.
#[derive(Debug, Clone)]
pub(super) struct Source {
    pub path: PathBuf,
    pub in_file: u64,
    pub held: Bytes,
}

impl Source {
    pub(super) fn end(&self) -> u64 {
        self.in_file + self.held.len() as u64
    }
    /// The seq of the first frame in `held`.
    pub(super) fn held_seq(&self) -> Option<u64> {
        decode(&self.held).ok()?.ok().map(|(frame, _)| frame.seq)
    }

    /// Gives each frame in `from..until` with its offset, as long as `each` goes on.
    pub(super) fn scan(&self, from: u64, until: u64, mut each: impl FnMut(u64, OutputFrame) -> ControlFlow<()>) -> io::Result<()> {
        let mut at = from;
        let in_file = self.in_file.min(until);
        if at < in_file {
            let file = File::open(&self.path)?;
            let mut want = CHUNK;
            while at < in_file {
                let mut chunk = vec![0; want.min(in_file - at) as usize];
                file.read_exact_at(&mut chunk, at)?;
                let (passed, needed, flow) = walk(&Bytes::from(chunk), at, &mut each)?;
                if flow.is_break() {
                    return Ok(());
                }
                at += passed;
                want = CHUNK.max(needed as u64);
                if passed == 0 && needed as u64 > in_file - at {
                    return Err(Error::new(io::ErrorKind::InvalidData, "the file ends within a frame"));
                }
            }
        }
        if at < until {
            let rest = self.held.slice((at - self.in_file) as usize..(until - self.in_file) as usize);
            let _ = walk(&rest, at, &mut each)?;
        }
        Ok(())
    }
}

/// Passes over the whole frames in `bytes`; also says how long the next one is at least.
fn walk(bytes: &Bytes, base: u64, each: &mut impl FnMut(u64, OutputFrame) -> ControlFlow<()>) -> io::Result<(u64, usize, ControlFlow<()>)> {
    let mut passed = 0;
    while passed < bytes.len() {
        match decode(&bytes.slice(passed..))? {
            Err(needed) => return Ok((passed as u64, needed, ControlFlow::Continue(()))),
            Ok((frame, length)) => {
                if each(base + passed as u64, frame).is_break() {
                    return Ok((passed as u64, 0, ControlFlow::Break(())));
                }
                passed += length;
            }
        }
    }
    Ok((passed as u64, 0, ControlFlow::Continue(())))
}

/// CRC-32 (ISO 3309, the one of zip), eight bytes a step.
fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = !0u32;
    let mut eights = bytes.chunks_exact(8);
    for e in &mut eights {
        let low = crc ^ le32(&e[..4]);
        crc = TABLES[7][(low & 255) as usize]
            ^ TABLES[6][(low >> 8 & 255) as usize]
            ^ TABLES[5][(low >> 16 & 255) as usize]
            ^ TABLES[4][(low >> 24) as usize]
            ^ TABLES[3][e[4] as usize]
            ^ TABLES[2][e[5] as usize]
            ^ TABLES[1][e[6] as usize]
            ^ TABLES[0][e[7] as usize];
    }
    for byte in eights.remainder() {
        crc = TABLES[0][((crc ^ u32::from(*byte)) & 255) as usize] ^ (crc >> 8);
    }
    !crc
}

static TABLES: [[u32; 256]; 8] = {
    let mut t = [[0u32; 256]; 8];
    let mut i = 0;
    while i < 256 {
        let mut crc = i as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 { 0xEDB8_8320 ^ (crc >> 1) } else { crc >> 1 };
            bit += 1;
        }
        t[0][i] = crc;
        i += 1;
    }
    let mut k = 1;
    while k < 8 {
        let mut i = 0;
        while i < 256 {
            t[k][i] = t[0][(t[k - 1][i] & 255) as usize] ^ (t[k - 1][i] >> 8);
            i += 1;
        }
        k += 1;
    }
    t
};

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_checksum_is_the_common_one() {
        assert_eq!(crc32(b"123456789"), 0xCBF4_3926);
        assert_eq!(crc32(b""), 0);
    }

    fn source(frames: &[OutputFrame]) -> Source {
        let mut held = vec![];
        frames.iter().for_each(|f| encode(f, &mut held));
        Source { path: PathBuf::new(), in_file: 0, held: held.into() }
    }

    proptest! {
        #[test]
        fn frames_come_back_as_they_were(data in prop::collection::vec((any::<i64>(), any::<bool>(), prop::collection::vec(any::<u8>(), 0..300)), 0..20)) {
            let frames: Vec<_> = data
                .into_iter()
                .enumerate()
                .map(|(i, (t_ms, err, data))| OutputFrame {
                    seq: i as u64 + 1,
                    t_ms,
                    stream: if err { Stream::Stderr } else { Stream::Stdout },
                    data: data.into(),
                })
                .collect();
            let source = source(&frames);
            let mut seen = vec![];
            source.scan(0, source.end(), |_, f| { seen.push(f); ControlFlow::Continue(()) }).unwrap();
            prop_assert_eq!(seen, frames);
        }

        #[test]
        fn a_changed_bit_is_noticed(at in 8usize..60, bit in 0u8..8) {
            let frame = OutputFrame { seq: 1, t_ms: 5, stream: Stream::Stdout, data: Bytes::from(vec![7; 43]) };
            let mut source = source(&[frame]);
            let mut bytes = source.held.to_vec();
            bytes[at] ^= 1 << bit;
            source.held = bytes.into();
            prop_assert!(source.scan(0, source.end(), |_, _| ControlFlow::Continue(())).is_err());
        }
    }
}
