//! System V shared memory: looked at, and made anew under its old number.
//!
//! A segment made here is filled through a file, as other shared memory is: the one mapping that is made for that is never accessed.
//! A segment lives until it is removed, whoever is attached or not; one that is removed already lives for as long as somebody is.
//!
//! # Safety
//! Each unsafe block is one system call with integers, or with a structure that outlives the call.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::mem::MaybeUninit;

use nix::errno::Errno;

use crate::choke::{self, Kind};
use crate::error::{Error, Result};
use crate::process::own_pid;

/// Whether `/proc/PID/maps` calls an attached segment so: by its key.
pub fn is_name(name: &str) -> bool {
    let key = name.strip_prefix("/SYSV");
    let key = key.and_then(|key| key.strip_suffix(" (deleted)"));
    key.is_some_and(|key| key.len() == 8 && key.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

/// Where the number of the next segment of this ipc namespace is ordered (3.9, `CONFIG_CHECKPOINT_RESTORE`).
const NEXT: &str = "/proc/sys/kernel/shm_next_id";
/// Bits of `shm_perm.mode` that are no permissions, of `linux/shm.h`.
const SHM_DEST: u32 = 0o1000;
const SHM_LOCKED: u32 = 0o2000;
const SHM_HUGETLB: u32 = 0o4000;

/// A segment (shmctl(2)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// Its number.
    pub id: i32,
    /// 0: `IPC_PRIVATE`, or removed.
    pub key: i32,
    /// Bytes.
    pub size: u64,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// And its group.
    pub gid: u32,
    /// It goes with the last that is attached (`SHM_DEST`).
    pub removed: bool,
    /// It is not swapped (`SHM_LOCK`).
    pub locked: bool,
    /// Of hugetlb pages.
    pub huge: bool,
    /// How many mappings of it there are, in all processes.
    pub attached: u64,
}

fn status(id: i32) -> std::result::Result<libc::shmid_ds, Errno> {
    let mut status = MaybeUninit::<libc::shmid_ds>::uninit();
    // SAFETY: the structure outlives the call, which fills it if it succeeds.
    unsafe {
        Errno::result(libc::shmctl(id, libc::IPC_STAT, status.as_mut_ptr()))?;
        Ok(status.assume_init())
    }
}

/// The segment `id` of this ipc namespace; `None` if there is none.
///
/// # Errors
/// [`Error::Kernel`].
pub fn segment(id: i32) -> Result<Option<Segment>> {
    const WHAT: &str = "shmctl(IPC_STAT)";
    choke::pass(Kind::Memory).map_err(|errno| Error::kernel(WHAT, own_pid(), errno))?;
    match status(id) {
        Ok(found) => {
            let mode = u32::from(found.shm_perm.mode);
            Ok(Some(Segment {
                id,
                key: found.shm_perm.__key,
                size: found.shm_segsz as u64,
                mode: mode & 0o777,
                uid: found.shm_perm.uid,
                gid: found.shm_perm.gid,
                removed: mode & SHM_DEST != 0,
                locked: mode & SHM_LOCKED != 0,
                huge: mode & SHM_HUGETLB != 0,
                attached: found.shm_nattch,
            }))
        }
        Err(Errno::EINVAL | Errno::EIDRM) => Ok(None),
        Err(errno) => Err(Error::kernel(WHAT, own_pid(), errno)),
    }
}

/// The segment that has this key, which is not 0.
pub fn with_key(key: i32) -> Option<i32> {
    // SAFETY: no pointers.
    let id = unsafe { libc::shmget(key, 0, 0) };
    Errno::result(id).ok()
}

/// Whether this host can give a segment a number that is asked for.
pub fn can_number() -> bool {
    OpenOptions::new().write(true).open(NEXT).is_ok()
}

/// Which processes of this pid namespace are attached to the segments `ids`, as far as they may be looked at.
///
/// # Errors
/// [`Error::Path`] when `/proc` cannot be listed.
pub fn holders(ids: &BTreeSet<i32>) -> Result<BTreeMap<i32, BTreeSet<i32>>> {
    let failed = |errno| Error::path("list", "/proc", errno);
    choke::pass(Kind::Proc).map_err(failed)?;
    let mut holders: BTreeMap<i32, BTreeSet<i32>> = BTreeMap::new();
    let entries = std::fs::read_dir("/proc").map_err(|error| failed(errno_of(&error)))?;
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        // One that has ended, or that nobody may look at.
        let Ok(text) = std::fs::read(entry.path().join("maps")) else {
            continue;
        };
        let text = String::from_utf8_lossy(&text);
        for id in text.lines().filter_map(attached_id) {
            if ids.contains(&id) {
                holders.entry(id).or_default().insert(pid);
            }
        }
    }
    Ok(holders)
}

