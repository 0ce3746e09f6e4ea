//! Processes and their threads.

#![allow(
    missing_docs,
    reason = "generated fields are documented in image/proto/task.proto"
)]

use std::collections::{BTreeMap, BTreeSet};

use super::files::{Descriptor, File, file};
use super::locks::Lock;
use super::memory::Space;
use super::relations::{Making, Member, Obstacle, Zombie};
use super::shared::Shared;
use super::signals::{Action, Pending};
use super::timers::{Itimer, Posix};
use super::{Invalid, absolute, at_most, ensure, limits};
use crate::page::PAGE_SIZE;

include!("generated/pageferry.task.rs");

/// SCHED_OTHER, FIFO, RR, BATCH, IDLE, DEADLINE, EXT.
const POLICIES: [u32; 7] = [0, 1, 2, 3, 5, 6, 7];
/// Bytes of `struct robust_list_head`.
const ROBUST_LIST_HEAD_LEN: u64 = 24;
/// Longest thread name: 15 bytes, each of which may have become a replacement character of three.
const COMM_LEN: usize = 45;
/// Bits of `membarrier(2)` registrations: global, private expedited, its sync-core and rseq forms.
const MEMBARRIERS: u32 = 1 << 2 | 1 << 4 | 1 << 6 | 1 << 8;
const SIGCHLD: u32 = 17;

impl Scheduling {
    fn validate(&self, object: &str) -> Result<(), Invalid> {
        let object = || format!("scheduling of {object}");
        ensure(
            POLICIES.contains(&self.policy),
            object,
            "has an unknown policy",
        )?;
        ensure(
            (-20..=19).contains(&self.nice) && self.priority <= 99,
            object,
            "has an impossible priority",
        )?;
        let has_cpu = self.affinity.iter().any(|&byte| byte != 0)
            && self.affinity.len() <= limits::AFFINITY_LEN;
        ensure(
            self.affinity_default || has_cpu,
            object,
            "has no CPU to run on",
        )
    }
}

impl Thread {
    /// # Errors
    /// The broken rule.
    pub fn validate(&self) -> Result<(), Invalid> {
        let name = format!("thread {}", self.tid);
        let object = || name.clone();
        ensure(
            self.tid > 1,
            object,
            "has the number of no thread that is carried",
        )?;
        ensure(
            self.comm.len() <= COMM_LEN && !self.comm.contains('\0'),
            object,
            "has an impossible name",
        )?;
        ensure(
            self.registers.len() == limits::REGISTERS_LEN,
            object,
            "has not the registers of x86-64",
        )?;
        let xsave = limits::XSAVE_LEN_MIN..=limits::XSAVE_LEN_MAX;
        ensure(
            xsave.contains(&self.xsave.len()),
            object,
            "has an xsave area of an impossible length",
        )?;
        Pending::validate_all(&self.pending, &name)?;
        if let Some(stack) = &self.altstack {
            stack.validate()?;
        }
        ensure(
            self.robust_list == 0 || self.robust_list_len == ROBUST_LIST_HEAD_LEN,
            object,
            "has a robust list of an unknown form",
        )?;
        for address in [
            self.robust_list,
            self.clear_child_tid,
            self.rseq.map_or(0, |rseq| rseq.address),
        ] {
            ensure(
                address < limits::ADDRESS_END,
                object,
                "has an address outside of user memory",
            )?;
        }
        ensure(
            self.parent_death_signal <= limits::SIGNAL,
            object,
            "has an impossible parent-death signal",
        )?;
        match &self.credentials {
            None => return Err(Invalid::new(name, "has no credentials")),
            Some(credentials) => at_most(credentials.groups.len(), limits::GROUPS, || {
                format!("group list of {name}")
            })?,
        }
        match &self.scheduling {
            None => Err(Invalid::new(name, "has no scheduling attributes")),
            Some(scheduling) => scheduling.validate(&name),
        }
    }
}

