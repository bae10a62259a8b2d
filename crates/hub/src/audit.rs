//! The audit log as text: checkpoints in files beside the database, and an export that is verified with
//! nothing but itself.

use crate::keys::Keys;
use anyhow::{Context, Result, bail, ensure};
use hub_engine::audit::Log;
use hub_engine::ports::{Meta, Noted, Witness};
use hub_store::Store;
use mesh_core::audit::{Checkpoint, Detail, Head, Person, Row, Salt, Signed, follow};
use mesh_core::{ChainId, Digest};
use mesh_process::{SharedClock, Tasks, entropy, files};
use mesh_wire::convert::{parse_rfc3339, rfc3339};
use mesh_wire::rest::{AuditActor, AuditCheckpoint, AuditEntry, AuditExportEnd, AuditHead, AuditResource};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// In the data folder: who this hub process is, and a file of checkpoints for each of its chains.
const FOLDER: &str = "audit";
const IDENTITY: &str = "identity";
const LINES: &str = ".jsonl";
/// How the last line of an export begins, and no other one.
const END: &[u8] = b"{\"checkpoint\":";
/// The longest line that anybody writes is far below.
const MAX_LINE: u64 = 1 << 20;

/// What tells this hub process from others on the same database; made once.
pub fn identity(data_dir: &Path) -> Result<[u8; 16]> {
    let dir = data_dir.join(FOLDER);
    files::private_dir(&dir).with_context(|| dir.display().to_string())?;
    let path = dir.join(IDENTITY);
    let mut id = entropy::bytes();
    match std::fs::read_to_string(&path) {
        Ok(text) => hex::decode_to_slice(text.trim(), &mut id).with_context(|| path.display().to_string())?,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            files::write_private(&path, hex::encode(id).as_bytes()).with_context(|| path.display().to_string())?;
        }
        Err(e) => return Err(e).with_context(|| path.display().to_string()),
    }
    Ok(id)
}

/// The log of the hub whose data folder this is, which goes on with its own chain.
pub async fn log(
    data_dir: &Path,
    store: &Arc<Store>,
    keys: &Arc<Keys>,
    incarnation: u32,
    clock: SharedClock,
    work: Tasks,
) -> Result<Arc<Log>> {
    let log = Arc::new(Log {
        store: store.clone(),
        witness: Arc::new(Files::of(data_dir)),
        keyring: keys.clone(),
        hub: keys.hub,
        clock,
        work,
        bounds: Default::default(),
    });
    let restored = store.restored().await?.is_some();
    log.start(&identity(data_dir)?, incarnation, restored).await.context("the audit log")?;
    Ok(log)
}

/// Checkpoints in `{data_dir}/audit`, one file for each chain of this process.
pub struct Files {
    dir: PathBuf,
}

impl Files {
    pub fn of(data_dir: &Path) -> Self {
        Self { dir: data_dir.join(FOLDER) }
    }
    fn path(&self, chain: ChainId) -> PathBuf {
        self.dir.join(format!("{chain}{LINES}"))
    }
}

impl Witness for Files {
    fn note(&self, signed: &Signed) -> io::Result<()> {
        let [head] = signed.checkpoint.heads.as_slice() else { return Err(io::Error::other("a checkpoint that is noted is of one chain")) };
        let path = self.path(head.chain);
        let new = !path.exists();
        let mut file = OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(&path)?;
        let mut line = serde_json::to_vec(&shown(signed))?;
        line.push(b'\n');
        // A line that a crash cut off must not take this one with it.
        let end = file.seek(SeekFrom::End(0))?;
        if end > 0 {
            file.seek(SeekFrom::End(-1))?;
            let mut last = [0];
            file.read_exact(&mut last)?;
            if last != *b"\n" {
                line.insert(0, b'\n');
            }
        }
        file.write_all(&line)?;
        file.sync_data()?;
        if new { File::open(&self.dir)?.sync_all() } else { Ok(()) }
    }

