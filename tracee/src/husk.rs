//! Husks: empty processes with a chosen pid, to be filled with a migrated process' state.
//!
//! A husk is made by clone3 with the wanted pid and execve of a program of one page that does nothing, so it has no memory but
//! that page, a stack and the kernel's vdso, no C library that expects anything, and no descriptors. Emptying a fork of this
//! program instead would die when the kernel writes the C library's rseq area, and would leave copies of keys and sockets.
//! Nothing here seizes or fills one.
//!
//! # Safety
//! The clone shares our memory until the child has executed the new program, while we are suspended (`CLONE_VFORK`). The child
//! runs one function, `enter`, on a stack of its own; that function makes raw system calls only, takes no lock, allocates
//! nothing, and cannot run our signal handlers, which the clone resets. The program must not have a second thread.

use std::ffi::CStr;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};

use nix::errno::Errno;

use crate::choke::{self, Kind};
use crate::error::{Error, Result};
use crate::process::{self, BlockedSignals, own_pid};
use crate::procfs;

/// Where the husk's page lies unless the caller knows that the migrated process has a mapping there: 64 KiB, the lowest address
/// that the usual `vm.mmap_min_addr` allows, below where programs are linked (4 MiB) and where the kernel places anything.
pub const DEFAULT_LOAD_ADDRESS: u64 = 0x1_0000;

/// Length of the husk's only file mapping.
pub const PROGRAM_LEN: u64 = PAGE;

const PAGE: u64 = 4096;

/// A husk to be made.
#[derive(Clone, Copy, Debug)]
pub struct HuskRequest<'a> {
    /// Its pid in our pid namespace.
    pub pid: i32,
    /// Make it the leader of a session of its own.
    pub set_sid: bool,
    /// Make it our sibling, child of our parent (`CLONE_PARENT`). Its end is then signalled to our parent as ours would be.
    pub sibling: bool,
    /// Page-aligned address of its page, [`DEFAULT_LOAD_ADDRESS`] unless that is in use.
    pub load_address: u64,
    /// Descriptors it gets, each under a number of the caller's choice. It has no others.
    pub inherit: &'a [(BorrowedFd<'a>, u32)],
}

impl HuskRequest<'_> {
    /// A husk at the usual address, in our session, without descriptors.
    pub fn new(pid: i32) -> Self {
        Self {
            pid,
            set_sid: false,
            sibling: false,
            load_address: DEFAULT_LOAD_ADDRESS,
            inherit: &[],
        }
    }
}

/// The program of a husk: a static x86-64 ELF image of one page, loaded at `load_address`, that waits for signals for ever.
///
/// Its code is `1: mov $34, %eax; syscall; jmp 1b` (34 = pause), so that the page also holds a `syscall` instruction for
/// injection. The stack is not executable.
///
/// # Errors
/// [`Error::WrongState`] for an address that is not page aligned or not in user space.
pub fn build_elf(load_address: u64) -> Result<Vec<u8>> {
    const HEADER_LEN: u16 = 64;
    const SEGMENT_LEN: u16 = 56;
    const SEGMENTS: u16 = 2;
    const CODE: [u8; 9] = [0xb8, 34, 0, 0, 0, 0x0f, 0x05, 0xeb, 0xf7];
    const PT_LOAD: u32 = 1;
    const PT_GNU_STACK: u32 = 0x6474_e551;
    const READ_EXECUTE: u32 = 5;
    const READ_WRITE: u32 = 6;
    /// One past the highest user address with four-level page tables.
    const USER_END: u64 = 1 << 47;
    if load_address % PAGE != 0 || load_address == 0 || load_address >= USER_END - PAGE {
        return Err(Error::WrongState {
            tid: own_pid(),
            what: "a husk at this address",
        });
    }
    let code_offset = u64::from(HEADER_LEN + SEGMENTS * SEGMENT_LEN);
    let length = code_offset + CODE.len() as u64;
    let mut elf = Vec::with_capacity(length as usize);
    // e_ident: 64-bit, little-endian, version 1, System V.
    elf.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    elf.extend(2_u16.to_le_bytes()); // e_type: ET_EXEC
    elf.extend(62_u16.to_le_bytes()); // e_machine: EM_X86_64
    elf.extend(1_u32.to_le_bytes()); // e_version
    elf.extend((load_address + code_offset).to_le_bytes()); // e_entry
    elf.extend(u64::from(HEADER_LEN).to_le_bytes()); // e_phoff
    elf.extend(0_u64.to_le_bytes()); // e_shoff
    elf.extend(0_u32.to_le_bytes()); // e_flags
    for half in [HEADER_LEN, SEGMENT_LEN, SEGMENTS, 64, 0, 0] {
        elf.extend(half.to_le_bytes()); // e_ehsize, e_phentsize, e_phnum, e_shentsize, e_shnum, e_shstrndx
    }
    for (kind, flags, address, length, alignment) in [
        (PT_LOAD, READ_EXECUTE, load_address, length, PAGE),
        (PT_GNU_STACK, READ_WRITE, 0, 0, 16),
    ] {
        elf.extend(kind.to_le_bytes());
        elf.extend(flags.to_le_bytes());
        // p_offset, p_vaddr, p_paddr, p_filesz, p_memsz, p_align
        for word in [0, address, address, length, length, alignment] {
            elf.extend(word.to_le_bytes());
        }
    }
    elf.extend(CODE);
    Ok(elf)
}

