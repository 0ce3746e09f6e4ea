//! Every tree that a kernel could bring about is made again by a kernel that allows only what the real one does.

use proptest::prelude::*;

use super::*;

const ROOT: i32 = 100;
/// The subreaper above the root.
const CRADLE: i32 = 2;

#[derive(Debug, Clone, Copy)]
struct Process {
    ppid: i32,
    pgid: i32,
    sid: i32,
    is_zombie: bool,
    is_subreaper: bool,
}

/// The rules of fork(2), setsid(2), setpgid(2), exit(2) and wait(2).
#[derive(Debug, Clone)]
struct Kernel {
    processes: BTreeMap<i32, Process>,
    /// In the order of birth.
    order: Vec<i32>,
    next: i32,
}

impl Kernel {
    fn new(pgid: i32, sid: i32) -> Self {
        let root = Process {
            ppid: CRADLE,
            pgid,
            sid,
            is_zombie: false,
            is_subreaper: false,
        };
        Self {
            processes: BTreeMap::from([(ROOT, root)]),
            order: vec![ROOT],
            next: ROOT + 1,
        }
    }

    fn is_taken(&self, number: i32) -> bool {
        let mut all = self.processes.iter();
        all.any(|(&pid, one)| [pid, one.pgid, one.sid].contains(&number))
    }

    fn fork(&mut self, parent: i32, child: i32) {
        assert!(!self.is_taken(child), "{child} is taken");
        let maker = self.processes[&parent];
        assert!(!maker.is_zombie, "{parent} has ended");
        let made = Process {
            ppid: parent,
            is_subreaper: false,
            ..maker
        };
        self.processes.insert(child, made);
        self.order.push(child);
    }

    fn may_set_sid(&self, pid: i32) -> bool {
        self.processes.values().all(|one| one.pgid != pid)
    }

    fn set_sid(&mut self, pid: i32) {
        assert!(self.may_set_sid(pid), "{pid} leads a group");
        let process = self.processes.get_mut(&pid).expect("it is there");
        (process.sid, process.pgid) = (pid, pid);
    }

    fn may_set_pgid(&self, pid: i32, group: i32) -> bool {
        let session = self.processes[&pid].sid;
        let mut members = self.processes.values().filter(|one| one.pgid == group);
        session != pid && (group == pid || members.next().is_some_and(|one| one.sid == session))
    }

    fn set_pgid(&mut self, pid: i32, group: i32) {
        assert!(self.may_set_pgid(pid, group), "{pid} may not join {group}");
        self.processes.get_mut(&pid).expect("it is there").pgid = group;
    }

    /// Who gets the children of `pid`.
    fn reaper(&self, pid: i32) -> i32 {
        let mut above = self.processes[&pid].ppid;
        while let Some(process) = self.processes.get(&above) {
            if process.is_subreaper && !process.is_zombie {
                return above;
            }
            above = process.ppid;
        }
        CRADLE
    }

    fn exit(&mut self, pid: i32) {
        let reaper = self.reaper(pid);
        for process in self.processes.values_mut().filter(|one| one.ppid == pid) {
            process.ppid = reaper;
        }
        self.processes.get_mut(&pid).expect("it is there").is_zombie = true;
        self.processes
            .retain(|_, one| one.ppid != CRADLE || !one.is_zombie);
    }

    fn reap(&mut self, pid: i32) {
        assert!(self.processes[&pid].is_zombie, "{pid} runs");
        self.processes.remove(&pid);
    }

    /// Those in the tree, as a capture lists them.
    fn members(&self) -> Vec<Member> {
        let member = |pid: i32| {
            let one = self.processes[&pid];
            Member {
                pid,
                ppid: one.ppid,
                pgid: one.pgid,
                sid: one.sid,
                ..Member::default()
            }
        };
        let mut found = vec![member(ROOT)];
        let mut index = 0;
        while index < found.len() {
            let parent = found[index].pid;
            let children = self.order.iter().filter(|&pid| {
                let child = self.processes.get(pid);
                child.is_some_and(|one| one.ppid == parent && !one.is_zombie)
            });
            found.extend(children.map(|&pid| member(pid)));
            index += 1;
        }
        let running: BTreeSet<i32> = found.iter().map(|one| one.pid).collect();
        let ended = self.order.iter().filter(|&pid| {
            let child = self.processes.get(pid);
            child.is_some_and(|one| one.is_zombie && running.contains(&one.ppid))
        });
        found.extend(ended.map(|&pid| member(pid)));
        found
    }

