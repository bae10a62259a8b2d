//! The one hand-written encoding behind every digest and every stored spec.
//!
//! Integers are big-endian, byte strings and lists carry a `u32` length, and each document starts
//! with a tag byte and a version byte, so that two different values can never share an encoding.
//! The golden vectors in the tests are a contract: a change of layout is a new version.

/// Why bytes are not a canonical document.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    #[error("the document ends early")]
    Short,
    #[error("{0} bytes are left over")]
    Trailing(usize),
    #[error("unknown {what} {value}")]
    Unknown { what: &'static str, value: u64 },
    #[error("text is not UTF-8")]
    NotUtf8,
    #[error("{0} is out of bounds")]
    Bounds(&'static str),
}

/// Kinds of document, so that one can never be read as another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Tag {
    Spec = 1,
    Intent = 2,
    Grant = 3,
    EnrolProof = 4,
    Capabilities = 5,
    Selector = 6,
    RecoverProof = 7,
    AuditRow = 8,
    AuditPerson = 9,
    AuditDetail = 10,
    AuditCheckpoint = 11,
    Bundle = 16,
}

#[derive(Debug, Default)]
pub struct Writer(Vec<u8>);

impl Writer {
    pub fn new(tag: Tag, version: u8) -> Self {
        Self(vec![tag as u8, version])
    }
    /// A message that is no document: it is never digested, and its frame says what it is.
    pub fn plain(head: &[u8]) -> Self {
        Self(head.to_vec())
    }
    pub fn u8(&mut self, v: u8) -> &mut Self {
        self.0.push(v);
        self
    }
    pub fn u32(&mut self, v: u32) -> &mut Self {
        self.0.extend_from_slice(&v.to_be_bytes());
        self
    }
    pub fn u64(&mut self, v: u64) -> &mut Self {
        self.0.extend_from_slice(&v.to_be_bytes());
        self
    }
    pub fn i64(&mut self, v: i64) -> &mut Self {
        self.u64(v as u64)
    }
    /// A length-prefixed byte string. Callers bound their input far below 4 GiB.
    pub fn bytes(&mut self, v: &[u8]) -> &mut Self {
        self.u32(u32::try_from(v.len()).expect("documents are bounded below 4 GiB"));
        self.0.extend_from_slice(v);
        self
    }
    pub fn str(&mut self, v: &str) -> &mut Self {
        self.bytes(v.as_bytes())
    }
    /// Bytes of a fixed, known length.
    pub fn raw(&mut self, v: &[u8]) -> &mut Self {
        self.0.extend_from_slice(v);
        self
    }
    pub fn option<T>(&mut self, v: Option<T>, put: impl FnOnce(&mut Self, T)) -> &mut Self {
        match v {
            None => {
                self.u8(0);
            }
            Some(v) => {
                self.u8(1);
                put(self, v);
            }
        }
        self
    }
    pub fn finish(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.0)
    }
}

#[derive(Debug)]
pub struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    /// Checks tag and version and stands behind them.
    pub fn new(bytes: &'a [u8], tag: Tag, version: u8) -> Result<Self, Malformed> {
        let mut r = Self(bytes);
        match (r.u8()?, r.u8()?) {
            (t, _) if t != tag as u8 => Err(Malformed::Unknown { what: "document", value: t.into() }),
            (_, v) if v != version => Err(Malformed::Unknown { what: "version", value: v.into() }),
            _ => Ok(r),
        }
    }
    /// Reads what [`Writer::plain`] wrote behind its head.
    pub fn plain(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }
    /// How many bytes were not read yet.
    pub fn left(&self) -> usize {
        self.0.len()
    }
    /// All that was not read yet.
    pub fn rest(self) -> &'a [u8] {
        self.0
    }
    pub fn raw(&mut self, n: usize) -> Result<&'a [u8], Malformed> {
        let (head, rest) = self.0.split_at_checked(n).ok_or(Malformed::Short)?;
        self.0 = rest;
        Ok(head)
    }
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        Ok(self.raw(N)?.try_into().expect("length was checked"))
    }
    pub fn u8(&mut self) -> Result<u8, Malformed> {
        Ok(self.array::<1>()?[0])
    }
    pub fn u32(&mut self) -> Result<u32, Malformed> {
        Ok(u32::from_be_bytes(self.array()?))
    }
    pub fn u64(&mut self) -> Result<u64, Malformed> {
        Ok(u64::from_be_bytes(self.array()?))
    }
    pub fn i64(&mut self) -> Result<i64, Malformed> {
        Ok(self.u64()? as i64)
    }
    pub fn bytes(&mut self) -> Result<&'a [u8], Malformed> {
        let n = self.u32()? as usize;
        self.raw(n)
    }
    pub fn str(&mut self) -> Result<&'a str, Malformed> {
        std::str::from_utf8(self.bytes()?).map_err(|_| Malformed::NotUtf8)
    }
    /// A list length; each element takes at least one byte, so a lie cannot reserve memory.
    pub fn count(&mut self) -> Result<usize, Malformed> {
        let n = self.u32()? as usize;
        if n > self.0.len() { Err(Malformed::Short) } else { Ok(n) }
    }
    pub fn option<T>(&mut self, get: impl FnOnce(&mut Self) -> Result<T, Malformed>) -> Result<Option<T>, Malformed> {
        match self.u8()? {
            0 => Ok(None),
            1 => get(self).map(Some),
            v => Err(Malformed::Unknown { what: "option", value: v.into() }),
        }
    }
    /// Refuses anything left over: one value has one encoding.
    pub fn end(self) -> Result<(), Malformed> {
        if self.0.is_empty() { Ok(()) } else { Err(Malformed::Trailing(self.0.len())) }
    }
}
