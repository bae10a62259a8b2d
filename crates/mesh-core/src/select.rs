//! Which machines a task or a list asks for: labels, skills and free slots.
//!
//! As text, labels alone: `os=linux,gpu` (`key=value` or `key`, a comma means *and*).

use crate::canon::{Malformed, Reader, Tag, Writer};
use crate::name;
use std::collections::{BTreeMap, BTreeSet};

/// Most labels, skills or kinds of slot in one selector.
pub const MAX_TERMS: usize = 64;
/// Most slots of one kind that a task can ask for or a node can have.
pub const MAX_SLOTS: u32 = 1024;

/// Every term must hold. An empty selector fits every machine.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Selector {
    /// Key to value; none asks for the key alone.
    pub labels: BTreeMap<String, Option<String>>,
    pub skills: BTreeSet<String>,
    /// Kind to the number that one task takes for itself while it runs.
    pub slots: BTreeMap<String, u32>,
}

/// What a machine has to offer. Slots are all of them, taken or not.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Offers {
    pub labels: BTreeMap<String, String>,
    pub skills: BTreeSet<String>,
    pub slots: BTreeMap<String, u32>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadSelector {
    #[error("a selector has terms of the form key=value or key, separated by commas; {0:?} is none")]
    Term(String),
    #[error("{0:?} is asked for twice")]
    Twice(String),
    #[error("a selector has at most {MAX_TERMS} terms of a kind")]
    TooMany,
    #[error("{0:?}: {1}")]
    Name(String, name::BadName),
    #[error("slots of {0:?} are 1 to {MAX_SLOTS}, not {1}")]
    Slots(String, u32),
}

impl Selector {
    /// Reads `os=linux,gpu`. An empty text fits every machine.
    pub fn parse(text: &str) -> Result<Self, BadSelector> {
        let mut labels = BTreeMap::new();
        for term in text.split(',').filter(|_| !text.trim().is_empty()) {
            let (key, value) = match term.split_once('=') {
                None => (term.trim(), None),
                Some((k, v)) => (k.trim(), Some(v.trim().to_owned())),
            };
            if key.is_empty() || value.as_deref() == Some("") {
                return Err(BadSelector::Term(term.to_owned()));
            }
            if labels.insert(key.to_owned(), value).is_some() {
                return Err(BadSelector::Twice(key.to_owned()));
            }
        }
        let selector = Self { labels, ..Self::default() };
        selector.validate()?;
        Ok(selector)
    }

    pub fn validate(&self) -> Result<(), BadSelector> {
        if [self.labels.len(), self.skills.len(), self.slots.len()].iter().any(|n| *n > MAX_TERMS) {
            return Err(BadSelector::TooMany);
        }
        let words = self.labels.iter().flat_map(|(k, v)| std::iter::once(k).chain(v));
        for word in words.chain(&self.skills).chain(self.slots.keys()) {
            name::check(word).map_err(|e| BadSelector::Name(word.clone(), e))?;
        }
        match self.slots.iter().find(|(_, n)| !(1..=MAX_SLOTS).contains(*n)) {
            None => Ok(()),
            Some((kind, n)) => Err(BadSelector::Slots(kind.clone(), *n)),
        }
    }

    /// Could this machine ever take it: labels and skills are there, and slots if all of them were free.
    pub fn fits(&self, offers: &Offers) -> bool {
        let labels = self.labels.iter().all(|(k, v)| offers.labels.get(k).is_some_and(|have| v.as_ref().is_none_or(|v| v == have)));
        labels && self.skills.is_subset(&offers.skills) && self.slots_fit(&offers.slots)
    }

    /// Are this many slots there?
    pub fn slots_fit(&self, free: &BTreeMap<String, u32>) -> bool {
        self.slots.iter().all(|(kind, n)| free.get(kind).is_some_and(|have| have >= n))
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new(Tag::Selector, 1);
        w.u32(self.labels.len() as u32);
        for (k, v) in &self.labels {
            w.str(k).option(v.as_ref(), |w, v| {
                w.str(v);
            });
        }
        w.u32(self.skills.len() as u32);
        for s in &self.skills {
            w.str(s);
        }
        w.u32(self.slots.len() as u32);
        for (k, n) in &self.slots {
            w.str(k).u32(*n);
        }
        w.finish()
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut r = Reader::new(bytes, Tag::Selector, 1)?;
        let mut s = Self::default();
        for _ in 0..count(&mut r)? {
            let key = r.str()?.to_owned();
            let value = r.option(|r| Ok(r.str()?.to_owned()))?;
            s.labels.insert(key, value);
        }
        for _ in 0..count(&mut r)? {
            s.skills.insert(r.str()?.to_owned());
        }
        for _ in 0..count(&mut r)? {
            let kind = r.str()?.to_owned();
            s.slots.insert(kind, r.u32()?);
        }
        r.end()?;
        Ok(s)
    }
}

fn count(r: &mut Reader<'_>) -> Result<u32, Malformed> {
    let n = r.u32()?;
    if n as usize > MAX_TERMS { Err(Malformed::Bounds("the number of terms")) } else { Ok(n) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_read_and_bad_text_named() {
        let s = Selector::parse("os=linux, gpu").unwrap();
        assert_eq!(s.labels, [("os".to_owned(), Some("linux".to_owned())), ("gpu".to_owned(), None)].into());
        assert_eq!(Selector::parse(" "), Ok(Selector::default()));
        assert_eq!(Selector::parse("a,"), Err(BadSelector::Term(String::new())));
        assert_eq!(Selector::parse("a="), Err(BadSelector::Term("a=".into())));
        assert_eq!(Selector::parse("a,a=1"), Err(BadSelector::Twice("a".into())));
        assert!(matches!(Selector::parse("a\u{202e}=1"), Err(BadSelector::Name(..))));
        let slots = Selector { slots: [("gpu".to_owned(), 0)].into(), ..Default::default() };
        assert_eq!(slots.validate(), Err(BadSelector::Slots("gpu".into(), 0)));
    }

    #[test]
    fn every_term_must_hold() {
        let offers = Offers {
            labels: [("os".to_owned(), "linux".to_owned()), ("gpu".to_owned(), "a100".to_owned())].into(),
            skills: ["shell".to_owned()].into(),
            slots: [("gpu".to_owned(), 2)].into(),
        };
        let with = |text: &str, skill: &[&str], gpus: u32| {
            let mut s = Selector::parse(text).unwrap();
            s.skills = skill.iter().map(|s| (*s).to_owned()).collect();
            if gpus > 0 {
                s.slots.insert("gpu".into(), gpus);
            }
            s.fits(&offers)
        };
        assert!(with("", &[], 0) && with("os=linux,gpu", &["shell"], 2));
        assert!(!with("os=darwin", &[], 0) && !with("zone", &[], 0) && !with("", &["browser"], 0) && !with("", &[], 3));
    }

    #[test]
    fn bytes_come_back_and_are_a_contract() {
        let mut s = Selector::parse("os=linux,gpu").unwrap();
        s.skills.insert("shell".into());
        s.slots.insert("gpu".into(), 2);
        let bytes = s.encode();
        assert_eq!(
            hex::encode(&bytes),
            "0601000000020000000367707500000000026f7301000000056c696e757800000001000000057368656c6c000000010000000367707500000002"
        );
        assert_eq!(Selector::decode(&bytes), Ok(s));
        for cut in 0..bytes.len() {
            assert!(Selector::decode(&bytes[..cut]).is_err(), "{cut}");
        }
    }
}
