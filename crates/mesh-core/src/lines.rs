//! The log of an agent: what its runs write, cut into lines as it comes.

use crate::UnixMs;
use crate::canon::{Malformed, Reader, Writer};

/// A line that is longer is cut into pieces of at most this many bytes.
pub const MAX_LINE: usize = 8 * 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    Stdout,
    Stderr,
    /// The supervisor's own words.
    Agent,
}

impl Source {
    const ALL: [Self; 3] = [Self::Stdout, Self::Stderr, Self::Agent];
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
            Self::Agent => "agent",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// When its first byte was written, by the clock of its node.
    pub at: UnixMs,
    pub source: Source,
    /// It goes on in the next line of this source: it was too long for one.
    pub cut: bool,
    /// Without what ended it.
    pub text: Vec<u8>,
}

impl Line {
    pub fn said(at: UnixMs, words: &str) -> Self {
        let end = words.floor_char_boundary(MAX_LINE);
        Self { at, source: Source::Agent, cut: false, text: words.as_bytes()[..end].to_vec() }
    }
}

/// What was written since the last end of a line, by stream.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cutter {
    stdout: Option<(UnixMs, Vec<u8>)>,
    stderr: Option<(UnixMs, Vec<u8>)>,
}

impl Cutter {
    fn of(&mut self, source: Source) -> &mut Option<(UnixMs, Vec<u8>)> {
        if source == Source::Stderr { &mut self.stderr } else { &mut self.stdout }
    }

    /// Takes what was written at `at`; gives the lines that are whole now.
    pub fn take(&mut self, at: UnixMs, source: Source, data: &[u8], lines: &mut Vec<Line>) {
        let open = self.of(source);
        let mut rest = data;
        while !rest.is_empty() {
            let (begun, text) = open.get_or_insert_with(|| (at, vec![]));
            let room = MAX_LINE - text.len();
            match rest.iter().take(room + 1).position(|b| *b == b'\n') {
                Some(end) => {
                    text.extend_from_slice(&rest[..end]);
                    if text.last() == Some(&b'\r') {
                        text.pop();
                    }
                    lines.push(Line { at: *begun, source, cut: false, text: std::mem::take(text) });
                    *open = None;
                    rest = &rest[end + 1..];
                }
                None if rest.len() <= room => {
                    text.extend_from_slice(rest);
                    return;
                }
                None => {
                    text.extend_from_slice(&rest[..room]);
                    rest = &rest[room..];
                    // A character is not torn, as far as there are any.
                    let after = text.split_off(whole_characters(text));
                    lines.push(Line { at: *begun, source, cut: true, text: std::mem::replace(text, after) });
                }
            }
        }
    }

    /// Nothing more comes: what has no end is a line all the same.
    pub fn flush(&mut self, lines: &mut Vec<Line>) {
        for source in [Source::Stdout, Source::Stderr] {
            if let Some((at, text)) = self.of(source).take() {
                lines.push(Line { at, source, cut: false, text });
            }
        }
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::plain(&[]);
        for open in [&self.stdout, &self.stderr] {
            w.option(open.as_ref(), |w, (at, text)| {
                w.i64(*at).bytes(text);
            });
        }
        w.finish()
    }
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        if bytes.is_empty() {
            return Ok(Self::default());
        }
        let mut r = Reader::plain(bytes);
        let mut open = || r.option(|r| Ok((r.i64()?, r.bytes()?.to_vec())));
        let cutter = Self { stdout: open()?, stderr: open()? };
        r.end()?;
        Ok(cutter)
    }
}

/// Up to where `text` holds whole characters, if the last one alone may be torn.
fn whole_characters(text: &[u8]) -> usize {
    let begin = text.iter().rev().take(3).position(|b| b & 0xC0 != 0x80);
    let Some(back) = begin else { return text.len() };
    let at = text.len() - 1 - back;
    let wide = match text[at] {
        0xC0..=0xDF => 2,
        0xE0..=0xEF => 3,
        0xF0..=0xF7 => 4,
        _ => 1,
    };
    if at > 0 && at + wide > text.len() { at } else { text.len() }
}

