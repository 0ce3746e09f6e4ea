//! A process with all its descendants in hand, held by one thread of ours as [`Tracee`] holds one process.
//!
//! Nothing escapes a freeze: a child that is forked before its parent stops arrives attached, and one whose parent was not
//! ours yet is found when everything that could make another stands still. What outlives us (parking, thawing, the release
//! of a rebuilt process) is done for each member as it is for one; that one member fails is no reason to leave the others as
//! they are.

use std::time::{Duration, Instant};

use crate::injection::{Birth, End, Injection};
use crate::lock;
use crate::tree::{self, Group};
use crate::{Error, Held, Result, SeizeOptions, Tracee, descriptor, procfs};

/// A process and its descendants, seized. Dropping it lets all go, as [`Family::thaw`] does.
#[derive(Debug)]
pub struct Family {
    /// The root first, parents before the children they had when these were found.
    members: Vec<Tracee>,
    options: SeizeOptions,
}

impl Family {
    /// Seizes `root` and every descendant that there is, without stopping any. Descendants that have ended are left out.
    ///
    /// # Errors
    /// As [`Tracee::seize`]. Whoever was seized so far is let go.
    pub fn seize(root: i32, options: SeizeOptions) -> Result<Self> {
        let mut family = Self {
            members: Vec::new(),
            options,
        };
        family.seize_member(root)?;
        while family.find_newcomers()? > 0 {}
        Ok(family)
    }

    /// The process ids, the root's first.
    pub fn pids(&self) -> Vec<i32> {
        self.members.iter().map(Tracee::pid).collect()
    }

    /// The processes, the root first.
    pub fn members(&self) -> &[Tracee] {
        &self.members
    }

    /// The process `pid`.
    ///
    /// # Errors
    /// [`Error::WrongState`] if it is not of the family.
    pub fn member(&mut self, pid: i32) -> Result<&mut Tracee> {
        self.members
            .iter_mut()
            .find(|member| member.pid() == pid)
            .ok_or(Error::WrongState {
                tid: pid,
                what: "a process of another family",
            })
    }

