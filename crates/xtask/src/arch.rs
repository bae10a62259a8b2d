//! `check-arch`: the rules of `ARCHITECTURE.md` that a program can check.
//!
//! One table of edges, one table of crates that a room must not know, and what must stand in the
//! tree. Each finding says which rule, where, and how to mend it.

pub mod files;
pub mod graph;

use anyhow::{Context, Result};
use cargo_metadata::{CargoOpt, MetadataCommand};
use graph::{Graph, Kind};
use std::fmt;

/// May stand in place of a list of targets.
const ANY: &[&str] = &["*"];

/// Room → rooms that it may depend on, by folder name. Nothing else is allowed.
/// `ARCHITECTURE.md` repeats it for people; a difference is a finding.
pub const EDGES: &[(&str, &[&str])] = &[
    ("mesh-core", &[]),
    ("mesh-process", &[]),
    ("mesh-wire", &["mesh-core"]),
    ("hub-engine", &["mesh-core", "mesh-process"]),
    ("hub-store", &["mesh-core", "mesh-process", "hub-engine"]),
    ("hub", &["mesh-core", "mesh-wire", "mesh-process", "hub-engine", "hub-store"]),
    ("node-warden", &["mesh-core"]),
    ("node", &["mesh-core", "mesh-wire", "mesh-process", "node-warden"]),
    ("cortex", &["mesh-core", "mesh-wire", "mesh-process"]),
    ("hub-testkit", &["mesh-core", "mesh-process", "hub-engine"]),
    ("xtask", &["mesh-core", "mesh-wire", "mesh-process", "node", "cortex"]),
    ("tests", ANY),
];

/// The only targets of dev edges.
const TESTKITS: &[&str] = &["mesh-testkit", "hub-testkit"];

/// How far a ban on an external crate looks.
#[derive(Clone, Copy, PartialEq)]
enum Reach {
    /// The room must not name it.
    Named,
    /// Nothing below the room may bring it in either.
    Below,
}
use Reach::{Below, Named};

/// What a room must not know of the world outside.
const STRANGERS: &[(&str, Reach, &[&str])] = &[
    ("mesh-core", Below, &["tokio", "sqlx", "tonic", "axum"]),
    ("mesh-core", Named, &["serde", "serde_json"]),
    ("mesh-wire", Below, &["sqlx"]),
    ("mesh-wire", Named, &["tokio"]),
    ("hub-engine", Below, &["sqlx", "axum", "tonic"]),
    ("hub-engine", Named, &["serde_json"]),
    ("hub", Named, &["sqlx"]),
    ("node-warden", Below, &["tokio"]),
    ("node", Below, &["sqlx"]),
];

/// In no shipped program: one TLS provider, no C library of the system, no unsound RSA.
const BANNED: &[(&str, &str)] = &[
    ("ring", "aws-lc-rs is the one crypto provider; switch the feature that brings it in"),
    ("openssl-sys", "programs must be static; use the rustls feature of the crate that brings it in"),
    ("rsa", "its timing leaks keys; leave out the feature that brings it in"),
];

/// A broken rule.
#[derive(Debug, PartialEq, Eq)]
pub struct Finding {
    pub rule: &'static str,
    /// A file, a crate or an edge.
    pub place: String,
    pub what: String,
    pub mend: String,
}

impl Finding {
    pub fn new(rule: &'static str, place: impl Into<String>, what: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { rule, place: place.into(), what: what.into(), mend: mend.into() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}] {}: {}\n    mend: {}", self.rule, self.place, self.what, self.mend)
    }
}

/// Checks the workspace of the current folder; true when all is well.
pub fn run() -> Result<bool> {
    let meta = MetadataCommand::new()
        .features(CargoOpt::AllFeatures)
        .other_options(["--locked".to_owned(), "--filter-platform=x86_64-unknown-linux-gnu".to_owned()])
        .exec()
        .context("cargo metadata")?;
    let root = meta.workspace_root.as_std_path();
    let graph = Graph::of(&meta)?;

    let mut findings = check_graph(&graph);
    let tree = files::check(root, &graph)?;
    findings.extend(tree.findings);
    for note in &tree.notes {
        println!("note: {note}");
    }
    for f in &findings {
        println!("{f}");
    }
    match findings.len() {
        0 => println!("check-arch: {} rooms, all rules hold", graph.rooms.len()),
        n => println!("check-arch: {n} broken rule{}; see ARCHITECTURE.md", if n == 1 { "" } else { "s" }),
    }
    Ok(findings.is_empty())
}

