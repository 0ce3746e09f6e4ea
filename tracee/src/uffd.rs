//! userfaultfd: fills the missing pages of another address space and tells what happens to its mappings.
//!
//! The ioctls are defined here because the `userfaultfd` crate knows nothing after Linux 5.13 and turns the `-EAGAIN` that the
//! kernel leaves in a copy's byte count into a huge count. What a caller must decide about (a page that exists, a mapping that
//! has gone, an event to be read first) is an answer, [`Copied`]; only what is a mistake or a broken host is an error.
//!
//! Nothing here ever waits, so that one thread can serve many contexts. A process whose fork, mremap, madvise or munmap event
//! has not been read is blocked in that call, and copies into it answer [`Copied::Again`] until somebody reads.
//!
//! # Safety
//! Each unsafe block is one system call with a structure that outlives it, or takes ownership of a descriptor that the kernel
//! has just made for us. The addresses given to the kernel are those of the *other* address space, never dereferenced here.

use std::ops::{BitOr, Range};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};

use nix::errno::Errno;

use crate::choke::{self, Kind};
use crate::error::{Error, Result};

// ---------------------------------------------------------------------------------------------------------------------
// The kernel's side (linux/userfaultfd.h)

const UFFDIO: u8 = 0xaa;
const UFFD_API: u64 = 0xaa;

#[repr(C)]
struct ApiArgument {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct RangeArgument {
    start: u64,
    len: u64,
}

#[repr(C)]
struct RegisterArgument {
    range: RangeArgument,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct CopyArgument {
    target: u64,
    source: u64,
    len: u64,
    mode: u64,
    /// Bytes copied, or a negative errno.
    copied: i64,
}

/// `struct uffdio_zeropage` and `struct uffdio_poison`, which are alike.
#[repr(C)]
struct FillArgument {
    range: RangeArgument,
    mode: u64,
    /// Bytes filled, or a negative errno.
    filled: i64,
}

/// `struct uffd_msg`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Message {
    event: u8,
    reserved1: u8,
    reserved2: u16,
    reserved3: u32,
    /// pagefault {flags, address, tid} · fork {descriptor} · remap {from, to, len} · remove and unmap {start, end}
    argument: [u64; 3],
}

const REGISTER: libc::Ioctl = 0xc020_aa00;
const UNREGISTER: libc::Ioctl = 0x8010_aa01;
const WAKE: libc::Ioctl = 0x8010_aa02;
const COPY: libc::Ioctl = 0xc028_aa03;
const ZEROPAGE: libc::Ioctl = 0xc020_aa04;
const POISON: libc::Ioctl = 0xc020_aa08;
const API: libc::Ioctl = 0xc018_aa3f;

const _: () = {
    use nix::{request_code_read, request_code_readwrite};
    assert!(size_of::<ApiArgument>() == 24);
    assert!(size_of::<RangeArgument>() == 16);
    assert!(size_of::<RegisterArgument>() == 32);
    assert!(size_of::<CopyArgument>() == 40);
    assert!(size_of::<FillArgument>() == 32);
    assert!(size_of::<Message>() == 32);
    assert!(API == request_code_readwrite!(UFFDIO, 0x3f, size_of::<ApiArgument>()));
    assert!(REGISTER == request_code_readwrite!(UFFDIO, 0x00, size_of::<RegisterArgument>()));
    assert!(UNREGISTER == request_code_read!(UFFDIO, 0x01, size_of::<RangeArgument>()));
    assert!(WAKE == request_code_read!(UFFDIO, 0x02, size_of::<RangeArgument>()));
    assert!(COPY == request_code_readwrite!(UFFDIO, 0x03, size_of::<CopyArgument>()));
    assert!(ZEROPAGE == request_code_readwrite!(UFFDIO, 0x04, size_of::<FillArgument>()));
    assert!(POISON == request_code_readwrite!(UFFDIO, 0x08, size_of::<FillArgument>()));
};

const REGISTER_MODE_MISSING: u64 = 1 << 0;
const REGISTER_MODE_WP: u64 = 1 << 1;

const EVENT_PAGEFAULT: u8 = 0x12;
const EVENT_FORK: u8 = 0x13;
const EVENT_REMAP: u8 = 0x14;
const EVENT_REMOVE: u8 = 0x15;
const EVENT_UNMAP: u8 = 0x16;
const PAGEFAULT_FLAG_WRITE: u64 = 1 << 0;

/// Messages taken by one read(2).
const MESSAGES_PER_READ: usize = 64;

/// Features asked for in the handshake.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features(u64);

impl Features {
    /// A fork gives the child a context of its own (4.11). Asking needs CAP_SYS_PTRACE in the asker. Without it children read
    /// zeros where pages are missing.
    pub const EVENT_FORK: Self = Self(1 << 1);
    /// mremap is told (4.11). Without it moved ranges read zeros.
    pub const EVENT_REMAP: Self = Self(1 << 2);
    /// madvise DONTNEED and REMOVE are told (4.11).
    pub const EVENT_REMOVE: Self = Self(1 << 3);
    /// Shared memory can be registered (4.11).
    pub const MISSING_SHMEM: Self = Self(1 << 5);
    /// munmap is told (4.11).
    pub const EVENT_UNMAP: Self = Self(1 << 6);
    /// Faults tell their thread (4.14).
    pub const THREAD_ID: Self = Self(1 << 8);
    /// Write protection covers pages that do not exist yet (6.4).
    pub const WP_UNPOPULATED: Self = Self(1 << 13);
    /// [`Uffd::poison`] (6.6).
    pub const POISON: Self = Self(1 << 14);
    /// Writes to protected pages are noted without any event (6.7).
    pub const WP_ASYNC: Self = Self(1 << 15);
    /// UFFDIO_MOVE (6.8), which only the process itself may ask for.
    pub const MOVE: Self = Self(1 << 16);

