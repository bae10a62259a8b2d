//! Who depends on whom, reduced to what the rules ask.

use anyhow::{Context, Result};
use cargo_metadata::{DependencyKind, Metadata, Node, NodeDep, Package, TargetKind};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// The rooms of the workspace, and below them all that would be linked into a program.
#[derive(Debug, Default)]
pub struct Graph {
    pub rooms: Vec<Room>,
    /// Package id → ids of its normal dependencies on linux. Procedural macros are left out: they
    /// run in the compiler and are not linked.
    pub below: BTreeMap<String, Vec<String>>,
    /// Package id → name.
    pub names: BTreeMap<String, String>,
}

/// A crate of the workspace.
#[derive(Debug, Default)]
pub struct Room {
    pub id: String,
    /// The folder's name.
    pub name: String,
    /// The folder, relative to the workspace.
    pub folder: String,
    /// Other rooms that it names.
    pub edges: Vec<(String, Kind)>,
    /// Crates of the outside that it names as normal dependencies.
    pub names: Vec<String>,
}

/// A dependency for building counts as normal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Normal,
    Dev,
}

impl Graph {
    pub fn of(meta: &Metadata) -> Result<Self> {
        let mut graph = Self::default();
        let members = meta.workspace_packages();
        let mut folders = BTreeMap::new();
        for p in &members {
            let folder = p.manifest_path.parent().context("a manifest without a folder")?;
            folders.insert(p.name.to_string(), folder);
        }
        for p in &members {
            let folder = folders[p.name.as_str()];
            let mut room = Room {
                id: p.id.repr.clone(),
                name: folder.file_name().unwrap_or_default().to_owned(),
                folder: folder.strip_prefix(&meta.workspace_root).unwrap_or(folder).to_string(),
                ..Room::default()
            };
            for d in &p.dependencies {
                match folders.get(d.name.as_str()).filter(|_| d.path.is_some()) {
                    Some(to) => {
                        let kind = if d.kind == DependencyKind::Development { Kind::Dev } else { Kind::Normal };
                        room.edges.push((to.file_name().unwrap_or_default().to_owned(), kind));
                    }
                    None if d.kind == DependencyKind::Normal => room.names.push(d.name.to_string()),
                    None => {}
                }
            }
            graph.rooms.push(room);
        }

        let macros: BTreeSet<_> =
            meta.packages.iter().filter(|p| p.targets.iter().any(|t| t.kind.contains(&TargetKind::ProcMacro))).map(|p| &p.id).collect();
        for p in &meta.packages {
            graph.names.insert(p.id.repr.clone(), p.name.to_string());
        }
        for node in &meta.resolve.as_ref().context("cargo metadata gave no resolved graph")?.nodes {
            let package = meta.packages.iter().find(|p| p.id == node.id);
            let linked = |d: &&NodeDep| {
                d.dep_kinds.iter().any(|k| k.kind == DependencyKind::Normal)
                    && !macros.contains(&d.pkg)
                    && package.is_none_or(|p| is_on(p, node, graph.names.get(&d.pkg.repr)))
            };
            let below = node.deps.iter().filter(linked).map(|d| d.pkg.repr.clone()).collect();
            graph.below.insert(node.id.repr.clone(), below);
        }
        Ok(graph)
    }

    /// The shortest way from a package down to a crate of this name, both ends included.
    pub fn way(&self, from: &str, name: &str) -> Option<Vec<String>> {
        let mut came: BTreeMap<&str, Option<&str>> = BTreeMap::from([(from, None)]);
        let mut queue = VecDeque::from([from]);
        while let Some(at) = queue.pop_front() {
            if self.names.get(at).is_some_and(|n| n == name) {
                let mut way = vec![];
                let mut step = Some(at);
                while let Some(id) = step {
                    way.push(self.names[id].clone());
                    step = came[id];
                }
                way.reverse();
                return Some(way);
            }
            for next in self.below.get(at).into_iter().flatten() {
                if !came.contains_key(next.as_str()) {
                    came.insert(next, Some(at));
                    queue.push_back(next);
                }
            }
        }
        None
    }
}