/// The rules about who depends on whom.
pub fn check_graph(graph: &Graph) -> Vec<Finding> {
    let mut out = vec![];
    check_table(graph, &mut out);
    check_edges(graph, &mut out);
    check_strangers(graph, &mut out);
    check_banned(graph, &mut out);
    out
}

fn allowed(room: &str) -> Option<&'static [&'static str]> {
    EDGES.iter().find(|(r, _)| *r == room).map(|(_, to)| *to)
}

fn check_table(graph: &Graph, out: &mut Vec<Finding>) {
    for room in &graph.rooms {
        if allowed(&room.name).is_none() {
            out.push(Finding::new(
                "rooms",
                &room.name,
                "a crate that the table of edges does not have",
                "make it a module, or give it a row in EDGES (xtask) and in ARCHITECTURE.md with what it must not know",
            ));
        }
    }
    for (room, _) in EDGES {
        if !graph.rooms.iter().any(|r| r.name == *room) {
            out.push(Finding::new("rooms", *room, "a row without a crate", "take it out of EDGES (xtask) and of ARCHITECTURE.md"));
        }
    }
}

fn check_edges(graph: &Graph, out: &mut Vec<Finding>) {
    for room in &graph.rooms {
        let Some(may) = allowed(&room.name) else { continue };
        for (to, kind) in &room.edges {
            let place = format!("{} -> {to}", room.name);
            if may == ANY {
                continue;
            }
            match kind {
                Kind::Normal if !may.contains(&to.as_str()) => out.push(Finding::new(
                    "edges",
                    place,
                    "this edge is not allowed",
                    format!("move what is needed down into a room that both may know, or hand it in through a port; {}", {
                        if may.is_empty() {
                            format!("{} knows no other room", room.name)
                        } else {
                            format!("{} may know {}", room.name, may.join(", "))
                        }
                    }),
                )),
                Kind::Dev if !TESTKITS.contains(&to.as_str()) => out.push(Finding::new(
                    "dev edges",
                    place,
                    "a dev edge leads to a testkit or nowhere",
                    "put the fixture into a testkit, or the test into tests/",
                )),
                _ => {}
            }
        }
    }
}

fn check_strangers(graph: &Graph, out: &mut Vec<Finding>) {
    for (name, reach, bans) in STRANGERS {
        let Some(room) = graph.rooms.iter().find(|r| r.name == *name) else { continue };
        for ban in *bans {
            if room.names.iter().any(|d| d == ban) {
                out.push(Finding::new(
                    "strangers",
                    format!("{name} -> {ban}"),
                    format!("{name} must not know {ban}"),
                    format!("take {ban} out of crates/{name}/Cargo.toml; its work belongs in another room"),
                ));
            } else if *reach == Below
                && let Some(way) = graph.way(&room.id, ban)
            {
                out.push(Finding::new(
                    "strangers",
                    way.join(" -> "),
                    format!("{name} must not know {ban}, and gets it from below"),
                    format!("drop the dependency or the feature on this way that brings {ban} in"),
                ));
            }
        }
    }
}

