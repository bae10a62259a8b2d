//! How people come, change and leave.

use super::*;

impl State {
    pub(super) fn named(&self, username: &str) -> Option<&User> {
        self.users.values().find(|u| u.username.eq_ignore_ascii_case(username))
    }
    pub(super) fn may_act(&self, user: &User) -> bool {
        !user.password_hash.is_empty() && !self.disabled.contains(&user.id)
    }
    fn entry(&self, id: UserId) -> Option<UserEntry> {
        let u = self.users.get(&id)?;
        let standing = if self.disabled.contains(&id) {
            Standing::Disabled
        } else if u.password_hash.is_empty() {
            Standing::Invited { until: self.user_invites.get(&id).map_or(u.created_at, |i| i.expires_at) }
        } else {
            Standing::Active
        };
        Some(UserEntry { id, username: Some(u.username.clone()), role: u.role, standing, created_at: u.created_at })
    }
    fn is_last_admin(&self, id: UserId) -> bool {
        let admins: Vec<UserId> = self.users.values().filter(|u| u.role == Role::Admin && self.may_act(u)).map(|u| u.id).collect();
        admins == [id]
    }
    fn usable(&self, mac: &Digest, now: UnixMs) -> Option<UserId> {
        let (id, _) = self.user_invites.iter().find(|(_, i)| i.mac == *mac && i.expires_at > now)?;
        matches!(self.entry(*id)?.standing, Standing::Invited { .. }).then_some(*id)
    }
    fn rights_changed(&mut self, id: UserId) {
        let epoch = self.raise_epoch();
        self.user_epochs.insert(id, epoch);
    }
    fn end_credentials(&mut self, id: UserId) {
        self.refresh.retain(|_, r| r.token.user != id);
        self.devices.retain(|_, d| d.user != id);
        self.keys.retain(|_, k| k.user != id);
    }
    fn revoke_invites(&mut self, owner: UserId, at: UnixMs) {
        for i in self.invites.values_mut().filter(|i| i.owner == owner && i.used.is_none()) {
            i.revoked_at.get_or_insert(at);
        }
    }
}