impl Process {
    /// Rules of one process, without its descriptors, which are rules of the tree.
    ///
    /// # Errors
    /// The broken rule.
    pub fn validate(&self) -> Result<(), Invalid> {
        let object = || format!("process {}", self.pid);
        ensure(self.pid != 1, object, "is the first of its pid namespace")?;
        ensure(self.pid > 0, object, "has the number of no process")?;
        ensure(
            self.ppid >= 0 && self.pgid >= 0 && self.sid >= 0,
            object,
            "has an impossible parent, group or session",
        )?;
        at_most(self.threads.len(), limits::THREADS, || {
            format!("thread list of process {}", self.pid)
        })?;
        ensure(!self.threads.is_empty(), object, "has no thread")?;
        ensure(
            self.threads
                .first()
                .is_some_and(|leader| leader.tid == self.pid),
            object,
            "has not its leader first",
        )?;
        self.threads.iter().try_for_each(Thread::validate)?;
        let mut tids: Vec<i32> = self.threads.iter().map(|thread| thread.tid).collect();
        tids.sort_unstable();
        ensure(
            tids.windows(2).all(|pair| pair[0] < pair[1]),
            object,
            "has a thread twice",
        )?;
        match &self.space {
            None if self.memory_of == 0 => {
                return Err(Invalid::new(object(), "has no address space"));
            }
            None => {}
            Some(_) if self.memory_of != 0 => {
                return Err(Invalid::new(object(), "shares memory and has its own"));
            }
            Some(space) => space.validate()?,
        }
        ensure(
            self.memory_of == 0 || (self.first_touch.is_empty() && self.membarrier == 0),
            object,
            "shares memory and tells of it itself",
        )?;
        at_most(self.first_touch.len(), limits::FIRST_TOUCH, || {
            format!("list of first pages of process {}", self.pid)
        })?;
        for range in &self.first_touch {
            let object = || format!("first pages {:x}-{:x}", range.start, range.end);
            super::memory::pages(range.start, range.end, object)?;
        }
        super::ascending(
            self.first_touch
                .iter()
                .flat_map(|range| [(range.start, 0), (range.end - 1, 1)]),
            "first pages",
        )?;
        Action::validate_all(&self.actions)?;
        Pending::validate_all(&self.pending, &object())?;
        Itimer::validate_all(&self.itimers)?;
        Posix::validate_all(&self.posix_timers)?;
        let are_told = self
            .posix_timers
            .iter()
            .all(|timer| timer.tid == 0 || tids.binary_search(&timer.tid).is_ok());
        ensure(are_told, object, "has a timer for a thread of another")?;
        absolute(&self.cwd, || format!("working directory {}", self.cwd))?;
        ensure(self.umask <= 0o777, object, "has an impossible umask")?;
        for limit in &self.limits {
            let object = || format!("limit {}", limit.resource);
            ensure(limit.resource < limits::RESOURCES, object, "does not exist")?;
            ensure(limit.soft <= limit.hard, object, "is above its own maximum")?;
        }
        super::ascending(self.limits.iter().map(|limit| limit.resource), "limits")?;
        ensure(
            (-1000..=1000).contains(&self.oom_score_adj),
            object,
            "has an impossible oom_score_adj",
        )?;
        ensure(self.dumpable <= 2, object, "is dumpable in no known way")?;
        ensure(
            self.end_signal() <= limits::SIGNAL,
            object,
            "tells its end by an impossible signal",
        )?;
        ensure(
            self.membarrier & !MEMBARRIERS == 0,
            object,
            "has unknown membarrier registrations",
        )
    }
}

impl Host {
    /// # Errors
    /// The broken rule.
    pub fn validate(&self) -> Result<(), Invalid> {
        let object = || "host".to_owned();
        let rule = "has pages of another size: only kernels with 4 KiB pages can meet";
        ensure(u64::from(self.page_size) == PAGE_SIZE, object, rule)?;
        at_most(self.cpu_flags.len(), limits::CPU_FLAGS, || {
            "list of processor flags".into()
        })?;
        let name = self.cpu_flags.iter().chain([&self.kernel_release]);
        let is_short = name
            .map(String::len)
            .all(|len| len <= limits::HOST_NAME_LEN);
        ensure(is_short, object, "has a name that is too long")?;
        let vdso = self.vdso.len();
        ensure(
            vdso <= limits::VDSO_LEN,
            object,
            "has a vdso that is too long",
        )
    }
}

