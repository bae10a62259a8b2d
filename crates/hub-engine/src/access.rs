//! The one choke point: every engine entry asks here first.

use crate::error::{Error, Result};
use mesh_core::UserId;
use mesh_core::permission::{Caller, Permission, Reach, allows};

/// Permits an act on something that `owner` owns. What the caller may not even read looks absent.
pub fn authorize(caller: &Caller, permission: Permission, owner: UserId, read: Permission, what: &'static str) -> Result<()> {
    if !allows(caller, read, owner) && !allows(caller, permission, owner) {
        return Err(Error::NotFound(what));
    }
    if allows(caller, permission, owner) { Ok(()) } else { Err(missing(permission)) }
}

/// Permits an act that makes something of the caller's own; gives the person behind it.
pub fn authorize_own(caller: &Caller, permission: Permission) -> Result<UserId> {
    let user = caller.user().ok_or_else(|| missing(permission))?;
    if allows(caller, permission, user) { Ok(user) } else { Err(missing(permission)) }
}

/// Whose things a list may show: everyone's (`None`) or the caller's own.
pub fn visible(caller: &Caller, permission: Permission) -> Result<Option<UserId>> {
    match caller.reach(permission) {
        Reach::All => Ok(None),
        Reach::Own => Ok(Some(caller.user().ok_or_else(|| missing(permission))?)),
        Reach::None => Err(missing(permission)),
    }
}

fn missing(permission: Permission) -> Error {
    Error::Forbidden(format!("this needs the permission {}", permission.as_str()))
}