#[async_trait]
impl Users for MemoryStore {
    async fn create_user(&self, user: &User, invite: Option<&UserInvite>) -> Stored<bool> {
        let mut state = self.state();
        if state.named(&user.username).is_some() {
            return Ok(false);
        }
        add(&mut state.users, "users.create", user.id, user.clone())?;
        state.user_invites.extend(invite.map(|i| (user.id, *i)));
        Ok(true)
    }
    async fn user_entry(&self, id: UserId) -> Stored<Option<UserEntry>> {
        let state = self.state();
        Ok(state.entry(id).or_else(|| state.removed_users.get(&id).map(|(entry, ..)| entry.clone())))
    }
    async fn entry_named(&self, username: &str) -> Stored<Option<UserEntry>> {
        let state = self.state();
        Ok(state.named(username).and_then(|u| state.entry(u.id)))
    }
    async fn user_entries(&self, window: Window<UserId>) -> Stored<Vec<UserEntry>> {
        let state = self.state();
        Ok(page(&state.users, window, |_| true).iter().filter_map(|u| state.entry(u.id)).collect())
    }
    async fn change_user(&self, id: UserId, to: &UserChange, now: UnixMs) -> Stored<UserChanged> {
        let mut state = self.state();
        let Some(before) = state.entry(id) else { return Ok(UserChanged::Unknown) };
        if to.username.as_ref().and_then(|name| state.named(name)).is_some_and(|u| u.id != id) {
            return Ok(UserChanged::NameTaken);
        }
        let stays = to.role.unwrap_or(before.role) == Role::Admin && to.disabled != Some(true);
        if !stays && state.is_last_admin(id) {
            return Ok(UserChanged::LastAdmin);
        }
        if let Some(invite) = to.invite {
            if !state.users[&id].password_hash.is_empty() {
                return Ok(UserChanged::HasPassword);
            }
            state.user_invites.insert(id, invite);
        }
        if to.role.is_some() || to.disabled.is_some() {
            state.rights_changed(id);
        }
        state.users.entry(id).and_modify(|u| {
            u.username = to.username.clone().unwrap_or(u.username.clone());
            u.role = to.role.unwrap_or(u.role);
            u.password_hash = to.password_hash.clone().unwrap_or(u.password_hash.clone());
        });
        if to.disabled == Some(true) || to.password_hash.is_some() {
            state.refresh.values_mut().filter(|r| r.token.user == id).for_each(|r| r.ended = true);
        }
        if to.disabled == Some(true) || to.role.is_some_and(|r| !matches!(r, Role::Admin | Role::Developer)) {
            state.revoke_invites(id, now);
        }
        match to.disabled {
            Some(true) => drop(state.disabled.insert(id)),
            Some(false) => drop(state.disabled.remove(&id)),
            None => {}
        }
        let now = state.entry(id).expect("it was there");
        Ok(UserChanged::Done { before, now })
    }
    async fn invited(&self, mac: &Digest, now: UnixMs) -> Stored<Option<UserId>> {
        Ok(self.state().usable(mac, now))
    }
    async fn accept_invite(&self, mac: &Digest, hash: &str, now: UnixMs) -> Stored<Option<UserEntry>> {
        let mut state = self.state();
        let Some(id) = state.usable(mac, now) else { return Ok(None) };
        state.users.entry(id).and_modify(|u| u.password_hash = hash.to_owned());
        state.user_invites.remove(&id);
        Ok(state.entry(id))
    }
    async fn remove_user(&self, l: &Leaving) -> Stored<Removal> {
        let mut state = self.state();
        let Some(before) = state.entry(l.user) else { return Ok(Removal::Unknown) };
        if state.is_last_admin(l.user) {
            return Ok(Removal::LastAdmin);
        }
        let successor = state.entry(l.successor).filter(|s| s.id != l.user && s.standing == Standing::Active);
        if !successor.is_some_and(|s| matches!(s.role, Role::Admin | Role::Developer)) {
            return Ok(Removal::NoSuccessor);
        }
        state.rights_changed(l.user);
        state.users.remove(&l.user);
        state.disabled.remove(&l.user);
        state.user_invites.remove(&l.user);
        state.removed_users.values_mut().filter(|(_, of, _)| of.successor == l.user).for_each(|(_, of, _)| of.successor = l.successor);
        let username = before.username.filter(|_| !l.purge);
        let entry = UserEntry { username, standing: Standing::Removed { at: l.at }, ..before };
        state.removed_users.insert(l.user, (entry, l.clone(), false));
        state.end_credentials(l.user);
        state.grants.retain(|_, g| g.subject != Subject::User(l.user));
        state.revoke_invites(l.user, l.at);
        Ok(Removal::Done)
    }
    async fn hand_over(&self, user: UserId, limit: u32) -> Stored<bool> {
        let mut state = self.state();
        let Some((_, leaving, _)) = state.removed_users.get(&user).cloned() else { return Ok(true) };
        state.end_credentials(user);
        state.revoke_invites(user, leaving.at);
        let nodes: Vec<NodeId> = state.nodes.values().filter(|n| n.owner == user).map(|n| n.id).take(limit as usize).collect();
        if !nodes.is_empty() {
            let epoch = state.raise_epoch();
            for id in &nodes {
                state.nodes.entry(*id).and_modify(|n| (n.owner, n.epoch) = (leaving.successor, epoch));
            }
        }
        let sessions = state.sessions.values_mut().filter(|s| s.owner == user).take(limit as usize);
        let sessions = sessions.map(|s| s.owner = leaving.successor).count();
        let real = || state.agents.values().map(|(a, _)| a).find(|a| a.owner == user).map(|a| a.name.clone());
        let agent = state.state.values().find(|e| e.owner == user).map(|e| e.agent.clone()).or_else(real);
        let same = state.agents.values_mut().map(|(a, _)| a).filter(|a| Some(&a.name) == agent.as_ref());
        same.for_each(|a| {
            a.owner = leaving.successor;
            if a.life.ended_at.is_none() {
                a.restart.policy = mesh_core::agent::Policy::Never;
            }
        });
        state.state.values_mut().filter(|e| Some(&e.agent) == agent.as_ref()).for_each(|e| e.owner = leaving.successor);
        Ok(nodes.is_empty() && sessions == 0 && agent.is_none())
    }
    async fn leaving(&self, limit: u32) -> Stored<Vec<Leaving>> {
        let state = self.state();
        let leaving = state.removed_users.values().filter(|(_, _, left)| !left).map(|(_, leaving, _)| leaving.clone());
        Ok(leaving.take(limit as usize).collect())
    }
    async fn left(&self, user: UserId) -> Stored<()> {
        self.state().removed_users.entry(user).and_modify(|(_, _, left)| *left = true);
        Ok(())
    }
    async fn erase_user(&self, id: UserId) -> Stored<bool> {
        let mut state = self.state();
        Ok(state.removed_users.get_mut(&id).map(|(entry, ..)| entry.username = None).is_some())
    }
}