impl Tree {
    /// Everything that must hold before anything is made from a tree that a peer or a file gave.
    ///
    /// # Errors
    /// The first broken rule.
    pub fn validate(&self) -> Result<(), Invalid> {
        let Some(root) = self.processes.first() else {
            return Err(Invalid::new("tree", "has no process"));
        };
        self.host.iter().try_for_each(Host::validate)?;
        at_most(self.processes.len(), limits::PROCESSES, || {
            "process list".into()
        })?;
        self.processes.iter().try_for_each(Process::validate)?;
        at_most(self.zombies.len(), limits::PROCESSES, || {
            "list of ended processes".into()
        })?;
        self.zombies.iter().try_for_each(Zombie::validate)?;
        let mut seen = BTreeSet::new();
        for member in self.members() {
            let object = || format!("process {}", member.pid);
            // Only parents that have been passed are in the set: that also rules out circles.
            let has_parent = member.pid == root.pid || seen.contains(&member.ppid);
            ensure(seen.insert(member.pid), object, "is in the tree twice")?;
            ensure(
                has_parent,
                object,
                "has a parent that does not stand before it",
            )?;
            ensure(
                member.sid != member.pid || member.pgid == member.pid,
                object,
                "leads a session and no group",
            )?;
        }
        let ended: BTreeSet<i32> = self.zombies.iter().map(|zombie| zombie.pid).collect();
        for zombie in &self.zombies {
            ensure(
                !ended.contains(&zombie.ppid),
                || format!("process {}", zombie.pid),
                "is the child of one that has ended",
            )?;
        }
        ensure(
            !seen.contains(&root.ppid) && (root.sid == root.pid || !seen.contains(&root.sid)),
            || format!("process {}", root.pid),
            "is the root, and has its parent or its session in the tree",
        )?;
        self.validate_sharing()?;
        let making = self.making().map_err(|obstacles| match obstacles.first() {
            Some(Obstacle::Session { pid, session }) => Invalid::new(
                format!("process {pid}"),
                format!("is in session {session}, into which there is no way"),
            ),
            Some(Obstacle::Group { pid, group }) => Invalid::new(
                format!("process {pid}"),
                format!("is in process group {group}, into which there is no way"),
            ),
            Some(Obstacle::Sharing { pid, other, .. }) => Invalid::new(
                format!("process {pid}"),
                format!("shares with process {other} what cannot come to it"),
            ),
            None => Invalid::new("tree", "cannot be made"),
        })?;
        let mut tids: Vec<i32> = self.processes.iter().flat_map(Process::tids).collect();
        tids.sort_unstable();
        let twice = tids.windows(2).find(|pair| pair[0] == pair[1]);
        if let Some(pair) = twice {
            return Err(Invalid::new(
                format!("thread {}", pair[0]),
                "is in two processes",
            ));
        }
        // Those of ended processes and of leaders that are gone must be free, too.
        let numbers = self.zombies.iter().map(|zombie| zombie.pid);
        for number in numbers.chain(making.helpers) {
            ensure(
                tids.binary_search(&number).is_err(),
                || format!("thread {number}"),
                "has the number of an ended process, a session or a group",
            )?;
        }
        let tables: Vec<_> = self
            .processes
            .iter()
            .map(|process| (process.pid, process.descriptors.as_slice()))
            .collect();
        File::validate_all(&self.files, &self.pipes, &tables)?;
        for file in &self.files {
            let Some(file::Kind::Socket(socket)) = &file.kind else {
                continue;
            };
            for sender in socket
                .attached
                .iter()
                .filter_map(|attached| attached.sender)
            {
                ensure(
                    seen.contains(&sender.pid),
                    || format!("open file {}", file.id),
                    "has a message from a process that is not in the tree",
                )?;
            }
        }
        let processes = self.processes.iter();
        let spaces: Vec<_> = processes
            .filter_map(|process| process.space.as_ref())
            .collect();
        Lock::validate_all(&self.locks, &self.files, &tables, &spaces)?;
        let mappings = spaces.iter().flat_map(|space| &space.mappings);
        Shared::validate_all(&self.shared, mappings, &self.files)
    }