/// Whether a dependency is really built. Cargo's metadata lists an optional one already when a
/// feature only mentions it (`ring?/alloc`); it is on when a feature asks for it.
fn is_on(package: &Package, node: &Node, name: Option<&String>) -> bool {
    let declared: Vec<_> =
        package.dependencies.iter().filter(|d| d.kind == DependencyKind::Normal && Some(&d.name.to_string()) == name).collect();
    declared.is_empty()
        || declared.iter().any(|d| {
            let key = d.rename.as_deref().unwrap_or(d.name.as_str());
            !d.optional
                || node.features.iter().any(|f| {
                    let asks = |a: &String| a.strip_prefix("dep:") == Some(key) || a.split_once('/').is_some_and(|(k, _)| k == key);
                    f.as_str() == key || package.features.get(f.as_str()).is_some_and(|list| list.iter().any(asks))
                })
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::check_graph;

    fn package(name: &str, folder: &str, kind: &str, dependencies: &[serde_json::Value]) -> serde_json::Value {
        serde_json::json!({
            "name": name, "version": "0.1.0", "id": name, "source": null, "dependencies": dependencies,
            "targets": [{"name": name, "kind": [kind], "crate_types": [kind], "src_path": "/w/src/lib.rs", "edition": "2024"}],
            "features": {}, "manifest_path": format!("/w/{folder}/Cargo.toml"), "edition": "2024"
        })
    }
    fn dependency(name: &str, kind: Option<&str>, path: Option<&str>) -> serde_json::Value {
        serde_json::json!({
            "name": name, "source": null, "req": "*", "kind": kind, "rename": null, "optional": false,
            "uses_default_features": true, "features": [], "target": null, "path": path, "registry": null
        })
    }
    fn node(id: &str, deps: &[(&str, Option<&str>)]) -> serde_json::Value {
        let deps: Vec<_> = deps
            .iter()
            .map(|(pkg, kind)| serde_json::json!({"name": pkg, "pkg": pkg, "dep_kinds": [{"kind": kind, "target": null}]}))
            .collect();
        serde_json::json!({"id": id, "dependencies": [], "deps": deps, "features": []})
    }

    /// What cargo prints, read as it is: a renamed package, a build-only and a macro dependency.
    #[test]
    fn metadata_becomes_rooms_and_ways() {
        let meta = serde_json::json!({
            "packages": [
                package("cortex-node", "crates/node", "lib", &[
                    dependency("hub-store", None, Some("/w/crates/hub-store")),
                    dependency("mesh-core", Some("dev"), Some("/w/crates/mesh-core")),
                    dependency("serde", None, None),
                    dependency("protox", Some("build"), None),
                ]),
                package("hub-store", "crates/hub-store", "lib", &[]),
                package("mesh-core", "crates/mesh-core", "lib", &[]),
                package("sqlx", "elsewhere/sqlx", "lib", &[]),
                package("ring", "elsewhere/ring", "lib", &[]),
                package("shiny-derive", "elsewhere/shiny", "proc-macro", &[]),
                package("protox", "elsewhere/protox", "lib", &[]),
            ],
            "workspace_members": ["cortex-node", "hub-store", "mesh-core"],
            "workspace_default_members": [],
            "resolve": {"root": null, "nodes": [
                node("cortex-node", &[("hub-store", None), ("shiny-derive", None), ("protox", Some("build"))]),
                node("hub-store", &[("sqlx", None)]),
                node("shiny-derive", &[("ring", None)]),
                node("protox", &[("ring", None)]),
            ]},
            "target_directory": "/w/target", "version": 1, "workspace_root": "/w", "metadata": null
        });
        let meta = cargo_metadata::MetadataCommand::parse(meta.to_string()).unwrap();
        let graph = Graph::of(&meta).unwrap();
        let room = graph.rooms.iter().find(|r| r.id == "cortex-node").unwrap();
        assert_eq!((room.name.as_str(), room.folder.as_str()), ("node", "crates/node"));
        assert_eq!(room.edges, [("hub-store".into(), Kind::Normal), ("mesh-core".into(), Kind::Dev)]);
        assert_eq!(room.names, ["serde"]);
        assert_eq!(graph.way("cortex-node", "sqlx").unwrap(), ["cortex-node", "hub-store", "sqlx"]);
        assert_eq!(graph.way("cortex-node", "ring"), None, "a macro and a build tool are not linked");

        let found: Vec<_> = check_graph(&graph).into_iter().filter(|f| f.rule != "rooms").map(|f| (f.rule, f.place)).collect();
        assert_eq!(
            found,
            [
                ("edges", "node -> hub-store".into()),
                ("dev edges", "node -> mesh-core".into()),
                ("strangers", "cortex-node -> hub-store -> sqlx".into()),
            ]
        );
    }
    #[test]
    fn an_optional_dependency_counts_when_a_feature_asks_for_it() {
        let on = |enabled: &[&str]| {
            let mut tls = package("tls", "elsewhere/tls", "lib", &[dependency("ring", None, None)]);
            tls["dependencies"][0]["optional"] = true.into();
            tls["features"] = serde_json::json!({"alloc": ["ring?/alloc"], "fast": ["ring/fast"], "classic": ["dep:ring"]});
            let mut at = node("tls", &[("ring", None)]);
            at["features"] = serde_json::json!(enabled);
            let meta = serde_json::json!({
                "packages": [tls, package("ring", "elsewhere/ring", "lib", &[])],
                "workspace_members": [], "workspace_default_members": [],
                "resolve": {"root": null, "nodes": [at]},
                "target_directory": "/w/target", "version": 1, "workspace_root": "/w", "metadata": null
            });
            let meta = cargo_metadata::MetadataCommand::parse(meta.to_string()).unwrap();
            Graph::of(&meta).unwrap().way("tls", "ring").is_some()
        };
        assert!(!on(&["alloc"]));
        assert!(on(&["alloc", "fast"]));
        assert!(on(&["classic"]));
        assert!(on(&["ring"]));
    }
}
