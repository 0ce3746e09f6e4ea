//! A process in hand: after it was stopped, had system calls made in it and was let go, it is bit for bit what it was; it
//! survives our death at any point; and it never notices, whatever system call it was in.
//!
//! The victims are small C programs in `victims/`, run as an ordinary user with no_new_privs, some under a seccomp filter
//! like Docker's default. They check themselves; the tests compare what only an outsider sees.

use std::collections::BTreeMap;
use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::os::fd::FromRawFd;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use pageferry_tracee::choke;
use pageferry_tracee::descriptor::Owner;
use pageferry_tracee::lock::{Held, Kind, Line, Lock};
use pageferry_tracee::{
    Arg, Batch, Birth, End, Error, Family, Injection, RemoteMemory, SeizeOptions, ThreadStart,
    Tracee, agent, descriptor, husk, procfs,
};

const BUDGET: Duration = Duration::from_millis(200);
const ATTEMPTS: u32 = 20;
const FOLLOW: SeizeOptions = SeizeOptions {
    exit_kill: false,
    follow: true,
    suspend_seccomp: false,
};

// ---------------------------------------------------------------------------------------------------------------------
// Victims

/// A place for programs and files of the tests that every user may write to.
fn workshop() -> PathBuf {
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("in_hand");
    fs::create_dir_all(&path).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o1777)).unwrap();
    path
}

/// Compiles `victims/NAME.c`, unless that has been done since it was last changed.
fn program(name: &str) -> PathBuf {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _lock = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/victims");
    let source = sources.join(format!("{name}.c"));
    let output = workshop().join(name);
    let changed = |path: &Path| {
        fs::metadata(path)
            .and_then(|metadata| metadata.modified())
            .ok()
    };
    let newest = changed(&source).max(changed(&sources.join("victim.h")));
    if changed(&output) < newest {
        let half_made = workshop().join(format!("{name}.{}", std::process::id()));
        let status = Command::new("cc")
            .args(["-O1", "-pthread", "-Wall", "-Werror", "-o"])
            .args([&half_made, &source])
            .status()
            .expect("cc");
        assert!(status.success(), "{} does not compile", source.display());
        fs::rename(half_made, &output).unwrap();
    }
    output
}

/// Whether this host lets the tests do what they are about; says why not, which is a failure where everything must be tested.
fn able() -> bool {
    let reason = if fs::metadata("/proc/self")
        .map(|_| nix::unistd::geteuid().is_root())
        .unwrap_or(false)
    {
        let mapping = procfs::maps(std::process::id() as i32).unwrap().remove(0);
        match File::open(format!(
            "/proc/self/map_files/{:x}-{:x}",
            mapping.start, mapping.end
        )) {
            Ok(_) => return true,
            Err(error) => format!("/proc/self/map_files: {error}"),
        }
    } else {
        "not root".to_owned()
    };
    assert!(
        std::env::var_os("PAGEFERRY_TEST_STRICT").is_none(),
        "skipped: {reason}"
    );
    println!("skipped: {reason}");
    false
}

/// A running victim; killed when dropped.
struct Victim {
    child: Child,
    page: File,
}

impl Victim {
    fn start(name: &str, arguments: &[&str], filtered: bool) -> Self {
        let page = memfd();
        page.set_len(4096).unwrap();
        let mut command = Command::new(program(name));
        command
            .args(arguments)
            .current_dir(workshop())
            .stdin(page.try_clone().unwrap())
            .stdout(Stdio::piped())
            .env_remove("VICTIM_FILTERED");
        if filtered {
            command.env("VICTIM_FILTERED", "1");
        }
        Self {
            child: command.spawn().unwrap(),
            page,
        }
    }

    /// A checker with all its threads at work.
    fn checker(threads: usize, filtered: bool) -> Self {
        let victim = Self::start("checker", &[&threads.to_string()], filtered);
        wait_for("the victim's threads", || victim.word(3) == threads as u64);
        victim
    }

    fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// A word of the shared page: 0 failure, 1 go, 2 verdict, 3 threads, from 4 on the turns of each thread.
    fn word(&self, index: u64) -> u64 {
        let mut bytes = [0; 8];
        self.page.read_exact_at(&mut bytes, index * 8).unwrap();
        u64::from_le_bytes(bytes)
    }

    /// From here on its calls may answer EINTR: they do after SIGSTOP and SIGCONT, and may when a tracer dies.
    fn expects_interruptions(&self) {
        self.page.write_all_at(&1_u64.to_le_bytes(), 8).unwrap();
    }

    fn turns(&self, threads: usize) -> Vec<u64> {
        (0..threads as u64)
            .map(|thread| self.word(4 + thread))
            .collect()
    }

    /// Every thread gets through more turns, and none has found anything wrong.
    fn assert_works(&self, threads: usize, context: &str) {
        let before = self.turns(threads);
        let started = Instant::now();
        // The turn that was interrupted and a whole one after it.
        while !self
            .turns(threads)
            .iter()
            .zip(&before)
            .all(|(now, before)| *now >= before + 2)
        {
            assert_eq!(
                self.word(0),
                0,
                "{context}: checker.c found something at this line"
            );
            assert!(
                started.elapsed() < Duration::from_secs(20),
                "{context}: threads stand still: {before:?} {:?}\n{}",
                self.turns(threads),
                self.describe()
            );
            std::thread::sleep(Duration::from_micros(500));
        }
        assert_eq!(self.word(0), 0, "{context}");
    }

    fn describe(&self) -> String {
        let pid = self.pid();
        procfs::tids(pid)
            .unwrap_or_default()
            .into_iter()
            .map(|tid| {
                format!(
                    "{tid}: {:?} {:?}\n",
                    procfs::stat(pid, tid).map(|stat| stat.state),
                    procfs::syscall(pid, tid)
                )
            })
            .collect()
    }

    fn assert_stands_still(&self, threads: usize) {
        let before = self.turns(threads);
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(self.turns(threads), before);
    }

    fn state(&self) -> char {
        procfs::stat(self.pid(), self.pid()).unwrap().state
    }

    fn signal(&self, signal: i32) {
        // SAFETY: no pointers; the child has not been waited for.
        unsafe { libc::kill(self.pid(), signal) };
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn memfd() -> File {
    // SAFETY: a literal name; the result is checked and owned by nobody else.
    unsafe {
        let fd = libc::memfd_create(c"page".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0);
        File::from_raw_fd(fd)
    }
}

fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(
            started.elapsed() < Duration::from_secs(20),
            "waited too long for {what}"
        );
        std::thread::sleep(Duration::from_micros(500));
    }
}

fn frozen(pid: i32) -> Tracee {
    let mut tracee = Tracee::seize(pid, FOLLOW).unwrap();
    tracee.freeze(BUDGET, ATTEMPTS).unwrap();
    tracee
}

/// Which call of [`busy_batch`] gives the thread id.
const BUSY_GETTID: usize = 6;

/// A batch that touches descriptors, memory and signals and takes back what it did.
fn busy_batch(scratch: u64) -> Batch {
    let mut batch = Batch::new();
    let fd = batch.call(libc::SYS_dup, &[0.into()]);
    batch.call(libc::SYS_close, &[fd.into()]);
    let map = batch.call(
        libc::SYS_mmap,
        &[
            0.into(),
            8192.into(),
            (libc::PROT_READ | libc::PROT_WRITE).into(),
            (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS).into(),
            (-1).into(),
            0.into(),
        ],
    );
    // Long enough for whatever goes wrong meanwhile to find the mapping there.
    batch.call(libc::SYS_poll, &[0.into(), 0.into(), 2.into()]);
    batch.call(libc::SYS_munmap, &[map.into(), 8192.into()]);
    batch.call(
        libc::SYS_rt_sigprocmask,
        &[0.into(), 0.into(), scratch.into(), 8.into()],
    );
    batch.call(libc::SYS_gettid, &[]);
    batch
}

fn work_in_all_threads(tracee: &mut Tracee) -> Result<(), Error> {
    let tids = tracee.tids().to_vec();
    let mut injection = tracee.plant(None)?;
    let work: Vec<_> = tids
        .iter()
        .map(|&tid| (tid, busy_batch(injection.scratch_address(tid))))
        .collect();
    let results = injection.run_all(&work)?;
    for (tid, result) in tids.iter().zip(&results) {
        assert!(result.iter().all(Result::is_ok), "{result:?}");
        assert_eq!(result[BUSY_GETTID], Ok(*tid as u64));
        // In the agent everything is blocked that can be.
        let blocked = u64::from_le_bytes(injection.scratch(*tid)[..8].try_into().unwrap());
        assert_eq!(!blocked, bit(libc::SIGKILL) | bit(libc::SIGSTOP));
    }
    injection.cure()
}

fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

