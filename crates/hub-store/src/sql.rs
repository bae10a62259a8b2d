//! A statement and its values, the same for either database.
//!
//! Placeholders are `$1`, `$2`, …: both databases know them. Columns named `user` are quoted. What
//! cannot be said alike in both is in [`crate::dialect`].

use crate::dialect::Dialect;
use std::borrow::Cow;
use std::fmt::Write;

/// The bytes of an id.
pub(crate) type IdBytes = [u8; 16];

/// A value to bind. Each variant is a type of column; `None` is NULL of that type.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value<'v> {
    Int(Option<i64>),
    Bool(Option<bool>),
    Text(Option<Cow<'v, str>>),
    Blob(Option<Cow<'v, [u8]>>),
    Id(Option<IdBytes>),
    /// A list for [`crate::dialect::Dialect::listed`].
    List(Vec<IdBytes>),
}

macro_rules! value {
    ($($from:ty => $variant:ident $(($convert:expr))?),* $(,)?) => {$(
        impl<'v> From<$from> for Value<'v> {
            fn from(v: $from) -> Self {
                Self::$variant(Some(v)$(.map($convert))?)
            }
        }
        impl<'v> From<Option<$from>> for Value<'v> {
            fn from(v: Option<$from>) -> Self {
                Self::$variant(v$(.map($convert))?)
            }
        }
    )*};
}
value!(i64 => Int, i32 => Int(i64::from), u32 => Int(i64::from), u64 => Int(|v| v as i64), bool => Bool, String => Text(Cow::Owned),
    &'v str => Text(Cow::Borrowed), Vec<u8> => Blob(Cow::Owned), &'v [u8] => Blob(Cow::Borrowed), [u8; 32] => Blob(|v| v.to_vec().into()),
    &'v [u8; 32] => Blob(|v| Cow::Borrowed(&v[..])), IdBytes => Id);

impl Value<'_> {
    fn into_owned(self) -> Value<'static> {
        match self {
            Self::Int(v) => Value::Int(v),
            Self::Bool(v) => Value::Bool(v),
            Self::Text(v) => Value::Text(v.map(|v| v.into_owned().into())),
            Self::Blob(v) => Value::Blob(v.map(|v| v.into_owned().into())),
            Self::Id(v) => Value::Id(v),
            Self::List(v) => Value::List(v),
        }
    }
}

/// Values of one row, from anything that a [`Value`] is made of.
macro_rules! values {
    ($($value:expr),* $(,)?) => {
        [$($crate::sql::Value::from($value)),*]
    };
}
pub(crate) use values;

/// A statement with its values.
#[derive(Debug, Clone)]
pub(crate) struct Sql {
    pub text: Cow<'static, str>,
    pub values: Vec<Value<'static>>,
}

pub(crate) fn sql(text: impl Into<Cow<'static, str>>) -> Sql {
    Sql { text: text.into(), values: vec![] }
}

impl Sql {
    /// Gives the next placeholder its value.
    pub(crate) fn bind<'v>(mut self, value: impl Into<Value<'v>>) -> Self {
        self.values.push(value.into().into_owned());
        self
    }
    /// Adds text that ends in a placeholder for `value`.
    pub(crate) fn and<'v>(mut self, text: &str, value: impl Into<Value<'v>>) -> Self {
        self.values.push(value.into().into_owned());
        let n = self.values.len();
        write!(self.text.to_mut(), "{text}${n}").expect("text can be added to text");
        self
    }
    /// Keeps those rows of which one of these columns has one of its values.
    pub(crate) fn and_any<const N: usize>(mut self, dialect: Dialect, columns: [(&str, Vec<Value<'static>>); N]) -> Self {
        let mut before = " AND (";
        for (column, values) in columns.into_iter().filter(|(_, values)| !values.is_empty()) {
            self.text.to_mut().push_str(&format!("{before}{column} IN ("));
            self = match ids(&values) {
                Some(ids) if ids.len() > PLACEHOLDERS => {
                    self.values.push(Value::List(ids));
                    let listed = dialect.listed(&format!("${}", self.values.len()));
                    self.text.to_mut().push_str(&listed);
                    self
                }
                _ => values.into_iter().enumerate().fold(self, |q, (n, value)| q.and(if n == 0 { "" } else { ", " }, value)),
            };
            self.text.to_mut().push(')');
            before = " OR ";
        }
        self.text.to_mut().push_str(if before == " OR " { ")" } else { " AND FALSE" });
        self
    }
}

/// A statement has 32,766 of them on SQLite; more ids than these are one value.
const PLACEHOLDERS: usize = 500;

fn ids(values: &[Value<'_>]) -> Option<Vec<IdBytes>> {
    let id = |value: &Value<'_>| match value {
        Value::Id(id) => *id,
        _ => None,
    };
    values.iter().map(id).collect()
}

/// Rows for one write over all of them. They may borrow from what they are made of.
#[derive(Debug, Clone)]
pub(crate) struct Rows<'v> {
    pub width: usize,
    pub values: Vec<Value<'v>>,
}

impl<'v> Rows<'v> {
    pub(crate) fn of<const N: usize>(rows: impl IntoIterator<Item = [Value<'v>; N]>) -> Self {
        Self { width: N, values: rows.into_iter().flatten().collect() }
    }
    pub(crate) fn into_owned(self) -> Rows<'static> {
        Rows { width: self.width, values: self.values.into_iter().map(Value::into_owned).collect() }
    }
}