    fn chains(&self) -> io::Result<Vec<(ChainId, u64)>> {
        let mut chains = vec![];
        for entry in std::fs::read_dir(&self.dir)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if let Some(chain) = name.strip_suffix(LINES).and_then(|n| n.parse().ok()) {
                chains.push((chain, entry.metadata()?.len()));
            }
        }
        Ok(chains)
    }

    fn read_to(&self, chain: ChainId, bytes: u64) -> io::Result<Noted> {
        let file = match File::open(self.path(chain)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Box::new(std::iter::empty())),
            file => file?,
        };
        let lines = BufReader::new(file.take(bytes)).split(b'\n');
        let read = |line: io::Result<Vec<u8>>| match line {
            Err(e) => Some(Err(e)),
            // What a crash left of a line is cut in the middle, and so is no document.
            Ok(line) => match serde_json::from_slice::<AuditCheckpoint>(&line) {
                Ok(c) => Some(signed(&c).map_err(io::Error::other)),
                Err(e) if e.is_eof() => None,
                Err(e) => Some(Err(e.into())),
            },
        };
        Ok(Box::new(lines.filter_map(read)))
    }
}

fn digest(text: &str) -> Result<Digest> {
    let mut out = [0; 32];
    hex::decode_to_slice(text, &mut out).with_context(|| format!("{text:?} is not a hash"))?;
    Ok(out)
}

/// As JSON says it.
pub fn shown(signed: &Signed) -> AuditCheckpoint {
    let c = &signed.checkpoint;
    let head = |h: &Head| AuditHead { chain: h.chain.to_string(), seq: h.seq, hash: hex::encode(h.hash) };
    AuditCheckpoint {
        hub_id: c.hub.to_string(),
        at: rfc3339(c.at),
        heads: c.heads.iter().map(head).collect(),
        key: hex::encode(signed.key),
        signature: hex::encode(&signed.signature),
    }
}

fn signed(c: &AuditCheckpoint) -> Result<Signed> {
    let head = |h: &AuditHead| Ok(Head { chain: h.chain.parse()?, seq: h.seq, hash: digest(&h.hash)? });
    let heads = c.heads.iter().map(head).collect::<Result<_>>()?;
    let checkpoint = Checkpoint { hub: c.hub_id.parse()?, at: parse_rfc3339(&c.at)?, heads };
    Ok(Signed { checkpoint, key: digest(&c.key)?, signature: hex::decode(&c.signature)? })
}

/// A row as JSON says it: [`row`] makes the same row of it.
pub fn entry(row: Row) -> AuditEntry {
    let person = row.person.as_deref().and_then(|p| Person::decode(p).ok());
    let detail = row.detail.as_deref().and_then(|d| Detail::decode(d).ok());
    let (person_salt, detail_salt) = (person.as_ref().map(|p| hex::encode(p.1)), detail.as_ref().map(|d| hex::encode(d.1)));
    let person = person.map(|p| p.0).unwrap_or_default();
    AuditEntry {
        chain: row.chain.to_string(),
        seq: row.seq,
        id: row.id.to_string(),
        at: rfc3339(row.at),
        kind: row.kind,
        action: row.action,
        actor: AuditActor {
            user_id: row.user.map(|u| u.to_string()),
            username: person.username,
            key_id: row.key.map(|k| k.to_string()),
            agent: row.agent,
            door: row.door,
        },
        resource: AuditResource { kind: row.resource_kind, id: row.resource_id },
        outcome: row.outcome,
        session_id: row.session.map(|s| s.to_string()),
        address: person.address,
        request_id: person.request_id,
        detail: detail.map(|d| d.0.0),
        person_hash: hex::encode(row.person_digest),
        person_salt,
        detail_hash: hex::encode(row.detail_digest),
        detail_salt,
        prev_hash: hex::encode(row.prev),
        hash: hex::encode(row.hash),
    }
}