// ---------------------------------------------------------------------------------------------------------------------
// Bit for bit

/// What `/proc/<pid>/status` tells about signals; not `SigQ`, which counts for all processes of a user.
const SIGNAL_LINES: [&str; 5] = ["SigPnd", "ShdPnd", "SigBlk", "SigIgn", "SigCgt"];

/// Everything about a frozen process that an injection could spoil.
#[derive(Debug, PartialEq)]
struct Snapshot {
    threads: Vec<ThreadSnapshot>,
    maps: String,
    descriptors: BTreeMap<u32, String>,
    /// Of every writable mapping, by start address.
    memory: BTreeMap<u64, u64>,
}

#[derive(Debug, PartialEq)]
struct ThreadSnapshot {
    registers: pageferry_tracee::Registers,
    xsave: Vec<u8>,
    sigmask: u64,
    pending: Vec<[u8; 128]>,
    signals: String,
    robust_list: (u64, u64),
    rseq: pageferry_tracee::RseqConfiguration,
}

impl Snapshot {
    fn assert_is(&self, before: &Self, context: &str) {
        for (now, before) in self.threads.iter().zip(&before.threads) {
            assert_eq!(now.registers, before.registers, "{context}");
            assert!(now.xsave == before.xsave, "{context}: extended state");
            assert_eq!(now.signals, before.signals, "{context}");
            assert_eq!(now, before, "{context}");
        }
        assert_eq!(self.maps, before.maps, "{context}");
        assert_eq!(self.descriptors, before.descriptors, "{context}");
        for (start, hash) in &self.memory {
            assert_eq!(
                Some(hash),
                before.memory.get(start),
                "{context}: memory from {start:x}\n{}",
                self.maps
            );
        }
        assert_eq!(self, before, "{context}");
    }

    fn of(tracee: &Tracee) -> Self {
        let pid = tracee.pid();
        let memory = RemoteMemory::open(pid).unwrap();
        // The kernel writes the processor's number into these whenever the thread passes it.
        let processor_words: Vec<u64> = tracee
            .tids()
            .iter()
            .map(|&tid| tracee.rseq(tid).unwrap().address)
            .collect();
        let hash = |vma: &procfs::Vma| {
            let mut bytes = vec![0; vma.len() as usize];
            memory.read(vma.start, &mut bytes).ok()?;
            for &rseq in &processor_words {
                if (vma.start..vma.end).contains(&rseq) {
                    let at = (rseq - vma.start) as usize;
                    bytes[at..at + 8].fill(0);
                    bytes[at + 20..at + 32].fill(0);
                }
            }
            // FNV-1a, by words
            Some(
                bytes
                    .chunks(8)
                    .fold(0xcbf2_9ce4_8422_2325_u64, |hash, chunk| {
                        let word = chunk
                            .iter()
                            .fold(0_u64, |word, &byte| word << 8 | u64::from(byte));
                        (hash ^ word).wrapping_mul(0x0100_0000_01b3)
                    }),
            )
        };
        Self {
            threads: tracee
                .tids()
                .iter()
                .map(|&tid| ThreadSnapshot {
                    registers: tracee.registers(tid).unwrap(),
                    xsave: tracee.xsave(tid).unwrap(),
                    sigmask: tracee.sigmask(tid).unwrap(),
                    pending: [
                        tracee.pending(tid, false).unwrap(),
                        tracee.pending(tid, true).unwrap(),
                    ]
                    .concat(),
                    signals: fs::read_to_string(format!("/proc/{pid}/task/{tid}/status"))
                        .unwrap()
                        .lines()
                        .filter(|line| SIGNAL_LINES.iter().any(|key| line.starts_with(key)))
                        .collect::<Vec<_>>()
                        .join("\n"),
                    robust_list: tracee.robust_list(tid).unwrap(),
                    rseq: tracee.rseq(tid).unwrap(),
                })
                .collect(),
            maps: fs::read_to_string(format!("/proc/{pid}/maps")).unwrap(),
            descriptors: procfs::descriptors(pid)
                .unwrap()
                .into_iter()
                .map(|entry| (entry.fd, entry.link))
                .collect(),
            memory: procfs::maps(pid)
                .unwrap()
                .iter()
                .filter(|vma| vma.write)
                .filter_map(|vma| Some((vma.start, hash(vma)?)))
                .collect(),
        }
    }
}

fn stays_bit_for_bit(filtered: bool, options: SeizeOptions) {
    if !able() {
        return;
    }
    let victim = Victim::checker(6, filtered);
    for round in 0..8 {
        let mut tracee = Tracee::seize(victim.pid(), options).unwrap();
        tracee.freeze(BUDGET, ATTEMPTS).unwrap();
        assert_eq!(tracee.tids().len(), 6);
        // One of them is blocked in some threads and not in others.
        victim.signal(libc::SIGUSR1);
        let before = Snapshot::of(&tracee);
        assert!(before.memory.len() > 4);
        work_in_all_threads(&mut tracee).unwrap();
        Snapshot::of(&tracee).assert_is(&before, &format!("round {round}"));
        // Nobody but us has seen the signal; without a handler it would kill.
        discard_pending(&victim, &mut tracee);
        tracee.thaw().unwrap();
        victim.assert_works(6, "after thaw");
    }
}

/// Makes the process ignore SIGUSR1 for a moment, which throws away the pending one.
fn discard_pending(victim: &Victim, tracee: &mut Tracee) {
    let mut injection = tracee.plant(None).unwrap();
    let mut batch = Batch::new();
    let address = injection.scratch_address(victim.pid());
    // struct sigaction of the kernel: handler, flags, restorer, mask
    injection.scratch(victim.pid())[..32].fill(0);
    injection.scratch(victim.pid())[0] = 1;
    injection.scratch(victim.pid())[32..64].fill(0);
    for action in [address, address + 32] {
        batch.call(
            libc::SYS_rt_sigaction,
            &[libc::SIGUSR1.into(), action.into(), 0.into(), 8.into()],
        );
    }
    assert_eq!(injection.run(victim.pid(), &batch).unwrap(), [Ok(0), Ok(0)]);
    injection.cure().unwrap();
}

#[test]
fn plant_run_and_cure_leave_an_ordinary_process_bit_for_bit() {
    stays_bit_for_bit(false, FOLLOW);
}

#[test]
fn plant_run_and_cure_leave_a_process_under_a_seccomp_filter_bit_for_bit() {
    stays_bit_for_bit(true, FOLLOW);
}

#[test]
fn plant_run_and_cure_leave_a_process_with_its_filter_lifted_bit_for_bit() {
    let lifted = SeizeOptions {
        suspend_seccomp: true,
        ..FOLLOW
    };
    stays_bit_for_bit(true, lifted);
}

#[test]
fn calls_in_many_threads_are_made_at_the_same_time() {
    const THREADS: usize = 32;
    if !able() {
        return;
    }
    let victim = Victim::checker(THREADS, false);
    let mut tracee = frozen(victim.pid());
    let tids = tracee.tids().to_vec();
    assert_eq!(tids.len(), THREADS);
    let mut injection = tracee.plant(None).unwrap();
    let work: Vec<_> = tids
        .iter()
        .map(|&tid| {
            injection.scratch(tid)[..16]
                .copy_from_slice(&[[0; 8], 50_000_000_u64.to_le_bytes()].concat());
            let mut batch = Batch::new();
            // poll: a nanosleep would overwrite what the kernel remembers of an interrupted one.
            batch.call(libc::SYS_poll, &[0.into(), 0.into(), 50.into()]);
            batch.call(libc::SYS_gettid, &[]);
            (tid, batch)
        })
        .collect();
    let started = Instant::now();
    let results = injection.run_all(&work).unwrap();
    assert!(
        started.elapsed() < Duration::from_millis(50 * 8),
        "{:?}",
        started.elapsed()
    );
    for (tid, result) in tids.iter().zip(results) {
        assert_eq!(result, [Ok(0), Ok(*tid as u64)]);
    }
    // Several batches for one thread are done in order, and results of one call are arguments of the next.
    let mut batch = Batch::new();
    let first = batch.call(libc::SYS_dup, &[0.into()]);
    let second = batch.call(libc::SYS_dup, &[Arg::from(first)]);
    batch.call(libc::SYS_close, &[second.into()]);
    batch.call(libc::SYS_close, &[first.into()]);
    batch.call(libc::SYS_close, &[first.into()]);
    let results = injection.run_all(&vec![(tids[0], batch); 3]).unwrap();
    assert_eq!(results.len(), 3);
    for result in results {
        let (Ok(first), Ok(second)) = (result[0], result[1]) else {
            panic!("{result:?}");
        };
        assert!(first > 2 && second > first);
        assert_eq!(result[2..4], [Ok(0), Ok(0)]);
        assert_eq!(result[4], Err(nix::errno::Errno::EBADF));
    }
    injection.cure().unwrap();
    tracee.thaw().unwrap();
    victim.assert_works(THREADS, "after parallel batches");
}

