//! Memory that several processes share: made anew in this process, and read where it is, as a file.
//!
//! The contents of an object are never read or written through a mapping: to read a hole that way would allocate it. Whoever maps
//! an object made here is another process, which gets it as a descriptor.
//!
//! # Safety
//! Each unsafe block is one system call with integers or with a text that outlives the call; the one mapping made here is
//! never accessed, and is gone when the call that makes it returns.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, FromRawFd as _};
use std::os::unix::fs::OpenOptionsExt as _;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek64};

use crate::choke::{self, Kind};
use crate::error::{Error, Result};
use crate::process::own_pid;

/// `F_SEAL_EXEC` (6.3): the permission to execute stays as it is.
pub const SEAL_EXEC: u32 = 0x20;

/// Opens an object for reading through the `/proc` path of a descriptor or mapping that reaches it; a position of its own, and the
/// times of the file stay as they are.
///
/// # Errors
/// [`Error::Path`].
pub fn open(path: &str) -> Result<File> {
    choke::pass(Kind::Memory)
        .and_then(|()| {
            OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_NOATIME | libc::O_NOCTTY | libc::O_NONBLOCK)
                .open(path)
                .map_err(errno_of)
        })
        .map_err(|errno| Error::path("open", path, errno))
}

/// The next bytes at or after `from` that are no hole, up to `end`: from and to, bytes. `None`: only holes are left. Moves the position.
///
/// # Errors
/// [`Error::Kernel`].
pub fn next_data(file: &File, from: u64, end: u64) -> Result<Option<(u64, u64)>> {
    const WHAT: &str = "lseek(SEEK_DATA)";
    let failed = |errno| Error::kernel(WHAT, own_pid(), errno);
    choke::pass(Kind::Memory).map_err(failed)?;
    let seek = |at: u64, whence| {
        let at = i64::try_from(at).map_err(|_| Errno::EINVAL)?;
        let found = lseek64(file, at, whence)?;
        u64::try_from(found).map_err(|_| Errno::EOVERFLOW)
    };
    let start = match seek(from, Whence::SeekData) {
        Ok(start) if start < end => start,
        // Behind the last data, or behind the end.
        Ok(_) | Err(Errno::ENXIO) => return Ok(None),
        Err(errno) => return Err(failed(errno)),
    };
    let hole = seek(start, Whence::SeekHole).map_err(failed)?;
    Ok(Some((start, hole.min(end))))
}

/// Shared anonymous memory of `len` bytes, whole pages: a file that `/proc/PID/maps` calls `/dev/zero (deleted)`. With `no_reserve`
/// its pages count as memory in use only once they are there.
///
/// # Errors
/// [`Error::Kernel`] with `ENOMEM` if there is no room for it; [`Error::Path`].
pub fn anonymous(len: u64, no_reserve: bool) -> Result<File> {
    const WHAT: &str = "mmap(MAP_SHARED | MAP_ANONYMOUS)";
    let failed = |errno| Error::kernel(WHAT, own_pid(), errno);
    let len = usize::try_from(len).map_err(|_| failed(Errno::ENOMEM))?;
    let mut flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
    if no_reserve {
        flags |= libc::MAP_NORESERVE;
    }
    // SAFETY: a new mapping, at an address of the kernel's choice.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_NONE, flags, -1, 0) };
    if at == libc::MAP_FAILED {
        return Err(failed(Errno::last()));
    }
    let start = at as usize;
    let path = format!("/proc/self/map_files/{start:x}-{:x}", start + len);
    let opened = OpenOptions::new().read(true).write(true).open(&path);
    // SAFETY: the mapping made above, which nobody else knows of.
    unsafe { libc::munmap(at, len) };
    opened.map_err(|error| Error::path("open", path, errno_of(error)))
}

/// A memfd without content. `seals` are those it will get by [`seal`].
///
/// # Errors
/// [`Error::Kernel`] with `EACCES` where `vm.memfd_noexec` forbids one that may be executed.
pub fn memfd(name: &str, mode: u32, seals: u32) -> Result<File> {
    const MFD_NOEXEC_SEAL: libc::c_uint = 8;
    const MFD_EXEC: libc::c_uint = 0x10;
    let failed = |errno| Error::kernel("memfd_create", own_pid(), errno);
    let name = CString::new(name).map_err(|_| failed(Errno::EINVAL))?;
    // The one way to have that seal on a host that allows no other memfd.
    let executable = match seals & SEAL_EXEC != 0 && mode & 0o111 == 0 {
        true => MFD_NOEXEC_SEAL,
        false => MFD_EXEC,
    };
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING | executable;
    // SAFETY: the name outlives the call; the descriptor returned is ours alone.
    unsafe {
        let fd = libc::memfd_create(name.as_ptr(), flags);
        Ok(File::from_raw_fd(Errno::result(fd).map_err(failed)?))
    }
}