    fn perform(&mut self, step: Step) {
        match step {
            Step::Bear { parent, child }
            | Step::Help {
                parent,
                helper: child,
            } => {
                self.fork(parent, child);
            }
            Step::Foster {
                parent,
                leader,
                child,
            } => {
                assert_eq!(self.processes[&leader].sid, leader, "it leads");
                let passing = self.next;
                self.next += 1;
                self.processes
                    .get_mut(&parent)
                    .expect("it is there")
                    .is_subreaper = true;
                self.fork(leader, passing);
                self.fork(passing, child);
                self.exit(passing);
                self.reap(passing);
                self.processes
                    .get_mut(&parent)
                    .expect("it is there")
                    .is_subreaper = false;
                assert_eq!(
                    self.processes[&child].ppid, parent,
                    "{child} was left to it"
                );
            }
            Step::LeadSession { pid } => self.set_sid(pid),
            Step::LeadGroup { pid } => self.set_pgid(pid, pid),
            Step::Join { pid, group } => self.set_pgid(pid, group),
            Step::Part { .. } => {}
            Step::Dismiss { parent, helper } => {
                assert_eq!(self.processes[&helper].ppid, parent);
                self.exit(helper);
                self.reap(helper);
            }
        }
    }
}

/// What a program may do to itself and its relatives; the numbers choose whom.
#[derive(Debug, Clone, Copy)]
enum Deed {
    Fork(usize),
    SetSid(usize),
    FoundGroup(usize),
    JoinGroup(usize, usize),
    Exit(usize),
    Reap(usize),
    BecomeSubreaper(usize),
}

fn deed() -> impl Strategy<Value = Deed> {
    let who = 0..64_usize;
    prop_oneof![
        5 => who.clone().prop_map(Deed::Fork),
        2 => who.clone().prop_map(Deed::SetSid),
        1 => who.clone().prop_map(Deed::FoundGroup),
        2 => (who.clone(), 0..64_usize).prop_map(|(one, other)| Deed::JoinGroup(one, other)),
        3 => who.clone().prop_map(Deed::Exit),
        1 => who.clone().prop_map(Deed::Reap),
        1 => who.prop_map(Deed::BecomeSubreaper),
    ]
}

fn live(kernel: &mut Kernel, deeds: &[Deed]) {
    for &deed in deeds {
        let all: Vec<i32> = kernel.processes.keys().copied().collect();
        let runs = |pid: &&i32| !kernel.processes[*pid].is_zombie;
        let running: Vec<i32> = all.iter().filter(runs).copied().collect();
        let pick = |number: usize| running[number % running.len()];
        match deed {
            Deed::Fork(who) => {
                let child = kernel.next;
                kernel.next += 1;
                kernel.fork(pick(who), child);
            }
            Deed::SetSid(who) if kernel.may_set_sid(pick(who)) => kernel.set_sid(pick(who)),
            Deed::FoundGroup(who) if kernel.may_set_pgid(pick(who), pick(who)) => {
                kernel.set_pgid(pick(who), pick(who));
            }
            Deed::JoinGroup(who, other) => {
                let group = kernel.processes[&all[other % all.len()]].pgid;
                if kernel.may_set_pgid(pick(who), group) {
                    kernel.set_pgid(pick(who), group);
                }
            }
            Deed::Exit(who) if pick(who) != ROOT => kernel.exit(pick(who)),
            Deed::Reap(who) => {
                let zombie = all[who % all.len()];
                if kernel.processes[&zombie].is_zombie {
                    kernel.reap(zombie);
                }
            }
            Deed::BecomeSubreaper(who) => {
                let one = kernel.processes.get_mut(&pick(who)).expect("it runs");
                one.is_subreaper = true;
            }
            Deed::SetSid(_) | Deed::FoundGroup(_) | Deed::Exit(_) => {}
        }
    }
}