    /// What is shared belongs to one that stands before, and is told of once.
    fn validate_sharing(&self) -> Result<(), Invalid> {
        let mut passed: BTreeMap<i32, &Process> = BTreeMap::new();
        for process in &self.processes {
            let object = || format!("process {}", process.pid);
            let table = passed.get(&process.table_of);
            ensure(
                process.table_of == 0 || table.is_some(),
                object,
                "shares the descriptors of none that stands before it",
            )?;
            ensure(
                table.is_none_or(|owner| owner.table_of == 0),
                object,
                "shares the descriptors of one that has none of its own",
            )?;
            ensure(
                table.is_none() || process.descriptors.is_empty(),
                object,
                "shares descriptors and lists its own",
            )?;
            let directory = passed.get(&process.directory_of);
            ensure(
                process.directory_of == 0 || directory.is_some(),
                object,
                "shares the directory of none that stands before it",
            )?;
            ensure(
                directory.is_none_or(|owner| owner.directory_of == 0),
                object,
                "shares the directory of one that has none of its own",
            )?;
            ensure(
                directory
                    .is_none_or(|owner| (&owner.cwd, owner.umask) == (&process.cwd, process.umask)),
                object,
                "shares a working directory and umask and has others",
            )?;
            let memory = passed.get(&process.memory_of);
            ensure(
                process.memory_of == 0 || memory.is_some(),
                object,
                "shares the memory of none that stands before it",
            )?;
            ensure(
                memory.is_none_or(|owner| owner.memory_of == 0),
                object,
                "shares the memory of one that has none of its own",
            )?;
            let actions = passed.get(&process.actions_of);
            ensure(
                process.actions_of == 0 || actions.is_some(),
                object,
                "shares the signal actions of none that stands before it",
            )?;
            ensure(
                actions.is_none_or(|owner| owner.actions_of == 0),
                object,
                "shares the signal actions of one that has none of its own",
            )?;
            ensure(
                actions.is_none_or(|owner| owner.home() == process.home()),
                object,
                "shares signal actions and not the memory they are in",
            )?;
            ensure(
                actions.is_none() || process.actions.is_empty(),
                object,
                "shares signal actions and lists its own",
            )?;
            passed.insert(process.pid, process);
        }
        Ok(())
    }

    /// The descriptors of `process`, which is of this tree: its own, or those it shares.
    pub fn descriptors_of<'a>(&'a self, process: &'a Process) -> &'a [Descriptor] {
        &self.owner(process, process.table_of).descriptors
    }

    /// The address space of `process`, which is of this tree: its own, or that which it shares. Every process of a valid tree has one.
    pub fn space_of<'a>(&'a self, process: &'a Process) -> Option<&'a Space> {
        self.owner(process, process.memory_of).space.as_ref()
    }

    /// The process with the number `owner`; `process` if there is none.
    fn owner<'a>(&'a self, process: &'a Process, owner: i32) -> &'a Process {
        let found = (owner != 0).then(|| self.processes.iter().find(|one| one.pid == owner));
        found.flatten().unwrap_or(process)
    }

    /// All processes as far as their relations go, ended ones last.
    pub fn members(&self) -> Vec<Member> {
        let running = self.processes.iter().map(|process| Member {
            pid: process.pid,
            ppid: process.ppid,
            pgid: process.pgid,
            sid: process.sid,
            table_of: process.table_of,
            directory_of: process.directory_of,
            memory_of: process.memory_of,
            actions_of: process.actions_of,
        });
        running
            .chain(self.zombies.iter().map(Member::from))
            .collect()
    }

