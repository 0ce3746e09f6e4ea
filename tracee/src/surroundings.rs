//! Namespaces and mounts of our own, for what must not change anything of this host.
//!
//! Like [`crate::process`] this is about this program only. All of it is to be called by a process with one thread.
//!
//! # Safety
//! Each unsafe block is one system call; what it is given outlives it.

use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags};

use crate::error::{Error, Result};
use crate::process::{errno_of, own_pid};

/// Where `/proc/sys` says that sockets may be bound to addresses that no interface has.
const NONLOCAL: [&str; 2] = [
    "/proc/sys/net/ipv4/ip_nonlocal_bind",
    "/proc/sys/net/ipv6/ip_nonlocal_bind",
];

/// What says how much sockets hold, for all of a network namespace. A new one has the kernel's word for it and not its maker's: who
/// has more than that in a queue could not have it again.
const QUEUES: [&str; 2] = [
    "/proc/sys/net/unix/max_dgram_qlen",
    "/proc/sys/net/core/somaxconn",
];

/// Inodes of a file system in memory: for each page of its bytes, and some beside.
const INODES_MIN: u64 = 1 << 14;
/// Bytes of such a file system beside those it is asked for.
const SPARE_LEN: u64 = 1 << 20;

/// `struct mount_attr` (5.12).
#[repr(C)]
struct MountAttributes {
    set: u64,
    clear: u64,
    propagation: u64,
    user_namespace: u64,
}

const MOUNT_ATTR_RDONLY: u64 = 1;
const AT_RECURSIVE: i32 = 0x8000;

fn failed(what: &'static str, errno: Errno) -> Error {
    Error::Kernel {
        what,
        pid: own_pid(),
        errno,
    }
}

/// Gives this process, and the children made from now on, a network of its own with nothing but the loopback in it, System V
/// objects and message queues of its own, and a host name of its own, which is the same at first.
///
/// # Errors
/// [`Error::Kernel`]: `EPERM` without CAP_SYS_ADMIN.
pub fn unshare_network_ipc_and_name() -> Result<Network> {
    let queues = QUEUES.map(|path| (path, std::fs::read_to_string(path).ok()));
    let all = libc::CLONE_NEWNET | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
    // SAFETY: no pointers.
    let answer = unsafe { libc::unshare(all) };
    Errno::result(answer)
        .map_err(|errno| failed("unshare(CLONE_NEWNET|CLONE_NEWIPC|CLONE_NEWUTS)", errno))?;
    raise_loopback()?;
    Ok(Network { queues })
}

/// A network of our own, which is not yet what it is to be.
#[derive(Debug)]
#[must_use]
pub struct Network {
    /// What there was on the host, by path.
    queues: [(&'static str, Option<String>); 2],
}

impl Network {
    /// Lets its sockets be bound to addresses that it has not, and hold as much as the host's. `/proc` must be one that can be
    /// written to.
    ///
    /// # Errors
    /// [`Error::Path`].
    pub fn settle(self) -> Result<()> {
        let everywhere = NONLOCAL.map(|path| (path, Some("1".to_owned())));
        for (path, value) in everywhere.into_iter().chain(self.queues) {
            let Some(value) = value else {
                continue;
            };
            match std::fs::write(path, value) {
                // A kernel without IPv6.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                written => {
                    written.map_err(|error| Error::path("write", path, errno_of(&error)))?;
                }
            }
        }
        Ok(())
    }
}

fn raise_loopback() -> Result<()> {
    // SAFETY: no pointers.
    let answer = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    let number = Errno::result(answer).map_err(|errno| failed("socket", errno))?;
    // SAFETY: the number was given to us a moment ago, and nobody else knows it.
    let socket = unsafe { OwnedFd::from_raw_fd(number) };
    let mut request = libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru {
            ifru_flags: (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short,
        },
    };
    for (place, &byte) in request.ifr_name.iter_mut().zip(b"lo") {
        *place = byte as libc::c_char;
    }
    // SAFETY: the kernel reads one ifreq.
    let answer = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    Errno::result(answer)
        .map(drop)
        .map_err(|errno| failed("ioctl(SIOCSIFFLAGS)", errno))
}

/// Gives this process, and the children made from now on, mounts of their own, all of which may only be read. What is mounted on
/// the host later is not seen there.
///
/// # Errors
/// [`Error::Kernel`]: `EPERM` without CAP_SYS_ADMIN, `ENOSYS` before Linux 5.12.
pub fn unshare_mounts_for_reading() -> Result<()> {
    // SAFETY: no pointers.
    let answer = unsafe { libc::unshare(libc::CLONE_NEWNS) };
    Errno::result(answer).map_err(|errno| failed("unshare(CLONE_NEWNS)", errno))?;
    let attributes = MountAttributes {
        set: MOUNT_ATTR_RDONLY,
        clear: 0,
        propagation: libc::MS_PRIVATE,
        user_namespace: 0,
    };
    // SAFETY: the path and the attributes outlive the call, and their length is stated.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            c"/".as_ptr(),
            AT_RECURSIVE,
            &raw const attributes,
            size_of::<MountAttributes>(),
        )
    };
    Errno::result(answer)
        .map(drop)
        .map_err(|errno| failed("mount_setattr", errno))
}

