//! What must stand in the tree: the first words of a crate, compiled contracts, links that lead
//! somewhere, one home for `unsafe`.

use super::{ANY, EDGES, Finding, graph::Graph};
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};

/// Lines after which a file is named in a note.
const LONG: usize = 700;
/// Lines that the map may have.
const MAP_LINES: usize = 200;

#[derive(Debug, Default)]
pub struct Tree {
    pub findings: Vec<Finding>,
    pub notes: Vec<String>,
}

pub fn check(root: &Path, graph: &Graph) -> Result<Tree> {
    let mut tree = Tree::default();
    let out = &mut tree.findings;

    for room in &graph.rooms {
        let manifest = format!("{}/Cargo.toml", room.folder);
        if !inherits_lints(&read(root, &manifest)?) {
            out.push(Finding::new(
                "lints",
                manifest,
                "the crate does not take the workspace's lints, so no ban holds in it",
                "add `[lints]` with `workspace = true`",
            ));
        }
        if ["mesh-", "hub", "node"].iter().any(|p| room.name.starts_with(p)) {
            let lib = format!("{}/src/lib.rs", room.folder);
            out.extend(check_first_words(&lib, &read(root, &lib)?));
        }
        let mut sources = vec![];
        walk(&root.join(&room.folder), "rs", &mut sources)?;
        for path in sources {
            let text = std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
            let place = relative(root, &path);
            if room.name != "node-warden" && room.name != "tests" {
                out.extend(check_unsafe(&place, &text));
            }
            let lines = text.lines().count();
            if lines > LONG {
                tree.notes.push(format!("{place} has {lines} lines; is it still one idea?"));
            }
        }
    }

    let mut contracts = vec![];
    walk(&root.join("protos"), "proto", &mut contracts)?;
    let wire = "crates/mesh-wire";
    let (build, lib) = (read(root, &format!("{wire}/build.rs"))?, read(root, &format!("{wire}/src/lib.rs"))?);
    for path in contracts {
        let text = std::fs::read_to_string(&path)?;
        out.extend(check_contract(&relative(root, &path), &text, &build, &lib));
    }

    let map = read(root, "ARCHITECTURE.md")?;
    out.extend(check_map(&map));
    let mut pages = vec![];
    for dir in ["docs", "certs-dev"] {
        walk(&root.join(dir), "md", &mut pages)?;
    }
    for e in std::fs::read_dir(root)? {
        pages.extend(Some(e?.path()).filter(|p| p.extension().is_some_and(|x| x == "md")));
    }
    pages.sort();
    for page in pages {
        let text = std::fs::read_to_string(&page)?;
        let place = relative(root, &page);
        let dir = page.parent().unwrap_or(root);
        for (line, target) in pointers(&text) {
            let there = match &target {
                Pointer::Path(p) => root.join(p).exists(),
                Pointer::Link(p) => dir.join(p).exists(),
            };
            if !there {
                let (Pointer::Path(p) | Pointer::Link(p)) = target;
                out.push(Finding::new("links", format!("{place}:{line}"), format!("`{p}` does not exist"), "name what is there now"));
            }
        }
    }
    Ok(tree)
}

fn read(root: &Path, path: &str) -> Result<String> {
    std::fs::read_to_string(root.join(path)).with_context(|| format!("read {path}"))
}

fn relative(root: &Path, path: &Path) -> String {
    path.strip_prefix(root).unwrap_or(path).display().to_string()
}

/// Files of one kind below a folder, in order; an absent folder has none.
fn walk(dir: &Path, ext: &str, out: &mut Vec<PathBuf>) -> Result<()> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Ok(()) };
    let mut entries: Vec<_> = entries.collect::<Result<_, _>>()?;
    entries.sort_by_key(|e| e.file_name());
    for e in entries {
        if e.file_type()?.is_dir() {
            if e.file_name() != "target" {
                walk(&e.path(), ext, out)?;
            }
        } else if e.path().extension().is_some_and(|x| x == ext) {
            out.push(e.path());
        }
    }
    Ok(())
}

fn inherits_lints(manifest: &str) -> bool {
    let mut lines = manifest.lines().map(|l| l.split('#').next().unwrap_or("").trim());
    lines.by_ref().any(|l| l == "[lints]") && lines.take_while(|l| !l.starts_with('[')).any(|l| l.replace(' ', "") == "workspace=true")
}