/// Makes a husk and returns its pid, which is the one asked for. It has executed its program when this returns.
///
/// The caller is its parent, or with `sibling` its brother, and must have one thread. It is killed when its parent ends
/// (`PR_SET_PDEATHSIG`), for as long as nobody sets that anew in it. Address space randomisation is off in it. It lives in the
/// time namespace that the caller has chosen for its children ([`process::unshare_time`]).
///
/// # Errors
/// [`Error::PidTaken`]; [`Error::WrongState`] with a second thread; [`Error::Kernel`]: `EINVAL` from clone3 for a pid above
/// `/proc/sys/kernel/pid_max`, `EPERM` without CAP_CHECKPOINT_RESTORE (5.9).
pub fn spawn(request: &HuskRequest<'_>) -> Result<i32> {
    if process::thread_count()? != 1 {
        return Err(Error::WrongState {
            tid: own_pid(),
            what: "making a husk with more than one thread",
        });
    }
    let elf = build_elf(request.load_address)?;
    execute(request, &program_file(&elf)?)
}

fn execute(request: &HuskRequest<'_>, program: &OwnedFd) -> Result<i32> {
    // Copies above every wanted number, so that giving one its number never closes another.
    let above = request
        .inherit
        .iter()
        .map(|&(_, number)| number)
        .max()
        .unwrap_or(0)
        .saturating_add(1);
    let mut copies = Vec::with_capacity(request.inherit.len());
    for (descriptor, number) in request.inherit {
        copies.push((duplicate(descriptor, above)?, *number));
    }
    let program = duplicate(program, above)?;
    let inherit: Vec<(i32, i32)> = copies
        .iter()
        .map(|(copy, number)| (copy.as_raw_fd(), *number as i32))
        .collect();

    let mut entry = Entry {
        program: program.as_raw_fd(),
        parent: if request.sibling {
            process::parent_pid()
        } else {
            own_pid()
        },
        set_sid: request.set_sid,
        inherit: inherit.as_ptr(),
        inherit_len: inherit.len(),
        failed: 0,
        errno: 0,
    };
    let pid = clone_into(request, &mut entry)?;
    if entry.failed == 0 {
        return Ok(pid);
    }
    // The child has told why and ended; as a sibling it is our parent's to reap.
    if !request.sibling {
        process::wait(pid)?;
    }
    Err(Error::kernel(
        STEPS[entry.failed],
        pid,
        Errno::from_raw(entry.errno),
    ))
}

/// What [`enter`] was doing when it failed; index 0 is "nothing".
const STEPS: [&str; 7] = [
    "husk",
    "prctl(PR_SET_PDEATHSIG)",
    "setsid",
    "close_range",
    "dup3",
    "personality",
    "execveat",
];
const STEP_PARENT: usize = 1;
const STEP_SESSION: usize = 2;
const STEP_CLOSE: usize = 3;
const STEP_INHERIT: usize = 4;
const STEP_PERSONALITY: usize = 5;
const STEP_EXECUTE: usize = 6;

/// What parent and child share while the parent is suspended.
#[repr(C)]
struct Entry {
    program: i32,
    parent: i32,
    set_sid: bool,
    inherit: *const (i32, i32),
    inherit_len: usize,
    /// Index into [`STEPS`]; 0 = the program was executed.
    failed: usize,
    errno: i32,
}

