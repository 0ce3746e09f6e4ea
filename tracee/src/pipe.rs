//! Pipes: what lies in one without taking it out, and new ones filled alike.
//!
//! Reading goes through a second pipe with `tee(2)`, so the original keeps every byte. It must never read from a pipe of the
//! migrated process itself.
//!
//! # Safety
//! Each unsafe block is one system call on descriptors we hold, with buffers that outlive the call.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd};

use nix::errno::Errno;

use crate::choke::{self, Kind};
use crate::error::{Error, Result};
use crate::process::own_pid;

fn failed(what: &'static str, errno: Errno) -> Error {
    Error::kernel(what, own_pid(), errno)
}

fn fcntl(pipe: &impl AsFd, command: i32, argument: i32, what: &'static str) -> Result<i32> {
    choke::pass(Kind::Descriptor).map_err(|errno| failed(what, errno))?;
    // SAFETY: the commands used here take an integer.
    let answer = unsafe { libc::fcntl(pipe.as_fd().as_raw_fd(), command, argument) };
    Errno::result(answer).map_err(|errno| failed(what, errno))
}

/// Capacity in bytes (`F_GETPIPE_SZ`).
///
/// # Errors
/// [`Error::Kernel`]: `EBADF` for a descriptor that is no pipe.
pub fn capacity(pipe: &impl AsFd) -> Result<u32> {
    fcntl(pipe, libc::F_GETPIPE_SZ, 0, "fcntl(F_GETPIPE_SZ)").map(|bytes| bytes as u32)
}

/// Bytes waiting to be read (`FIONREAD`).
///
/// # Errors
/// [`Error::Kernel`].
pub fn unread_bytes(pipe: &impl AsFd) -> Result<usize> {
    const WHAT: &str = "ioctl(FIONREAD)";
    choke::pass(Kind::Descriptor).map_err(|errno| failed(WHAT, errno))?;
    let mut bytes: libc::c_int = 0;
    // SAFETY: FIONREAD stores one int at the address.
    let answer = unsafe { libc::ioctl(pipe.as_fd().as_raw_fd(), libc::FIONREAD, &raw mut bytes) };
    Errno::result(answer).map_err(|errno| failed(WHAT, errno))?;
    usize::try_from(bytes).map_err(|_| failed(WHAT, Errno::EIO))
}

/// A copy of everything in a pipe; `read_end` must be open for reading. Nobody may read or write it meanwhile.
///
/// The borders between the packets of an `O_DIRECT` pipe are not kept: such pipes need another way.
///
/// # Errors
/// [`Error::Kernel`]; in particular `EPERM` from `F_SETPIPE_SZ` when the pipe is larger than `/proc/sys/fs/pipe-max-size` lets
/// us make one without CAP_SYS_RESOURCE.
pub fn contents(read_end: &impl AsFd) -> Result<Vec<u8>> {
    let expected = unread_bytes(read_end)?;
    if expected == 0 {
        return Ok(Vec::new());
    }
    // As many slots as the original: tee(2) copies references to its buffers, however little each one holds.
    let (copy_read, copy_write) = create(capacity(read_end)?, &[])?;
    choke::pass(Kind::Descriptor).map_err(|errno| failed("tee", errno))?;
    // SAFETY: no pointers.
    let copied = unsafe {
        libc::tee(
            read_end.as_fd().as_raw_fd(),
            copy_write.as_raw_fd(),
            expected,
            libc::SPLICE_F_NONBLOCK,
        )
    };
    let copied = Errno::result(copied).map_err(|errno| failed("tee", errno))? as usize;
    if copied != expected {
        return Err(failed("tee", Errno::EIO));
    }
    // Without the writing end a short copy would show as an early end instead of a wait.
    drop(copy_write);
    let mut content = Vec::with_capacity(expected);
    File::from(copy_read)
        .read_to_end(&mut content)
        .map_err(|error| {
            failed(
                "read",
                Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)),
            )
        })?;
    if content.len() != expected {
        return Err(failed("read", Errno::EIO));
    }
    Ok(content)
}