    /// How its processes are made again.
    ///
    /// # Errors
    /// As [`Making::of`].
    pub fn making(&self) -> Result<Making, Vec<Obstacle>> {
        Making::of(&self.members())
    }

    /// Every number that has to be free where it is to run: of threads, of ended processes, and of leaders that are gone.
    pub fn numbers(&self) -> Vec<i32> {
        let helpers = self.making().map_or(Vec::new(), |making| making.helpers);
        let threads = self.processes.iter().flat_map(Process::tids);
        let ended = self.zombies.iter().map(|zombie| zombie.pid);
        threads.chain(ended).chain(helpers).collect()
    }
}

impl Process {
    /// The ids of its threads.
    pub fn tids(&self) -> impl Iterator<Item = i32> + '_ {
        self.threads.iter().map(|thread| thread.tid)
    }

    /// The process whose memory it is in: itself, or one before it.
    pub fn home(&self) -> i32 {
        match self.memory_of {
            0 => self.pid,
            owner => owner,
        }
    }

    /// The signal that its parent gets when it ends; 0: none.
    pub fn end_signal(&self) -> u32 {
        self.exit_signal.unwrap_or(SIGCHLD)
    }
}

#[cfg(test)]
mod tests {
    use super::super::memory::{FileIdentity, Space};
    use super::*;

    fn thread(tid: i32) -> Thread {
        Thread {
            tid,
            comm: "a".into(),
            registers: vec![0; 216],
            xsave: vec![0; 2696],
            credentials: Some(Credentials::default()),
            scheduling: Some(Scheduling {
                affinity: vec![1],
                ..Scheduling::default()
            }),
            ..Thread::default()
        }
    }

    fn process() -> Process {
        let exe = Some(FileIdentity {
            path: "/bin/true".into(),
            ..FileIdentity::default()
        });
        Process {
            pid: 7,
            threads: vec![thread(7), thread(3)],
            space: Some(Space {
                exe,
                ..Space::default()
            }),
            cwd: "/".into(),
            limits: vec![Limit {
                resource: 7,
                soft: 1,
                hard: 2,
            }],
            ..Process::default()
        }
    }

    #[test]
    fn threads_follow_their_rules() {
        assert_eq!(thread(2).validate(), Ok(()));
        for (why, bad) in [
            ("number", thread(0)),
            (
                "registers",
                Thread {
                    registers: vec![0; 8],
                    ..thread(2)
                },
            ),
            (
                "xsave",
                Thread {
                    xsave: vec![0; 100],
                    ..thread(2)
                },
            ),
            (
                "credentials",
                Thread {
                    credentials: None,
                    ..thread(2)
                },
            ),
            (
                "scheduling",
                Thread {
                    scheduling: None,
                    ..thread(2)
                },
            ),
            (
                "no CPU",
                Thread {
                    scheduling: Some(Scheduling::default()),
                    ..thread(2)
                },
            ),
            (
                "robust list",
                Thread {
                    robust_list: 0x1000,
                    robust_list_len: 8,
                    ..thread(2)
                },
            ),
            (
                "kernel address",
                Thread {
                    clear_child_tid: u64::MAX,
                    ..thread(2)
                },
            ),
            (
                "signal",
                Thread {
                    parent_death_signal: 65,
                    ..thread(2)
                },
            ),
        ] {
            assert!(bad.validate().is_err(), "{why}");
        }
    }