fn check_banned(graph: &Graph, out: &mut Vec<Finding>) {
    for (ban, mend) in BANNED {
        let way = graph.rooms.iter().filter(|r| r.name != "tests").find_map(|r| graph.way(&r.id, ban));
        if let Some(way) = way {
            out.push(Finding::new("banned", way.join(" -> "), format!("{ban} would be linked on linux"), *mend));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use graph::Room;

    /// A workspace with every room of the table, its allowed edges, and nothing else.
    fn house() -> Graph {
        let mut g = Graph::default();
        for (name, to) in EDGES {
            let edges = if *to == ANY { vec![] } else { to.iter().map(|t| (t.to_string(), Kind::Normal)).collect() };
            g.below.insert((*name).into(), edges.iter().map(|(t, _): &(String, Kind)| t.clone()).collect());
            g.names.insert((*name).into(), (*name).into());
            g.rooms.push(Room { id: (*name).into(), name: (*name).into(), edges, ..Room::default() });
        }
        g
    }
    fn room<'a>(g: &'a mut Graph, name: &str) -> &'a mut Room {
        g.rooms.iter_mut().find(|r| r.name == name).unwrap()
    }
    fn link(g: &mut Graph, from: &str, to: &str) {
        g.names.insert(to.into(), to.into());
        g.below.entry(from.into()).or_default().push(to.into());
    }
    fn found(g: &Graph) -> Vec<(&'static str, String)> {
        check_graph(g).into_iter().map(|f| (f.rule, f.place)).collect()
    }

    #[test]
    fn the_house_as_drawn_has_no_finding() {
        assert_eq!(found(&house()), []);
    }

    #[test]
    fn a_forbidden_edge_is_found() {
        let mut g = house();
        room(&mut g, "mesh-core").edges.push(("mesh-process".into(), Kind::Normal));
        room(&mut g, "node").edges.push(("hub-engine".into(), Kind::Normal));
        let f = check_graph(&g);
        assert_eq!(f.len(), 2);
        assert_eq!((f[0].rule, f[0].place.as_str()), ("edges", "mesh-core -> mesh-process"));
        assert!(f[0].mend.contains("mesh-core knows no other room"), "{}", f[0]);
        assert_eq!(f[1].place, "node -> hub-engine");
        assert!(f[1].mend.contains("node-warden"), "{}", f[1]);
    }

    #[test]
    fn dev_edges_lead_to_testkits_only() {
        let mut g = house();
        room(&mut g, "hub-store").edges.push(("hub-testkit".into(), Kind::Dev));
        room(&mut g, "tests").edges.push(("hub".into(), Kind::Dev));
        assert_eq!(found(&g), []);
        room(&mut g, "hub-store").edges.push(("hub".into(), Kind::Dev));
        room(&mut g, "hub-store").edges.push(("hub-testkit".into(), Kind::Normal));
        assert_eq!(found(&g), [("dev edges", "hub-store -> hub".into()), ("edges", "hub-store -> hub-testkit".into())]);
    }

    #[test]
    fn a_room_without_a_row_and_a_row_without_a_room() {
        let mut g = house();
        g.rooms.retain(|r| r.name != "cortex");
        g.rooms.push(Room { id: "common".into(), name: "common".into(), ..Room::default() });
        assert_eq!(found(&g), [("rooms", "common".into()), ("rooms", "cortex".into())]);
    }

    #[test]
    fn a_stranger_is_found_by_name_and_from_below() {
        let mut g = house();
        room(&mut g, "hub").names.push("sqlx".into());
        room(&mut g, "hub-engine").names.push("serde_json".into());
        assert_eq!(found(&g), [("strangers", "hub-engine -> serde_json".into()), ("strangers", "hub -> sqlx".into())]);

        let mut g = house();
        link(&mut g, "mesh-core", "helper");
        link(&mut g, "helper", "tokio");
        let all = found(&g);
        assert!(all.contains(&("strangers", "mesh-core -> helper -> tokio".into())), "{all:?}");
        assert!(all.contains(&("strangers", "node-warden -> mesh-core -> helper -> tokio".into())), "{all:?}");

        // The hub reaches sqlx through its store; only its own use is forbidden.
        let mut g = house();
        link(&mut g, "hub-store", "sqlx");
        assert_eq!(found(&g), []);
    }

    #[test]
    fn a_banned_crate_is_found_with_the_way_to_it() {
        let mut g = house();
        link(&mut g, "cortex", "web-client");
        link(&mut g, "web-client", "ring");
        let f = check_graph(&g);
        assert!(f.iter().any(|f| f.rule == "banned" && f.place == "cortex -> web-client -> ring"), "{f:?}");
    }
}
