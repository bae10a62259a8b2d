//! The file: a tar archive of members, then a manifest that names them, a seal and a digest.
//!
//! ```text
//! hub.db · output/… · keys.sealed? │ manifest.json │ seal │ digest
//!                                  digests of those  MAC    SHA-256 of everything before it
//! ```
//! The digest finds every altered or missing byte, without any key. The seal says that a hub with these
//! keys wrote the file: who can write a backup and is not that hub could otherwise make themselves an
//! admin by a restore. Both are of a fixed size, so that they are found from the end.

use anyhow::{Context, Result, bail, ensure};
use hmac::{Hmac, KeyInit, Mac};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

pub const DATABASE: &str = "hub.db";
pub const KEYS: &str = "keys.sealed";
pub const OUTPUT: &str = "output/";
const MANIFEST: &str = "manifest.json";
const SEAL: &str = "seal";
const DIGEST: &str = "digest";
const FORMAT: u32 = 1;
/// A manifest of a million output files has about so much.
const MAX_MANIFEST: u64 = 256 << 20;

/// A header and one block of 512 bytes.
const SHORT_MEMBER: u64 = 1024;
/// The digest and the two empty blocks that end every tar archive.
const TAIL: u64 = SHORT_MEMBER + 1024;

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    pub format: u32,
    /// Of the program that wrote it.
    pub version: String,
    pub hub_id: String,
    pub created_at_ms: i64,
    pub incarnation: u32,
    /// The newest migration of the database.
    pub schema: i64,
    pub members: BTreeMap<String, Member>,
    /// Output that was erased while the backup was made.
    pub erased: Vec<String>,
    /// Output that the database counts on and that was not there.
    pub missing: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Member {
    pub bytes: u64,
    pub sha256: String,
}

impl Manifest {
    pub fn new(hub_id: String, created_at_ms: i64, incarnation: u32, schema: i64) -> Self {
        let version = env!("CARGO_PKG_VERSION").to_owned();
        let (members, erased, missing) = (BTreeMap::new(), vec![], vec![]);
        Self { format: FORMAT, version, hub_id, created_at_ms, incarnation, schema, members, erased, missing }
    }
    pub fn has_keys(&self) -> bool {
        self.members.contains_key(KEYS)
    }
    pub fn bytes(&self) -> u64 {
        self.members.values().map(|m| m.bytes).sum()
    }
}

/// What passes through, and its digest.
struct Hashed<T> {
    inner: T,
    hash: Sha256,
}

impl<T> Hashed<T> {
    fn new(inner: T) -> Self {
        Self { inner, hash: Sha256::new() }
    }
    fn so_far(&self) -> [u8; 32] {
        self.hash.clone().finalize().into()
    }
}
impl<T: Write> Write for Hashed<T> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(bytes)?;
        self.hash.update(&bytes[..n]);
        Ok(n)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}
impl<T: Read> Read for Hashed<T> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(to)?;
        self.hash.update(&to[..n]);
        Ok(n)
    }
}

fn header(name: &str, bytes: u64, at_ms: i64) -> Result<tar::Header> {
    let mut header = tar::Header::new_ustar();
    header.set_path(name).with_context(|| format!("the name {name}"))?;
    header.set_size(bytes);
    header.set_mode(0o600);
    header.set_mtime((at_ms / 1000).max(0) as u64);
    header.set_cksum();
    Ok(header)
}

fn sealed(key: &[u8; 32], digest: &[u8; 32]) -> Hmac<Sha256> {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes a key of any length");
    mac.update(digest);
    mac
}

/// The end of a file whose body has this digest.
fn tail(digest: &[u8; 32]) -> Result<Vec<u8>> {
    let text = hex::encode(digest);
    let mut tail = header(DIGEST, text.len() as u64, 0)?.as_bytes().to_vec();
    tail.extend_from_slice(text.as_bytes());
    tail.resize(TAIL as usize, 0);
    Ok(tail)
}

/// A backup that is being written. It has its name when it is whole and synced, and not before.
pub struct Writer {
    to: PathBuf,
    part: PathBuf,
    /// Until it is finished.
    tar: Option<tar::Builder<Hashed<BufWriter<File>>>>,
    manifest: Manifest,
    named: bool,
}

