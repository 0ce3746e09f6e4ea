//! Reading and writing the memory of another process.
//!
//! Two ways lead there: `process_vm_readv(2)`, fast but bound to the mapping's own protection, and `/proc/<pid>/mem`, which
//! also sees PROT_NONE, execute-only and write-only mappings. A page neither can give is a named error: this file must never
//! hand out zeros for bytes it could not read. It must not be pointed at memory that a userfaultfd of ours has still to fill:
//! `process_vm_readv` would wait for ourselves.

use std::fs::{File, OpenOptions};
use std::io;
use std::marker::PhantomData;
use std::mem::{MaybeUninit, size_of};
use std::os::unix::fs::FileExt;

use nix::errno::Errno;

use crate::choke::{self, Kind};
use crate::{Error, Result};

const PAGE: u64 = 4096;

/// Types whose every bit pattern is a value, so that they can be read from another process.
///
/// # Safety
/// The type has no padding, no niche and no pointer or reference of ours in it.
pub unsafe trait Pod: Copy {}
// SAFETY: plain integers and arrays of them.
unsafe impl Pod for u8 {}
// SAFETY: as above.
unsafe impl Pod for u16 {}
// SAFETY: as above.
unsafe impl Pod for u32 {}
// SAFETY: as above.
unsafe impl Pod for u64 {}
// SAFETY: as above.
unsafe impl Pod for i32 {}
// SAFETY: as above.
unsafe impl Pod for i64 {}
// SAFETY: as above.
unsafe impl<T: Pod, const N: usize> Pod for [T; N] {}

/// An address inside another process, which cannot be mixed up with one of ours.
#[derive(Debug)]
pub struct RemotePtr<T> {
    address: u64,
    of: PhantomData<fn() -> T>,
}

impl<T> Clone for RemotePtr<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for RemotePtr<T> {}

impl<T> RemotePtr<T> {
    /// The value of type `T` at `address`.
    pub fn new(address: u64) -> Self {
        Self {
            address,
            of: PhantomData,
        }
    }

    /// The address.
    pub fn address(self) -> u64 {
        self.address
    }
}

/// The memory of one process. Needs the right to trace it, but no trace.
#[derive(Debug)]
pub struct RemoteMemory {
    pid: i32,
    mem: File,
}

impl RemoteMemory {
    /// Opens the memory of `pid`. The handle stays with this address space: after an execve of the process it reads nothing.
    pub fn open(pid: i32) -> Result<Self> {
        let path = format!("/proc/{pid}/mem");
        let opened = choke::pass(Kind::Memory).and_then(|()| {
            OpenOptions::new()
                .read(true)
                .write(true)
                .open(&path)
                .map_err(errno_of)
        });
        match opened {
            Ok(mem) => Ok(Self { pid, mem }),
            Err(Errno::ENOENT | Errno::ESRCH) => Err(Error::Gone { pid }),
            Err(errno) => Err(Error::path("open", path, errno)),
        }
    }

    /// The process this is the memory of.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Whether the address space this was opened for still exists. What was found out about its pages before that, a hole in
    /// its page map among it, was true: the page tables of a process that has ended look like those of one that has nothing.
    ///
    /// # Errors
    /// [`Error::Gone`].
    pub fn check_exists(&self) -> Result<()> {
        choke::pass(Kind::Memory)
            .map_err(|errno| Error::kernel("read /proc/<pid>/mem", self.pid, errno))?;
        // Bound to the address space, not to the number: 0 bytes when that has no user left, otherwise a byte, or EIO where
        // nothing is mapped.
        match self.mem.read_at(&mut [0], 0).map_err(errno_of) {
            Ok(0) => Err(Error::Gone { pid: self.pid }),
            _ => Ok(()),
        }
    }

