//! What a machine says it can do, as it crosses the wire and is kept.

use crate::canon::{Malformed, Reader, Tag, Writer};
use std::collections::BTreeMap;

/// A node's own words: text to show, never markup, and bounded by [`Capabilities::bounded`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Capabilities {
    pub os: String,
    pub arch: String,
    pub kernel: String,
    pub hostname: String,
    pub cpu_model: String,
    pub cpu_cores: u32,
    pub memory_bytes: u64,
    pub disk_bytes: u64,
    /// Name to version; an empty version is unknown.
    pub runtimes: BTreeMap<String, String>,
    pub skills: BTreeMap<String, String>,
    pub gpus: Vec<Gpu>,
    /// Name to whether it works here, probed by doing, and a word about it.
    pub sandbox: BTreeMap<String, (bool, String)>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Gpu {
    pub name: String,
    pub memory_bytes: u64,
}

const MAX_TEXT: usize = 200;
const MAX_ENTRIES: usize = 100;

impl Capabilities {
    /// Cuts what a node claims to sizes that a registry can hold, and takes control characters out.
    pub fn bounded(self) -> Self {
        let t = |s: String| s.chars().filter(|c| !crate::name::is_deceptive(*c)).take(MAX_TEXT).collect::<String>();
        let m = |m: BTreeMap<String, String>| m.into_iter().take(MAX_ENTRIES).map(|(k, v)| (t(k), t(v))).collect();
        Self {
            os: t(self.os),
            arch: t(self.arch),
            kernel: t(self.kernel),
            hostname: t(self.hostname),
            cpu_model: t(self.cpu_model),
            runtimes: m(self.runtimes),
            skills: m(self.skills),
            gpus: self.gpus.into_iter().take(MAX_ENTRIES).map(|g| Gpu { name: t(g.name), memory_bytes: g.memory_bytes }).collect(),
            sandbox: self.sandbox.into_iter().take(MAX_ENTRIES).map(|(k, (w, d))| (t(k), (w, t(d)))).collect(),
            ..self
        }
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new(Tag::Capabilities, 1);
        for s in [&self.os, &self.arch, &self.kernel, &self.hostname, &self.cpu_model] {
            w.str(s);
        }
        w.u32(self.cpu_cores).u64(self.memory_bytes).u64(self.disk_bytes);
        for map in [&self.runtimes, &self.skills] {
            w.u32(map.len() as u32);
            for (k, v) in map {
                w.str(k).str(v);
            }
        }
        w.u32(self.gpus.len() as u32);
        for g in &self.gpus {
            w.str(&g.name).u64(g.memory_bytes);
        }
        w.u32(self.sandbox.len() as u32);
        for (k, (works, detail)) in &self.sandbox {
            w.str(k).u8((*works).into()).str(detail);
        }
        w.finish()
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut r = Reader::new(bytes, Tag::Capabilities, 1)?;
        let mut text = || r.str().map(str::to_owned);
        let (os, arch, kernel, hostname, cpu_model) = (text()?, text()?, text()?, text()?, text()?);
        let (cpu_cores, memory_bytes, disk_bytes) = (r.u32()?, r.u64()?, r.u64()?);
        let map = |r: &mut Reader<'_>| -> Result<BTreeMap<String, String>, Malformed> {
            let n = r.count()?;
            (0..n).map(|_| Ok((r.str()?.to_owned(), r.str()?.to_owned()))).collect()
        };
        let (runtimes, skills) = (map(&mut r)?, map(&mut r)?);
        let n = r.count()?;
        let gpus = (0..n).map(|_| Ok(Gpu { name: r.str()?.to_owned(), memory_bytes: r.u64()? })).collect::<Result<_, Malformed>>()?;
        let n = r.count()?;
        let sandbox = (0..n).map(|_| Ok((r.str()?.to_owned(), (r.u8()? == 1, r.str()?.to_owned())))).collect::<Result<_, Malformed>>()?;
        r.end()?;
        Ok(Self { os, arch, kernel, hostname, cpu_model, cpu_cores, memory_bytes, disk_bytes, runtimes, skills, gpus, sandbox })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip_and_bounds() {
        let c = Capabilities {
            os: "linux\u{202e}\n".into(),
            hostname: "h".repeat(999),
            gpus: vec![Gpu { name: "g".into(), memory_bytes: 1 }],
            sandbox: [("pid_namespace".to_owned(), (true, "root".to_owned()))].into(),
            runtimes: [("git".to_owned(), String::new())].into(),
            ..Default::default()
        }
        .bounded();
        assert_eq!((c.os.as_str(), c.hostname.len()), ("linux", MAX_TEXT));
        assert_eq!(Capabilities::decode(&c.encode()).unwrap(), c);
    }
}