/// The seals of a memfd, `F_SEAL_*`.
///
/// # Errors
/// [`Error::Kernel`] with `EINVAL` for a file that can have none.
pub fn seals(file: impl AsFd) -> Result<u32> {
    let failed = |errno| Error::kernel("fcntl(F_GET_SEALS)", own_pid(), errno);
    choke::pass(Kind::Descriptor).map_err(failed)?;
    // SAFETY: no pointers.
    let seals = unsafe { libc::fcntl(file.as_fd().as_raw_fd(), libc::F_GET_SEALS) };
    Errno::result(seals)
        .map(|seals| seals.unsigned_abs())
        .map_err(failed)
}

/// Whether a file has extended attributes that are somebody's choice; the label that SELinux gives every file is not.
///
/// # Errors
/// [`Error::Kernel`].
pub fn has_attributes(file: impl AsFd) -> Result<bool> {
    /// Longest list there is, `XATTR_LIST_MAX`, bytes.
    const LIST_LEN: usize = 65_536;
    let failed = |errno| Error::kernel("flistxattr", own_pid(), errno);
    choke::pass(Kind::Descriptor).map_err(failed)?;
    let mut names = vec![0_u8; LIST_LEN];
    // SAFETY: the buffer is as long as is said, and outlives the call.
    let len = unsafe {
        libc::flistxattr(
            file.as_fd().as_raw_fd(),
            names.as_mut_ptr().cast(),
            names.len(),
        )
    };
    match Errno::result(len) {
        Ok(len) => {
            let names = &names[..len.unsigned_abs()];
            let mut names = names.split(|&byte| byte == 0);
            Ok(names.any(|name| !name.is_empty() && name != b"security.selinux"))
        }
        Err(Errno::EOPNOTSUPP) => Ok(false),
        Err(errno) => Err(failed(errno)),
    }
}

/// Adds seals; they cannot be taken off again.
///
/// # Errors
/// [`Error::Kernel`] with `EBUSY` while a mapping may still write what is to be sealed.
pub fn seal(file: impl AsFd, seals: u32) -> Result<()> {
    // SAFETY: no pointers.
    let added = unsafe { libc::fcntl(file.as_fd().as_raw_fd(), libc::F_ADD_SEALS, seals) };
    Errno::result(added)
        .map(drop)
        .map_err(|errno| Error::kernel("fcntl(F_ADD_SEALS)", own_pid(), errno))
}

fn errno_of(error: io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use super::*;

    #[test]
    fn holes_of_an_object_stay_holes() {
        let memfd = memfd("holes", 0o600, 0).expect("it can be made");
        memfd.set_len(1 << 20).expect("it may grow");
        memfd.write_all_at(b"here", 5 * 4096).expect("it is ours");
        let next = |from| next_data(&memfd, from, 1 << 20).expect("it can be asked");
        assert_eq!(next(0), Some((5 * 4096, 6 * 4096)));
        assert_eq!(next(6 * 4096), None);
        assert_eq!(next(1 << 20), None);
        let cut = next_data(&memfd, 0, 5 * 4096).expect("it can be asked");
        assert_eq!(cut, None);
    }

    #[test]
    fn seals_are_those_that_were_added() {
        let plain = memfd("plain", 0o777, 0).expect("it can be made");
        assert_eq!(seals(&plain).expect("it has"), 0);
        let wanted = (libc::F_SEAL_SHRINK | libc::F_SEAL_GROW).unsigned_abs() | SEAL_EXEC;
        let data = memfd("data", 0o666, wanted).expect("it can be made");
        seal(&data, wanted).expect("it may be sealed");
        assert_eq!(seals(&data).expect("it has"), wanted);
        assert!(data.set_len(1).is_err(), "it may not grow");
    }

    #[test]
    fn shared_anonymous_memory_is_a_file_that_forgets_its_mapping() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let memory = match anonymous(3 * 4096, false) {
            Ok(memory) => memory,
            // Without CAP_CHECKPOINT_RESTORE; `pageferry check` says so.
            Err(Error::Path {
                errno: Errno::EPERM,
                ..
            }) => return,
            Err(error) => panic!("{error}"),
        };
        assert_eq!(memory.metadata().expect("it is open").len(), 3 * 4096);
        memory.write_all_at(b"there", 4096).expect("it is ours");
        let data = next_data(&memory, 0, 3 * 4096).expect("it can be asked");
        assert_eq!(data, Some((4096, 2 * 4096)));
        let link = format!("/proc/self/fd/{}", memory.as_raw_fd());
        let link = std::fs::read_link(link).expect("it is open");
        assert_eq!(link.to_str(), Some("/dev/zero (deleted)"));
    }
}