/// Makes a pipe of `capacity` bytes that holds `content`: (read end, write end), both close-on-exec and blocking.
///
/// # Errors
/// [`Error::TooMuch`] when the content is longer than the capacity; [`Error::Kernel`], in particular `EPERM` from
/// `F_SETPIPE_SZ` above `/proc/sys/fs/pipe-max-size` without CAP_SYS_RESOURCE.
pub fn create(capacity: u32, content: &[u8]) -> Result<(OwnedFd, OwnedFd)> {
    let mut ends = [-1; 2];
    choke::pass(Kind::Descriptor).map_err(|errno| failed("pipe2", errno))?;
    // SAFETY: the kernel stores two descriptors, which are ours alone.
    let (read_end, write_end) = unsafe {
        Errno::result(libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC))
            .map_err(|errno| failed("pipe2", errno))?;
        (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1]))
    };
    fill(&write_end, capacity, content)?;
    Ok((read_end, write_end))
}

/// Gives an empty pipe this capacity, bytes, and content.
///
/// # Errors
/// As [`create`].
pub fn fill(write_end: &OwnedFd, capacity: u32, content: &[u8]) -> Result<()> {
    if self::capacity(write_end)? != capacity {
        let wanted =
            i32::try_from(capacity).map_err(|_| failed("fcntl(F_SETPIPE_SZ)", Errno::EINVAL))?;
        fcntl(write_end, libc::F_SETPIPE_SZ, wanted, "fcntl(F_SETPIPE_SZ)")?;
    }
    if content.is_empty() {
        return Ok(());
    }
    // The write below must not be able to wait.
    let limit = self::capacity(write_end)? as usize;
    if content.len() > limit {
        return Err(Error::TooMuch {
            what: "bytes in a pipe",
            asked: content.len(),
            limit,
        });
    }
    let wrote = |error: std::io::Error| {
        failed(
            "write",
            Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)),
        )
    };
    let mut writer = File::from(write_end.try_clone().map_err(wrote)?);
    writer.write_all(content).map_err(wrote)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contents_leave_the_pipe_as_it_was() {
        let bytes: Vec<u8> = (0..100_000_u32).map(|n| n as u8).collect();
        let (read_end, _write_end) = create(1 << 17, &bytes).expect("create");
        assert_eq!(capacity(&read_end).expect("capacity"), 1 << 17);
        assert_eq!(contents(&read_end).expect("first"), bytes);
        assert_eq!(contents(&read_end).expect("second"), bytes);
        assert_eq!(unread_bytes(&read_end).expect("unread"), bytes.len());
    }

    #[test]
    fn contents_in_many_small_buffers_are_complete() {
        let (read_end, write_end) = create(65_536, &[]).expect("create");
        // Splicing one byte at a time from another pipe leaves sixteen buffers of one byte: nothing merges.
        for byte in 0..16_u8 {
            let (other, _keep) = create(4096, &[byte]).expect("create");
            // SAFETY: no pointers but nulls.
            let moved = unsafe {
                libc::splice(
                    other.as_raw_fd(),
                    std::ptr::null_mut(),
                    write_end.as_raw_fd(),
                    std::ptr::null_mut(),
                    1,
                    0,
                )
            };
            assert_eq!(moved, 1);
        }
        let expected: Vec<u8> = (0..16).collect();
        assert_eq!(contents(&read_end).expect("contents"), expected);
    }

    #[test]
    fn empty_pipes_have_no_contents() {
        let (read_end, _write_end) = create(65_536, &[]).expect("create");
        assert_eq!(contents(&read_end).expect("contents"), Vec::<u8>::new());
    }

    #[test]
    fn a_pipe_is_never_overfilled() {
        assert!(matches!(
            create(4096, &[0; 4097]),
            Err(Error::TooMuch {
                asked: 4097,
                limit: 4096,
                ..
            })
        ));
    }
}