/// The number of the segment in a line of `maps`: `7f00-7f01 rw-s 00000000 00:01 5  /SYSV0000002a (deleted)`.
fn attached_id(line: &str) -> Option<i32> {
    let mut fields = line.split_ascii_whitespace().skip(4);
    let (inode, name, deleted) = (fields.next()?, fields.next()?, fields.next()?);
    is_name(&format!("{name} {deleted}")).then(|| inode.parse().ok())?
}

/// A segment that was made here. We are attached to it until this is dropped.
#[derive(Debug)]
pub struct Made {
    /// Leads to what it holds.
    pub file: File,
    /// Where it is mapped.
    at: usize,
}

impl Drop for Made {
    fn drop(&mut self) {
        // SAFETY: the mapping was made for this value alone, and is never accessed.
        unsafe { libc::shmdt(self.at as *const libc::c_void) };
    }
}

/// Makes `wanted` with its number, all holes. One that is to be removed already is so at once, so that nothing of it outlives us and
/// those who are attached; others can attach to it all the same.
///
/// # Errors
/// [`Error::Path`] where a number cannot be asked for; [`Error::Kernel`] with `EEXIST` if the key or the number is taken. Nothing is
/// left of it then.
pub fn create(wanted: &Segment) -> Result<Made> {
    order(wanted.id)?;
    let made = made_with_number(wanted);
    if made.is_err() {
        // What was not used up would be the next one's, of anybody.
        let _ = order(-1);
    }
    let id = made?;
    let opened = give_owner(wanted)
        .and_then(|()| open(id, wanted.size))
        .and_then(|made| match wanted.locked {
            true => control(id, libc::SHM_LOCK, "shmctl(SHM_LOCK)").map(|()| made),
            false => Ok(made),
        });
    if opened.is_err() || wanted.removed {
        // It lives for as long as we are attached.
        let _ = remove(id);
    }
    opened
}

fn order(id: i32) -> Result<()> {
    choke::pass(Kind::Memory)
        .and_then(|()| std::fs::write(NEXT, id.to_string()).map_err(|error| errno_of(&error)))
        .map_err(|errno| Error::path("write", NEXT, errno))
}

fn made_with_number(wanted: &Segment) -> Result<i32> {
    let failed = |errno| Error::kernel("shmget", own_pid(), errno);
    let size = usize::try_from(wanted.size).map_err(|_| failed(Errno::EINVAL))?;
    let flags = libc::IPC_CREAT | libc::IPC_EXCL | (wanted.mode & 0o777) as i32;
    // SAFETY: no pointers.
    let id = unsafe { libc::shmget(wanted.key, size, flags) };
    let id = Errno::result(id).map_err(failed)?;
    if id == wanted.id {
        return Ok(id);
    }
    // The number's place is in use, and the kernel took the next.
    let _ = remove(id);
    Err(failed(Errno::EEXIST))
}

fn give_owner(wanted: &Segment) -> Result<()> {
    let failed = |errno| Error::kernel("shmctl(IPC_SET)", own_pid(), errno);
    let mut now = status(wanted.id).map_err(failed)?;
    (now.shm_perm.uid, now.shm_perm.gid) = (wanted.uid, wanted.gid);
    // SAFETY: the structure was filled by the kernel and outlives the call.
    let set = unsafe { libc::shmctl(wanted.id, libc::IPC_SET, &raw mut now) };
    Errno::result(set).map(drop).map_err(failed)
}