fn check_first_words(place: &str, text: &str) -> Option<Finding> {
    let doc: Vec<&str> = text.lines().map_while(|l| l.strip_prefix("//!")).map(str::trim).collect();
    if doc.is_empty() {
        return Some(Finding::new(
            "first words",
            place,
            "the file does not begin with a `//!` doc",
            "say in the first line what the crate is, then what it does *not* know",
        ));
    }
    (!doc.join(" ").contains("does *not* know")).then(|| {
        Finding::new(
            "first words",
            place,
            "the crate's doc has no sentence with \"does *not* know\"",
            "say what the crate must not know; a crate without such a sentence is a module",
        )
    })
}

fn check_unsafe(place: &str, text: &str) -> Option<Finding> {
    let attribute = |l: &str| {
        let l = l.trim_start();
        (l.starts_with("#[") || l.starts_with("#![")) && (l.contains("allow(") || l.contains("expect(")) && l.contains("unsafe_code")
    };
    let at = text.lines().position(attribute)?;
    Some(Finding::new(
        "unsafe",
        format!("{place}:{}", at + 1),
        "unsafe code is let in here",
        "node-warden is its only home; use a safe wrapper such as rustix",
    ))
}

/// The compiler must be given the file, and the crate must include the package.
fn check_contract(place: &str, text: &str, build: &str, lib: &str) -> Option<Finding> {
    let file = place.strip_prefix("protos/").unwrap_or(place);
    let code = |t: &str| t.lines().filter(|l| !l.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
    if !code(build).contains(&format!("\"{file}\"")) {
        return Some(Finding::new(
            "contracts",
            place,
            "nothing compiles this file",
            format!("name \"{file}\" in crates/mesh-wire/build.rs"),
        ));
    }
    let package = text.lines().find_map(|l| l.trim().strip_prefix("package "))?.trim_end_matches(';').trim();
    (!code(lib).contains(&format!("\"{package}\""))).then(|| {
        Finding::new(
            "contracts",
            place,
            format!("package {package} is compiled and not included"),
            "include it by `tonic::include_proto!` in crates/mesh-wire/src/lib.rs",
        )
    })
}

/// The map stays short, and its block of edges says what the table says.
fn check_map(map: &str) -> Vec<Finding> {
    let mut out = vec![];
    let lines = map.lines().count();
    if lines > MAP_LINES {
        out.push(Finding::new("map", "ARCHITECTURE.md", format!("{lines} lines; {MAP_LINES} are allowed"), "move detail into docs/"));
    }
    let mut drawn: Vec<(String, Vec<String>)> = vec![];
    for l in map.lines().skip_while(|l| l.trim() != "```edges").skip(1).take_while(|l| l.trim() != "```") {
        if let Some((from, to)) = l.split_once("->") {
            drawn.push((from.trim().into(), to.split_whitespace().filter(|t| *t != "(none)").map(Into::into).collect()));
        }
    }
    for (room, to) in EDGES {
        let want: Vec<&str> = if *to == ANY { vec!["any"] } else { to.to_vec() };
        match drawn.iter().position(|(r, _)| r == room).map(|i| drawn.swap_remove(i).1) {
            Some(got) if got.iter().map(String::as_str).eq(want.iter().copied()) => {}
            got => out.push(Finding::new(
                "map",
                "ARCHITECTURE.md",
                format!("the block `edges` says {room} -> {}", got.map_or("nothing".into(), |g| g.join(" "))),
                format!(
                    "the table in xtask says {room} -> {}; make them the same",
                    if want.is_empty() { "(none)".into() } else { want.join(" ") }
                ),
            )),
        }
    }
    for (room, _) in drawn {
        out.push(Finding::new(
            "map",
            "ARCHITECTURE.md",
            format!("the block `edges` has {room}, the table in xtask has not"),
            "make them the same",
        ));
    }
    out
}

#[derive(Debug, PartialEq, Eq)]
enum Pointer {
    /// From the root: `crates/…` and its siblings in code marks.
    Path(String),
    /// From the page.
    Link(String),
}

/// What a page points at in this tree, by line. A placeholder such as `<noun>` or `NNNN` ends a path
/// at the folder before it; code blocks are skipped.
fn pointers(text: &str) -> Vec<(usize, Pointer)> {
    let mut out = vec![];
    let mut code = false;
    for (n, line) in text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            code = !code;
            continue;
        }
        if code {
            continue;
        }
        for (i, span) in line.split('`').enumerate() {
            let tree = ["crates/", "protos/", "docs/", "scripts/", "tests/"].iter().any(|p| span.starts_with(p));
            if i % 2 == 1 && tree && !span.contains(' ') {
                let path = match span.find(['<', '{', '*', '…']).or_else(|| span.find("NNNN")) {
                    Some(end) => &span[..span[..end].rfind('/').unwrap_or(0)],
                    None => span.split("::").next().unwrap_or(span),
                };
                out.push((n + 1, Pointer::Path(path.trim_end_matches('/').into())));
            }
        }
        for part in line.split("](").skip(1) {
            let target = part.split(')').next().unwrap_or("").split('#').next().unwrap_or("");
            if !target.is_empty() && !target.contains("://") && !target.starts_with("mailto:") {
                out.push((n + 1, Pointer::Link(target.into())));
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_words() {
        let said = |t| check_first_words("lib.rs", t).map(|f| f.what);
        assert_eq!(said("//! A room.\n//!\n//! It does *not*\n//! know SQL.\nmod a;\n"), None);
        assert!(said("//! A room.\nmod a;\n// does *not* know\n").unwrap().contains("no sentence"));
        assert!(said("mod a;\n").unwrap().contains("does not begin"));
    }

    #[test]
    fn lints_are_inherited() {
        assert!(inherits_lints("[package]\n\n[lints]\nworkspace = true\n"));
        assert!(!inherits_lints("[package]\nversion.workspace = true\n"));
        assert!(!inherits_lints("[lints]\n[x]\nworkspace = true\n"));
        assert!(!inherits_lints("# [lints]\n# workspace = true\n"));
    }

    #[test]
    fn unsafe_has_one_home() {
        assert!(check_unsafe("a.rs", "fn f() {}\n#[allow(unsafe_code)]\n").unwrap().place.ends_with(":2"));
        assert!(check_unsafe("a.rs", "#![expect(unsafe_code, reason = \"x\")]\n").is_some());
        assert!(check_unsafe("a.rs", "// allow(unsafe_code) is not for us\n#![forbid(unsafe_code)]\n").is_none());
    }

    #[test]
    fn a_contract_is_compiled_and_included() {
        let proto = "syntax = \"proto3\";\npackage cortex.node.v1;\n";
        let (build, lib) = ("compile([\"cortex/node/v1/node.proto\"])", "include_proto!(\"cortex.node.v1\")");
        let check = |b: &str, l: &str| check_contract("protos/cortex/node/v1/node.proto", proto, b, l).map(|f| f.what);
        assert_eq!(check(build, lib), None);
        assert!(check(&format!("// {build}"), lib).unwrap().contains("nothing compiles"));
        assert!(check(build, "").unwrap().contains("not included"));
    }

    #[test]
    fn the_map_says_what_the_table_says() {
        let mut map = String::from("```edges\n");
        for (room, to) in EDGES {
            let to = if *to == ANY { "any".into() } else { to.join(" ") };
            map += &format!("{room} -> {}\n", if to.is_empty() { "(none)" } else { &to });
        }
        map += "```\n";
        assert_eq!(check_map(&map), []);
        assert_eq!(check_map(&map.replace("mesh-core -> (none)", "mesh-core -> mesh-wire")).len(), 1);
        assert_eq!(check_map(&map.replace("cortex ->", "cortx ->")).len(), 2);
        assert_eq!(check_map(&format!("{map}{}", "\n".repeat(MAP_LINES))).len(), 1);
    }

    #[test]
    fn pointers_of_a_page() {
        let page = "See `crates/hub/src/lib.rs` and `crates/hub/src/doors/rest/<noun>.rs`.\n```\n`crates/nowhere`\n```\n\
                    [a](docs/a.md#b) [c](https://example.org) `not/here` `crates/x::y` `docs/decisions/NNNN-title.md`\n";
        let path = |p: &str| Pointer::Path(p.into());
        assert_eq!(
            pointers(page),
            [
                (1, path("crates/hub/src/lib.rs")),
                (1, path("crates/hub/src/doors/rest")),
                (5, path("crates/x")),
                (5, path("docs/decisions")),
                (5, Pointer::Link("docs/a.md".into())),
            ]
        );
    }
}
