//! What lies unread in UNIX sockets, and the open files that travel in it.
//!
//! Who looks at more than the first message changes the socket while he looks. Our death must not leave it so: the process that
//! holds it has an agent planted meanwhile, whose will is to put the options back.
//!
//! A file that was sent and then closed is open nowhere: only the kernel's queue holds it. Who peeks at the message gets a
//! descriptor of it, so that it can be looked at in our own table, which stands behind those of the tree for as long as that takes.
//! What else holds it there, and what is refused, is told of the socket that would bring it.

use std::collections::BTreeMap;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::sync::Arc;

use nix::libc;
use pageferry_tracee::descriptor::PidFd;
use pageferry_tracee::family::Family;
use pageferry_tracee::injection::Batch;
use pageferry_tracee::procfs::{self, DescriptorEntry};
use pageferry_tracee::socket::{self, Message};

use crate::Result;
use crate::capture::files::Entries;
use crate::capture::shared::SharedPages;
use crate::survey::{Object, Refusal, RefusalKind};

/// Where a descriptor of ours was found: a socket of the tree and the place of a message in its queue, from 0. What travels in a
/// socket that travels itself is found in the first.
#[derive(Debug, Clone, Copy)]
struct Place {
    pid: i32,
    fd: u32,
    message: usize,
}

/// The messages of a frozen tree, and what travels in them.
#[derive(Debug, Default)]
pub(crate) struct InFlight {
    /// What lies unread in its UNIX sockets, and in those that travel, by inode. Holds our descriptors.
    queues: BTreeMap<u64, Vec<Message>>,
    /// By our descriptors.
    places: BTreeMap<u32, Place>,
}

impl InFlight {
    /// Looks into the queues of all UNIX sockets of `tables`, and of those that travel, and adds our table.
    pub(crate) fn find(family: &mut Family, tables: &mut Vec<Entries>) -> Result<Self> {
        let mut found = Self::default();
        let mut own = Vec::new();
        let mut left: Vec<(i32, DescriptorEntry, Option<Place>)> = Vec::new();
        for (pid, entries) in tables.iter() {
            let sockets = entries.iter().filter(|entry| has_queue(entry));
            left.extend(sockets.map(|entry| (*pid, entry.clone(), None)));
        }
        let mut next = 0;
        while let Some((holder, entry, within)) = left.get(next).cloned() {
            next += 1;
            let Some(inode) = entry.pipe_or_socket_inode() else {
                continue;
            };
            if found.queues.contains_key(&inode) {
                continue;
            }
            let copy = PidFd::open(holder)?.get_fd(entry.fd)?;
            // What travels to connections that nobody has accepted cannot be seen.
            if socket::is_listening(copy.as_fd())? {
                continue;
            }
            let messages = match within {
                None => peek(family, holder, entry.fd, &copy)?,
                // No process has it.
                Some(_) => socket::peek_all(copy.as_fd())?,
            };
            for (index, message) in messages.iter().enumerate() {
                let place = within.unwrap_or(Place {
                    pid: holder,
                    fd: entry.fd,
                    message: index,
                });
                for file in &message.files {
                    let sent = procfs::descriptor(own_pid(), number(file))?;
                    if has_queue(&sent) {
                        left.push((own_pid(), sent.clone(), Some(place)));
                    }
                    found.places.insert(sent.fd, place);
                    own.push(sent);
                }
            }
            found.queues.insert(inode, messages);
        }
        if !own.is_empty() {
            own.sort_by_key(|entry| entry.fd);
            tables.push((own_pid(), own));
        }
        Ok(found)
    }

    /// What lies unread in the socket with this inode, if it was looked at.
    pub(crate) fn queue(&self, inode: u64) -> Option<&[Message]> {
        self.queues.get(&inode).map(Vec::as_slice)
    }

    /// Tells refusals of our descriptors as those of the sockets that bring them.
    pub(crate) fn named(&self, mut refusals: Vec<Refusal>) -> Vec<Refusal> {
        for refusal in &mut refusals {
            let Object::Fd(fd) = refusal.object else {
                continue;
            };
            let Some(place) = self.places.get(&fd).filter(|_| refusal.pid == own_pid()) else {
                continue;
            };
            *refusal = Refusal {
                pid: place.pid,
                object: Object::Fd(place.fd),
                what: RefusalKind::UnixInFlight {
                    message: place.message + 1,
                    what: refusal.what.to_string(),
                },
            };
        }
        refusals
    }

    /// Lets objects be reached that nobody else has open, after this is gone.
    pub(crate) fn keep(&self, objects: &mut [SharedPages]) -> Result<()> {
        let files = || {
            self.queues
                .values()
                .flatten()
                .flat_map(|queue| &queue.files)
        };
        for object in objects {
            let is_its = |file: &&OwnedFd| object.path == path(file);
            let Some(file) = files().find(is_its) else {
                continue;
            };
            let kept = file.try_clone().map_err(|source| crate::Error::File {
                path: object.path.clone(),
                source,
            })?;
            object.path = path(&kept);
            object.kept = Some(Arc::new(kept));
        }
        Ok(())
    }
}

/// Looks into the queue of descriptor `fd` of `pid`, which is `copy` here. If we are killed meanwhile the process puts right what
/// is not as it was, and then goes on.
fn peek(family: &mut Family, pid: i32, fd: u32, copy: &OwnedFd) -> Result<Vec<Message>> {
    let changed = socket::changed_by_peek(copy.as_fd())?;
    if changed.is_empty() {
        return Ok(Vec::new());
    }
    let mut injection = family.plant(pid)?;
    let address = injection.will_address(pid);
    let (mut will, mut values) = (Batch::new(), Vec::new());
    for (at, (name, value)) in (address..).step_by(8).zip(changed) {
        let len = size_of_val(&value);
        let option = [
            fd.into(),
            libc::SOL_SOCKET.into(),
            name.into(),
            at.into(),
            len.into(),
        ];
        will.call(libc::SYS_setsockopt, &option);
        // Its first bytes are those of the int.
        values.push(u64::from(u32::from_ne_bytes(value.to_ne_bytes())));
    }
    injection.make_will(pid, &will, &values)?;
    let messages = socket::peek_all(copy.as_fd())?;
    injection.revoke_will(pid)?;
    injection.cure()?;
    Ok(messages)
}

/// Our process, whose table holds what travels.
pub(crate) fn own_pid() -> i32 {
    std::process::id() as i32
}

/// The number of a descriptor of ours.
pub(crate) fn number(file: &OwnedFd) -> u32 {
    file.as_raw_fd().unsigned_abs()
}

fn path(file: &OwnedFd) -> String {
    format!("/proc/{}/fd/{}", own_pid(), number(file))
}

/// Whether this is a UNIX socket: no other tells how many open files travel to it, even if none does.
fn has_queue(entry: &DescriptorEntry) -> bool {
    entry.info.scm_fds.is_some()
}

/// Whether something travels to this socket.
fn brings(entry: &DescriptorEntry) -> bool {
    entry.info.scm_fds.is_some_and(|count| count > 0)
}

/// Whether something travels to any socket of these tables: who holds it is seen in the freeze only.
pub(crate) fn is_there<'e>(entries: impl IntoIterator<Item = &'e DescriptorEntry>) -> bool {
    entries.into_iter().any(brings)
}
