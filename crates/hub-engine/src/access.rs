//! The one choke point: every engine entry asks here first.

use crate::audit;
use crate::error::{Error, Result};
use crate::records::Within;
use mesh_core::UserId;
use mesh_core::permission::{Caller, Permission, Reach, Thing, allows};

/// Permits an act on `thing`, which `owner` owns. What the caller may not even read looks absent.
pub fn authorize(
    caller: &Caller,
    permission: Permission,
    (owner, thing): (UserId, Thing<'_>),
    read: Permission,
    what: &'static str,
) -> Result<()> {
    if allows(caller, permission, owner, thing) {
        return Ok(());
    }
    Err(deny(caller, permission, thing, allows(caller, read, owner, thing), what))
}

/// The refusal of an act on a thing that the caller may see, or may not know of.
pub(crate) fn deny(caller: &Caller, permission: Permission, thing: Thing<'_>, seen: bool, what: &'static str) -> Error {
    audit::denied(caller, permission, Some(thing));
    if seen { missing(permission) } else { Error::NotFound(what) }
}

/// Permits an act that makes something of the caller's own; gives the person behind it. Where the caller
/// can act with what was granted alone, the place decides that is named, later.
pub fn authorize_own(caller: &Caller, permission: Permission) -> Result<UserId> {
    let person = caller.as_person().ok_or_else(|| refused(caller, permission))?;
    match person.reach(permission) {
        Reach::None => Err(refused(caller, permission)),
        Reach::Granted if !person.granted.has(permission) => Err(refused(caller, permission)),
        _ => Ok(person.user),
    }
}

/// Permits an act on `thing` to its owner and to who may do it on everything; no grant gives it. What the
/// caller may not even read looks absent.
pub fn authorize_owner(
    caller: &Caller,
    permission: Permission,
    (owner, thing): (UserId, Thing<'_>),
    read: Permission,
    what: &'static str,
) -> Result<()> {
    if allows(caller, permission, owner, Thing::Other) {
        return Ok(());
    }
    Err(deny(caller, permission, thing, allows(caller, read, owner, thing), what))
}

/// Does this permission reach everything?
pub fn reaches_all(caller: &Caller, permission: Permission) -> bool {
    caller.reach(permission) == Reach::All
}

/// What a list may show: everything (`None`), or what is within.
pub fn visible(caller: &Caller, permission: Permission) -> Result<Option<Within>> {
    let reach = caller.reach(permission);
    if reach == Reach::All {
        return Ok(None);
    }
    let person = caller.as_person().filter(|_| reach != Reach::None).ok_or_else(|| refused(caller, permission))?;
    // Who was granted a place to run something at sees what they run there.
    let runs = permission == Permission::TasksRead && person.granted.has(Permission::TasksDispatch);
    let mut within = Within { owner: (reach.is_to_own() || runs).then_some(person.user), ..Within::default() };
    if reach.is_to_granted() {
        let granted = &person.granted;
        within.nodes = granted.nodes.iter().filter(|(_, given)| given.has(permission)).map(|(id, _)| *id).collect();
        within.sessions = granted.sessions.iter().filter(|(_, given)| given.has(permission)).map(|(id, _)| *id).collect();
        within.agents = granted.agents.iter().filter(|(_, given)| given.has(permission)).map(|(name, _)| name.clone()).collect();
    }
    Ok(Some(within))
}

fn refused(caller: &Caller, permission: Permission) -> Error {
    audit::denied(caller, permission, None);
    missing(permission)
}

pub(crate) fn missing(permission: Permission) -> Error {
    Error::Forbidden(format!("this needs the permission {}", permission.as_str()))
}