    /// Whether all of `other` are among these.
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

impl BitOr for Features {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Answers and events

/// What became of pages to install. The number is of bytes, from the start of the range, that *were* installed before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Copied {
    /// All of it; waiting threads were woken.
    Done,
    /// The layout is changing: read the events, then go on from there. Trying again without reading goes on for ever.
    Again(u64),
    /// The next page exists already. Threads waiting for it are not woken: [`Uffd::wake`].
    Exists(u64),
    /// The next page lies in no mapping of this context any more, or the range crosses a border of mappings.
    NoMapping(u64),
    /// The host, or the memory control group, has no room for the next page.
    NoMemory(u64),
    /// The process has no address space any more.
    Gone,
}

/// What happened in the other address space. Addresses are page aligned.
#[derive(Debug)]
pub enum Event {
    /// A thread waits for a missing page.
    Fault {
        /// The page.
        address: u64,
        /// It wants to write.
        write: bool,
        /// The thread, numbered as in the pid namespace *it* lives in; 0 without [`Features::THREAD_ID`].
        tid: i32,
    },
    /// The process forked. Pages missing in the parent are missing in the child.
    Fork {
        /// The child's own context, with the same features and ranges. Dropped too early, the child reads zeros.
        child: Uffd,
    },
    /// A mapping moved; so did its pages and what is missing of it.
    Remap {
        /// Old address.
        from: u64,
        /// New address.
        to: u64,
        /// Bytes moved.
        len: u64,
    },
    /// Pages were dropped by madvise. Private ones read as zeros from now on; of shared ones the event does not tell whether
    /// the content went too.
    Remove {
        /// First address.
        start: u64,
        /// One past the last.
        end: u64,
    },
    /// A mapping went away.
    Unmap {
        /// First address.
        start: u64,
        /// One past the last.
        end: u64,
    },
}

// ---------------------------------------------------------------------------------------------------------------------
// The context

/// A userfaultfd context.
///
/// When its last descriptor closes, every missing page becomes zeros without a word: hold a second one where that matters.
#[derive(Debug)]
pub struct Uffd(OwnedFd);

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<Uffd> for OwnedFd {
    fn from(uffd: Uffd) -> Self {
        uffd.0
    }
}

impl Uffd {
    /// A context for our own address space that also takes faults raised inside system calls. Needs CAP_SYS_PTRACE or
    /// `vm.unprivileged_userfaultfd`.
    ///
    /// # Errors
    /// [`Error::Kernel`]: `EPERM`; `ENOSYS` without `CONFIG_USERFAULTFD`.
    pub fn create() -> Result<Self> {
        pass("userfaultfd")?;
        // SAFETY: no pointers; the descriptor returned is ours alone.
        unsafe {
            let fd = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK);
            let fd = Errno::result(fd).map_err(|errno| failed("userfaultfd", errno))?;
            Ok(Self(OwnedFd::from_raw_fd(fd as i32)))
        }
    }