fn open(id: i32, size: u64) -> Result<Made> {
    let failed = |errno| Error::kernel("shmat", own_pid(), errno);
    // SAFETY: a new mapping, at an address of the kernel's choice, which is not accessed.
    let at = unsafe { libc::shmat(id, std::ptr::null(), 0) };
    if at as isize == -1 {
        return Err(failed(Errno::last()));
    }
    let start = at as u64;
    let end = start + size.next_multiple_of(4096);
    let path = format!("/proc/self/map_files/{start:x}-{end:x}");
    let opened = OpenOptions::new().read(true).write(true).open(&path);
    match opened {
        Ok(file) => Ok(Made {
            file,
            at: at as usize,
        }),
        Err(error) => {
            // SAFETY: the mapping made above, which nobody else knows of.
            unsafe { libc::shmdt(at) };
            Err(Error::path("open", path, errno_of(&error)))
        }
    }
}

/// Removes a segment: at once, or with the last that is attached. That it is gone is no error.
///
/// # Errors
/// [`Error::Kernel`].
pub fn remove(id: i32) -> Result<()> {
    control(id, libc::IPC_RMID, "shmctl(IPC_RMID)")
}

fn control(id: i32, command: i32, what: &'static str) -> Result<()> {
    // SAFETY: these commands take no structure.
    let done = unsafe { libc::shmctl(id, command, std::ptr::null_mut()) };
    match Errno::result(done) {
        Ok(_) => Ok(()),
        Err(Errno::EINVAL | Errno::EIDRM) if command == libc::IPC_RMID => Ok(()),
        Err(errno) => Err(Error::kernel(what, own_pid(), errno)),
    }
}

fn errno_of(error: &std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use super::*;

    #[test]
    fn lines_of_maps_tell_the_segment() {
        let line = "7f00-7f01 rw-s 00000000 00:01 5                      /SYSV0000002a (deleted)";
        assert_eq!(attached_id(line), Some(5));
        for other in [
            "7f00-7f01 rw-s 00000000 00:01 5  /dev/zero (deleted)",
            "7f00-7f01 rw-p 00000000 00:00 0 ",
            "7f00-7f01 rw-s 00000000 08:01 5  /SYSV0000002a",
        ] {
            assert_eq!(attached_id(other), None);
        }
    }

    #[test]
    fn a_segment_is_made_with_its_number_or_not_at_all() {
        if !nix::unistd::geteuid().is_root() || !can_number() {
            return;
        }
        let wanted = Segment {
            id: 7 << 15 | 77,
            key: 0x7061_6765,
            size: 5000,
            mode: 0o640,
            uid: 65534,
            gid: 3,
            ..Segment::default()
        };
        assert_eq!(segment(wanted.id).expect("it can be asked"), None);
        let made = create(&wanted).expect("nobody has its number or key");
        made.file.write_all_at(b"text", 4996).expect("it has room");
        assert!(create(&wanted).is_err(), "the key is taken");
        let other = Segment { key: 0, ..wanted };
        assert!(create(&other).is_err(), "the number is taken");
        let is = || segment(wanted.id).expect("it can be asked");
        let attached = Segment {
            attached: 1,
            ..wanted
        };
        assert_eq!(is(), Some(attached));
        assert_eq!(with_key(wanted.key), Some(wanted.id));
        drop(made);
        assert_eq!(is(), Some(wanted));
        remove(wanted.id).expect("it is there");
        assert_eq!(is(), None);
        remove(wanted.id).expect("it is gone");
        // One that is removed lives for as long as we do.
        let removed = Segment {
            key: 0,
            removed: true,
            attached: 1,
            ..wanted
        };
        let made = create(&removed).expect("the number is free");
        assert_eq!(is(), Some(removed));
        drop(made);
        assert_eq!(is(), None);
        // The order for a number is used up, or taken back.
        let next = std::fs::read_to_string(NEXT).expect("it can be read");
        assert_eq!(next.trim(), "-1");
    }
}