// ---------------------------------------------------------------------------------------------------------------------
// Blocking system calls

/// What a blocked call came to: result, errno, milliseconds.
type Outcome = (i64, i32, i64);

/// The calls by name with what they come to; each in a process of its own, all at once. `disturb` gets their process ids
/// while all are blocked.
fn outcomes(filtered: bool, disturb: impl FnOnce(&[(String, i32)])) -> BTreeMap<String, Outcome> {
    let list = Command::new(program("blocking")).output().unwrap();
    let names: Vec<String> = String::from_utf8(list.stdout)
        .unwrap()
        .lines()
        .map(str::to_owned)
        .collect();
    let mut running: Vec<_> = names
        .iter()
        .map(|name| {
            let mut victim = Victim::start("blocking", &[name], filtered);
            let mut output = BufReader::new(victim.child.stdout.take().unwrap());
            let mut line = String::new();
            output.read_line(&mut line).unwrap();
            assert!(line == "ready\n" || filtered, "{name}: {line:?}");
            (name.clone(), victim, output)
        })
        .collect();
    // Time to fall asleep in the call.
    std::thread::sleep(Duration::from_millis(50));
    let pids: Vec<_> = running
        .iter()
        .map(|(name, victim, _)| (name.clone(), victim.pid()))
        .collect();
    disturb(&pids);
    running
        .iter_mut()
        .filter_map(|(name, _, output)| {
            let mut line = String::new();
            output.read_to_string(&mut line).unwrap();
            let words: Vec<&str> = line.split_whitespace().collect();
            let [_, result, errno, milliseconds] = words[..] else {
                assert!(filtered, "{name} said {line:?}");
                return None;
            };
            Some((
                name.clone(),
                (
                    result.parse().unwrap(),
                    errno.parse().unwrap(),
                    milliseconds.parse().unwrap(),
                ),
            ))
        })
        .collect()
}