/// What a tree is to be: the root leads, and takes along those that were with it.
fn wanted(members: &[Member]) -> Vec<Member> {
    let root = members[0];
    let is_led = |member: &Member| {
        let mut all = members.iter();
        all.any(|one| one.pid == member.pgid && (one.pgid, one.sid) == (member.pgid, member.sid))
    };
    let with_root = |member: &Member| {
        member.pid == ROOT || (member.pgid, member.sid) == (root.pgid, root.sid) && !is_led(member)
    };
    let changed = |member: &Member| Member {
        ppid: member.ppid,
        pid: member.pid,
        pgid: if with_root(member) { ROOT } else { member.pgid },
        sid: if member.sid == root.sid {
            ROOT
        } else {
            member.sid
        },
        ..*member
    };
    members.iter().map(changed).collect()
}

fn make(members: &[Member]) -> Result<(), Vec<Obstacle>> {
    let making = Making::of(members)?;
    let mut kernel = Kernel::new(ROOT, ROOT);
    kernel.next = 1_000_000;
    for &step in &making.steps {
        kernel.perform(step);
    }
    let made: Vec<Member> = members
        .iter()
        .map(|member| {
            let one = kernel.processes[&member.pid];
            Member {
                pid: member.pid,
                ppid: one.ppid,
                pgid: one.pgid,
                sid: one.sid,
                ..Member::default()
            }
        })
        .collect();
    assert_eq!(made, wanted(members), "{:?}", making.steps);
    assert_eq!(kernel.processes.len(), members.len(), "no helper is left");
    for helper in making.helpers {
        assert!(members.iter().all(|member| member.pid != helper));
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]

    #[test]
    fn what_a_kernel_brings_about_is_made_again(
        // Its own; a shell's; init's, as in a container; those of somebody outside the pid namespace, which read as 0.
        (pgid, sid) in prop::sample::select(vec![(ROOT, ROOT), (60, 50), (60, 0), (1, 1), (0, 0)]),
        deeds in prop::collection::vec(deed(), 1..60),
    ) {
        let mut kernel = Kernel::new(pgid, sid);
        kernel.processes.get_mut(&ROOT).expect("it is there").is_subreaper = true;
        live(&mut kernel, &deeds);
        let members = kernel.members();
        let made = make(&members);
        // Nobody can bear these numbers for those that stayed when the root left such a group or session.
        let stayed = |obstacle: &Obstacle| {
            matches!(obstacle, Obstacle::Group { group: 0 | 1, .. } | Obstacle::Session { session: 0 | 1, .. })
        };
        let has_left = (members[0].pgid, members[0].sid) != (pgid, sid);
        if !(has_left && made.as_ref().is_err_and(|obstacles| obstacles.iter().all(stayed))) {
            prop_assert_eq!(made, Ok(()), "{:?}", members);
        }
    }

    /// Whatever somebody claims, it is made or refused.
    #[test]
    fn what_somebody_claims_is_made_or_refused(
        claims in prop::collection::vec((0..8_usize, 0..12_i32, 0..12_i32), 1..10),
    ) {
        let mut members = vec![Member { pid: ROOT, ppid: CRADLE, pgid: ROOT, sid: ROOT, ..Member::default() }];
        for (number, (parent, pgid, sid)) in claims.into_iter().enumerate() {
            let parent = members[parent % members.len()];
            let pid = ROOT + 1 + number as i32;
            members.push(Member { pid, ppid: parent.pid, pgid: ROOT - 1 + pgid, sid: ROOT - 1 + sid, ..Member::default() });
        }
        members.retain(|member| member.sid != member.pid || member.pgid == member.pid);
        let pids: BTreeSet<i32> = members.iter().map(|member| member.pid).collect();
        if members.iter().skip(1).all(|member| pids.contains(&member.ppid)) {
            let _ = make(&members);
        }
    }
}

fn members(list: &[(i32, i32, i32, i32)]) -> Vec<Member> {
    let member = |&(pid, ppid, pgid, sid): &(i32, i32, i32, i32)| Member {
        pid,
        ppid,
        pgid,
        sid,
        ..Member::default()
    };
    list.iter().map(member).collect()
}

#[test]
fn a_plain_tree_takes_no_detours() {
    let making = Making::of(&members(&[
        (7, 1, 7, 7),
        (8, 7, 7, 7),
        (9, 7, 9, 9),
        (10, 9, 9, 9),
    ]));
    let making = making.expect("nothing is in the way");
    assert_eq!(
        making.steps,
        [
            Step::Bear {
                parent: 7,
                child: 8
            },
            Step::Bear {
                parent: 7,
                child: 9
            },
            Step::LeadSession { pid: 9 },
            Step::Bear {
                parent: 9,
                child: 10
            },
        ]
    );
    assert!(making.helpers.is_empty());
}