/// `struct clone_args` (linux/sched.h), as of 5.7.
#[repr(C, align(8))]
struct CloneArguments {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}
const _: () = assert!(size_of::<CloneArguments>() == 88);

const CLONE_CLEAR_SIGHAND: u64 = 0x1_0000_0000;

/// Enough for [`enter`]; the kernel's own work does not count.
const STACK_LEN: usize = 64 * 1024;

fn clone_into(request: &HuskRequest<'_>, entry: &mut Entry) -> Result<i32> {
    const WHAT: &str = "clone3(set_tid)";
    choke::pass(Kind::Spawn).map_err(|errno| Error::kernel(WHAT, request.pid, errno))?;
    // u128 for the 16-byte alignment that the ABI wants of a stack.
    let mut stack = vec![0_u128; STACK_LEN / size_of::<u128>()];
    let set_tid = request.pid;
    let mut flags = libc::CLONE_VM as u64 | libc::CLONE_VFORK as u64 | CLONE_CLEAR_SIGHAND;
    // With CLONE_PARENT the exit signal is ours, whatever that is, and must not be given.
    let exit_signal = if request.sibling {
        flags |= libc::CLONE_PARENT as u64;
        0
    } else {
        libc::SIGCHLD as u64
    };
    let arguments = CloneArguments {
        flags,
        pidfd: 0,
        child_tid: 0,
        parent_tid: 0,
        exit_signal,
        stack: stack.as_mut_ptr() as u64,
        stack_size: STACK_LEN as u64,
        tls: 0,
        set_tid: &raw const set_tid as u64,
        set_tid_size: 1,
        cgroup: 0,
    };
    // The child starts with our mask; nothing may interrupt it half-way.
    let blocked = BlockedSignals::all()?;
    let answer: i64;
    // SAFETY: the kernel reads `arguments` and `set_tid`. In the parent the instruction is an ordinary system call that returns
    // after the child has executed its program or ended. The child starts behind it with the given stack, 16-byte aligned, and
    // calls `enter`, which does not return; memory is shared, so `entry` and everything it points to is valid there.
    unsafe {
        std::arch::asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, {entry}",
            "call {enter}",
            "ud2",
            "2:",
            entry = in(reg) std::ptr::from_mut(entry),
            enter = in(reg) enter as extern "C" fn(*mut Entry) -> !,
            inlateout("rax") libc::SYS_clone3 => answer,
            in("rdi") &raw const arguments,
            in("rsi") size_of::<CloneArguments>(),
            // Not `lateout`: the child reads its two inputs after the kernel has overwritten these.
            out("rcx") _,
            out("r11") _,
        );
    }
    drop(blocked);
    drop(stack);
    match Errno::result(answer_of(answer)) {
        Ok(pid) => Ok(pid as i32),
        Err(Errno::EEXIST) => Err(Error::PidTaken {
            pid: request.pid,
            holder: holder_of(request.pid),
        }),
        Err(errno) => Err(Error::kernel(WHAT, request.pid, errno)),
    }
}

/// A raw system call's answer in the C library's form.
fn answer_of(raw: i64) -> i64 {
    if (-4095..0).contains(&raw) {
        Errno::set_raw(-raw as i32);
        -1
    } else {
        raw
    }
}

/// The name of what holds a pid. A number can be taken without a process to see: as a thread, or as the group or session of
/// processes whose leader has ended.
pub(crate) fn holder_of(pid: i32) -> String {
    procfs::comm(pid, pid).unwrap_or_else(|_| "a process group or session".to_owned())
}

/// The child's side, on its own stack in our memory.
extern "C" fn enter(entry: *mut Entry) -> ! {
    // SAFETY: the parent is suspended and made this pointer from a live exclusive reference.
    let entry = unsafe { &mut *entry };
    let (step, errno) = prepare_and_execute(entry);
    entry.failed = step;
    entry.errno = errno as i32;
    // SAFETY: ends this process only; exit handlers belong to the parent.
    unsafe { libc::syscall(libc::SYS_exit_group, 127) };
    loop {
        std::hint::spin_loop();
    }
}