fn blocking_calls_come_to_the_same(filtered: bool) {
    /// `WAIT_MS` in blocking.c.
    const WAIT: i64 = 2500;
    /// How late a helper or a timeout may be on a busy machine with fifty of them.
    const LATE: i64 = 400;
    if !able() {
        return;
    }
    let undisturbed = outcomes(filtered, |_| ());
    assert!(undisturbed.len() >= 36, "{}", undisturbed.len());
    let disturbed = outcomes(filtered, |victims| {
        let started = Instant::now();
        for (name, pid) in victims {
            // Stopped and let go, and again with calls made in between.
            let result = Tracee::seize(*pid, FOLLOW).and_then(|mut tracee| {
                tracee.freeze(BUDGET, ATTEMPTS)?;
                tracee.thaw()?;
                std::thread::sleep(Duration::from_millis(3));
                let mut tracee = Tracee::seize(*pid, FOLLOW)?;
                tracee.freeze(BUDGET, ATTEMPTS)?;
                work_in_all_threads(&mut tracee)?;
                tracee.thaw()
            });
            match result {
                Ok(()) => {}
                // Under a filter some of them have nothing to wait for.
                Err(error) if filtered && error.is_gone() => {}
                Err(error)
                    if error.is_gone() && started.elapsed().as_millis() as i64 > WAIT - LATE =>
                {
                    println!("{name} ended before it could be disturbed");
                }
                Err(error) => panic!("{name}: {error}"),
            }
        }
    });
    let mut wrong = Vec::new();
    for (name, (result, errno, milliseconds)) in &undisturbed {
        let Some(after) = disturbed.get(name) else {
            wrong.push(format!("{name}: no answer"));
            continue;
        };
        // Only calls that wait take time; the filter makes some answer at once.
        let in_time = if *milliseconds >= WAIT - LATE {
            // Helpers may be early by the time the victim took to start its call.
            (WAIT - LATE..WAIT + LATE).contains(&after.2)
        } else {
            after.2 < LATE
        };
        if (*result, *errno) != (after.0, after.1) || !in_time {
            wrong.push(format!(
                "{name}: undisturbed {:?}, disturbed {after:?}",
                (result, errno, milliseconds)
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn blocking_calls_return_what_they_would_have_returned() {
    blocking_calls_come_to_the_same(false);
}

#[test]
fn blocking_calls_under_a_seccomp_filter_return_what_they_would_have_returned() {
    blocking_calls_come_to_the_same(true);
}

#[test]
fn a_restartable_sequence_is_aborted() {
    if !able() {
        return;
    }
    for planted in [false, true] {
        let victim = Victim::start("sequence", &[], false);
        wait_for("the victim", || victim.word(3) == 1);
        let pid = victim.pid();
        let memory = RemoteMemory::open(pid).unwrap();
        // Until it is caught inside, which is nearly always.
        let mut tracee = loop {
            let tracee = frozen(pid);
            let rseq = tracee.rseq(pid).unwrap();
            let pointer: u64 = memory
                .read_value(pageferry_tracee::RemotePtr::new(rseq.address + 8))
                .unwrap();
            let rip = tracee.registers(pid).unwrap().rip;
            if pointer != 0 {
                let [_, start, len, abort] = memory
                    .read_value(pageferry_tracee::RemotePtr::<[u64; 4]>::new(pointer))
                    .unwrap();
                if rip.wrapping_sub(start) < len {
                    assert_eq!(tracee.portable_registers(pid).unwrap().rip, abort);
                    break tracee;
                }
            }
            tracee.thaw().unwrap();
        };
        // From here on the sequence would come through if nobody aborted it.
        victim.page.write_all_at(&1_u64.to_le_bytes(), 8).unwrap();
        if planted {
            work_in_all_threads(&mut tracee).unwrap();
        }
        tracee.thaw().unwrap();
        wait_for("the verdict", || victim.word(2) != 0);
        assert_eq!(
            victim.word(2),
            1,
            "the sequence came through although it was interrupted"
        );
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Stopped, parked, held

#[test]
fn a_stopped_process_stays_stopped() {
    if !able() {
        return;
    }
    let victim = Victim::checker(4, false);
    victim.expects_interruptions();
    victim.signal(libc::SIGSTOP);
    wait_for("the stop", || victim.state() == 'T');
    let mut tracee = frozen(victim.pid());
    let before = Snapshot::of(&tracee);
    work_in_all_threads(&mut tracee).unwrap();
    Snapshot::of(&tracee).assert_is(&before, "stopped");
    tracee.thaw().unwrap();
    wait_for("the stop", || victim.state() == 'T');
    victim.assert_stands_still(4);
    victim.signal(libc::SIGCONT);
    victim.assert_works(4, "after SIGCONT");
}

#[test]
fn a_stop_that_arrives_while_planted_stops_the_process_afterwards() {
    if !able() {
        return;
    }
    let victim = Victim::checker(4, false);
    victim.expects_interruptions();
    let mut tracee = frozen(victim.pid());
    let tids = tracee.tids().to_vec();
    let mut injection = tracee.plant(None).unwrap();
    victim.signal(libc::SIGSTOP);
    for &tid in &tids {
        assert_eq!(
            injection
                .run(tid, &busy_batch(injection.scratch_address(tid)))
                .unwrap()[BUSY_GETTID],
            Ok(tid as u64)
        );
    }
    injection.cure().unwrap();
    tracee.thaw().unwrap();
    wait_for("the stop", || victim.state() == 'T');
    victim.assert_stands_still(4);
    victim.signal(libc::SIGCONT);
    victim.assert_works(4, "after SIGCONT");
}

#[test]
fn unparking_swallows_the_stop_unseen() {
    if !able() {
        return;
    }
    let victim = Victim::checker(4, false);
    for _ in 0..5 {
        let mut tracee = frozen(victim.pid());
        let before = Snapshot::of(&tracee);
        tracee.park().unwrap();
        assert_ne!(
            procfs::status(victim.pid(), victim.pid()).unwrap().shd_pnd & bit(libc::SIGSTOP),
            0
        );
        tracee.unpark().unwrap();
        Snapshot::of(&tracee).assert_is(&before, "unparked");
        tracee.thaw().unwrap();
        victim.assert_works(4, "after unpark");
    }
}

#[test]
fn unparking_gives_back_a_pending_sigcont() {
    if !able() {
        return;
    }
    let victim = Victim::checker(4, false);
    let has =
        |signal| procfs::status(victim.pid(), victim.pid()).unwrap().shd_pnd & bit(signal) != 0;
    for _ in 0..5 {
        let mut tracee = frozen(victim.pid());
        // A traced process keeps even what it ignores until its tracer has seen it.
        victim.signal(libc::SIGCONT);
        assert!(has(libc::SIGCONT));
        tracee.park().unwrap();
        assert!(has(libc::SIGSTOP) && !has(libc::SIGCONT));
        tracee.unpark().unwrap();
        assert!(has(libc::SIGCONT) && !has(libc::SIGSTOP));
        tracee.thaw().unwrap();
        victim.assert_works(4, "after unpark");
    }
}

/// A lock of each kind, on what the victim has as descriptor 0.
fn locks() -> [(u32, Lock); 3] {
    let lock = |kind, start, len| Lock {
        kind,
        exclusive: true,
        start,
        len,
    };
    [
        (0, lock(Kind::Flock, 0, 0)),
        (0, lock(Kind::Record, 1000, 10)),
        (0, lock(Kind::Description, 2000, 0)),
    ]
}

#[test]
fn a_parked_process_gives_up_its_locks_and_takes_them_again() {
    if !able() {
        return;
    }
    let victim = Victim::checker(4, false);
    let pid = victim.pid();
    let told = || -> Vec<Line> {
        let entry = procfs::descriptor(pid, 0).unwrap();
        let lines = entry.info.locks.iter();
        lines.map(|line| Line::parse(line).unwrap()).collect()
    };
    for round in 0..3 {
        let mut tracee = frozen(pid);
        let before = Snapshot::of(&tracee);
        let answers = tracee.take_locks(&locks()).unwrap();
        assert_eq!(answers, [Ok(()); 3]);
        Snapshot::of(&tracee).assert_is(&before, "locked");
        let mut seen: Vec<Lock> = told().iter().filter_map(|line| line.lock).collect();
        seen.sort_by_key(|lock| lock.start);
        assert_eq!(seen, locks().map(|(_, lock)| lock));
        let file = told()[0].file;
        let owner = Owner::default();
        let held = locks().map(|(fd, lock)| Held {
            fd,
            lock,
            file,
            owner,
        });

        tracee.park().unwrap();
        tracee.give_up_locks(&held).unwrap();
        assert_eq!(told(), []);
        let pending = procfs::status(pid, pid).unwrap().shd_pnd;
        assert_ne!(pending & bit(libc::SIGSTOP), 0, "it is parked no more");
        // Somebody else has them for a moment.
        let other = same_file(&victim);
        let mut stranger = frozen(other.pid());
        assert_eq!(stranger.take_locks(&locks()).unwrap()[1], Ok(()));
        tracee.unpark().unwrap();
        let answers = tracee.take_locks(&locks()).unwrap();
        assert_eq!(answers[1], Err(Errno::EAGAIN));
        stranger.kill().unwrap();
        drop(other);
        let answers = tracee.take_locks(&locks()).unwrap();
        assert_eq!(answers, [Ok(()); 3], "round {round}");
        Snapshot::of(&tracee).assert_is(&before, "locked again");
        tracee.park().unwrap();
        tracee.give_up_locks(&held).unwrap();
        tracee.unpark().unwrap();
        tracee.thaw().unwrap();
        victim.assert_works(4, "after all that");
    }
}

/// A program that has the same file.
fn same_file(victim: &Victim) -> Victim {
    let child = Command::new("sleep")
        .arg("1000")
        .stdin(victim.page.try_clone().unwrap())
        .spawn()
        .unwrap();
    Victim {
        child,
        page: victim.page.try_clone().unwrap(),
    }
}

#[test]
fn a_parked_process_stays_stopped_when_its_tracer_is_killed() {
    if !able() {
        return;
    }
    let victim = Victim::checker(4, false);
    victim.expects_interruptions();
    let mut role = Role::start("park", victim.pid(), None);
    role.wait_until_ready();
    role.kill();
    wait_for("the stop", || victim.state() == 'T');
    victim.assert_stands_still(4);
    victim.signal(libc::SIGCONT);
    victim.assert_works(4, "after SIGCONT");
}

#[test]
fn a_second_tracer_and_the_dead_are_refused_by_name() {
    if !able() {
        return;
    }
    let mut victim = Victim::checker(2, false);
    let pid = victim.pid();
    let mut role = Role::start("freeze", pid, None);
    role.wait_until_ready();
    let tracer = role.child.id() as i32;
    match Tracee::seize(pid, FOLLOW) {
        Err(Error::AlreadyTraced { tracer: found, .. }) => {
            assert!(procfs::tids(tracer).unwrap().contains(&found));
        }
        other => panic!("{other:?}"),
    }
    victim.expects_interruptions();
    role.kill();
    victim.assert_works(2, "after its tracer's death");
    victim.child.kill().unwrap();
    wait_for("its end", || victim.state() == 'Z');
    assert!(matches!(
        Tracee::seize(pid, FOLLOW),
        Err(Error::Zombie { .. })
    ));
    victim.child.wait().unwrap();
    assert!(matches!(
        Tracee::seize(pid, FOLLOW),
        Err(Error::Gone { .. })
    ));
}

// ---------------------------------------------------------------------------------------------------------------------
// Families

fn frozen_family(pid: i32) -> Family {
    let mut family = Family::seize(pid, FOLLOW).unwrap();
    family.freeze(BUDGET, ATTEMPTS).unwrap();
    family
}

/// A husk, which ends with us, and is to have others.
fn husk_family(root: i32) -> Family {
    husk::spawn(&husk::HuskRequest::new(root)).unwrap();
    let options = SeizeOptions {
        exit_kill: true,
        ..SeizeOptions::default()
    };
    let mut family = Family::seize(root, options).unwrap();
    family.freeze(BUDGET, ATTEMPTS).unwrap();
    family
}

impl Victim {
    /// `how`: "forking" or "cloning", if each is to have children all the time.
    fn brood(processes: usize, how: Option<&str>) -> Self {
        let processes = processes.to_string();
        let arguments: Vec<&str> = [processes.as_str()].into_iter().chain(how).collect();
        let victim = Self::start("brood", &arguments, false);
        wait_for("the victim's children", || {
            victim.word(3).to_string() == processes
        });
        victim
    }

    /// Two processes in one memory, and the number of that which is the other's guest.
    fn with_guest() -> (Self, i32) {
        let victim = Self::start("guest", &[], false);
        wait_for("the guest", || {
            victim.word(3) == 2 && victim.turns(2).iter().all(|&turns| turns > 0)
        });
        let [guest] = procfs::children(victim.pid()).unwrap()[..] else {
            panic!("one guest");
        };
        (victim, guest)
    }
}

fn state_of(pid: i32) -> char {
    procfs::stat(pid, pid).map_or('X', |stat| stat.state)
}

#[test]
fn a_family_is_frozen_and_goes_on() {
    if !able() {
        return;
    }
    let victim = Victim::brood(7, None);
    for _ in 0..5 {
        let mut family = frozen_family(victim.pid());
        let pids = family.pids();
        assert_eq!((pids.len(), pids[0]), (7, victim.pid()));
        for (index, &pid) in pids.iter().enumerate().skip(1) {
            let parent = procfs::stat(pid, pid).unwrap().ppid;
            assert!(
                pids[..index].contains(&parent),
                "parents stand before their children"
            );
            work_in_all_threads(family.member(pid).unwrap()).unwrap();
        }
        assert!(family.members().iter().all(Tracee::is_frozen));
        assert!(family.member(1).is_err());
        victim.assert_stands_still(7);
        family.thaw().unwrap();
        victim.assert_works(7, "after thaw");
    }
}

#[test]
fn no_child_that_is_born_in_a_freeze_escapes() {
    no_child_escapes("forking");
}

#[test]
fn no_child_of_clone_that_is_born_in_a_freeze_escapes() {
    no_child_escapes("cloning");
}

fn no_child_escapes(how: &str) {
    if !able() {
        return;
    }
    let victim = Victim::brood(5, Some(how));
    let mut newborn = 0;
    for round in 0..100 {
        let family = frozen_family(victim.pid());
        let pids = family.pids();
        for pid in procfs::descendants(victim.pid()).unwrap() {
            let state = state_of(pid);
            assert!(
                state == 'Z' || (state == 't' && pids.contains(&pid)),
                "round {round}: process {pid} is {state}, of {pids:?}"
            );
            newborn += usize::from(state == 't');
        }
        family.thaw().unwrap();
        victim.assert_works(5, "after thaw");
    }
    assert!(newborn > 500, "some rounds have met a child");
}

#[test]
fn a_family_is_parked_and_unparked_unseen() {
    if !able() {
        return;
    }
    let victim = Victim::brood(5, None);
    let is_parked = |pid| procfs::status(pid, pid).unwrap().shd_pnd & bit(libc::SIGSTOP) != 0;
    for _ in 0..5 {
        let mut family = frozen_family(victim.pid());
        family.park().unwrap();
        assert!(family.pids().into_iter().all(is_parked));
        family.unpark().unwrap();
        assert!(!family.pids().into_iter().any(is_parked));
        family.thaw().unwrap();
        victim.assert_works(5, "after unpark");
    }
}

#[test]
fn a_parked_family_stays_stopped_when_its_tracer_is_killed() {
    if !able() {
        return;
    }
    let victim = Victim::brood(5, None);
    let mut role = Role::start("park-family", victim.pid(), None);
    role.wait_until_ready();
    role.kill();
    let all = procfs::descendants(victim.pid()).unwrap();
    assert_eq!(all.len(), 5);
    wait_for("every stop", || all.iter().all(|&pid| state_of(pid) == 'T'));
    victim.assert_stands_still(5);
    for pid in all {
        pageferry_tracee::process::kill(pid, libc::SIGCONT).unwrap();
    }
    victim.assert_works(5, "after SIGCONT");
}

#[test]
fn a_guest_is_unharmed_by_a_failure_of_every_call() {
    if !able() {
        return;
    }
    let (victim, guest) = Victim::with_guest();
    assert!(descriptor::same_memory(victim.pid(), guest).unwrap());
    let (code, said) = Role::start("plant-guest", victim.pid(), None).end();
    assert_eq!(code, Some(ROLE_DONE), "{said}");
    victim.assert_works(2, "after all failures");
}

/// For each call that is made while the agent is planted in the guest of `root` and taken out again: nothing of it is left when that
/// one fails.
fn guest_story(root: i32) {
    let mut family = frozen_family(root);
    let [_, guest] = family.pids()[..] else {
        panic!("a host and its guest");
    };
    let before = host_and_guest(&family);
    for n in 1.. {
        choke::arm(Some(choke::Fault::Fail(n)));
        let result = family.plant(guest).and_then(Injection::cure);
        let fired = choke::fired();
        choke::arm(None);
        let context = format!("call {n} failed: {result:?}");
        for (now, before) in host_and_guest(&family).iter().zip(&before) {
            now.assert_is(before, &context);
        }
        if !fired {
            result.unwrap();
            assert!(n > 60, "only {n} calls");
            break;
        }
    }
    family.thaw().unwrap();
}

/// What they have in common is looked at once, by the one of whom it is known where the kernel writes in there.
fn host_and_guest(family: &Family) -> [Snapshot; 2] {
    let [host, guest] = family.members() else {
        panic!("a host and its guest");
    };
    let guest = Snapshot {
        memory: BTreeMap::new(),
        ..Snapshot::of(guest)
    };
    [Snapshot::of(host), guest]
}

/// Its stack ends where its stack pointer stands, and behind that is nothing.
#[test]
fn a_parked_guest_gives_up_its_locks_without_a_stack() {
    if !able() {
        return;
    }
    let (victim, guest) = Victim::with_guest();
    let told = || procfs::descriptor(guest, 0).unwrap().info.locks;
    for _ in 0..3 {
        let mut family = frozen_family(victim.pid());
        let rsp = family.member(guest).unwrap().registers(guest).unwrap().rsp;
        let maps = procfs::maps(guest).unwrap();
        assert!(maps.iter().any(|vma| vma.start == rsp && vma.write));
        assert!(maps.iter().any(|vma| vma.end == rsp && !vma.read));
        let before = host_and_guest(&family);
        let member = family.member(guest).unwrap();
        assert_eq!(member.take_locks(&locks()).unwrap(), [Ok(()); 3]);
        let file = Line::parse(&told()[0]).unwrap().file;
        let owner = Owner::default();
        let held = locks().map(|(fd, lock)| Held {
            fd,
            lock,
            file,
            owner,
        });
        family.park().unwrap();
        family.give_up_locks(guest, &held).unwrap();
        assert_eq!(told(), [""; 0]);
        for pid in family.pids() {
            let pending = procfs::status(pid, pid).unwrap().shd_pnd;
            assert_ne!(pending & bit(libc::SIGSTOP), 0, "{pid} is parked no more");
        }
        family.unpark().unwrap();
        for (now, before) in host_and_guest(&family).iter().zip(&before) {
            now.assert_is(before, "unlocked");
        }
        family.thaw().unwrap();
        victim.assert_works(2, "after all that");
    }
}

#[test]
fn a_family_is_killed_whole() {
    if !able() {
        return;
    }
    let victim = Victim::brood(5, Some("forking"));
    let family = frozen_family(victim.pid());
    let pids = family.pids();
    family.kill().unwrap();
    assert!(
        pids.iter()
            .all(|&pid| pid == victim.pid() || !procfs::exists(pid) || state_of(pid) == 'Z')
    );
}

/// Numbers that nobody has, not even a group or session whose leader is gone, below one that no other test gives.
fn chosen_pids(below: i32, count: usize) -> Vec<i32> {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let led: HashSet<i32> = processes
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(|pid| procfs::stat(pid, pid).ok())
        .flat_map(|stat| [stat.pgrp, stat.session])
        .collect();
    let free = (10_000..below)
        .rev()
        .filter(|pid| !led.contains(pid) && !procfs::exists(*pid));
    free.take(count).collect()
}

#[test]
fn husks_have_children_of_their_own() {
    if !able() {
        return;
    }
    let pids = chosen_pids(20_000, 4);
    forked(|| husk_family_story(&pids));
    // Its tracer's end was theirs.
    wait_for("the end of every husk", || {
        pids.iter()
            .all(|&pid| !procfs::exists(pid) || state_of(pid) == 'Z')
    });
}

fn husk_family_story(pids: &[i32]) {
    let [root, leader, member, follower] = *pids else {
        panic!("four pids");
    };
    let mut family = husk_family(root);
    let born = |pid| Birth {
        pid: Some(pid),
        exit_signal: libc::SIGCHLD as u32,
        shares_table: false,
        shares_directory: false,
        shares_memory: false,
        shares_actions: false,
    };
    family.member(root).unwrap().lead_session().unwrap();
    family.bear(root, &[born(leader), born(follower)]).unwrap();
    family.member(leader).unwrap().join_group(leader).unwrap();
    family.bear(leader, &[born(member)]).unwrap();
    assert_eq!(family.pids(), [root, leader, follower, member]);
    let stat = |pid| {
        let stat = procfs::stat(pid, pid).unwrap();
        (stat.ppid, stat.pgrp, stat.session)
    };
    assert_eq!(stat(leader), (root, leader, root));
    assert_eq!(stat(follower), (root, root, root));
    assert_eq!(stat(member), (leader, leader, root));
    // The first process there is.
    assert!(matches!(
        family.bear(follower, &[born(1)]),
        Err(Error::PidTaken { pid: 1, .. })
    ));
    for pid in [root, leader, member, follower] {
        let tracee = family.member(pid).unwrap();
        let mut injection = tracee.plant(None).unwrap();
        let mut batch = Batch::new();
        batch.call(libc::SYS_getpid, &[]);
        batch.call(libc::SYS_getppid, &[]);
        let answers = injection.run(pid, &batch).unwrap();
        assert_eq!(answers[0], Ok(pid as u64));
        let parent = if pid == root {
            std::process::id() as i32
        } else {
            stat(pid).0
        };
        assert_eq!(answers[1], Ok(parent as u64));
        injection.cure().unwrap();
        // As empty as its parent was.
        assert_eq!(procfs::descriptors(pid).unwrap(), []);
        assert!(procfs::maps(pid).unwrap().len() <= 6);
    }
    std::mem::forget(family);
}

#[test]
fn husks_have_in_common_what_they_are_told_to_until_they_part() {
    if !able() {
        return;
    }
    let pids = chosen_pids(18_500, 4);
    forked(|| husk_sharing_story(&pids));
}

fn husk_sharing_story(pids: &[i32]) {
    let [root, table, both, adopted] = *pids else {
        panic!("four pids");
    };
    let mut family = husk_family(root);
    let born = |pid, shares_table, shares_directory| Birth {
        pid: Some(pid),
        exit_signal: libc::SIGCHLD as u32,
        shares_table,
        shares_directory,
        shares_memory: false,
        shares_actions: false,
    };
    family.bear(root, &[born(table, true, false)]).unwrap();
    family.bear(table, &[born(both, true, true)]).unwrap();
    // By one that passes by, and has to have it too.
    family.member(table).unwrap().lead_session().unwrap();
    family
        .foster(root, table, born(adopted, true, false))
        .unwrap();
    let shared = |one, other| {
        (
            descriptor::same_table(one, other).unwrap(),
            descriptor::same_directory(one, other).unwrap(),
        )
    };
    assert_eq!(shared(root, table), (true, false));
    assert_eq!(shared(table, both), (true, true));
    assert_eq!(shared(root, adopted), (true, false));
    family.member(table).unwrap().part(true, false).unwrap();
    assert_eq!(shared(root, table), (false, false));
    assert_eq!(shared(table, both), (false, true));
    assert_eq!(shared(root, both), (true, false));
    std::mem::forget(family);
}

#[test]
fn one_that_is_born_into_the_memory_of_another_moves_in_when_that_is_ready() {
    if !able() {
        return;
    }
    let pids = chosen_pids(17_500, 3);
    forked(|| husk_memory_story(&pids));
}

fn husk_memory_story(pids: &[i32]) {
    let [root, guest, apart] = *pids else {
        panic!("three pids");
    };
    const AGENT: u64 = 0x1_0000_0000;
    const CODE: u64 = 0x2_0000_0000;
    let mut family = husk_family(root);
    let born = |pid, shares| Birth {
        pid: Some(pid),
        exit_signal: libc::SIGCHLD as u32,
        shares_table: false,
        shares_directory: false,
        shares_memory: shares,
        shares_actions: shares,
    };
    family
        .bear(root, &[born(guest, true), born(apart, false)])
        .unwrap();
    for (other, is_shared) in [(guest, true), (apart, false)] {
        assert_eq!(descriptor::same_memory(root, other).unwrap(), is_shared);
        assert_eq!(descriptor::same_actions(root, other).unwrap(), is_shared);
        assert!(!descriptor::same_table(root, other).unwrap());
    }
    assert!(matches!(
        family.move_in(apart, root),
        Err(Error::WrongState { .. })
    ));
    // Nothing stays of what the guest was made in: neither its text nor its stack.
    let gone = procfs::maps(root).unwrap();
    let gone = gone
        .iter()
        .filter(|vma| vma.path == "[stack]" || !vma.path.starts_with('['));
    let mut batch = Batch::new();
    for vma in gone {
        batch.call(
            libc::SYS_munmap,
            &[vma.start.into(), (vma.end - vma.start).into()],
        );
    }
    batch.call(
        libc::SYS_mmap,
        &[
            CODE.into(),
            4096.into(),
            (libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC).into(),
            (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE).into(),
            (-1).into(),
            0.into(),
        ],
    );
    // 1: lock inc qword [rdi]; pause; jmp 1b
    let code = [0xf0, 0x48, 0xff, 0x07, 0xf3, 0x90, 0xeb, 0xf8];
    let memory = RemoteMemory::open(root).unwrap();
    for (pid, counter) in [(root, CODE + 256), (guest, CODE + 320)] {
        if pid == guest {
            memory.write(CODE, &code).unwrap();
            family.move_in(guest, root).unwrap();
        }
        let tracee = family.member(pid).unwrap();
        let mut injection = tracee.plant_with_room(Some(AGENT), 1).unwrap();
        let mut whoami = Batch::new();
        whoami.call(libc::SYS_getpid, &[]);
        assert_eq!(injection.run(pid, &whoami).unwrap(), [Ok(pid as u64)]);
        if pid == root {
            let answers = injection.run(pid, &batch).unwrap();
            assert!(
                answers.iter().all(std::result::Result::is_ok),
                "{answers:?}"
            );
        }
        let start = ThreadStart {
            tid: pid,
            registers: pageferry_tracee::Registers {
                rip: CODE,
                rdi: counter,
                rsp: CODE + 4096,
                orig_rax: u64::MAX,
                cs: 0x33,
                ss: 0x2b,
                eflags: 0x202,
                ..Default::default()
            },
            xsave: Vec::new(),
            sigmask: 0,
        };
        injection.finish(&[start]).unwrap();
    }
    assert!(
        procfs::maps(guest)
            .unwrap()
            .iter()
            .all(|vma| vma.start != AGENT)
    );
    family.clear_exit_kill().unwrap();
    let held = family.release().unwrap();
    wait_for("both to count", || {
        [256, 320].iter().all(|offset| {
            let count = pageferry_tracee::RemotePtr::<u64>::new(CODE + offset);
            memory.read_value(count).unwrap() > 0
        })
    });
    // Our end is theirs.
    std::mem::forget(held);
}

#[test]
fn husks_end_as_they_are_told_and_leave_others_behind() {
    if !able() {
        return;
    }
    let pids = chosen_pids(19_000, 5);
    forked(|| husk_ends_story(&pids));
}

fn husk_ends_story(pids: &[i32]) {
    let [root, leader, left, early, late] = *pids else {
        panic!("five pids");
    };
    let mut family = husk_family(root);
    let born = |pid, exit_signal| Birth {
        pid: Some(pid),
        exit_signal,
        shares_table: false,
        shares_directory: false,
        shares_memory: false,
        shares_actions: false,
    };
    let stat = |pid| procfs::stat(pid, pid).unwrap();
    // A session whose leader goes, and one of its members that another has.
    family.bear(root, &[born(leader, 0)]).unwrap();
    family.member(leader).unwrap().lead_session().unwrap();
    family.foster(root, leader, born(left, 17)).unwrap();
    family.end(leader, &End::default()).unwrap();
    family.member(root).unwrap().reap(leader).unwrap();
    assert!(!procfs::exists(leader));
    let found = stat(left);
    assert_eq!(
        (found.ppid, found.pgrp, found.session),
        (root, leader, leader)
    );
    assert_eq!(found.exit_signal, libc::SIGCHLD);
    // The number is that of a session, and of nobody.
    assert!(matches!(
        family.bear(root, &[born(leader, 0)]),
        Err(Error::PidTaken { .. })
    ));

    family
        .bear(left, &[born(early, 17), born(late, 10)])
        .unwrap();
    let end = |status| End {
        status,
        uid: 65_534,
        comm: "fifteen_letters_and_more".into(),
    };
    family.end(late, &end(0x80 | libc::SIGSEGV as u32)).unwrap();
    family.end(early, &end(7 << 8)).unwrap();
    for (pid, status) in [(early, 7 << 8), (late, libc::SIGSEGV as u32)] {
        let found = stat(pid);
        assert_eq!(
            (found.state, found.exit_code, found.ppid),
            ('Z', status, left)
        );
        let status = procfs::status(pid, pid).unwrap();
        assert_eq!(
            (status.uid[0], status.name.as_str()),
            (65_534, "fifteen_letters")
        );
    }
    assert_eq!(procfs::children(left).unwrap(), [early, late]);
    let pending = family.member(left).unwrap().pending(left, true).unwrap();
    assert_eq!(pending.len(), 2, "each has told of its end");
    family.kill().unwrap();
}

// ---------------------------------------------------------------------------------------------------------------------
// Our own death, and failing calls

/// This test program once more, as a tracer of its own that can be killed.
struct Role {
    child: Child,
}

impl Role {
    fn start(what: &str, pid: i32, fault: Option<String>) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args([
                "--exact",
                "role",
                "--ignored",
                "--nocapture",
                "--test-threads=1",
            ])
            .env("ROLE", what)
            .env("ROLE_PID", pid.to_string())
            .env_remove("PAGEFERRY_FAULT")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        if let Some(fault) = fault {
            command.env("PAGEFERRY_FAULT", fault);
        }
        Self {
            child: command.spawn().unwrap(),
        }
    }

    /// The role says a word on its standard error, since the test harness writes to the other.
    fn wait_until_ready(&mut self) {
        let mut line = String::new();
        BufReader::new(self.child.stderr.as_mut().unwrap())
            .read_line(&mut line)
            .unwrap();
        assert_eq!(line, "ready\n");
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// `None` when it was killed, else its exit code and what it said.
    fn end(mut self) -> (Option<i32>, String) {
        let mut said = String::new();
        self.child
            .stderr
            .as_mut()
            .unwrap()
            .read_to_string(&mut said)
            .unwrap();
        let status = self.child.wait().unwrap();
        assert!(
            status.signal().is_none_or(|signal| signal == libc::SIGKILL),
            "{status:?} {said}"
        );
        (status.code(), said)
    }
}

impl Drop for Role {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// How long the role "linger" has a call of the agent wait.
const LINGER_MS: i32 = 400;
/// What the role "will" leaves.
const WILL_UMASK: u32 = 0o173;
const ROLE_DONE: i32 = 0;
const ROLE_FAILED: i32 = 3;

/// Not a test: what [`Role`] runs.
#[test]
#[ignore = "a helper process of other tests"]
fn role() {
    let (Ok(what), Ok(pid)) = (std::env::var("ROLE"), std::env::var("ROLE_PID")) else {
        return;
    };
    let pid: i32 = pid.parse().unwrap();
    if what == "park" || what == "freeze" {
        let mut tracee = frozen(pid);
        if what == "park" {
            tracee.park().unwrap();
        }
        eprintln!("ready");
        let _ = std::io::stdin().read(&mut [0]);
        return;
    }
    if what == "park-family" {
        let mut family = frozen_family(pid);
        family.park().unwrap();
        eprintln!("ready");
        let _ = std::io::stdin().read(&mut [0]);
        return;
    }
    if what == "plant-guest" {
        return guest_story(pid);
    }
    if what == "linger" {
        // For the test to kill it in the midst of this: signals arrive, and the call goes on without us.
        let mut tracee = frozen(pid);
        let mut injection = tracee.plant(None).unwrap();
        let mut batch = Batch::new();
        let none = injection.scratch_address(pid);
        batch.call(
            libc::SYS_rt_sigprocmask,
            &[libc::SIG_SETMASK.into(), none.into(), 0.into(), 8.into()],
        );
        batch.call(libc::SYS_poll, &[0.into(), 0.into(), LINGER_MS.into()]);
        eprintln!("ready");
        injection.run(pid, &batch).unwrap();
        return;
    }
    if what == "will" || what == "will-revoked" {
        let mut tracee = frozen(pid);
        let mut injection = tracee.plant(None).unwrap();
        let mut name = [0_u64; 2];
        name[0] = u64::from_ne_bytes(*b"our will");
        let address = injection.will_address(pid);
        let mut will = Batch::new();
        will.call(libc::SYS_umask, &[WILL_UMASK.into()]);
        will.call(libc::SYS_prctl, &[libc::PR_SET_NAME.into(), address.into()]);
        injection.make_will(pid, &will, &name).unwrap();
        if what == "will-revoked" {
            injection.revoke_will(pid).unwrap();
        }
        eprintln!("ready");
        let _ = std::io::stdin().read(&mut [0]);
        return;
    }
    if what == "endless" {
        eprintln!("ready");
        loop {
            let mut tracee = frozen(pid);
            work_in_all_threads(&mut tracee).unwrap();
            tracee.thaw().unwrap();
        }
    }
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    choke::configure_from_environment();
    let cycle = || -> Result<(), Error> {
        let mut tracee = Tracee::seize(pid, FOLLOW)?;
        tracee.freeze(BUDGET, ATTEMPTS)?;
        work_in_all_threads(&mut tracee)?;
        tracee.thaw()
    };
    let result = cycle();
    let fired = choke::fired();
    choke::arm(None);
    if what == "cycle" {
        // Whatever failed, nothing of us is left in it, before we end.
        for tid in procfs::tids(pid).unwrap() {
            assert_eq!(
                procfs::status(pid, tid).unwrap().tracer_pid,
                0,
                "{result:?}"
            );
        }
        assert_eq!(
            fs::read_to_string(format!("/proc/{pid}/maps")).unwrap(),
            maps,
            "{result:?}"
        );
    }
    let code = match (result, fired) {
        // The call that failed was one that is tried again.
        (Ok(()), true) | (Err(_), _) => ROLE_FAILED,
        (Ok(()), false) => ROLE_DONE,
    };
    std::process::exit(code);
}

#[test]
fn the_victim_survives_our_death_at_every_call() {
    const THREADS: usize = 3;
    if !able() {
        return;
    }
    let victim = Victim::checker(THREADS, false);
    victim.expects_interruptions();
    let before = layout_after_freeze(victim.pid());
    for n in 1.. {
        let (code, said) = Role::start("cycle", victim.pid(), Some(format!("kill:{n}"))).end();
        victim.assert_works(THREADS, &format!("killed at call {n}"));
        // What could not be undone is undone by whoever comes next.
        assert_eq!(
            layout_after_freeze(victim.pid()),
            before,
            "killed at call {n}"
        );
        match code {
            None => {}
            Some(ROLE_DONE) => {
                assert!(n > 60, "only {n} calls");
                break;
            }
            Some(code) => panic!("call {n}: exit {code}: {said}"),
        }
    }
}

/// What must not outlive us and the kernel does not put back, the process puts back itself.
#[test]
fn our_will_is_done_before_the_victim_goes_on_and_only_then() {
    if !able() {
        return;
    }
    let victim = Victim::checker(2, false);
    victim.expects_interruptions();
    let seen = || {
        let status = procfs::status(victim.pid(), victim.pid()).unwrap();
        (status.umask, status.name)
    };
    let before = seen();
    let mut role = Role::start("will-revoked", victim.pid(), None);
    role.wait_until_ready();
    role.kill();
    victim.assert_works(2, "after a will that was revoked");
    assert_eq!(seen(), before);
    let mut role = Role::start("will", victim.pid(), None);
    role.wait_until_ready();
    assert_eq!(seen(), before, "while we live");
    role.kill();
    victim.assert_works(2, "after a will");
    assert_eq!(seen(), (WILL_UMASK, "our will".to_owned()));
}

#[test]
fn the_victim_survives_our_death_at_any_time() {
    const THREADS: usize = 3;
    if !able() {
        return;
    }
    let victim = Victim::checker(THREADS, true);
    victim.expects_interruptions();
    let before = layout_after_freeze(victim.pid());
    for round in 0..60_u64 {
        let mut role = Role::start("endless", victim.pid(), None);
        role.wait_until_ready();
        std::thread::sleep(Duration::from_micros(round * 7919 % 5000));
        role.kill();
        victim.assert_works(THREADS, &format!("killed in round {round}"));
    }
    assert_eq!(layout_after_freeze(victim.pid()), before);
    victim.assert_works(THREADS, "after the last freeze");
}

#[test]
fn the_victim_is_unharmed_by_a_failure_of_every_call() {
    const THREADS: usize = 3;
    if !able() {
        return;
    }
    let victim = Victim::checker(THREADS, false);
    for n in 1.. {
        let (code, said) = Role::start("cycle", victim.pid(), Some(format!("fail:{n}"))).end();
        victim.assert_works(THREADS, &format!("call {n} failed"));
        match code {
            Some(ROLE_FAILED) => {}
            Some(ROLE_DONE) => {
                assert!(n > 60, "only {n} calls");
                break;
            }
            code => panic!("call {n}: exit {code:?}: {said}"),
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// What a killed tracer leaves

/// Mappings, descriptors and locked memory: what an agent's mapping would show in.
#[derive(Debug, PartialEq)]
struct Layout {
    maps: String,
    descriptors: BTreeMap<u32, String>,
    locked_kib: u64,
}

impl Layout {
    fn of(pid: i32) -> Self {
        Self {
            maps: fs::read_to_string(format!("/proc/{pid}/maps")).unwrap(),
            descriptors: procfs::descriptors(pid)
                .unwrap()
                .into_iter()
                .map(|entry| (entry.fd, entry.link))
                .collect(),
            locked_kib: procfs::status(pid, pid).unwrap().vm_lck_kib,
        }
    }
}

/// The layout in the freeze, which the process is let go from again.
fn layout_after_freeze(pid: i32) -> Layout {
    let tracee = frozen(pid);
    let layout = Layout::of(pid);
    tracee.thaw().unwrap();
    layout
}

/// Memory made as an agent's is, at `at` or where the kernel likes, its first page with these contents.
fn imitate(injection: &mut Injection<'_>, at: u64, len: usize, shared: i32, page: &[u8]) -> u64 {
    let pid = injection.tracee().pid();
    let mut batch = Batch::new();
    batch.call(
        libc::SYS_mmap,
        &[
            at.into(),
            len.into(),
            (libc::PROT_READ | libc::PROT_WRITE).into(),
            (shared | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE).into(),
            (-1).into(),
            0.into(),
        ],
    );
    let address = injection.run(pid, &batch).unwrap()[0].unwrap();
    let memory = RemoteMemory::open(pid).unwrap();
    memory.write(address, page).unwrap();
    let mut batch = Batch::new();
    batch.call(
        libc::SYS_mprotect,
        &[
            address.into(),
            page.len().into(),
            (libc::PROT_READ | libc::PROT_EXEC).into(),
        ],
    );
    assert_eq!(injection.run(pid, &batch).unwrap(), [Ok(0)]);
    address
}

#[test]
fn several_leftovers_go_and_what_only_looks_like_one_stays() {
    const THREADS: usize = 3;
    if !able() {
        return;
    }
    let victim = Victim::checker(THREADS, false);
    let pid = victim.pid();
    let memory = RemoteMemory::open(pid).unwrap();
    let len = agent::byte_len(THREADS);
    let mut tracee = frozen(pid);
    let mut injection = tracee.plant(None).unwrap();
    let mut page = vec![0; 4096];
    memory.read(injection.mapping().start, &mut page).unwrap();
    // All that is mapped from here on is locked, agents included.
    let mut batch = Batch::new();
    batch.call(libc::SYS_mlockall, &[libc::MCL_FUTURE.into()]);
    assert_eq!(injection.run(pid, &batch).unwrap(), [Ok(0)]);
    let mut other = page.clone();
    *other.last_mut().unwrap() ^= 1;
    let untouched = vec![0; 4096];
    let look_alikes = [
        imitate(&mut injection, 0, len, libc::MAP_SHARED, &other),
        imitate(&mut injection, 0, len, libc::MAP_SHARED, &untouched),
        imitate(&mut injection, 0, len + 4096, libc::MAP_SHARED, &page),
        imitate(&mut injection, 0, len, libc::MAP_PRIVATE, &page),
    ];
    injection.cure().unwrap();
    tracee.thaw().unwrap();
    let before = layout_after_freeze(pid);
    let starts = |layout: &Layout, address| layout.maps.contains(&format!("{address:x}-"));
    assert!(look_alikes.iter().all(|&address| starts(&before, address)));

    let mut tracee = frozen(pid);
    let mut injection = tracee.plant(None).unwrap();
    let marked = injection.mapping().start + (1 << 40);
    let left = [
        imitate(&mut injection, 0, len, libc::MAP_SHARED, &page),
        imitate(&mut injection, 0, len, libc::MAP_SHARED, &page),
        imitate(&mut injection, marked, len, libc::MAP_SHARED, &untouched),
    ];
    assert_eq!(left[2], marked);
    injection.cure().unwrap();
    tracee.thaw().unwrap();
    let between = Layout::of(pid);
    assert!(left.iter().all(|&address| starts(&between, address)));
    assert!(between.locked_kib > before.locked_kib);
    assert_eq!(layout_after_freeze(pid), before);
    victim.assert_works(THREADS, "afterwards");
}

/// Lets a tracer be killed while its agent waits in a call, gives the process to `disturb`, and freezes it again.
fn freeze_after_lingering(disturb: impl FnOnce(&Victim)) {
    let victim = Victim::start("handler", &[], false);
    wait_for("the victim", || victim.word(4) > 2);
    let pid = victim.pid();
    let before = layout_after_freeze(pid);
    let mut role = Role::start("linger", pid, None);
    role.wait_until_ready();
    wait_for("the agent's call", || {
        procfs::syscall(pid, pid)
            .is_ok_and(|call| call.is_some_and(|call| call.nr == libc::SYS_poll))
    });
    role.kill();
    assert_ne!(Layout::of(pid).maps, before.maps);
    disturb(&victim);
    let asked = Instant::now();
    let mut tracee = Tracee::seize(pid, FOLLOW).unwrap();
    let began = tracee.freeze(BUDGET, ATTEMPTS).unwrap();
    // Until then it ran: attempts in vain do not count.
    assert!(began - asked > Duration::from_millis(LINGER_MS as u64 / 2));
    assert!(began.elapsed() < BUDGET);
    assert_eq!(Layout::of(pid), before);
    tracee.thaw().unwrap();
    let turns = victim.word(4);
    wait_for("the victim to work", || victim.word(4) > turns + 2);
}

#[test]
fn a_thread_in_a_leftover_is_let_out_first() {
    if able() {
        freeze_after_lingering(|_| ());
    }
}

#[test]
fn a_thread_that_has_to_return_into_a_leftover_is_let_out_first() {
    if able() {
        freeze_after_lingering(|victim| {
            // Longer than the agent's call would have lasted.
            victim.page.write_all_at(&600_u64.to_le_bytes(), 8).unwrap();
            victim.signal(libc::SIGUSR2);
            wait_for("the handler", || victim.word(5) == 1);
            assert_eq!(victim.word(6), 0);
        });
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Husks

/// Husks are made by single-threaded processes only, which a test harness is not: its child is.
#[test]
fn a_husk_gets_threads_and_goes_on_as_it_is_told() {
    if !able() {
        return;
    }
    forked(husk_story);
}

/// Runs `story` in a child: husks are made by a process with one thread.
fn forked(story: impl FnOnce()) {
    // SAFETY: the child only runs the body below and ends without returning to the harness; what it uses of the C library
    // is usable in a forked child with glibc.
    let child = unsafe { libc::fork() };
    if child == 0 {
        std::panic::set_hook(Box::new(|panic| {
            let words = format!("{panic}\n");
            // SAFETY: writes live bytes to standard error, past the harness's capture, which belongs to the other process.
            unsafe { libc::write(2, words.as_ptr().cast(), words.len()) };
        }));
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(story));
        // SAFETY: ends this process without the harness's clean-up.
        unsafe { libc::_exit(i32::from(result.is_err())) };
    }
    let mut status = 0;
    // SAFETY: our own child and a live integer.
    unsafe { libc::waitpid(child, &raw mut status, 0) };
    assert_eq!(status, 0, "its words are above");
}

fn husk_story() {
    let pid = (20_000..30_000)
        .rev()
        .find(|&pid| !procfs::exists(pid))
        .unwrap();
    let pid = husk::spawn(&husk::HuskRequest::new(pid)).unwrap();
    let options = SeizeOptions {
        exit_kill: true,
        ..SeizeOptions::default()
    };
    let mut tracee = Tracee::seize(pid, options).unwrap();
    tracee.freeze(BUDGET, ATTEMPTS).unwrap();
    const AGENT: u64 = 0x1_0000_0000;
    const CODE: u64 = 0x2_0000_0000;
    let mut injection = tracee.plant_with_room(Some(AGENT), 3).unwrap();
    assert_eq!(injection.mapping().start, AGENT);
    let tids: Vec<i32> = (pid..)
        .filter(|&tid| tid == pid || !procfs::exists(tid))
        .take(3)
        .collect();
    for &tid in &tids[1..] {
        injection.spawn_thread(tid).unwrap();
    }
    assert!(matches!(
        injection.spawn_thread(tids[2] + 1),
        Err(Error::TooMuch { .. })
    ));
    assert_eq!(injection.tracee().tids(), tids);
    let mut batch = Batch::new();
    batch.call(
        libc::SYS_mmap,
        &[
            CODE.into(),
            4096.into(),
            (libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC).into(),
            (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE).into(),
            (-1).into(),
            0.into(),
        ],
    );
    assert_eq!(injection.run(pid, &batch).unwrap(), [Ok(CODE)]);
    let mut whoami = Batch::new();
    whoami.call(libc::SYS_gettid, &[]);
    for &tid in &tids {
        assert_eq!(injection.run(tid, &whoami).unwrap(), [Ok(tid as u64)]);
    }
    let memory = RemoteMemory::open(pid).unwrap();
    // 1: lock inc qword [rdi]; pause; jmp 1b
    memory
        .write(CODE, &[0xf0, 0x48, 0xff, 0x07, 0xf3, 0x90, 0xeb, 0xf8])
        .unwrap();
    let registers = |thread: u64| pageferry_tracee::Registers {
        rip: CODE,
        rdi: CODE + 256 + thread * 64,
        rsp: CODE + 4096,
        orig_rax: u64::MAX,
        cs: 0x33,
        ss: 0x2b,
        eflags: 0x202,
        ..Default::default()
    };
    let starts: Vec<ThreadStart> = tids
        .iter()
        .enumerate()
        .map(|(thread, &tid)| ThreadStart {
            tid,
            registers: registers(thread as u64),
            xsave: Vec::new(),
            sigmask: bit(libc::SIGUSR1),
        })
        .collect();
    injection.finish(&starts).unwrap();
    for (thread, &tid) in tids.iter().enumerate() {
        assert_eq!(
            tracee.registers(tid).unwrap().rip,
            registers(thread as u64).rip
        );
        assert_eq!(tracee.sigmask(tid).unwrap(), bit(libc::SIGUSR1));
    }
    assert!(
        procfs::maps(pid)
            .unwrap()
            .iter()
            .all(|vma| vma.start != AGENT)
    );
    tracee.clear_exit_kill().unwrap();
    let mut held = tracee.release(true).unwrap().unwrap();
    let counters = || -> Vec<u64> {
        (0..3)
            .map(|thread| {
                memory
                    .read_value(pageferry_tracee::RemotePtr::new(CODE + 256 + thread * 64))
                    .unwrap()
            })
            .collect()
    };
    wait_for("every thread to count", || {
        counters().iter().all(|&count| count > 0)
    });
    assert_eq!(
        held.pump(Duration::from_millis(5)).unwrap(),
        pageferry_tracee::Pumped::Running
    );
    // Signals pass through.
    // SAFETY: no pointers; the process is ours.
    unsafe { libc::kill(pid, libc::SIGTERM) };
    let started = Instant::now();
    let ended = loop {
        match held.pump(Duration::from_millis(5)).unwrap() {
            pageferry_tracee::Pumped::Exited(status) => break status,
            pageferry_tracee::Pumped::Running => {
                assert!(started.elapsed() < Duration::from_secs(5))
            }
        }
    };
    assert_eq!(libc::WTERMSIG(ended), libc::SIGTERM);
}