    #[test]
    fn processes_follow_their_rules() {
        assert_eq!(process().validate(), Ok(()));
        for (why, bad) in [
            (
                "no leader",
                Process {
                    threads: vec![thread(3), thread(7)],
                    ..process()
                },
            ),
            (
                "no threads",
                Process {
                    threads: Vec::new(),
                    ..process()
                },
            ),
            (
                "a thread twice",
                Process {
                    threads: vec![thread(7), thread(3), thread(3)],
                    ..process()
                },
            ),
            (
                "no space",
                Process {
                    space: None,
                    ..process()
                },
            ),
            (
                "relative",
                Process {
                    cwd: "x".into(),
                    ..process()
                },
            ),
            (
                "umask",
                Process {
                    umask: 0o1000,
                    ..process()
                },
            ),
            (
                "limit",
                Process {
                    limits: vec![Limit {
                        resource: 7,
                        soft: 3,
                        hard: 2,
                    }],
                    ..process()
                },
            ),
            (
                "no such limit",
                Process {
                    limits: vec![Limit {
                        resource: 16,
                        soft: 1,
                        hard: 2,
                    }],
                    ..process()
                },
            ),
            (
                "oom",
                Process {
                    oom_score_adj: 1001,
                    ..process()
                },
            ),
            (
                "membarrier",
                Process {
                    membarrier: 1,
                    ..process()
                },
            ),
            (
                "timer",
                Process {
                    posix_timers: vec![Posix {
                        notify: 4,
                        tid: 99,
                        signo: 1,
                        ..Posix::default()
                    }],
                    ..process()
                },
            ),
        ] {
            assert!(bad.validate().is_err(), "{why}");
        }
    }

    /// A process of one thread: its pid, parent, group and session.
    fn member((pid, ppid, pgid, sid): (i32, i32, i32, i32)) -> Process {
        Process {
            pid,
            ppid,
            pgid,
            sid,
            threads: vec![thread(pid)],
            ..process()
        }
    }

    fn tree(members: &[(i32, i32, i32, i32)]) -> Tree {
        Tree {
            processes: members.iter().copied().map(member).collect(),
            ..Tree::default()
        }
    }

    #[test]
    fn a_tree_has_a_root() {
        assert!(Tree::default().validate().is_err());
        assert_eq!(tree(&[(7, 1, 5, 4)]).validate(), Ok(()));
        assert_eq!(
            tree(&[(7, 0, 7, 7)]).validate(),
            Ok(()),
            "its parent is outside of the pid namespace"
        );
        for (why, bad) in [
            ("a child's child", vec![(7, 8, 7, 7), (8, 7, 7, 7)]),
            ("a child's session", vec![(7, 1, 7, 8), (8, 7, 8, 8)]),
            ("its own child", vec![(7, 7, 7, 7)]),
        ] {
            assert!(tree(&bad).validate().is_err(), "{why}");
        }
    }

    #[test]
    fn parents_stand_before_their_children() {
        let good = [
            (7, 1, 7, 7),
            (9, 7, 7, 7),
            (8, 9, 8, 8),
            (12, 8, 8, 8),
            (10, 9, 9, 7),
        ];
        assert_eq!(tree(&good).validate(), Ok(()));
        for (why, bad) in [
            (
                "a parent later",
                vec![(7, 1, 7, 7), (8, 9, 7, 7), (9, 7, 7, 7)],
            ),
            ("a parent elsewhere", vec![(7, 1, 7, 7), (8, 2, 7, 7)]),
            (
                "in a circle",
                vec![(7, 1, 7, 7), (8, 9, 7, 7), (9, 8, 7, 7)],
            ),
            ("twice", vec![(7, 1, 7, 7), (8, 7, 7, 7), (8, 7, 7, 7)]),
        ] {
            assert!(tree(&bad).validate().is_err(), "{why}");
        }
        let mut shared = tree(&[(7, 1, 7, 7), (9, 7, 7, 7)]);
        shared.processes[1].threads.push(thread(11));
        assert_eq!(shared.validate(), Ok(()));
        shared.processes[0].threads.push(thread(11));
        assert!(shared.validate().is_err(), "a thread of two processes");
    }