impl Writer {
    /// `to` must not be there.
    pub fn begin(to: &Path, manifest: Manifest) -> Result<Self> {
        ensure!(std::fs::symlink_metadata(to).is_err(), "{} is there already; a backup is never written over a file", to.display());
        let part = beside(to, "part")?;
        let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&part);
        let file = file.with_context(|| part.display().to_string())?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => bail!("another backup to {} is under way", to.display()),
            Err(TryLockError::Error(e)) => return Err(e).with_context(|| part.display().to_string()),
        }
        // What a killed backup left.
        file.set_len(0)?;
        let tar = tar::Builder::new(Hashed::new(BufWriter::with_capacity(1 << 20, file)));
        Ok(Self { to: to.to_owned(), part, tar: Some(tar), manifest, named: false })
    }

    pub fn manifest(&mut self) -> &mut Manifest {
        &mut self.manifest
    }

    /// Adds exactly `bytes` of `from`; fewer fail.
    pub fn add(&mut self, name: &str, bytes: u64, from: impl Read) -> Result<()> {
        let header = header(name, bytes, self.manifest.created_at_ms)?;
        let mut from = Hashed::new(from.take(bytes));
        let tar = self.tar.as_mut().context("it was finished before")?;
        tar.append(&header, &mut from).with_context(|| format!("writing {name} to {}", self.part.display()))?;
        ensure!(from.inner.limit() == 0, "{name} became shorter while it was read");
        self.manifest.members.insert(name.to_owned(), Member { bytes, sha256: hex::encode(from.so_far()) });
        Ok(())
    }

    /// Ends the file under its seal and gives it its name.
    pub fn finish(mut self, seal_key: &[u8; 32]) -> Result<Manifest> {
        let at = self.manifest.created_at_ms;
        let manifest = serde_json::to_vec(&self.manifest)?;
        let wrong = format!("writing {}", self.part.display());
        let mut tar = self.tar.take().context("it was finished before")?;
        tar.append(&header(MANIFEST, manifest.len() as u64, at)?, &manifest[..]).context(wrong.clone())?;
        let seal = hex::encode(sealed(seal_key, &tar.get_ref().so_far()).finalize().into_bytes());
        tar.append(&header(SEAL, seal.len() as u64, at)?, seal.as_bytes()).context(wrong.clone())?;
        let digest = hex::encode(tar.get_ref().so_far());
        tar.append(&header(DIGEST, digest.len() as u64, 0)?, digest.as_bytes()).context(wrong.clone())?;
        // Writes the two empty blocks.
        let mut out = tar.into_inner().context(wrong.clone())?;
        out.flush().and_then(|()| out.inner.get_ref().sync_all()).context(wrong)?;
        name(&self.part, &self.to).with_context(|| self.to.display().to_string())?;
        self.named = true;
        let folder = folder_of(&self.to);
        File::open(folder).and_then(|f| f.sync_all()).with_context(|| folder.display().to_string())?;
        Ok(self.manifest.clone())
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if !self.named {
            // What is left of it fills a disk that may be full already.
            let _ = std::fs::remove_file(&self.part);
        }
    }
}

/// A hidden file beside `path`.
pub fn beside(path: &Path, end: &str) -> Result<PathBuf> {
    let name = path.file_name().with_context(|| format!("{} is no name for a file", path.display()))?;
    Ok(folder_of(path).join(format!(".{}.{end}", name.to_string_lossy())))
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Renames, and never over a file.
fn name(from: &Path, to: &Path) -> io::Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // A file system that cannot: a second name can be made only where there is none.
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => std::fs::hard_link(from, to).and_then(|()| std::fs::remove_file(from)),
        done => Ok(done?),
    }
}

/// A backup of which every byte is as it was written.
pub struct Archive {
    path: PathBuf,
    file: File,
    /// Where members end.
    body: u64,
    pub manifest: Manifest,
    seal: Vec<u8>,
    sealed: [u8; 32],
}

impl Archive {
    /// Reads the file to its end; fails when a byte is missing or other than it was.
    pub fn open(path: &Path) -> Result<Self> {
        let named = || path.display().to_string();
        let mut file = File::open(path).with_context(named)?;
        let length = file.metadata().with_context(named)?.len();
        let cut = || format!("{} is not a whole backup: it was cut off, or it is something else", path.display());
        ensure!(length > TAIL + SHORT_MEMBER && length % 512 == 0, cut());
        let (body, mut end) = (length - TAIL, vec![]);
        let mut reader = Hashed::new(BufReader::with_capacity(1 << 20, &mut file));
        io::copy(&mut (&mut reader).take(body - SHORT_MEMBER), &mut io::sink()).with_context(named)?;
        let sealed = reader.so_far();
        let mut seal = vec![];
        (&mut reader).take(SHORT_MEMBER).read_to_end(&mut seal).with_context(named)?;
        let digest = reader.so_far();
        reader.read_to_end(&mut end).with_context(named)?;
        if end != tail(&digest)? {
            let is_tail = end.starts_with(DIGEST.as_bytes());
            ensure!(is_tail, cut());
            bail!("{} is damaged: its bytes are not those that were written", path.display());
        }
        let seal = seal.get(512..512 + 64).and_then(|text| hex::decode(text).ok()).context("the seal cannot be read")?;
        let mut archive =
            Self { path: path.to_owned(), file, body: body - SHORT_MEMBER, manifest: Manifest::new(String::new(), 0, 0, 0), seal, sealed };
        archive.manifest = archive.read_manifest().with_context(named)?;
        Ok(archive)
    }

    /// Was it written by a hub that has this key?
    pub fn is_sealed_by(&self, key: &[u8; 32]) -> bool {
        sealed(key, &self.sealed).verify_slice(&self.seal).is_ok()
    }