/// Mounts an empty file system in memory on `folder`, for about `len` bytes, whose own folder has this mode and these owners.
///
/// # Errors
/// [`Error::Path`].
pub fn mount_memory(folder: &Path, len: u64, mode: u32, uid: u32, gid: u32) -> Result<()> {
    let options = format!(
        "size={},nr_inodes={},mode={:o},uid={uid},gid={gid}",
        len.saturating_add(SPARE_LEN),
        (len / 4096).max(INODES_MIN),
        mode & 0o7777
    );
    nix::mount::mount(
        Some("pageferry"),
        folder,
        Some("tmpfs"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        Some(options.as_str()),
    )
    .map_err(|errno| Error::path("mount", folder.to_string_lossy(), errno))
}

/// Shows at `to` what is at `from`, with all that is mounted there, and with the same rights.
///
/// # Errors
/// [`Error::Path`] names `to`.
pub fn bind(from: &Path, to: &Path) -> Result<()> {
    let nothing: Option<&str> = None;
    nix::mount::mount(
        Some(from),
        to,
        nothing,
        MsFlags::MS_BIND | MsFlags::MS_REC,
        nothing,
    )
    .map_err(|errno| Error::path("mount", to.to_string_lossy(), errno))
}

/// Takes what was mounted last off `path`; who has something of it keeps that.
///
/// # Errors
/// [`Error::Path`].
pub fn take_off(path: &Path) -> Result<()> {
    nix::mount::umount2(path, MntFlags::MNT_DETACH)
        .map_err(|errno| Error::path("umount", path.to_string_lossy(), errno))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::{Ended, alone, fork, mount_proc, wait};

    #[test]
    fn what_is_read_only_stays_so_behind_a_bind_and_memory_does_not() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let folder = std::env::temp_dir().join(format!("pageferry-mounts-{}", own_pid()));
        std::fs::create_dir_all(&folder).expect("it can be made");
        std::fs::write(folder.join("file"), "text").expect("it can be written");
        alone(|| {
            let child = fork(false, || {
                let network = unshare_network_ipc_and_name().expect("unshare");
                unshare_mounts_for_reading().expect("unshare");
                let write = |path: &Path| std::fs::write(path, "more");
                let is_refused =
                    |path: &Path| write(path).is_err_and(|error| errno_of(&error) == Errno::EROFS);
                assert!(is_refused(&folder.join("file")) && is_refused(&folder.join("new")));
                bind(&folder, Path::new("/proc")).expect("bind");
                mount_memory(&folder, 8 << 20, 0o1750, 1, 2).expect("mount");
                write(&folder.join("file")).expect("it is in memory");
                write(&folder.join("other")).expect("it is in memory");
                bind(Path::new("/proc/file"), &folder.join("other")).expect("bind");
                take_off(Path::new("/proc")).expect("umount");
                assert!(is_refused(&folder.join("other")));
                let read = |name| std::fs::read_to_string(folder.join(name)).expect("read");
                assert_eq!(
                    (read("file"), read("other")),
                    ("more".into(), "text".into())
                );
                mount_proc().expect("proc");
                network.settle().expect("it is ours");
                let listener = std::net::TcpListener::bind("192.0.2.7:0");
                listener.expect("nobody has that address, and it can be bound");
                std::net::UdpSocket::bind("127.0.0.1:0")
                    .and_then(|socket| socket.connect("127.0.0.1:9"))
                    .expect("the loopback is there");
                0
            });
            assert_eq!(wait(child.expect("fork")).expect("wait"), Ended::Exited(0));
        });
        // And here as it was.
        let text = std::fs::read_to_string(folder.join("file")).expect("read");
        assert_eq!(text, "text");
        std::fs::write(folder.join("file"), "").expect("it can be written to");
        std::fs::remove_dir_all(&folder).expect("it is ours");
    }
}