    #[test]
    fn sessions_and_groups_can_be_made_again() {
        for (why, good) in [
            (
                "as a shell starts a pipeline, in a session and a group of others",
                vec![(7, 1, 5, 4), (8, 7, 5, 4), (9, 7, 9, 4), (10, 7, 9, 4)],
            ),
            ("a dead leader of a group", vec![(7, 1, 7, 7), (8, 7, 6, 7)]),
            (
                "a dead leader of a session",
                vec![(7, 1, 7, 7), (8, 7, 8, 6)],
            ),
        ] {
            assert_eq!(tree(&good).validate(), Ok(()), "{why}");
        }
        for (why, bad) in [
            ("a group of init", vec![(7, 1, 7, 7), (8, 7, 1, 7)]),
            ("a session of nobody", vec![(7, 1, 7, 7), (8, 7, 8, 0)]),
            (
                "a group of another session",
                vec![(7, 1, 7, 7), (8, 7, 8, 8), (9, 7, 8, 7)],
            ),
            (
                "a leader in another's group",
                vec![(7, 1, 7, 7), (8, 7, 7, 8)],
            ),
        ] {
            assert!(tree(&bad).validate().is_err(), "{why}");
        }
        let mut taken = tree(&[(7, 1, 7, 7), (8, 7, 6, 7)]);
        assert_eq!(taken.numbers(), [7, 8, 6]);
        taken.processes[0].threads.push(thread(6));
        assert!(taken.validate().is_err(), "a group with a thread's number");
    }

    #[test]
    fn ended_processes_are_children() {
        let with = |zombie: Zombie| Tree {
            zombies: vec![zombie],
            ..tree(&[(7, 1, 7, 7), (8, 7, 7, 7)])
        };
        let good = Zombie {
            pid: 9,
            ppid: 8,
            pgid: 9,
            sid: 7,
            status: 3 << 8,
            comm: "a".into(),
            exit_signal: 17,
            ..Zombie::default()
        };
        assert_eq!(with(good.clone()).validate(), Ok(()));
        assert_eq!(with(good.clone()).numbers(), [7, 8, 9]);
        for status in [0, 0xff00, 9, 6, 0x80 | 6, 64] {
            let zombie = Zombie {
                status,
                ..good.clone()
            };
            assert_eq!(with(zombie).validate(), Ok(()), "{status:#x}");
        }
        for (why, bad) in [
            (
                "of nobody",
                Zombie {
                    ppid: 5,
                    ..good.clone()
                },
            ),
            (
                "of itself",
                Zombie {
                    ppid: 9,
                    ..good.clone()
                },
            ),
            (
                "twice",
                Zombie {
                    pid: 8,
                    ..good.clone()
                },
            ),
            (
                "first of its namespace",
                Zombie {
                    pid: 1,
                    ..good.clone()
                },
            ),
            (
                "stopped",
                Zombie {
                    status: 0x137f,
                    ..good.clone()
                },
            ),
            (
                "of a harmless signal",
                Zombie {
                    status: 17,
                    ..good.clone()
                },
            ),
            (
                "of a signal and by itself",
                Zombie {
                    status: 0x109,
                    ..good.clone()
                },
            ),
            (
                "a core dump of nothing",
                Zombie {
                    status: 0x80,
                    ..good.clone()
                },
            ),
            (
                "out of range",
                Zombie {
                    status: 0x1_0000,
                    ..good.clone()
                },
            ),
            (
                "no signal",
                Zombie {
                    exit_signal: 65,
                    ..good.clone()
                },
            ),
            (
                "a long name",
                Zombie {
                    comm: "a".repeat(46),
                    ..good.clone()
                },
            ),
        ] {
            assert!(with(bad).validate().is_err(), "{why}");
        }
        let mut child = with(good.clone());
        child.zombies.push(Zombie {
            pid: 10,
            ppid: 9,
            ..good.clone()
        });
        assert!(child.validate().is_err(), "a child of one that has ended");
        let mut shared = with(good);
        shared.processes[0].threads.push(thread(9));
        assert!(shared.validate().is_err(), "the number of a thread");
    }
}