/// Returns only on failure.
fn prepare_and_execute(entry: &Entry) -> (usize, Errno) {
    const NAME: &CStr = c"pageferry-husk";
    const ADDR_NO_RANDOMIZE: u64 = 0x0004_0000;
    const KEEP_PERSONALITY: u64 = 0xffff_ffff;
    let arguments = [NAME.as_ptr(), std::ptr::null()];
    let environment = [std::ptr::null::<libc::c_char>()];
    // SAFETY: each is one raw system call; pointers are to data that outlives it. The descriptor table is this process' own,
    // because CLONE_FILES was not asked for.
    unsafe {
        let check = |answer: i64, step: usize| match Errno::result(answer) {
            Ok(_) => Ok(()),
            Err(errno) => Err((step, errno)),
        };
        let prepared = (|| {
            check(
                libc::syscall(libc::SYS_prctl, libc::PR_SET_PDEATHSIG, libc::SIGKILL),
                STEP_PARENT,
            )?;
            // It may have ended before: nobody would tell.
            if libc::syscall(libc::SYS_getppid) != i64::from(entry.parent) {
                return Err((STEP_PARENT, Errno::ESRCH));
            }
            if entry.set_sid {
                check(libc::syscall(libc::SYS_setsid), STEP_SESSION)?;
            }
            // Everything closes at execve, whoever forgot O_CLOEXEC.
            check(
                libc::syscall(
                    libc::SYS_close_range,
                    0,
                    u32::MAX,
                    libc::CLOSE_RANGE_CLOEXEC,
                ),
                STEP_CLOSE,
            )?;
            for index in 0..entry.inherit_len {
                let (copy, number) = *entry.inherit.add(index);
                check(libc::syscall(libc::SYS_dup3, copy, number, 0), STEP_INHERIT)?;
            }
            let personality = libc::syscall(libc::SYS_personality, KEEP_PERSONALITY);
            check(personality, STEP_PERSONALITY)?;
            check(
                libc::syscall(
                    libc::SYS_personality,
                    personality as u64 | ADDR_NO_RANDOMIZE,
                ),
                STEP_PERSONALITY,
            )?;
            check(
                libc::syscall(
                    libc::SYS_execveat,
                    entry.program,
                    c"".as_ptr(),
                    arguments.as_ptr(),
                    environment.as_ptr(),
                    libc::AT_EMPTY_PATH,
                ),
                STEP_EXECUTE,
            )
        })();
        match prepared {
            Err(failure) => failure,
            // execve does not return success.
            Ok(()) => (STEP_EXECUTE, Errno::EIO),
        }
    }
}

fn duplicate(descriptor: &impl std::os::fd::AsFd, lowest: u32) -> Result<OwnedFd> {
    const WHAT: &str = "fcntl(F_DUPFD_CLOEXEC)";
    let failed = |errno| Error::kernel(WHAT, own_pid(), errno);
    let lowest = i32::try_from(lowest).map_err(|_| failed(Errno::EINVAL))?;
    // SAFETY: no pointers; the descriptor returned is ours alone.
    unsafe {
        let copy = libc::fcntl(
            descriptor.as_fd().as_raw_fd(),
            libc::F_DUPFD_CLOEXEC,
            lowest,
        );
        Ok(OwnedFd::from_raw_fd(Errno::result(copy).map_err(failed)?))
    }
}

/// Directories that may take the program when memory files must not be executed.
const DIRECTORIES: [&str; 5] = ["/run", "/dev/shm", "/var/tmp", "/tmp", "."];

/// An unnamed file with these bytes that can be executed.
fn program_file(elf: &[u8]) -> Result<OwnedFd> {
    match memory_file(elf) {
        // vm.memfd_noexec = 2.
        Err(Error::Kernel {
            errno: Errno::EACCES,
            ..
        }) => {}
        answer => return answer,
    }
    let mut refused = Errno::EACCES;
    for directory in DIRECTORIES {
        match disk_file(directory, elf) {
            Ok(file) => return Ok(file),
            Err(error) => refused = process::errno_of(&error),
        }
    }
    Err(Error::path(
        "a program file in",
        DIRECTORIES.join(", "),
        refused,
    ))
}