    /// Plants the agent in every thread of `pid`, as [`Tracee::plant`] does; also where it is in the memory of another of the family,
    /// on no stack of its own that is known.
    ///
    /// # Errors
    /// As [`Tracee::plant`]; [`Error::WrongState`] if it is not of the family.
    pub fn plant(&mut self, pid: i32) -> Result<Injection<'_>> {
        let (member, host) = self.with_host(pid)?;
        let room = member.threads.len();
        Injection::plant_by(member, host, None, room)
    }

    /// Gives up `locks` of `pid`, as [`Tracee::give_up_locks`] does; also where it is in the memory of another of the family.
    ///
    /// # Errors
    /// As [`Tracee::give_up_locks`]; [`Error::WrongState`] if it is not of the family.
    pub fn give_up_locks(&mut self, pid: i32, locks: &[lock::Held]) -> Result<()> {
        let (member, host) = self.with_host(pid)?;
        member.give_up_locks_by(host, locks)
    }

    /// The process `pid`, and the one in whose memory it is.
    fn with_host(&mut self, pid: i32) -> Result<(&mut Tracee, Option<&mut Tracee>)> {
        let place = |members: &[Tracee], pid| members.iter().position(|one| one.pid() == pid);
        let index = place(&self.members, pid).ok_or(Error::WrongState {
            tid: pid,
            what: "a process of another family",
        })?;
        let (before, rest) = self.members.split_at_mut(index);
        let member = &mut rest[0];
        // It stands before: the first in that memory is nobody's guest.
        let host = member.host.and_then(|host| place(before, host));
        Ok((member, host.map(|host| &mut before[host])))
    }

    /// Makes children of a husk, see [`Tracee::bear`], and takes them in.
    ///
    /// # Errors
    /// As [`Tracee::bear`]; [`Error::WrongState`] if `parent` is not of the family.
    pub fn bear(&mut self, parent: i32, children: &[Birth]) -> Result<()> {
        let born = self.member(parent)?.bear(children)?;
        self.members.extend(born);
        Ok(())
    }

    /// Makes a husk in the session of `leader`, which descends from `parent`, and leaves it to `parent`, as a subreaper gets it.
    ///
    /// # Errors
    /// As [`Tracee::bear`], whose [`Error::PidTaken`] may also be about the husk that passes by; [`Error::WrongState`] if one of the
    /// two is not of the family.
    pub fn foster(&mut self, parent: i32, leader: i32, child: Birth) -> Result<()> {
        // 1. From here on the parent gets what is left by those below it. No husk was a subreaper before.
        self.member(parent)?.set_subreaper(true)?;
        // 2. The leader has a child, and that another one.
        let passing = self.member(leader)?.bear(&[Birth {
            pid: None,
            exit_signal: 0,
            ..child
        }])?;
        for mut passing in passing {
            let pid = passing.pid();
            self.members.extend(passing.bear(&[child])?);
            // 3. The first ends, and nothing is left of it.
            passing.end(&End::default())?;
            self.member(leader)?.reap(pid)?;
        }
        self.member(parent)?.set_subreaper(false)
    }

    /// In frozen husks: `pid` was made in the memory of `owner`, which has become what it is to be meanwhile, so that the text and
    /// the stack on which `pid` was made are gone. From here on its calls are made in what is there now, and without a stack.
    ///
    /// # Errors
    /// [`Error::WrongState`] if one of the two is not of the family, or they are not in one memory; [`Error::Gone`].
    pub fn move_in(&mut self, pid: i32, owner: i32) -> Result<()> {
        let code = self.member(owner)?.code;
        if !descriptor::same_memory(pid, owner)? {
            return Err(Error::WrongState {
                tid: pid,
                what: "moving into memory that is not its own",
            });
        }
        self.member(pid)?.move_to(owner, code)
    }

    /// Ends a husk, see [`Tracee::end`]; its parent is still to wait for it.
    ///
    /// # Errors
    /// As [`Tracee::end`]; [`Error::WrongState`] if `pid` is not of the family.
    pub fn end(&mut self, pid: i32, end: &End) -> Result<()> {
        let index = self.members.iter().position(|member| member.pid() == pid);
        let index = index.ok_or(Error::WrongState {
            tid: pid,
            what: "ending in another family",
        })?;
        self.members.remove(index).end(end)
    }

    /// Stops every thread of every process within `budget`, as [`Tracee::freeze`] does for one process; on success there is
    /// no descendant that is not stopped.
    ///
    /// # Errors
    /// As [`Tracee::freeze`]; every thread runs again.
    pub fn freeze(&mut self, budget: Duration, attempts: u32) -> Result<Instant> {
        tree::freeze(self, budget, attempts)
    }

    /// [`Tracee::park`] for every process. If our death comes between two of them, those parked stay stopped and the others run.
    ///
    /// # Errors
    /// The first that occurred; no further process is parked then.
    pub fn park(&mut self) -> Result<()> {
        self.members.iter_mut().try_for_each(Tracee::park)
    }

    /// [`Tracee::unpark`] for every process, parked or not.
    ///
    /// # Errors
    /// The first that occurred; every process is tried.
    pub fn unpark(&mut self) -> Result<()> {
        every(self.members.iter_mut(), |member| {
            gone_is_well(member.unpark())
        })
    }

    /// [`Tracee::thaw`] for every process.
    ///
    /// # Errors
    /// The first that occurred; every process is tried.
    pub fn thaw(mut self) -> Result<()> {
        every(self.members.drain(..), Tracee::thaw)
    }

    /// [`Tracee::kill`] for every process, children before their parents: the end of a session's leader continues the stopped
    /// members of its group, and there must be none left.
    ///
    /// # Errors
    /// The first that occurred; every process is tried.
    pub fn kill(mut self) -> Result<()> {
        every(self.members.drain(..).rev(), Tracee::kill)
    }

    /// [`Tracee::clear_exit_kill`] for every process.
    ///
    /// # Errors
    /// The first that occurred.
    pub fn clear_exit_kill(&mut self) -> Result<()> {
        self.members
            .iter_mut()
            .try_for_each(Tracee::clear_exit_kill)
    }

    /// [`Tracee::release`] for every process, with its leader held.
    ///
    /// # Errors
    /// The first that occurred. Some processes may run already.
    pub fn release(mut self) -> Result<Vec<Held>> {
        // Taken from the list one by one: what is left when one fails is dropped, still with EXITKILL on its leader.
        self.members.reverse();
        let mut held = Vec::with_capacity(self.members.len());
        while let Some(member) = self.members.pop() {
            held.extend(member.release(true)?);
        }
        Ok(held)
    }

    fn seize_member(&mut self, pid: i32) -> Result<()> {
        let member = Tracee::seize(pid, self.options)?;
        self.take(member);
        Ok(())
    }

    fn take(&mut self, mut member: Tracee) {
        member.keeps_children = true;
        self.members.push(member);
    }

    fn knows(&self, pid: i32) -> bool {
        self.members.iter().any(|member| member.pid() == pid)
    }
}

impl Group for Family {
    fn members(&mut self) -> &mut [Tracee] {
        &mut self.members
    }

    fn find_newcomers(&mut self) -> Result<usize> {
        let before = self.members.len();
        let mut index = 0;
        // Those that are found have children too.
        while index < self.members.len() {
            for pid in std::mem::take(&mut self.members[index].born) {
                if !self.knows(pid) {
                    self.take(Tracee::adopted(pid, self.options));
                }
            }
            let children = match procfs::children(self.members[index].pid()) {
                Err(error) if error.is_gone() && index > 0 => Vec::new(),
                children => children?,
            };
            for pid in children {
                if self.knows(pid) {
                    continue;
                }
                match self.seize_member(pid) {
                    // It has ended: its parent knows, or will.
                    Err(Error::Zombie { .. } | Error::Gone { .. }) => {}
                    result => result?,
                }
            }
            index += 1;
        }
        Ok(self.members.len() - before)
    }

    fn lose(&mut self, pid: i32) -> bool {
        match self.members.iter().position(|member| member.pid() == pid) {
            None | Some(0) => false,
            Some(index) => {
                self.members.remove(index);
                true
            }
        }
    }
}

/// Does `step` with each of `items`; the first error.
fn every<T>(items: impl Iterator<Item = T>, mut step: impl FnMut(T) -> Result<()>) -> Result<()> {
    let mut first = Ok(());
    for item in items {
        let result = step(item);
        first = first.and(result);
    }
    first
}

/// Somebody killed it meanwhile: the others go on.
fn gone_is_well(result: Result<()>) -> Result<()> {
    match result {
        Err(error) if error.is_gone() => Ok(()),
        result => result,
    }
}