    /// Takes over a context made elsewhere: in the process it is for, by an earlier engine.
    pub fn adopt(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Agrees on features, once in the life of a context, and makes the descriptor non-blocking and close-on-exec. Returns the
    /// features the kernel has, asked for or not.
    ///
    /// # Errors
    /// [`Error::Kernel`]: `EINVAL` for a feature the kernel lacks, or a second handshake; `EPERM` for [`Features::EVENT_FORK`]
    /// without CAP_SYS_PTRACE.
    pub fn handshake(&self, features: Features) -> Result<Features> {
        self.prepare()?;
        let mut argument = ApiArgument {
            api: UFFD_API,
            features: features.0,
            ioctls: 0,
        };
        self.ioctl(API, &mut argument)
            .map_err(|errno| failed("ioctl(UFFDIO_API)", errno))?;
        Ok(Features(argument.features))
    }

    /// poll(2) answers POLLERR for a blocking context, and a child's context takes its flags from the parent's creation.
    fn prepare(&self) -> Result<()> {
        for (command, value, what) in [
            (libc::F_SETFL, libc::O_NONBLOCK, "fcntl(F_SETFL)"),
            (libc::F_SETFD, libc::FD_CLOEXEC, "fcntl(F_SETFD)"),
        ] {
            pass(what)?;
            // SAFETY: no pointers.
            let answer = unsafe { libc::fcntl(self.0.as_raw_fd(), command, value) };
            Errno::result(answer).map_err(|errno| failed(what, errno))?;
        }
        Ok(())
    }

    /// From now on missing pages of the range raise faults. The range may span several mappings and the gaps between them;
    /// all mappings in it must be of a kind that can be registered.
    ///
    /// # Errors
    /// [`Error::Kernel`]: `EINVAL` for an unsuitable mapping, `EPERM` for a shared mapping of a read-only descriptor, `EBUSY`
    /// for one of another context, `ENOMEM` for no mapping at the start or the process being gone.
    pub fn register_missing(&self, range: Range<u64>) -> Result<()> {
        self.register(range, REGISTER_MODE_MISSING)
    }

    /// Makes writes in the range trackable ([`Features::WP_ASYNC`]); [`crate::pagemap::protect`] arms it.
    ///
    /// # Errors
    /// As [`Uffd::register_missing`].
    pub fn register_tracking(&self, range: Range<u64>) -> Result<()> {
        self.register(range, REGISTER_MODE_WP)
    }

    fn register(&self, range: Range<u64>, mode: u64) -> Result<()> {
        const WHAT: &str = "ioctl(UFFDIO_REGISTER)";
        let mut argument = RegisterArgument {
            range: range_argument(&range),
            mode,
            ioctls: 0,
        };
        self.ioctl(REGISTER, &mut argument)
            .map_err(|errno| failed(WHAT, errno))
    }

    /// Ends faults, or tracking, in the range; pages stay, waiting threads go on with zeros.
    ///
    /// # Errors
    /// [`Error::Kernel`].
    pub fn unregister(&self, range: Range<u64>) -> Result<()> {
        const WHAT: &str = "ioctl(UFFDIO_UNREGISTER)";
        self.ioctl(UNREGISTER, &mut range_argument(&range))
            .map_err(|errno| failed(WHAT, errno))
    }

    /// Installs bytes as pages at `address`, atomically page by page, and wakes the threads that wait for them. Whole pages
    /// only, inside one mapping. Never overwrites a page, but does replace guard and poison markers.
    ///
    /// # Errors
    /// [`Error::Kernel`]: `EINVAL` for a length or address that is not whole pages or a context without handshake.
    pub fn copy(&self, address: u64, bytes: &[u8]) -> Result<Copied> {
        const WHAT: &str = "ioctl(UFFDIO_COPY)";
        self.fill(WHAT, bytes.len() as u64, |done| {
            let mut argument = CopyArgument {
                target: address + done,
                source: bytes.as_ptr() as u64 + done,
                len: bytes.len() as u64 - done,
                mode: 0,
                copied: 0,
            };
            let answer = self.ioctl(COPY, &mut argument);
            (answer, argument.copied)
        })
    }

    /// Installs zeros: for private anonymous memory the shared page of zeros, which costs no memory.
    ///
    /// # Errors
    /// As [`Uffd::copy`].
    pub fn zero(&self, range: Range<u64>) -> Result<Copied> {
        self.fill_with(ZEROPAGE, range, "ioctl(UFFDIO_ZEROPAGE)")
    }

    /// Makes missing pages raise SIGBUS, or `EFAULT` inside a system call, for good (6.6). Of shared memory only this mapping
    /// is poisoned.
    ///
    /// # Errors
    /// As [`Uffd::copy`].
    pub fn poison(&self, range: Range<u64>) -> Result<Copied> {
        self.fill_with(POISON, range, "ioctl(UFFDIO_POISON)")
    }

    fn fill_with(
        &self,
        request: libc::Ioctl,
        range: Range<u64>,
        what: &'static str,
    ) -> Result<Copied> {
        self.fill(what, range.end - range.start, |done| {
            let mut argument = FillArgument {
                range: range_argument(&(range.start + done..range.end)),
                mode: 0,
                filled: 0,
            };
            let answer = self.ioctl(request, &mut argument);
            (answer, argument.filled)
        })
    }

    /// Calls `step` until everything is installed or the kernel says why not.
    ///
    /// An ioctl that stops in the middle answers `EAGAIN` with the bytes it did, whatever stopped it: the reason only shows
    /// when the rest is tried. `EAGAIN` with no bytes, or with `-EAGAIN` in their place, is the layout changing.
    fn fill(
        &self,
        what: &'static str,
        len: u64,
        mut step: impl FnMut(u64) -> (std::result::Result<(), Errno>, i64),
    ) -> Result<Copied> {
        let mut done = 0;
        while done < len {
            let (answer, progress) = step(done);
            let Err(errno) = answer else {
                return Ok(Copied::Done);
            };
            return Ok(match errno {
                Errno::EAGAIN => match u64::try_from(progress) {
                    Ok(bytes @ 1..) => {
                        done += bytes;
                        continue;
                    }
                    _ => Copied::Again(done),
                },
                Errno::EEXIST => Copied::Exists(done),
                Errno::ENOENT => Copied::NoMapping(done),
                Errno::ENOMEM | Errno::ENOSPC => Copied::NoMemory(done),
                Errno::ESRCH => Copied::Gone,
                errno => return Err(failed(what, errno)),
            });
        }
        Ok(Copied::Done)
    }

    /// Lets the threads that wait for pages of the range try again. Those whose page is still missing fault again, which also
    /// brings back faults that were read by somebody who is dead now.
    ///
    /// # Errors
    /// [`Error::Kernel`].
    pub fn wake(&self, range: Range<u64>) -> Result<()> {
        const WHAT: &str = "ioctl(UFFDIO_WAKE)";
        self.ioctl(WAKE, &mut range_argument(&range))
            .map_err(|errno| failed(WHAT, errno))
    }

    /// Takes what has happened, oldest first of each kind, appending to `events`; up to 64 of them in one read(2). Returns how
    /// many there were: 0 = nothing now.
    ///
    /// Reading a fork, remap, remove or unmap event lets the process go on. A fault may overtake an event, and several faults
    /// for one page are normal.
    ///
    /// # Errors
    /// [`Error::Kernel`]: `EINVAL` before the handshake; [`Error::Unsupported`] for an event this program does not know.
    pub fn read_events(&self, events: &mut Vec<Event>) -> Result<usize> {
        let mut messages = [Message::default(); MESSAGES_PER_READ];
        pass("read(userfaultfd)")?;
        let bytes = loop {
            // SAFETY: the buffer is writable for the length given, and any bytes make a valid `Message`.
            let answer = unsafe {
                libc::read(
                    self.0.as_raw_fd(),
                    messages.as_mut_ptr().cast(),
                    size_of_val(&messages),
                )
            };
            match Errno::result(answer) {
                Ok(bytes) => break bytes as usize,
                Err(Errno::EAGAIN) => return Ok(0),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(failed("read(userfaultfd)", errno)),
            }
        };
        let count = bytes / size_of::<Message>();
        // First every descriptor among them gets its owner, then errors may return.
        let taken: Vec<Result<Event>> = messages.iter().take(count).map(decode).collect();
        for event in taken {
            let event = event?;
            if let Event::Fork { child } = &event {
                child.prepare()?;
            }
            events.push(event);
        }
        Ok(count)
    }

    fn ioctl<T>(&self, request: libc::Ioctl, argument: &mut T) -> std::result::Result<(), Errno> {
        choke::pass(Kind::Ioctl)?;
        // SAFETY: every caller pairs a request with the structure it is defined with (asserted above).
        let answer = unsafe { libc::ioctl(self.0.as_raw_fd(), request, &raw mut *argument) };
        Errno::result(answer).map(drop)
    }
}

fn decode(message: &Message) -> Result<Event> {
    let [first, second, third] = message.argument;
    Ok(match message.event {
        EVENT_PAGEFAULT => Event::Fault {
            address: second,
            write: first & PAGEFAULT_FLAG_WRITE != 0,
            tid: third as u32 as i32,
        },
        EVENT_FORK => Event::Fork {
            // SAFETY: the kernel made this descriptor for us in the read that brought the message.
            child: Uffd(unsafe { OwnedFd::from_raw_fd(first as u32 as i32) }),
        },
        EVENT_REMAP => Event::Remap {
            from: first,
            to: second,
            len: third,
        },
        EVENT_REMOVE => Event::Remove {
            start: first,
            end: second,
        },
        EVENT_UNMAP => Event::Unmap {
            start: first,
            end: second,
        },
        _ => {
            return Err(Error::Unsupported {
                what: "an unknown userfaultfd event",
            });
        }
    })
}

fn range_argument(range: &Range<u64>) -> RangeArgument {
    RangeArgument {
        start: range.start,
        len: range.end - range.start,
    }
}

fn pass(what: &'static str) -> Result<()> {
    choke::pass(Kind::Ioctl).map_err(|errno| failed(what, errno))
}

/// The descriptor does not tell whose address space it is: the process in these errors is ours.
fn failed(what: &'static str, errno: Errno) -> Error {
    Error::Kernel {
        what,
        pid: crate::process::own_pid(),
        errno,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::{self, Ended, alone, wait_readable};
    use std::time::Duration;

    const PAGE: usize = 4096;

    /// Private anonymous memory, unmapped with the process.
    fn map(pages: usize) -> u64 {
        // SAFETY: a new mapping where the kernel likes.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                pages * PAGE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(address, libc::MAP_FAILED);
        address as u64
    }

    fn range(address: u64, pages: usize) -> Range<u64> {
        address..address + (pages * PAGE) as u64
    }

    /// One byte of mapped memory; waits while it is missing.
    fn peek(address: u64) -> u8 {
        // SAFETY: the tests pass addresses of their own mappings.
        unsafe { std::ptr::read_volatile(address as *const u8) }
    }

    fn poke(address: u64, value: u8) {
        // SAFETY: as in `peek`; nobody holds a reference to it.
        unsafe { std::ptr::write_volatile(address as *mut u8, value) };
    }

    fn context(features: Features, range: Range<u64>) -> Uffd {
        let uffd = Uffd::create().expect("create");
        uffd.handshake(features).expect("handshake");
        uffd.register_missing(range).expect("register");
        uffd
    }

    fn next_event(uffd: &Uffd) -> Event {
        let mut events = Vec::new();
        while events.is_empty() {
            let ready = wait_readable(&[uffd.as_fd()], Some(Duration::from_secs(5))).expect("wait");
            assert_eq!(ready, [true], "no event");
            uffd.read_events(&mut events).expect("read");
        }
        assert_eq!(events.len(), 1, "{events:?}");
        events.remove(0)
    }

    fn assert_fault(event: &Event, at: u64, writing: bool) {
        let Event::Fault { address, write, .. } = *event else {
            panic!("{event:?}");
        };
        assert_eq!((address, write), (at, writing));
    }

    #[test]
    fn a_missing_page_waits_for_its_content() {
        alone(|| {
            let at = map(4);
            let uffd = context(Features::THREAD_ID, range(at, 4));
            std::thread::scope(|scope| {
                let reader = scope.spawn(|| {
                    let tid = nix::unistd::gettid().as_raw();
                    (tid, peek(at + PAGE as u64 + 7))
                });
                let event = next_event(&uffd);
                assert_fault(&event, at + PAGE as u64, false);
                // Woken without content it faults again.
                uffd.wake(range(at, 4)).expect("wake");
                assert_fault(&next_event(&uffd), at + PAGE as u64, false);
                assert_eq!(
                    uffd.copy(at + PAGE as u64, &[42; PAGE]).expect("copy"),
                    Copied::Done
                );
                let (tid, byte) = reader.join().expect("join");
                assert_eq!(byte, 42);
                let Event::Fault { tid: told, .. } = event else {
                    unreachable!("checked above");
                };
                assert_eq!(told, tid);

                let writer = scope.spawn(|| poke(at, 9));
                assert_fault(&next_event(&uffd), at, true);
                assert_eq!(uffd.zero(range(at, 1)).expect("zero"), Copied::Done);
                writer.join().expect("join");
                assert_eq!((peek(at), peek(at + 1)), (9, 0));
            });
        });
    }

    #[test]
    fn a_copy_that_stops_tells_where_and_why() {
        alone(|| {
            let at = map(8);
            let page = PAGE as u64;
            let uffd = context(Features::default(), range(at, 6));
            // Present: page 2. Without a mapping: page 5.
            assert_eq!(
                uffd.copy(at + 2 * page, &[2; PAGE]).expect("copy"),
                Copied::Done
            );
            // SAFETY: part of our own mapping, which nothing refers to.
            assert_eq!(unsafe { libc::munmap((at + 5 * page) as *mut _, PAGE) }, 0);
            let content = vec![7; 8 * PAGE];
            assert_eq!(
                uffd.copy(at, &content[..4 * PAGE]).expect("copy"),
                Copied::Exists(2 * page)
            );
            assert_eq!(peek(at + 2 * page), 2);
            assert_eq!(peek(at + page), 7);
            assert_eq!(
                uffd.copy(at + 3 * page, &content[..PAGE]).expect("copy"),
                Copied::Done
            );
            // A border of mappings is known before anything is copied.
            assert_eq!(
                uffd.copy(at + 4 * page, &content[..2 * PAGE])
                    .expect("copy"),
                Copied::NoMapping(0)
            );
            assert_eq!(
                uffd.zero(range(at + 4 * page, 1)).expect("zero"),
                Copied::Done
            );
            assert_eq!(
                uffd.zero(range(at + 4 * page, 1)).expect("zero"),
                Copied::Exists(0)
            );
            // Not registered: no mapping of this context.
            assert_eq!(
                uffd.copy(at + 6 * page, &content[..PAGE]).expect("copy"),
                Copied::NoMapping(0)
            );
            for (address, len) in [(at + 1, PAGE), (at, PAGE - 1)] {
                assert!(matches!(
                    uffd.copy(address, &content[..len]),
                    Err(Error::Kernel {
                        errno: Errno::EINVAL,
                        ..
                    })
                ));
            }
            assert_eq!(uffd.copy(at, &[]).expect("copy"), Copied::Done);
        });
    }

    #[test]
    fn layout_events_hold_the_caller_until_they_are_read() {
        alone(|| {
            let at = map(8);
            let page = PAGE as u64;
            let features = Features::EVENT_REMAP | Features::EVENT_REMOVE | Features::EVENT_UNMAP;
            let uffd = context(features, range(at, 8));
            uffd.copy(at, &[1; 8 * PAGE]).expect("copy");
            std::thread::scope(|scope| {
                // SAFETY: our own mapping.
                let dropper = scope.spawn(|| unsafe {
                    libc::madvise((at + page) as *mut _, PAGE, libc::MADV_DONTNEED)
                });
                assert!(wait_readable(&[uffd.as_fd()], None).expect("wait")[0]);
                assert_eq!(
                    uffd.copy(at + page, &[2; PAGE]).expect("copy"),
                    Copied::Again(0)
                );
                let Event::Remove { start, end } = next_event(&uffd) else {
                    panic!("not a removal");
                };
                assert_eq!(start..end, range(at + page, 1));
                assert_eq!(dropper.join().expect("join"), 0);
                assert_eq!(uffd.zero(range(at + page, 1)).expect("zero"), Copied::Done);

                // SAFETY: our own mapping; the old address is not used again.
                let mover = scope.spawn(|| unsafe {
                    libc::mremap(
                        (at + 4 * page) as *mut _,
                        PAGE,
                        2 * PAGE,
                        libc::MREMAP_MAYMOVE,
                    ) as u64
                });
                let Event::Remap { from, to, len } = next_event(&uffd) else {
                    panic!("not a move");
                };
                // An unmap of the old place follows.
                let Event::Unmap { start, end } = next_event(&uffd) else {
                    panic!("not an unmap");
                };
                assert_eq!(start..end, range(at + 4 * page, 1));
                assert_eq!(mover.join().expect("join"), to);
                assert_eq!((from, len), (at + 4 * page, page));
                assert_eq!(peek(to), 1);

                // SAFETY: our own mapping.
                let unmapper =
                    scope.spawn(|| unsafe { libc::munmap((at + 6 * page) as *mut _, 2 * PAGE) });
                let Event::Unmap { start, end } = next_event(&uffd) else {
                    panic!("not an unmap");
                };
                assert_eq!(start..end, range(at + 6 * page, 2));
                assert_eq!(unmapper.join().expect("join"), 0);
            });
        });
    }

    #[test]
    fn a_child_comes_with_a_context_of_its_own() {
        alone(|| {
            let at = map(2);
            let uffd = context(Features::EVENT_FORK | Features::EVENT_REMAP, range(at, 2));
            std::thread::scope(|scope| {
                let filler = scope.spawn(|| {
                    let Event::Fork { child } = next_event(&uffd) else {
                        panic!("not a fork");
                    };
                    let info = crate::procfs::descriptor(
                        process::own_pid(),
                        child.as_fd().as_raw_fd() as u32,
                    )
                    .expect("own descriptor")
                    .info;
                    assert!(info.close_on_exec());
                    assert_fault(&next_event(&child), at, false);
                    assert_eq!(child.copy(at, &[5; PAGE]).expect("copy"), Copied::Done);
                    child
                });
                // fork(3) would hold the allocator's locks while it waits for the filler, which allocates.
                // SAFETY: the child, with a copy of all memory, reads a byte and exits.
                let pid = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) };
                let pid = i32::try_from(pid).expect("pid");
                if pid == 0 {
                    // SAFETY: ends this process only.
                    unsafe { libc::_exit(peek(at).into()) };
                }
                assert_eq!(process::wait(pid).expect("wait"), Ended::Exited(5));
                let child = filler.join().expect("join");
                // The parent's page is still missing; the dead child's context says so.
                assert_eq!(
                    child.copy(at + PAGE as u64, &[6; PAGE]).expect("copy"),
                    Copied::Gone
                );
                assert_eq!(uffd.copy(at, &[8; PAGE]).expect("copy"), Copied::Done);
                assert_eq!(peek(at), 8);
            });
        });
    }