fn row(e: AuditEntry) -> Result<Row> {
    let salt = |text: &str| -> Result<Salt> {
        let mut salt = [0; 16];
        hex::decode_to_slice(text, &mut salt).context("a salt")?;
        Ok(salt)
    };
    let person = Person { username: e.actor.username, address: e.address, request_id: e.request_id };
    let person = match e.person_salt.as_deref() {
        Some(text) => Some(person.encode(&salt(text)?)),
        None if person == Person::default() => None,
        None => bail!("a person that nothing was signed of"),
    };
    let detail = match (e.detail, e.detail_salt.as_deref()) {
        (Some(detail), Some(text)) => Some(Detail(detail).encode(&salt(text)?)),
        (None, None) => None,
        _ => bail!("a detail that nothing was signed of"),
    };
    Ok(Row {
        chain: e.chain.parse()?,
        seq: e.seq,
        id: e.id.parse()?,
        at: parse_rfc3339(&e.at)?,
        kind: e.kind,
        action: e.action,
        user: e.actor.user_id.map(|id| id.parse()).transpose()?,
        key: e.actor.key_id.map(|id| id.parse()).transpose()?,
        agent: e.actor.agent,
        door: e.actor.door,
        resource_kind: e.resource.kind,
        resource_id: e.resource.id,
        outcome: e.outcome,
        session: e.session_id.map(|id| id.parse()).transpose()?,
        person_digest: digest(&e.person_hash)?,
        detail_digest: digest(&e.detail_hash)?,
        prev: digest(&e.prev_hash)?,
        hash: digest(&e.hash)?,
        person,
        detail,
    })
}

/// The last line of an export.
pub fn end(signed: Option<&Signed>) -> AuditExportEnd {
    AuditExportEnd { checkpoint: signed.map(shown) }
}

/// `cortex-hub audit verify FILE`: reads an export to its end, and says what is in it. Needs no hub.
pub fn verify_file(file: &Path, pinned: Option<&str>) -> Result<Vec<String>> {
    let pinned = pinned.map(digest).transpose().context("--key: 64 hexadecimal digits")?;
    let open = File::open(file).with_context(|| file.display().to_string())?;
    let mut lines = BufReader::new(open);
    let mut heads: BTreeMap<ChainId, Head> = BTreeMap::new();
    let mut rows = 0u64;
    let mut text = vec![];
    let last = loop {
        text.clear();
        let n = rows + 1;
        if lines.by_ref().take(MAX_LINE).read_until(b'\n', &mut text).with_context(|| file.display().to_string())? == 0 {
            bail!("the file is cut off: it does not end with a signed checkpoint ({rows} rows)");
        }
        if text.starts_with(END) {
            break serde_json::from_slice::<AuditExportEnd>(&text).context("the checkpoint at the end cannot be read")?;
        }
        let entry: AuditEntry = serde_json::from_slice(&text).with_context(|| format!("line {n} is not an audit entry"))?;
        let (seq, chain) = (entry.seq, entry.chain.clone());
        let row = row(entry).with_context(|| format!("line {n}, seq {seq} of {chain}"))?;
        let head = heads.entry(row.chain).or_insert(Head::none(row.chain));
        *head = follow(head, &row).map_err(|flaw| anyhow::anyhow!("line {n}, seq {seq} of {chain}: {flaw}"))?;
        rows += 1;
    };
    text.clear();
    ensure!(lines.take(1).read_to_end(&mut text)? == 0, "there is something behind the checkpoint");
    let Some(checkpoint) = last.checkpoint else {
        bail!("the hub did not sign this export: it found that its log was changed; GET /audit/verify tells where")
    };
    let signed = signed(&checkpoint).context("the checkpoint")?;
    ensure!(signed.is_by(&[signed.key]), "the checkpoint is forged: its signature does not match");
    if let Some(pinned) = pinned {
        ensure!(signed.key == pinned, "the checkpoint is signed by {}, and not by the pinned key", hex::encode(signed.key));
    }
    let told: BTreeMap<ChainId, Head> = signed.checkpoint.heads.iter().filter(|h| h.seq > 0).map(|h| (h.chain, *h)).collect();
    ensure!(told == heads, "the rows are not those that were signed: some are missing, or too many, or were made anew");
    let mut out = vec![format!("{rows} rows, whole and as they were written")];
    out.extend(heads.values().map(|h| format!("chain   {} up to {}, {}", h.chain, h.seq, hex::encode(h.hash))));
    out.push(format!("hub     {}", signed.checkpoint.hub));
    out.push(format!("signed  {} by {}", rfc3339(signed.checkpoint.at), hex::encode(signed.key)));
    if pinned.is_none() {
        out.push("the signer was not checked: compare the key with that of the hub (cortex-hub ca show), or give --key".into());
    }
    Ok(out)
}
