//! Model → kernel objects: turns a husk into the captured process tree, stopped one instruction before it goes on.
//!
//! One module per kind of object, with the names of the model. Everything that only the process itself can ask of the
//! kernel is asked by the agent planted in the husk; files and sockets are opened by us and handed over. The husk is
//! privileged until the last batch of each thread, which drops to the captured credentials.
//!
//! First the husk of the root makes those of its children, and they of theirs, so that parenthood, sessions and groups are real;
//! those that had ended end. Then the UNIX sockets are made, which know by whom and may be connected over any two processes, and
//! the open files that travel in their messages. Then each process is built, parents first. Any other open file that several have is made once, when the first of them is built, and
//! handed to each. Shared objects are made and filled before the husks are touched, and sealed when the last process is built.
//! Memory that several processes have is made with the first of them; the others, which were born into its husk, get an agent of
//! their own in it and skip steps 2 and 4 to 7 below.
//!
//! Order within a process, and why:
//! 1. plant the agent in a hole that both the husk and the final layout leave free;
//! 2. unmap all that the exec brought, map the vdso at its old place (it must be gone before it can be mapped);
//! 3. take the leader's user and group ids, keeping capabilities: UNIX socket pairs record them;
//! 4. mappings (they need descriptors of the mapped files for a moment, so before the table is filled);
//! 5. `PR_SET_MM_MAP`, exe link included (nothing maps the husk's own file any more);
//! 6. the run userfaultfd, made while the husk is privileged, then `mprotect` of locked mappings: locking a range that
//!    is already registered would block in the kernel;
//! 7. pages that must be there at the first instruction;
//! 8. descriptors, then epoll items, which name descriptors;
//! 9. threads, signal actions, pending signals, timers, and last, per thread, credentials.

use std::collections::BTreeMap;

use pageferry_image::model;
use pageferry_image::model::memory::{Kind, Space};
use pageferry_image::model::task::{Process, Tree};
use pageferry_image::page::{PAGE_LEN, PAGE_SIZE, PageRange};
use pageferry_tracee::Error as TraceeError;
use pageferry_tracee::family::Family;
use pageferry_tracee::host::Clocks;
use pageferry_tracee::injection::{Arg, Batch, Injection, Slot, ThreadStart};
use pageferry_tracee::tree::Tracee;
use pageferry_tracee::uffd::Uffd;

use self::sockets::names::Names;

pub mod files;
pub mod locks;
pub mod memory;
pub mod relations;
pub mod shared;
pub mod signals;
pub mod sockets;
pub mod task;
pub mod timers;