/// Adds a line to a chunk.
pub fn encode(line: &Line, chunk: &mut Vec<u8>) {
    let source = Source::ALL.iter().position(|s| *s == line.source).unwrap_or_default() as u8;
    let mut w = Writer::plain(&[]);
    w.i64(line.at).u8(source | u8::from(line.cut) << 7).bytes(&line.text);
    chunk.extend_from_slice(&w.finish());
}

/// The lines of a chunk, in order.
pub fn decode(chunk: &[u8]) -> Result<Vec<Line>, Malformed> {
    let mut r = Reader::plain(chunk);
    let mut lines = vec![];
    while r.left() > 0 {
        let (at, flags) = (r.i64()?, r.u8()?);
        let source = Source::ALL.get(usize::from(flags & 0x7F)).copied();
        let source = source.ok_or(Malformed::Unknown { what: "source", value: flags.into() })?;
        lines.push(Line { at, source, cut: flags & 0x80 != 0, text: r.bytes()?.to_vec() });
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn cut(pieces: &[(Source, &[u8])]) -> Vec<Line> {
        let (mut cutter, mut lines) = (Cutter::default(), vec![]);
        for (n, (source, data)) in pieces.iter().enumerate() {
            // As a hub does that dies after each of them.
            cutter = Cutter::decode(&cutter.encode()).unwrap();
            cutter.take(n as i64, *source, data, &mut lines);
        }
        cutter.flush(&mut lines);
        lines
    }
    fn texts(lines: &[Line]) -> Vec<String> {
        lines.iter().map(|l| String::from_utf8(l.text.clone()).unwrap()).collect()
    }

    #[test]
    fn lines_across_pieces_and_streams() {
        let lines = cut(&[(Source::Stdout, b"a\r\nb"), (Source::Stderr, b"e\n\n"), (Source::Stdout, b"c\nlast")]);
        assert_eq!(texts(&lines), ["a", "e", "", "bc", "last"]);
        assert_eq!(lines[3], Line { at: 0, source: Source::Stdout, cut: false, text: b"bc".to_vec() }, "its first byte came then");
        assert_eq!(lines[1].source, Source::Stderr);
    }

    #[test]
    fn long_lines_come_in_pieces_that_say_so() {
        let long = "ü".repeat(MAX_LINE);
        let lines = cut(&[(Source::Stdout, b"x"), (Source::Stdout, format!("{long}\nnext\n").as_bytes())]);
        assert_eq!(texts(&lines).concat(), format!("x{long}next"), "nothing is lost, and no character torn");
        assert!(lines.iter().all(|l| l.text.len() <= MAX_LINE));
        let cuts: Vec<bool> = lines.iter().map(|l| l.cut).collect();
        assert_eq!(cuts, [true, true, false, false]);
        let exact = cut(&[(Source::Stdout, &[b'x'; MAX_LINE]), (Source::Stdout, b"\n")]);
        assert_eq!((exact.len(), exact[0].cut), (1, false));
        assert_eq!(cut(&[(Source::Stdout, &[0x80; 3 * MAX_LINE])]).len(), 3, "what is no text is cut all the same");
    }

    #[test]
    fn a_torn_chunk_is_told() {
        let mut chunk = vec![];
        encode(&Line::said(7, "killed"), &mut chunk);
        assert_eq!(decode(&chunk).unwrap()[0].text, b"killed");
        assert!(decode(&chunk[..chunk.len() - 1]).is_err());
        chunk[8] = 9;
        assert!(decode(&chunk).is_err());
    }

    proptest! {
        #[test]
        fn what_is_taken_is_what_is_kept(pieces in proptest::collection::vec(proptest::collection::vec(prop_oneof![Just(b'\n'), any::<u8>()], 0..60), 0..20)) {
            let whole: Vec<u8> = pieces.concat();
            let lines = cut(&pieces.iter().map(|p| (Source::Stderr, &p[..])).collect::<Vec<_>>());
            let at_once = cut(&[(Source::Stderr, &whole)]);
            prop_assert_eq!(lines.iter().map(|l| &l.text).collect::<Vec<_>>(), at_once.iter().map(|l| &l.text).collect::<Vec<_>>());
            prop_assert_eq!(lines.len(), whole.split_inclusive(|b| *b == b'\n').count());
            let mut chunk = vec![];
            lines.iter().for_each(|l| encode(l, &mut chunk));
            prop_assert_eq!(decode(&chunk).unwrap(), lines);
        }
    }
}
