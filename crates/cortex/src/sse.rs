//! An incremental reader of `text/event-stream` (WHATWG HTML, "Server-sent events").

/// The longest event that is taken, in bytes of its lines. The hub's largest is an `end` whose task
/// carries twice 64 KiB of escaped text.
pub const MAX_EVENT_BYTES: usize = 16 << 20;

/// One event with data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// `message` where the stream names none.
    pub event: String,
    /// The data lines, joined by line feeds.
    pub data: String,
    /// The last id that the stream gave, up to and with this event.
    pub id: Option<String>,
}

/// An event longer than [`MAX_EVENT_BYTES`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an event is longer than {MAX_EVENT_BYTES} bytes")]
pub struct TooLong;

/// Turns pieces of a stream, cut anywhere, into events. Comments, `retry` and unknown fields are
/// passed over; what follows the last empty line is never an event.
#[derive(Debug, Default)]
pub struct Parser {
    line: Vec<u8>,
    /// The last byte was a carriage return: a line feed now belongs to the same line end.
    after_cr: bool,
    seen_line: bool,
    event: String,
    data: Option<String>,
    id: Option<String>,
}

impl Parser {
    pub fn new() -> Self {
        Self::default()
    }
    /// Takes the next piece and gives the events that it completes.
    pub fn push(&mut self, piece: &[u8]) -> Result<Vec<Event>, TooLong> {
        let mut events = Vec::new();
        let mut rest = piece;
        while !rest.is_empty() {
            if std::mem::take(&mut self.after_cr) && rest[0] == b'\n' {
                rest = &rest[1..];
                continue;
            }
            let end = rest.iter().position(|b| matches!(b, b'\r' | b'\n'));
            self.line.extend_from_slice(&rest[..end.unwrap_or(rest.len())]);
            if self.line.len() + self.data.as_ref().map_or(0, String::len) > MAX_EVENT_BYTES {
                return Err(TooLong);
            }
            let Some(end) = end else { break };
            self.after_cr = rest[end] == b'\r';
            rest = &rest[end + 1..];
            events.extend(self.end_line());
        }
        Ok(events)
    }

    fn end_line(&mut self) -> Option<Event> {
        let bytes = std::mem::take(&mut self.line);
        let text = String::from_utf8_lossy(&bytes);
        let mut line: &str = &text;
        if !std::mem::replace(&mut self.seen_line, true) {
            line = line.strip_prefix('\u{feff}').unwrap_or(line);
        }
        if line.is_empty() {
            let event = std::mem::take(&mut self.event);
            let data = self.data.take()?;
            let event = if event.is_empty() { "message".to_owned() } else { event };
            return Some(Event { event, data, id: self.id.clone() });
        }
        // A comment is a line whose field name is empty.
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "event" => value.clone_into(&mut self.event),
            "data" => match &mut self.data {
                Some(d) => {
                    d.push('\n');
                    d.push_str(value);
                }
                None => self.data = Some(value.to_owned()),
            },
            "id" if !value.contains('\0') => self.id = Some(value.to_owned()),
            _ => {}
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads `input` whole, byte by byte and cut in two at each place; all must agree.
    fn check(input: &str, expect: &[(&str, &str, Option<&str>)]) {
        let expect: Vec<_> =
            expect.iter().map(|(e, d, i)| Event { event: (*e).into(), data: (*d).into(), id: i.map(str::to_owned) }).collect();
        let bytes = input.as_bytes();
        assert_eq!(Parser::new().push(bytes).unwrap(), expect, "whole: {input:?}");
        let mut p = Parser::new();
        let single: Vec<_> = bytes.iter().flat_map(|b| p.push(&[*b]).unwrap()).collect();
        assert_eq!(single, expect, "byte by byte: {input:?}");
        for cut in 0..bytes.len() {
            let mut p = Parser::new();
            let mut got = p.push(&bytes[..cut]).unwrap();
            got.extend(p.push(&bytes[cut..]).unwrap());
            assert_eq!(got, expect, "cut at {cut}: {input:?}");
        }
    }

    #[test]
    fn line_ends() {
        let want = &[("a", "1", None), ("b", "2", None)][..];
        check("event: a\ndata: 1\n\nevent: b\ndata: 2\n\n", want);
        check("event: a\r\ndata: 1\r\n\r\nevent: b\r\ndata: 2\r\n\r\n", want);
        check("event: a\rdata: 1\r\revent: b\rdata: 2\r\r", want);
    }

    #[test]
    fn fields() {
        check("data: one\ndata: two\ndata\n\n", &[("message", "one\ntwo\n", None)]);
        check("data:tight\n\n", &[("message", "tight", None)]);
        check("data:  two spaces\n\n", &[("message", " two spaces", None)]);
        check("data: ü机\n\n", &[("message", "ü机", None)]);
        check("\u{feff}data: x\n\n", &[("message", "x", None)]);
        check("retry: 5\nother: y\ndata: x\n\n", &[("message", "x", None)]);
    }

    #[test]
    fn comments_and_ids() {
        check(": ping\n\ndata: x\n: inside\nid: 7\n\n:\n\ndata: y\n\n", &[("message", "x", Some("7")), ("message", "y", Some("7"))]);
        // An id alone is remembered, its event is none; an event type does not leak into the next.
        check("id: 3\nevent: gone\n\ndata: x\n\n", &[("message", "x", Some("3"))]);
        check("id: 4\ndata: x\n\nid: a\0b\ndata: y\n\n", &[("message", "x", Some("4")), ("message", "y", Some("4"))]);
    }

    #[test]
    fn an_unfinished_event_is_none() {
        check("data: x\n\ndata: cut of", &[("message", "x", None)]);
        check("data: x\n", &[]);
    }

    #[test]
    fn an_endless_line_is_refused() {
        let mut p = Parser::new();
        let piece = vec![b'x'; MAX_EVENT_BYTES / 2];
        assert!(p.push(&piece).is_ok());
        assert!(p.push(&piece).is_ok());
        assert_eq!(p.push(b"x"), Err(TooLong));
    }
}