#[test]
fn a_session_that_is_not_seen_from_here_becomes_the_roots() {
    for unseen in [0, 1] {
        let tree = members(&[(7, 1, unseen, unseen), (8, 7, unseen, unseen)]);
        let making = Making::of(&tree).expect("nothing is in the way");
        let bear = Step::Bear {
            parent: 7,
            child: 8,
        };
        assert_eq!(making.steps, [bear]);
        let stray = members(&[(7, 1, 7, 7), (8, 7, unseen, unseen)]);
        let obstacle = Obstacle::Session {
            pid: 8,
            session: unseen,
        };
        assert_eq!(Making::of(&stray), Err(vec![obstacle]));
    }
}

#[test]
fn a_daemon_whose_leader_is_gone_takes_a_helper() {
    let making =
        Making::of(&members(&[(7, 1, 7, 7), (9, 7, 8, 8)])).expect("nothing is in the way");
    assert_eq!(
        making.steps,
        [
            Step::Help {
                parent: 7,
                helper: 8
            },
            Step::LeadSession { pid: 8 },
            Step::Foster {
                parent: 7,
                leader: 8,
                child: 9
            },
            Step::Dismiss {
                parent: 7,
                helper: 8
            },
        ]
    );
    assert_eq!(making.helpers, [8]);
}

/// Does the births as a kernel does, and gives what each has in the end: one number is one thing.
fn had(members: &[Member], making: &Making, kind: fn(&Shares) -> bool) -> Vec<usize> {
    let mut next = 0;
    let mut new = || {
        next += 1;
        next
    };
    let mut had = BTreeMap::from([(members[0].pid, new())]);
    for step in &making.steps {
        match *step {
            Step::Bear { parent, child }
            | Step::Foster {
                leader: parent,
                child,
                ..
            } => {
                let shares = making.shares.get(&child).copied().unwrap_or_default();
                let its = if kind(&shares) { had[&parent] } else { new() };
                had.insert(child, its);
            }
            Step::Help { helper, .. } => drop(had.insert(helper, new())),
            Step::Part { pid, shares } if kind(&shares) => drop(had.insert(pid, new())),
            _ => {}
        }
    }
    members.iter().map(|member| had[&member.pid]).collect()
}

/// Whether exactly those have something in common that are to.
fn assert_shared(members: &[Member], making: &Making) {
    for (owner, kind) in [
        (
            (|one| one.table_of) as fn(&Member) -> i32,
            (|shares| shares.table) as fn(&Shares) -> bool,
        ),
        (|one| one.directory_of, |shares| shares.directory),
        (|one| one.memory_of, |shares| shares.memory),
        (|one| one.actions_of, |shares| shares.actions),
    ] {
        let had = had(members, making, kind);
        let set = |one: &Member| if owner(one) == 0 { one.pid } else { owner(one) };
        for (one, its) in members.iter().zip(&had) {
            for (other, others) in members.iter().zip(&had) {
                let is_shared = set(one) == set(other);
                assert_eq!(its == others, is_shared, "{one:?} {other:?} {making:?}");
            }
        }
    }
}

fn sharing(list: &[(i32, i32, i32, i32)]) -> Vec<Member> {
    let member = |&(pid, ppid, table_of, directory_of): &(i32, i32, i32, i32)| Member {
        pid,
        ppid,
        pgid: list[0].0,
        sid: list[0].0,
        table_of,
        directory_of,
        ..Member::default()
    };
    list.iter().map(member).collect()
}

#[test]
fn what_comes_from_a_parent_takes_no_detour() {
    let tree = sharing(&[(7, 1, 0, 0), (8, 7, 7, 0), (9, 8, 7, 8), (10, 7, 0, 7)]);
    let making = Making::of(&tree).expect("nothing is in the way");
    assert_shared(&tree, &making);
    let parts = |step: &Step| matches!(step, Step::Part { .. });
    assert!(!making.steps.iter().any(parts), "{making:?}");
}

