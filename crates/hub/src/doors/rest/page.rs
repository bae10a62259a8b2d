//! Pages of lists: newest first, an opaque cursor bound to its filters.

use super::problem::{Answer, Refusal};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as B64;
use hub_engine::ports::Window;
use hub_engine::records::Part;
use mesh_wire::rest::Page;

pub const DEFAULT_LIMIT: u32 = 50;
pub const MAX_LIMIT: u32 = 500;

/// Reads `limit` and `cursor`. `filters` is any text that says which list this is.
/// `id` makes what the list is ordered by from the bytes in the cursor.
pub fn window<Id, const N: usize>(limit: Option<u32>, cursor: Option<&str>, filters: &str, id: fn([u8; N]) -> Id) -> Answer<Window<Id>> {
    let limit = limit.unwrap_or(DEFAULT_LIMIT);
    if !(1..=MAX_LIMIT).contains(&limit) {
        return Err(Refusal::bad_request("bad_limit", format!("limit is 1 to {MAX_LIMIT}, not {limit}")));
    }
    let before = match cursor {
        None => None,
        Some(text) => {
            let bad = || Refusal::bad_request("bad_cursor", "this cursor is not one of this list with these filters; start without one");
            let bytes = B64.decode(text).map_err(|_| bad())?;
            let (mark, rest) = bytes.split_at_checked(8).ok_or_else(bad)?;
            if mark != filter_mark(filters) {
                return Err(bad());
            }
            Some(id(rest.try_into().map_err(|_| bad())?))
        }
    };
    Ok(Window { before, limit: limit + 1 })
}

/// Packs a page. The store was asked for one more than the limit: its presence says there is more.
pub fn page<T, V, const N: usize>(found: Vec<T>, asked: u32, filters: &str, id: impl Fn(&T) -> [u8; N], view: impl Fn(T) -> V) -> Page<V> {
    cut_page(found, asked, false, filters, id, view)
}

/// The same for a list that may have been cut short: then there is more, too.
pub fn cut_page<T, V, const N: usize>(
    mut found: Vec<T>,
    asked: u32,
    cut_short: bool,
    filters: &str,
    id: impl Fn(&T) -> [u8; N],
    view: impl Fn(T) -> V,
) -> Page<V> {
    let limit = asked as usize - 1;
    let more = cut_short || found.len() > limit;
    found.truncate(limit);
    cut(Part { items: found, more }, filters, id, view)
}

/// Packs a page of which the store itself says whether there is more.
pub fn cut<T, V, const N: usize>(
    Part { items: found, more }: Part<T>,
    filters: &str,
    id: impl Fn(&T) -> [u8; N],
    view: impl Fn(T) -> V,
) -> Page<V> {
    let next_cursor = match found.last() {
        Some(last) if more => {
            let mut bytes = filter_mark(filters).to_vec();
            bytes.extend_from_slice(&id(last));
            Some(B64.encode(bytes))
        }
        _ => None,
    };
    Page { items: found.into_iter().map(view).collect(), next_cursor }
}

/// A window for a store that says itself whether there is more.
pub fn exact<Id>(w: Window<Id>) -> Window<Id> {
    Window { limit: w.limit - 1, ..w }
}

fn filter_mark(filters: &str) -> [u8; 8] {
    mesh_core::sha256(filters.as_bytes())[..8].try_into().expect("a digest has 32 bytes")
}

/// `?limit=&cursor=` of a list without filters.
#[derive(Debug, serde::Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct PlainList {
    pub limit: Option<u32>,
    pub cursor: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_belongs_to_its_filters() {
        let found: Vec<u8> = (0..4).collect();
        let p = page(found, 4, "a", |n| [*n; 16], |n| n);
        assert_eq!(p.items, [0, 1, 2]);
        let cursor = p.next_cursor.unwrap();
        assert_eq!(window(None, Some(&cursor), "a", |b: [u8; 16]| b).unwrap().before, Some([2; 16]));
        for (cursor, filters) in [(cursor.as_str(), "b"), ("!", "a"), ("", "a"), ("AAAA", "a")] {
            assert_eq!(window(None, Some(cursor), filters, |b: [u8; 16]| b).unwrap_err().code, "bad_cursor");
        }
        for limit in [0, 501] {
            assert_eq!(window(Some(limit), None, "", |b: [u8; 16]| b).unwrap_err().code, "bad_limit");
        }
        let p = cut_page(vec![7u8], 4, true, "a", |n| [*n; 16], |n| n);
        assert_eq!(window(None, p.next_cursor.as_deref(), "a", |b: [u8; 16]| b).unwrap().before, Some([7; 16]));
        assert!(page(vec![1u8, 2, 3], 4, "", |n| [*n; 16], |n| n).next_cursor.is_none());
    }
}