    /// Fills `buffer` from `address`.
    ///
    /// # Errors
    /// [`Error::Unreadable`] names the first page that cannot be had (unmapped, a guard page, device memory,
    /// memfd_secret(2)); the buffer's content is then unspecified.
    pub fn read(&self, address: u64, buffer: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < buffer.len() {
            let at = address + done as u64;
            match self.read_vector(at, &mut buffer[done..]) {
                Ok(count) if count > 0 => done += count,
                Ok(_) | Err(Errno::EFAULT) => {
                    let in_page = (PAGE - at % PAGE) as usize;
                    let end = buffer.len().min(done + in_page);
                    self.read_forced(at, &mut buffer[done..end])?;
                    done = end;
                }
                Err(errno) => return Err(Error::kernel("process_vm_readv", self.pid, errno)),
            }
        }
        Ok(())
    }

    /// Writes `bytes` at `address`, whatever the mapping's protection, as a debugger would: a private file page becomes a
    /// copy of its own.
    ///
    /// # Errors
    /// [`Error::Unreadable`] when a page cannot be written.
    pub fn write(&self, address: u64, bytes: &[u8]) -> Result<()> {
        let mut done = 0;
        while done < bytes.len() {
            let at = address + done as u64;
            choke::pass(Kind::Memory)
                .map_err(|errno| Error::kernel("write /proc/<pid>/mem", self.pid, errno))?;
            match self.mem.write_at(&bytes[done..], at).map_err(errno_of) {
                Ok(0) => return Err(Error::Gone { pid: self.pid }),
                Ok(count) => done += count,
                Err(Errno::EINTR) => {}
                Err(Errno::EIO | Errno::EFAULT) => {
                    return Err(Error::Unreadable {
                        pid: self.pid,
                        address: at,
                    });
                }
                Err(errno) => return Err(Error::kernel("write /proc/<pid>/mem", self.pid, errno)),
            }
        }
        Ok(())
    }

    /// Reads one value.
    ///
    /// # Errors
    /// As [`RemoteMemory::read`].
    pub fn read_value<T: Pod>(&self, pointer: RemotePtr<T>) -> Result<T> {
        let mut value = MaybeUninit::<T>::zeroed();
        // SAFETY: the bytes of `value`, zeroed and so initialised, and borrowed only here.
        let bytes = unsafe {
            std::slice::from_raw_parts_mut(value.as_mut_ptr().cast::<u8>(), size_of::<T>())
        };
        self.read(pointer.address, bytes)?;
        // SAFETY: `T: Pod`: every bit pattern is a value.
        Ok(unsafe { value.assume_init() })
    }

    fn read_vector(&self, address: u64, buffer: &mut [u8]) -> std::result::Result<usize, Errno> {
        choke::pass(Kind::Memory)?;
        let local = libc::iovec {
            iov_base: buffer.as_mut_ptr().cast(),
            iov_len: buffer.len(),
        };
        let remote = libc::iovec {
            iov_base: address as *mut libc::c_void,
            iov_len: buffer.len(),
        };
        // SAFETY: `local` describes `buffer`, which outlives the call; `remote` is only an address in the other process.
        let count = unsafe { libc::process_vm_readv(self.pid, &local, 1, &remote, 1, 0) };
        Errno::result(count).map(|count| count as usize)
    }

    fn read_forced(&self, address: u64, buffer: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < buffer.len() {
            choke::pass(Kind::Memory)
                .map_err(|errno| Error::kernel("read /proc/<pid>/mem", self.pid, errno))?;
            match self
                .mem
                .read_at(&mut buffer[done..], address + done as u64)
                .map_err(errno_of)
            {
                Ok(0) => return Err(Error::Gone { pid: self.pid }),
                Ok(count) => done += count,
                Err(Errno::EINTR) => {}
                Err(Errno::EIO | Errno::EFAULT) => {
                    return Err(Error::Unreadable {
                        pid: self.pid,
                        address: address + done as u64,
                    });
                }
                Err(errno) => return Err(Error::kernel("read /proc/<pid>/mem", self.pid, errno)),
            }
        }
        Ok(())
    }
}

fn errno_of(error: io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}