    #[test]
    fn poisoned_pages_fail_system_calls() {
        alone(|| {
            let at = map(2);
            let uffd = context(Features::POISON, range(at, 2));
            assert_eq!(uffd.poison(range(at, 1)).expect("poison"), Copied::Done);
            let (_read_end, write_end) = crate::pipe::create(PAGE as u32, &[]).expect("pipe");
            // SAFETY: the kernel checks the address itself.
            let written = unsafe { libc::write(write_end.as_raw_fd(), at as *const _, 1) };
            assert_eq!((written, Errno::last()), (-1, Errno::EFAULT));
            assert_eq!(
                uffd.zero(range(at + PAGE as u64, 1)).expect("zero"),
                Copied::Done
            );
            assert_eq!(
                uffd.poison(range(at + PAGE as u64, 1)).expect("poison"),
                Copied::Exists(0)
            );
        });
    }

    #[test]
    fn a_handshake_refuses_what_the_kernel_has_not() {
        let uffd = Uffd::create().expect("create");
        assert!(uffd.handshake(Features(1 << 63)).is_err());
        let uffd = Uffd::create().expect("create");
        let known = uffd.handshake(Features::default()).expect("handshake");
        assert!(known.contains(Features::EVENT_FORK | Features::POISON));
        assert!(matches!(
            uffd.handshake(Features::default()),
            Err(Error::Kernel {
                errno: Errno::EINVAL,
                ..
            })
        ));
    }

    #[test]
    fn nothing_to_read_is_no_error() {
        let uffd = Uffd::create().expect("create");
        uffd.handshake(Features::default()).expect("handshake");
        let mut events = Vec::new();
        assert_eq!(uffd.read_events(&mut events).expect("read"), 0);
        assert!(events.is_empty());
    }
}