fn memory_file(elf: &[u8]) -> Result<OwnedFd> {
    const WHAT: &str = "memfd_create";
    let failed = |errno| Error::kernel(WHAT, own_pid(), errno);
    let create = |flags: u32| {
        // SAFETY: a C string; the descriptor returned is ours alone.
        unsafe {
            let fd = libc::memfd_create(c"pageferry-husk".as_ptr(), flags);
            Errno::result(fd).map(|fd| OwnedFd::from_raw_fd(fd))
        }
    };
    let file = match create(libc::MFD_CLOEXEC | libc::MFD_EXEC) {
        // Before 6.3 there was no such flag and every memory file could be executed.
        Err(Errno::EINVAL) => create(libc::MFD_CLOEXEC),
        answer => answer,
    }
    .map_err(failed)?;
    let mut file = File::from(file);
    file.write_all(elf)
        .map_err(|error| failed(process::errno_of(&error)))?;
    Ok(file.into())
}

fn disk_file(directory: &str, elf: &[u8]) -> std::io::Result<OwnedFd> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let mut file = File::options()
        .write(true)
        .mode(0o500)
        .custom_flags(libc::O_TMPFILE)
        .open(directory)?;
    file.write_all(elf)?;
    // A file open for writing cannot be executed (ETXTBSY), so it is opened again for reading and the first one closed.
    let again = File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    drop(file);
    // The file system may forbid execution: ask before a process is made for it.
    // SAFETY: a C string; only asks.
    let answer = unsafe {
        libc::faccessat(
            again.as_raw_fd(),
            c"".as_ptr(),
            libc::X_OK,
            libc::AT_EMPTY_PATH,
        )
    };
    if answer == 0 {
        Ok(again.into())
    } else {
        Err(std::io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::{Ended, alone};
    use std::os::fd::AsFd as _;

    /// A pid that the kernel gives to nobody for a long time. Each test has its own.
    fn free_pid(offset: i32) -> i32 {
        let highest = crate::host::pid_max().expect("pid_max") as i32 - 1;
        (0..highest)
            .map(|step| highest - offset - 100 * step)
            .find(|&pid| !procfs::exists(pid))
            .expect("a free pid")
    }

    fn end(pid: i32) {
        process::kill(pid, libc::SIGKILL).expect("kill");
        assert_eq!(
            process::wait(pid).expect("wait"),
            Ended::Killed(libc::SIGKILL)
        );
        assert!(!procfs::exists(pid));
    }

    #[test]
    fn a_husk_has_its_pid_and_next_to_no_memory() {
        alone(|| {
            let wanted = free_pid(1);
            let pid = spawn(&HuskRequest::new(wanted)).expect("spawn");
            assert_eq!(pid, wanted);
            let status = procfs::status(pid, pid).expect("status");
            assert_eq!((status.ppid, status.threads), (own_pid(), 1));
            assert_eq!(
                status.sig_blk,
                !process::signal_set(&[libc::SIGKILL, libc::SIGSTOP])
            );
            assert_eq!(procfs::descriptors(pid).expect("descriptors"), []);
            assert_eq!(
                procfs::personality(pid, pid).expect("personality") & 0x4_0000,
                0x4_0000
            );
            let maps = procfs::maps(pid).expect("maps");
            let own: Vec<_> = maps
                .iter()
                .filter(|vma| !vma.path.starts_with('['))
                .collect();
            let [page] = own[..] else {
                panic!("mappings: {own:?}");
            };
            assert_eq!(
                (page.start, page.end),
                (DEFAULT_LOAD_ADDRESS, DEFAULT_LOAD_ADDRESS + PROGRAM_LEN)
            );
            assert!(page.read && page.exec && !page.write);
            for vma in maps.iter().filter(|vma| vma.path.starts_with('[')) {
                assert!(
                    ["[stack]", "[vvar]", "[vvar_vclock]", "[vdso]", "[vsyscall]"]
                        .contains(&vma.path.as_str()),
                    "{vma:?}"
                );
            }
            assert!(maps.iter().any(|vma| vma.path == "[stack]" && !vma.exec));
            end(pid);
        });
    }

    #[test]
    fn a_husk_lies_where_it_is_told_and_gets_what_it_is_given() {
        alone(|| {
            let one = crate::descriptor::create_eventfd(1, false).expect("eventfd");
            let two = crate::descriptor::create_eventfd(2, false).expect("eventfd");
            // Each goes to the number that the other has here.
            let inherit = [
                (one.as_fd(), two.as_raw_fd() as u32),
                (two.as_fd(), one.as_raw_fd() as u32),
            ];
            let request = HuskRequest {
                set_sid: true,
                load_address: 0x7000_0000_0000,
                inherit: &inherit,
                ..HuskRequest::new(free_pid(2))
            };
            let pid = spawn(&request).expect("spawn");
            let stat = procfs::stat(pid, pid).expect("stat");
            assert_eq!((stat.session, stat.pgrp), (pid, pid));
            assert!(
                procfs::maps(pid)
                    .expect("maps")
                    .iter()
                    .any(|vma| vma.start == 0x7000_0000_0000 && vma.exec)
            );
            let counts: Vec<_> = procfs::descriptors(pid)
                .expect("descriptors")
                .iter()
                .map(|entry| (entry.fd, entry.info.eventfd.map(|eventfd| eventfd.count)))
                .collect();
            assert_eq!(
                counts,
                [
                    (one.as_raw_fd() as u32, Some(2)),
                    (two.as_raw_fd() as u32, Some(1))
                ]
            );
            end(pid);
        });
    }

    #[test]
    fn a_husk_enters_the_time_namespace_made_for_it() {
        alone(|| {
            process::unshare_time(1_000_000_000_000, 2_000_000_000_000).expect("unshare");
            let pid = spawn(&HuskRequest::new(free_pid(3))).expect("spawn");
            let (ours, its) = (
                procfs::namespaces(own_pid()).expect("namespaces"),
                procfs::namespaces(pid).expect("namespaces"),
            );
            assert_ne!(ours.time, its.time);
            assert_eq!(ours.time_for_children, its.time);
            // Its threads and children will be in it too.
            assert_eq!(its.time, its.time_for_children);
            // Offsets are settled once somebody is inside.
            let late = std::fs::write("/proc/self/timens_offsets", "monotonic 1 0\n");
            let errno = late.map_err(|error| process::errno_of(&error));
            assert_eq!(errno, Err(Errno::EACCES));
            end(pid);
        });
    }

    #[test]
    fn a_taken_pid_is_refused_with_its_holder() {
        alone(|| {
            let Err(Error::PidTaken { pid, holder }) = spawn(&HuskRequest::new(own_pid())) else {
                panic!("not refused");
            };
            assert_eq!(pid, own_pid());
            assert_eq!(holder, procfs::comm(pid, pid).expect("comm"));
            // Nothing is left of the attempt.
            assert!(matches!(process::wait(-1), Err(Error::Gone { .. })));
        });
    }

    #[test]
    fn a_program_that_cannot_be_executed_leaves_nothing() {
        alone(|| {
            let file = memory_file(b"not a program").expect("file");
            let answer = execute(&HuskRequest::new(free_pid(4)), &file);
            assert!(
                matches!(
                    answer,
                    Err(Error::Kernel {
                        what: "execveat",
                        errno: Errno::ENOEXEC,
                        ..
                    })
                ),
                "{answer:?}"
            );
            assert!(matches!(process::wait(-1), Err(Error::Gone { .. })));
        });
    }

    #[test]
    fn a_file_serves_where_memory_files_are_forbidden() {
        alone(|| {
            let elf = build_elf(DEFAULT_LOAD_ADDRESS).expect("elf");
            let file = DIRECTORIES
                .iter()
                .find_map(|directory| disk_file(directory, &elf).ok())
                .expect("a directory that allows execution");
            let pid = execute(&HuskRequest::new(free_pid(5)), &file).expect("execute");
            end(pid);
        });
    }

    #[test]
    fn a_sibling_is_our_parents_child() {
        alone(|| {
            let wanted = free_pid(6);
            let cradle = process::fork(false, || {
                let request = HuskRequest {
                    sibling: true,
                    ..HuskRequest::new(wanted)
                };
                i32::from(spawn(&request).is_err())
            });
            let cradle = cradle.expect("fork");
            assert_eq!(process::wait(cradle).expect("wait"), Ended::Exited(0));
            assert_eq!(
                procfs::status(wanted, wanted).expect("status").ppid,
                own_pid()
            );
            end(wanted);
        });
    }

    #[test]
    fn only_whole_pages_of_user_space_can_be_loaded_at() {
        for address in [0, 1, 4097, 1 << 47, !4095] {
            assert!(build_elf(address).is_err(), "{address:#x}");
        }
    }
}