#[test]
fn siblings_and_orphans_share_by_those_who_then_part() {
    // 9 and 10 share, of whom their parent has none; 12 with 7 what 11 between them has not.
    let tree = sharing(&[
        (7, 1, 0, 0),
        (8, 7, 0, 0),
        (9, 8, 0, 0),
        (10, 8, 9, 0),
        (11, 7, 0, 0),
        (12, 11, 0, 7),
    ]);
    let making = Making::of(&tree).expect("nothing is in the way");
    assert_shared(&tree, &making);
    let part = |pid, shares| Step::Part { pid, shares };
    let (table, directory) = (
        Shares {
            table: true,
            ..Shares::default()
        },
        Shares {
            directory: true,
            ..Shares::default()
        },
    );
    assert!(
        making
            .steps
            .ends_with(&[part(8, table), part(11, directory)])
    );
}

#[test]
fn one_that_would_have_to_pass_on_two_is_in_the_way() {
    // 8 shares with 7, and its children with each other; and 10 with 9 what can come by 7 only.
    let tree = sharing(&[(7, 1, 0, 0), (8, 7, 7, 0), (9, 8, 0, 0), (10, 8, 9, 0)]);
    let shares = Shares {
        table: true,
        ..Shares::default()
    };
    let obstacle = Obstacle::Sharing {
        pid: 10,
        other: 9,
        shares,
    };
    assert_eq!(Making::of(&tree), Err(vec![obstacle]));
}

#[test]
fn memory_comes_from_those_who_have_it_only() {
    // 8 and 9 are in the memory of 7, and 10, below them, has one of its own.
    let mut tree = sharing(&[(7, 1, 0, 0), (8, 7, 0, 0), (9, 8, 0, 7), (10, 9, 0, 0)]);
    for place in [1, 2] {
        tree[place].memory_of = 7;
    }
    tree[2].actions_of = 8;
    let making = Making::of(&tree).expect("nothing is in the way");
    assert_shared(&tree, &making);
    // 8 would have to part with it, which nobody can.
    tree[1].memory_of = 0;
    tree[2].actions_of = 0;
    let shares = Shares {
        memory: true,
        ..Shares::default()
    };
    let obstacle = Obstacle::Sharing {
        pid: 9,
        other: 7,
        shares,
    };
    assert_eq!(Making::of(&tree), Err(vec![obstacle]));
}

#[test]
fn nothing_comes_through_a_helper() {
    let mut tree = members(&[(7, 1, 7, 7), (9, 7, 8, 8)]);
    tree[1].directory_of = 7;
    assert!(matches!(
        Making::of(&tree).as_ref().map_err(Vec::as_slice),
        Err([Obstacle::Sharing {
            pid: 9,
            other: 7,
            ..
        }])
    ));
}

proptest! {
    /// Whatever is said to be shared, it is shared by those and nobody else, or refused; and not refused where all have it from
    /// their parents.
    #[test]
    fn what_is_shared_is_shared_or_refused(
        claims in prop::collection::vec((0..8_usize, 0..4_usize, 0..4_usize, 0..6_usize), 1..12),
    ) {
        let mut tree = sharing(&[(ROOT, CRADLE, 0, 0)]);
        let mut is_inherited = true;
        for (number, (parent, table, directory, memory)) in claims.into_iter().enumerate() {
            let parent = tree[parent % tree.len()];
            let owner = |claim: usize, owner: fn(&Member) -> i32| match (claim, tree.get(claim)) {
                (0, _) | (_, None) => 0,
                (_, Some(other)) if owner(other) == 0 => other.pid,
                (_, Some(other)) => owner(other),
            };
            let (table_of, directory_of) = (owner(table, |one| one.table_of), owner(directory, |one| one.directory_of));
            let comes = |its: i32, parents: i32| its == 0 || its == parent.pid || its == parents && parents != 0;
            is_inherited &= comes(table_of, parent.table_of) && comes(directory_of, parent.directory_of);
            let memory_of = owner(memory, |one| one.memory_of);
            is_inherited &= comes(memory_of, parent.memory_of);
            let pid = ROOT + 1 + number as i32;
            tree.push(Member { pid, ppid: parent.pid, table_of, directory_of, memory_of, ..tree[0] });
        }
        match Making::of(&tree) {
            Ok(making) => assert_shared(&tree, &making),
            Err(obstacles) => {
                let is_sharing = |one: &Obstacle| matches!(one, Obstacle::Sharing { .. });
                assert!(obstacles.iter().all(is_sharing) && !is_inherited, "{tree:?} {obstacles:?}");
            }
        }
    }
}