/// Why the process could not be rebuilt. The husk is then destroyed; the source runs on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The model breaks a rule.
    #[error("the source sent a model that cannot be: {0}")]
    Model(#[from] model::Invalid),
    /// The husk, or the kernel on its behalf.
    #[error("the prepared process could not be worked on")]
    Tracee(#[from] TraceeError),
    /// One object could not be made.
    #[error("{object}: {call} failed")]
    Object {
        /// As an operator would name it: `fd 9`, `mapping 7f00-7f01`, `thread 12`.
        object: String,
        /// The system call or step.
        call: &'static str,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The kernel did something else than asked.
    #[error("{object}: {what}")]
    Mismatch {
        /// As above.
        object: String,
        /// What is different.
        what: String,
    },
}

impl Error {
    pub(crate) fn object(
        object: impl Into<String>,
        call: &'static str,
        source: impl Into<std::io::Error>,
    ) -> Self {
        Self::Object {
            object: object.into(),
            call,
            source: source.into(),
        }
    }
}

/// Result of this module.
pub type Result<T> = std::result::Result<T, Error>;

/// A page that travels with the state: its address and its 4096 bytes.
#[derive(Debug, Clone)]
pub struct EagerPage {
    /// Page-aligned address.
    pub address: u64,
    /// Exactly one page.
    pub content: bytes::Bytes,
}

/// What comes before the tree runs: pages of its processes, which are kept, and all those of its shared objects, which are made
/// before and filled as they come.
#[derive(Debug)]
pub struct Eager {
    objects: shared::Objects,
    pages: BTreeMap<u32, Vec<EagerPage>>,
    count: u64,
}

impl Eager {
    /// Nothing yet, for `tree`, which is valid.
    ///
    /// # Errors
    /// As [`shared::Objects::create`].
    pub fn new(tree: &Tree) -> Result<Self> {
        Ok(Self {
            objects: shared::Objects::create(tree)?,
            pages: BTreeMap::new(),
            count: 0,
        })
    }

    /// Takes neighbouring pages of an object that begin at `start`.
    ///
    /// # Errors
    /// [`Error::Model`] if `object` is a shared one that has no such pages; [`Error::Object`] if it cannot be filled. Pages of a
    /// process are looked at when it is built.
    pub fn take(&mut self, object: u32, start: u64, bytes: &bytes::Bytes) -> Result<()> {
        self.count += (bytes.len() / PAGE_LEN) as u64;
        if self.objects.has(object) {
            return self.objects.write(object, start, bytes);
        }
        let pages = self.pages.entry(object).or_default();
        for (index, address) in (start..).step_by(PAGE_LEN).enumerate() {
            let at = index * PAGE_LEN;
            if at == bytes.len() {
                break;
            }
            pages.push(EagerPage {
                address,
                content: bytes.slice(at..at + PAGE_LEN),
            });
        }
        Ok(())
    }

    /// How many pages have come.
    pub fn page_count(&self) -> u64 {
        self.count
    }
}

/// Rebuilt memory, registered with the run userfaultfd: that of one process, or of several, whose threads all stand stopped with
/// their final registers.
#[derive(Debug)]
pub struct Rebuilt {
    /// Whose pages these are on the source, or in an image.
    pub object: u32,
    /// The processes that have it: its owner first.
    pub pids: Vec<i32>,
    /// The run userfaultfd (events on, kernel-mode faults taken). Nothing was read from it yet.
    pub uffd: Uffd,
    /// Ranges whose pages are fetched on demand, ascending.
    pub lazy: Vec<PageRange>,
    /// Pages inside `lazy` that are there already.
    pub resident: Vec<u64>,
    /// How many of these hold only zeros, which the source does not count as pages.
    pub zeros: usize,
    /// Ranges with MADV_WIPEONFORK.
    pub wipe_on_fork: Vec<PageRange>,
}

impl Rebuilt {
    /// Pages that came before it runs.
    pub fn page_count(&self) -> u64 {
        (self.resident.len() - self.zeros) as u64
    }
}

/// Calls made in one thread by the agent, collected into batches, each with the words for its failure.
pub(crate) struct Work<'w, 'i> {
    injection: &'w mut Injection<'i>,
    tid: i32,
    batch: Batch,
    named: Vec<(String, &'static str, Outcome)>,
    scratch_used: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Outcome {
    MustWork,
    /// The call must return this value.
    Exactly(u64),
    Ignored,
}

/// Operations that one object may add between two calls of [`Work::room`].
const GROUP_OPS_MAX: usize = 16;
/// Scratch bytes that one object may use between two calls of [`Work::room`]: two paths and some structures.
const GROUP_SCRATCH_MAX: usize = 10 * 1024;

impl<'w, 'i> Work<'w, 'i> {
    pub(crate) fn new(injection: &'w mut Injection<'i>, tid: i32) -> Self {
        Self {
            injection,
            tid,
            batch: Batch::new(),
            named: Vec::new(),
            scratch_used: 0,
        }
    }

    /// Makes sure that one object's calls fit into the batch at hand; runs what is collected if they would not.
    /// [`Slot`]s from before are then void.
    pub(crate) fn room(&mut self) -> Result<()> {
        let scratch_len = self.injection.scratch(self.tid).len();
        if self.batch.len() + GROUP_OPS_MAX > Batch::LIMIT
            || self.scratch_used + GROUP_SCRATCH_MAX > scratch_len
        {
            self.run()?;
        }
        Ok(())
    }

    /// Puts `bytes` where the process can read them; valid until the batch has run.
    pub(crate) fn bytes(&mut self, bytes: &[u8]) -> Result<u64> {
        let tid = self.tid;
        let start = self.scratch_used.next_multiple_of(16);
        let end = start + bytes.len();
        let scratch = self.injection.scratch(tid);
        let Some(place) = scratch.get_mut(start..end) else {
            return Err(Error::Mismatch {
                object: format!("thread {tid}"),
                what: format!(
                    "{} bytes of arguments do not fit the agent's scratch memory",
                    bytes.len()
                ),
            });
        };
        place.copy_from_slice(bytes);
        self.scratch_used = end;
        Ok(self.injection.scratch_address(tid) + start as u64)
    }

    /// The same, with a NUL behind.
    pub(crate) fn text(&mut self, text: &str) -> Result<u64> {
        let mut bytes = text.as_bytes().to_vec();
        bytes.push(0);
        self.bytes(&bytes)
    }

    /// Adds a call that must succeed.
    pub(crate) fn call(
        &mut self,
        object: impl Into<String>,
        call: &'static str,
        nr: i64,
        args: &[Arg],
    ) -> Slot {
        self.add(object.into(), call, Outcome::MustWork, nr, args)
    }

    /// Adds a call that must return `value`.
    pub(crate) fn exactly(
        &mut self,
        value: u64,
        object: impl Into<String>,
        call: &'static str,
        nr: i64,
        args: &[Arg],
    ) -> Slot {
        self.add(object.into(), call, Outcome::Exactly(value), nr, args)
    }

    /// Adds a call whose failure is of no account.
    pub(crate) fn ignored(&mut self, call: &'static str, nr: i64, args: &[Arg]) -> Slot {
        self.add(String::new(), call, Outcome::Ignored, nr, args)
    }

    fn add(
        &mut self,
        object: String,
        call: &'static str,
        outcome: Outcome,
        nr: i64,
        args: &[Arg],
    ) -> Slot {
        self.named.push((object, call, outcome));
        self.batch.call(nr, args)
    }

    /// Runs what is collected. The results of the calls, in order.
    pub(crate) fn run(&mut self) -> Result<Vec<u64>> {
        let batch = std::mem::replace(&mut self.batch, Batch::new());
        let named = std::mem::take(&mut self.named);
        self.scratch_used = 0;
        if batch.is_empty() {
            return Ok(Vec::new());
        }
        let results = self.injection.run(self.tid, &batch)?;
        let mut values = Vec::with_capacity(results.len());
        for (result, (object, call, outcome)) in results.into_iter().zip(named) {
            match (result, outcome) {
                (Ok(value), Outcome::Exactly(wanted)) if value != wanted => {
                    return Err(Error::Mismatch {
                        object,
                        what: format!("{call} gave {value:#x} instead of {wanted:#x}"),
                    });
                }
                (Ok(value), _) => values.push(value),
                (Err(_), Outcome::Ignored) => values.push(u64::MAX),
                (Err(errno), _) => return Err(Error::object(object, call, errno)),
            }
        }
        Ok(values)
    }

    pub(crate) fn injection(&mut self) -> &mut Injection<'i> {
        self.injection
    }
}

/// Rebuilds `tree` in the husk that `family` consists of, frozen, and in those it makes, and leaves all stopped, ready for their
/// first instruction. The memory that is returned is in the order of the tree, each once; the files that were made go again unless
/// they are kept; the locks are those that somebody else had, perhaps the source.
///
/// `clock` tells the tree's time at this moment: timers lose what has passed since the capture.
/// On `Err` the husks are of no further use: kill them.
pub fn rebuild(
    family: &mut Family,
    tree: &Tree,
    eager: Eager,
    clock: impl Fn() -> pageferry_tracee::Result<Clocks>,
) -> Result<(Vec<Rebuilt>, shared::NewFiles, Vec<locks::Waiting>)> {
    tree.validate()?;
    let root = tree
        .processes
        .first()
        .ok_or_else(|| model::Invalid::new("the tree", "has no process"))?;
    if family.pids() != [root.pid] {
        return Err(Error::Mismatch {
            object: format!("pid {}", root.pid),
            what: format!("the prepared processes are {:?}", family.pids()),
        });
    }
    relations::make(family, tree)?;

    let Eager {
        objects, mut pages, ..
    } = eager;
    let mut names = Names::default();
    let mut files = files::Files::new(tree, objects, &mut names)?;
    let passed = || Ok(timers::since_capture(tree, clock()?));
    sockets::unix::make(family, tree, &mut names, &mut files, passed)?;
    let mut rebuilt = Vec::with_capacity(tree.processes.len());
    // Where in that the memory of each owner is.
    let mut homes: BTreeMap<i32, usize> = BTreeMap::new();
    for (object, process) in (1..).zip(&tree.processes) {
        let eager = if process.memory_of == 0 {
            pages.remove(&object).unwrap_or_default()
        } else {
            family.move_in(process.pid, process.memory_of)?;
            Vec::new()
        };
        let member = family.member(process.pid)?;
        let work = (object, process, eager.as_slice());
        match rebuild_process(member, work, tree, &mut files, &clock)? {
            Some(memory) => {
                homes.insert(process.pid, rebuilt.len());
                rebuilt.push(memory);
            }
            None => {
                let home = homes.get(&process.memory_of);
                if let Some(home) = home.and_then(|&home| rebuilt.get_mut(home)) {
                    home.pids.push(process.pid);
                }
            }
        }
    }
    files.locks.rebuild_last(family, tree)?;
    let waiting = files.locks.into_waiting();
    let mut new_files = files.objects.finish()?;
    new_files.names = names;
    match pages.keys().next() {
        None => Ok((rebuilt, new_files, waiting)),
        Some(object) => Err(model::Invalid::new(
            format!("object {object}"),
            "has pages that came with the state, and is not in the tree",
        )
        .into()),
    }
}

/// What a husk becomes: the number of its memory, the process, and the pages of that memory that are there already.
type Becoming<'a> = (u32, &'a Process, &'a [EagerPage]);

/// Gives the memory if it is the process' own.
fn rebuild_process(
    husk: &mut Tracee,
    becoming: Becoming<'_>,
    tree: &Tree,
    files: &mut files::Files,
    clock: &impl Fn() -> pageferry_tracee::Result<Clocks>,
) -> Result<Option<Rebuilt>> {
    let (_, process, _) = becoming;
    let pid = process.pid;
    let space = tree
        .space_of(process)
        .ok_or_else(|| model::Invalid::new("the process", "has no memory"))?;
    let hole = memory::hole_for_agent(
        space,
        &pageferry_tracee::procfs::maps(pid)?,
        process.threads.len(),
    )?;
    let mut injection = husk.plant_with_room(Some(hole), process.threads.len())?;
    let built = build(&mut injection, becoming, space, tree, files, clock);
    let (rebuilt, starts) = match built {
        Ok(built) => built,
        Err(error) => {
            // A half-made process is of no use, and curing one whose stack and text are gone would only wait for it. It dies
            // first, so that the guard finds nothing to cure.
            let _ = pageferry_tracee::process::kill(pid, libc::SIGKILL);
            return Err(error);
        }
    };
    injection.finish(&starts)?;
    Ok(rebuilt)
}

/// Everything between plant and finish. `space` may be another's: that has been made then.
fn build(
    injection: &mut Injection<'_>,
    becoming: Becoming<'_>,
    space: &Space,
    tree: &Tree,
    files: &mut files::Files,
    clock: &impl Fn() -> pageferry_tracee::Result<Clocks>,
) -> Result<(Option<Rebuilt>, Vec<ThreadStart>)> {
    let (_, process, _) = becoming;
    let pid = process.pid;
    let agent = injection.mapping();
    let is_owner = process.memory_of == 0;
    if is_owner {
        memory::clear(injection, pid)?;
        memory::map_vdso(injection, pid, space)?;
    }
    task::limits_first(injection, process, tree)?;
    task::take_ids(injection, process)?;

    let mut handed = files::Handover::new(process, tree);
    handed.begin(injection)?;
    let rebuilt = match is_owner {
        true => Some(make_memory(injection, becoming, space, files, &mut handed)?),
        false => None,
    };

    let passed = || Ok(timers::since_capture(tree, clock()?));
    files.rebuild(injection, process, tree, &mut handed, passed)?;

    for thread in process.threads.iter().skip(1) {
        injection.spawn_thread(thread.tid)?;
    }
    signals::rebuild_actions(injection, process)?;
    task::rebuild_process(injection, process)?;
    relations::forget_ends(injection, process, tree)?;
    signals::rebuild_pending(injection, process)?;
    handed.end(injection)?;
    files.locks.rebuild(injection, process, tree)?;
    timers::rebuild(injection, process, tree, passed)?;
    task::limits_last(injection, process)?;
    task::rebuild_threads(injection, process)?;

    memory::verify(pid, space, &agent)?;
    Ok((rebuilt, task::starts(process)?))
}

/// Makes the mappings of a husk that has been emptied, and the pages that must be there at the first instruction.
fn make_memory(
    injection: &mut Injection<'_>,
    (object, process, eager): Becoming<'_>,
    space: &Space,
    files: &files::Files,
    handed: &mut files::Handover,
) -> Result<Rebuilt> {
    let pid = process.pid;
    memory::map(injection, pid, space, handed, &files.objects)?;
    memory::set_mm(injection, pid, space, handed)?;
    let uffd = memory::register(injection, pid, space)?;
    let (resident, zeros) = memory::install(pid, space, &process.first_touch, &uffd, eager)?;
    let (mut lazy, mut wipe_on_fork) = (Vec::new(), Vec::new());
    for mapping in space.mappings.iter().filter(|m| m.kind() == Kind::Anon) {
        let range = PageRange {
            start: mapping.start,
            end: mapping.end,
        };
        lazy.push(range);
        if mapping
            .advice
            .contains(&(libc::MADV_WIPEONFORK.unsigned_abs()))
        {
            wipe_on_fork.push(range);
        }
    }
    Ok(Rebuilt {
        object,
        pids: vec![pid],
        uffd,
        lazy,
        resident,
        zeros,
        wipe_on_fork,
    })
}

/// Object names of the mappings, as operators read them.
pub(crate) fn mapping_name(start: u64, end: u64) -> String {
    format!("mapping {start:x}-{end:x}")
}

/// Sorts eager pages into runs of consecutive addresses, so that each run is one call.
pub(crate) fn runs(pages: &[EagerPage]) -> Vec<(u64, Vec<u8>)> {
    let mut sorted: BTreeMap<u64, &EagerPage> = BTreeMap::new();
    for page in pages {
        sorted.insert(page.address, page);
    }
    let mut runs: Vec<(u64, Vec<u8>)> = Vec::new();
    for (address, page) in sorted {
        match runs.last_mut() {
            Some((start, bytes)) if *start + bytes.len() as u64 == address => {
                bytes.extend_from_slice(&page.content)
            }
            _ => runs.push((address, page.content.to_vec())),
        }
    }
    debug_assert!(
        runs.iter()
            .all(|(start, bytes)| start % PAGE_SIZE == 0 && bytes.len() as u64 % PAGE_SIZE == 0)
    );
    runs
}