    /// Hands each member to `take`, in their order, with its name and size.
    pub fn members(&mut self, mut take: impl FnMut(&str, u64, &mut dyn Read) -> Result<()>) -> Result<()> {
        self.file.seek(SeekFrom::Start(0))?;
        let mut tar = tar::Archive::new(BufReader::with_capacity(1 << 20, (&mut self.file).take(self.body)));
        for entry in tar.entries()? {
            let mut entry = entry?;
            let name = String::from_utf8(entry.path_bytes().into_owned()).context("the name of a member")?;
            let size = entry.size();
            take(&name, size, &mut entry).with_context(|| format!("{name} in {}", self.path.display()))?;
        }
        Ok(())
    }

    /// The manifest, when it names exactly what is there.
    fn read_manifest(&mut self) -> Result<Manifest> {
        let (mut found, mut text) = (BTreeMap::new(), None);
        self.members(|name, bytes, from| {
            ensure!(text.is_none(), "it stands behind the manifest");
            if name == MANIFEST {
                ensure!(bytes <= MAX_MANIFEST, "it is too long");
                let mut all = vec![];
                from.read_to_end(&mut all)?;
                text = Some(all);
                return Ok(());
            }
            ensure!(is_known(name), "this version does not know what it is");
            let mut from = Hashed::new(from);
            io::copy(&mut from, &mut io::sink())?;
            found.insert(name.to_owned(), Member { bytes, sha256: hex::encode(from.so_far()) });
            Ok(())
        })?;
        let text = text.context("there is no manifest")?;
        let format: Format = serde_json::from_slice(&text).context("the manifest")?;
        ensure!(format.format == FORMAT, "it is of format {}, and this version knows {FORMAT}", format.format);
        let manifest: Manifest = serde_json::from_slice(&text).context("the manifest")?;
        ensure!(manifest.members == found, "the manifest names other members than there are");
        ensure!(found.contains_key(DATABASE), "there is no database in it");
        Ok(manifest)
    }
}

#[derive(Deserialize)]
struct Format {
    format: u32,
}

/// No name leads out of the folder that it is put in.
fn is_known(name: &str) -> bool {
    let plain = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-');
    let output = |rest: &str| rest.split_once('/').is_some_and(|(folder, file)| plain(folder) && plain(file));
    name == DATABASE || name == KEYS || name.strip_prefix(OUTPUT).is_some_and(output)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: [u8; 32] = [3; 32];

    fn written(dir: &Path) -> PathBuf {
        let to = dir.join("backup");
        let mut w = Writer::begin(&to, Manifest::new("hub_x".into(), 5_000, 1, 8)).unwrap();
        w.add(DATABASE, 5, &b"12345 and more"[..]).unwrap();
        w.add("output/0f/01a1fd7b-66a3-100000001", 700, &[7; 700][..]).unwrap();
        w.finish(&KEY).unwrap();
        to
    }

    #[test]
    fn what_is_written_is_read() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = written(dir.path());
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        let mut a = Archive::open(&path).unwrap();
        assert!(a.is_sealed_by(&KEY) && !a.is_sealed_by(&[4; 32]));
        let mut seen = vec![];
        a.members(|name, _, from| {
            let mut all = vec![];
            from.read_to_end(&mut all)?;
            seen.push((name.to_owned(), all));
            Ok(())
        })
        .unwrap();
        assert_eq!(seen[0], (DATABASE.to_owned(), b"12345".to_vec()));
        assert_eq!((seen[1].1.len(), seen[2].0.as_str()), (700, MANIFEST));
        assert!(Writer::begin(&path, a.manifest.clone()).is_err(), "never over a file");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing else stays");
    }

    #[test]
    fn every_altered_bit_and_every_cut_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = written(dir.path());
        let good = std::fs::read(&path).unwrap();
        let bad = dir.path().join("bad");
        for at in 0..good.len() {
            let mut bytes = good.clone();
            bytes[at] ^= 1 << (at % 8);
            std::fs::write(&bad, bytes).unwrap();
            assert!(Archive::open(&bad).is_err(), "byte {at}");
        }
        for cut in (0..good.len()).step_by(256) {
            std::fs::write(&bad, &good[..cut]).unwrap();
            assert!(Archive::open(&bad).is_err(), "cut at {cut}");
        }
        std::fs::write(&bad, [&good[..], &[0; 512]].concat()).unwrap();
        assert!(Archive::open(&bad).is_err(), "longer");
    }

    #[test]
    fn what_is_short_is_no_backup() {
        let dir = tempfile::tempdir().unwrap();
        let to = dir.path().join("backup");
        let mut w = Writer::begin(&to, Manifest::new("hub_x".into(), 0, 1, 8)).unwrap();
        assert!(w.add(DATABASE, 6, &b"12345"[..]).is_err());
        assert!(Writer::begin(&to, w.manifest.clone()).is_err(), "one at a time");
        drop(w);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "and nothing is left of it");
    }

    #[test]
    fn names_stay_inside() {
        for good in ["hub.db", "keys.sealed", "output/0f/01a1fd7b-66a3-100000001"] {
            assert!(is_known(good), "{good}");
        }
        for bad in ["", "/hub.db", "output/../hub.db", "output/0f", "output//x", "output/0f/a/b", "output/0f/..", "hub.lock"] {
            assert!(!is_known(bad), "{bad}");
        }
    }
}
