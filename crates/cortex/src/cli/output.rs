//! Tables for people, documents for programs.

use super::args::Format;
use super::{Fail, Io};
use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Makes text from elsewhere harmless on a terminal: control characters and those that turn the
/// direction of text are written out. Line feeds stay.
pub fn clean(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c != '\n' && mesh_core::name::is_deceptive(c) {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

/// [`clean`] on a single line.
pub fn cell(text: &str) -> String {
    clean(text).replace('\n', "\\n")
}

/// `-` for what is not there.
pub fn or_dash(text: Option<&str>) -> String {
    text.filter(|t| !t.is_empty()).map_or_else(|| "-".to_owned(), cell)
}

pub fn json<T: Serialize>(io: &mut Io<'_>, document: &T) -> Result<(), Fail> {
    let text = serde_json::to_string_pretty(document).map_err(|e| Fail::Failed(format!("cannot write the document: {e}")))?;
    writeln!(io.out, "{text}")?;
    Ok(io.out.flush()?)
}

/// A list: as a page of documents, or as a table with these columns.
pub fn list<T: Serialize>(
    io: &mut Io<'_>,
    format: Format,
    items: &[T],
    columns: &[&str],
    row: impl Fn(&T) -> Vec<String>,
) -> Result<(), Fail> {
    if format == Format::Json {
        #[derive(Serialize)]
        struct List<'a, T> {
            items: &'a [T],
            next_cursor: Option<String>,
        }
        return json(io, &List { items, next_cursor: None });
    }
    let mut table = plain();
    table.set_header(columns.iter().map(|c| c.to_uppercase()));
    for item in items {
        table.add_row(row(item));
    }
    print(io, &table)
}

/// One thing: as its document, or as a table of names and values.
pub fn one<T: Serialize>(io: &mut Io<'_>, format: Format, item: &T, fields: Vec<(&str, String)>) -> Result<(), Fail> {
    if format == Format::Json {
        return json(io, item);
    }
    let mut table = plain();
    for (name, value) in fields {
        table.add_row([name, &value]);
    }
    print(io, &table)
}

fn plain() -> Table {
    let mut table = Table::new();
    // Not arranged to the terminal's width, so that an id is never cut.
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table
}

fn print(io: &mut Io<'_>, table: &Table) -> Result<(), Fail> {
    for line in table.lines() {
        // Columns begin at the left edge, and nothing trails.
        let line = line.strip_prefix(' ').unwrap_or(&line);
        writeln!(io.out, "{}", line.trim_end())?;
    }
    Ok(io.out.flush()?)
}

/// How long ago a moment was, for people; the text itself where it is no time.
pub fn ago(at: Option<&str>, now_ms: i64) -> String {
    let Some(at) = at else { return "never".to_owned() };
    let Ok(time) = OffsetDateTime::parse(at, &Rfc3339) else { return cell(at) };
    let secs = now_ms / 1000 - time.unix_timestamp();
    // Two clocks that differ a little make no future.
    match secs {
        ..-60 => cell(at),
        -60..=1 => "now".to_owned(),
        2..120 => format!("{secs} s ago"),
        120..7200 => format!("{} min ago", secs / 60),
        7200..172_800 => format!("{} h ago", secs / 3600),
        _ => format!("{} d ago", secs / 86_400),
    }
}

pub fn bytes(n: u64) -> String {
    let mut value = n as f64;
    for unit in ["B", "KiB", "MiB", "GiB", "TiB"] {
        if value < 1024.0 || unit == "TiB" {
            return if unit == "B" { format!("{n} B") } else { format!("{value:.1} {unit}") };
        }
        value /= 1024.0;
    }
    unreachable!("the last unit takes every value")
}

/// `k=v` pairs on one line.
pub fn pairs<V: std::fmt::Display>(map: &std::collections::BTreeMap<String, V>) -> String {
    // A value that is not known, such as a runtime's version, leaves the name alone.
    let text: Vec<_> = map.iter().map(|(k, v)| format!("{k}={v}").trim_end_matches('=').to_owned()).collect();
    or_dash(Some(&text.join(" ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_is_not_commanded() {
        assert_eq!(cell("a\x1b[31mb\nc\u{202e}d"), "a\\u{1b}[31mb\\nc\\u{202e}d");
        assert_eq!(cell("Jürgen 机器"), "Jürgen 机器");
    }

    #[test]
    fn ages_and_sizes() {
        let now = 1_800_000_000_000;
        let at = |secs: i64| OffsetDateTime::from_unix_timestamp(1_800_000_000 - secs).unwrap().format(&Rfc3339).unwrap();
        let check = |secs, expect: &str| assert_eq!(ago(Some(&at(secs)), now), expect);
        check(0, "now");
        check(-30, "now");
        check(59, "59 s ago");
        check(600, "10 min ago");
        check(7200, "2 h ago");
        check(864_000, "10 d ago");
        assert_eq!(ago(Some(&at(-3600)), now), at(-3600));
        assert_eq!(ago(None, now), "never");
        assert_eq!([bytes(0), bytes(1023), bytes(1536), bytes(1 << 40)], ["0 B", "1023 B", "1.5 KiB", "1.0 TiB"]);
    }

    #[test]
    fn a_table_is_plain() {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let mut io = Io { out: &mut out, err: &mut err };
        list(&mut io, Format::Table, &[("a", "long one"), ("bcd", "x")], &["id", "name"], |t| vec![t.0.into(), t.1.into()]).unwrap();
        assert_eq!(String::from_utf8(out).unwrap(), "ID   NAME\na    long one\nbcd  x\n");
    }
}
