//! Who is whose child, and of which session and process group; and what has ended without having been waited for.
//!
//! None of this can be set. A parent is who made a process, or the subreaper that took it; a session is founded by its leader
//! and passed on to children; a group is founded by its leader and joined from within its session. [`Making`] works out the
//! order of births, foundings and joins that leads to what was, before anything is made: what has no such order is refused.
//! So it is with what processes have in common, see [`sharing`].

#![allow(
    missing_docs,
    reason = "generated fields are documented in image/proto/relations.proto"
)]

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::{Invalid, ensure, limits};

pub mod sharing;

use self::sharing::{Shares, Sharing};

include!("generated/pageferry.relations.rs");

/// Longest name, as that of a thread.
const COMM_LEN: usize = 45;
/// The signals whose default is not to end a process: CHLD, CONT, STOP, TSTP, TTIN, TTOU, URG, WINCH.
const HARMLESS: [u32; 8] = [17, 18, 19, 20, 21, 22, 23, 28];
/// In a wait status: a core was dumped.
const CORE_DUMPED: u32 = 0x80;

impl Zombie {
    /// # Errors
    /// The broken rule.
    pub fn validate(&self) -> Result<(), Invalid> {
        let object = || format!("ended process {}", self.pid);
        ensure(self.pid > 1, object, "has the number of no process")?;
        ensure(
            self.ppid > 1 && self.pgid >= 0 && self.sid >= 0,
            object,
            "has an impossible parent, group or session",
        )?;
        ensure(
            self.comm.len() <= COMM_LEN && !self.comm.contains('\0'),
            object,
            "has an impossible name",
        )?;
        ensure(
            self.exit_signal <= limits::SIGNAL,
            object,
            "told its parent by an impossible signal",
        )?;
        let has_ended = match self.signal() {
            0 => self.status & !0xff00 == 0,
            signal => {
                signal <= limits::SIGNAL
                    && !HARMLESS.contains(&signal)
                    && self.status & !(0x7f | CORE_DUMPED) == 0
            }
        };
        ensure(has_ended, object, "has ended in an impossible way")
    }

    /// The signal it died of; 0: it has exited.
    pub fn signal(&self) -> u32 {
        self.status & 0x7f
    }

    /// Its exit code, if it has exited.
    pub fn code(&self) -> u32 {
        self.status >> 8 & 0xff
    }

    /// Whether its death left a core dump.
    pub fn dumped_core(&self) -> bool {
        self.signal() != 0 && self.status & CORE_DUMPED != 0
    }
}

/// A process, running or ended, as far as its relations go.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Member {
    pub pid: i32,
    pub ppid: i32,
    pub pgid: i32,
    pub sid: i32,
    /// Whose descriptor table it has; 0: its own.
    pub table_of: i32,
    /// Whose working directory and umask it has; 0: its own.
    pub directory_of: i32,
    /// Whose memory it has; 0: its own.
    pub memory_of: i32,
    /// Whose signal actions it has; 0: its own.
    pub actions_of: i32,
}

impl From<&Zombie> for Member {
    fn from(zombie: &Zombie) -> Self {
        Self {
            pid: zombie.pid,
            ppid: zombie.ppid,
            pgid: zombie.pgid,
            sid: zombie.sid,
            ..Self::default()
        }
    }
}

/// One step in making a tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// `parent` makes `child`, which gets its session and group.
    Bear { parent: i32, child: i32 },
    /// `child` is made in the session and group of `leader`, some generations below `parent`, and is left to `parent`.
    Foster {
        parent: i32,
        leader: i32,
        child: i32,
    },
    /// A process founds a session and its first group.
    LeadSession { pid: i32 },
    /// A process founds a group in its session.
    LeadGroup { pid: i32 },
    /// A process joins a group of its session.
    Join { pid: i32, group: i32 },
    /// A process gets what it had in common with its maker for itself: it had to pass it on.
    Part { pid: i32, shares: Shares },
    /// `parent` makes a helper: it bears the number of a session or group whose leader is gone. Its end tells nobody.
    Help { parent: i32, helper: i32 },
    /// A helper ends, and `parent` waits for it.
    Dismiss { parent: i32, helper: i32 },
}

/// What keeps a tree from being made again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Obstacle {
    /// There is no way into this session.
    Session { pid: i32, session: i32 },
    /// There is no way into this group.
    Group { pid: i32, group: i32 },
    /// What it has in common with `other` cannot be passed on to it.
    Sharing {
        pid: i32,
        other: i32,
        shares: Shares,
    },
}

/// How a tree is made from the husk of its root, which leads a session of its own.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Making {
    /// In order. Ended processes end after the last.
    pub steps: Vec<Step>,
    /// Numbers that have to be free for a moment, though no process of the tree has them.
    pub helpers: Vec<i32>,
    /// What is had in common from birth with whoever made it, by the process that is born. All others have all for themselves.
    pub shares: BTreeMap<i32, Shares>,
}

impl Making {
    /// The root stands first, parents before their children, each process once, ended ones behind all others.
    ///
    /// The root leads a session and a group of its own afterwards. If it did not before, those that were in its session and group
    /// still are.
    ///
    /// # Errors
    /// What is in the way, for one process at least.
    pub fn of(members: &[Member]) -> Result<Self, Vec<Obstacle>> {
        let Some(plan) = Plan::of(members) else {
            return Ok(Self::default());
        };
        plan?.making(members)
    }
}

/// One place for each member, in their order.
struct Plan {
    pids: Vec<i32>,
    parents: Vec<usize>,
    sids: Vec<i32>,
    pgids: Vec<i32>,
    /// The session in which a session's leader has to be born, since children of its are in that: they were born before it led.
    /// For others, their session.
    births: Vec<Option<i32>>,
    places: BTreeMap<i32, usize>,
    /// First number and count of each with its descendants, counted from the root downwards.
    descent: Vec<(usize, usize)>,
    /// For sessions without a leader: whose child the helper is.
    sites: BTreeMap<i32, usize>,
    obstacles: Vec<Obstacle>,
}

/// What a birth waits for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// This one is there.
    Made(usize),
    /// The same, and it leads its session, if it does.
    Settled(usize),
}

/// How a process gets into the session it is born in.
enum Birth {
    /// From its parent.
    Inherited,
    /// From its parent, before that founds one.
    Early,
    /// From the leader, which is there and descends from the parent.
    FromLeader(usize),
    /// From a helper that is a child of this one.
    FromHelper(usize),
}

impl Plan {
    /// `None` without a root.
    fn of(members: &[Member]) -> Option<Result<Self, Vec<Obstacle>>> {
        let root = *members.first()?;
        let mut obstacles = Vec::new();
        let founded: BTreeSet<(i32, i32)> = members
            .iter()
            .filter(|member| member.pgid == member.pid)
            .map(|member| (member.pgid, member.sid))
            .collect();
        let places: BTreeMap<i32, usize> = (0..)
            .zip(members)
            .map(|(place, member)| (member.pid, place))
            .collect();
        let mut plan = Self {
            pids: Vec::with_capacity(members.len()),
            parents: Vec::with_capacity(members.len()),
            sids: Vec::with_capacity(members.len()),
            pgids: Vec::with_capacity(members.len()),
            births: Vec::new(),
            places,
            descent: Vec::new(),
            sites: BTreeMap::new(),
            obstacles: Vec::new(),
        };
        for (place, member) in members.iter().enumerate() {
            let group = (member.pgid, member.sid);
            let of_root = group == (root.pgid, root.sid) && !founded.contains(&group);
            plan.pids.push(member.pid);
            plan.parents
                .push(plan.places.get(&member.ppid).copied().unwrap_or(0));
            if place == 0 {
                plan.sids.push(root.pid);
                plan.pgids.push(root.pid);
                continue;
            }
            // One that leads no session never did. 0 stands for a number outside the pid namespace, 1 for its init: the root's
            // descendants can have inherited only its session of those, which becomes the root's own.
            let led = plan.places.get(&member.sid);
            let is_nobodys = member.sid <= 1 && member.sid != root.sid;
            if is_nobodys || led.is_some_and(|&leader| members[leader].sid != member.sid) {
                obstacles.push(Obstacle::Session {
                    pid: member.pid,
                    session: member.sid,
                });
            } else if member.pgid <= 1 && !of_root {
                obstacles.push(Obstacle::Group {
                    pid: member.pid,
                    group: member.pgid,
                });
            }
            plan.sids.push(if member.sid == root.sid {
                root.pid
            } else {
                member.sid
            });
            plan.pgids
                .push(if of_root { root.pid } else { member.pgid });
        }
        if !obstacles.is_empty() {
            return Some(Err(obstacles));
        }
        plan.count_descent();
        plan.settle_births();
        Some(if plan.obstacles.is_empty() {
            Ok(plan)
        } else {
            Err(plan.obstacles)
        })
    }

    fn count_descent(&mut self) {
        let count = self.pids.len();
        let mut sizes = vec![1; count];
        for place in (1..count).rev() {
            sizes[self.parents[place]] += sizes[place];
        }
        self.descent = vec![(0, count); count];
        let mut next = vec![1; count];
        for place in 1..count {
            let parent = self.parents[place];
            let first = next[parent];
            next[parent] += sizes[place];
            self.descent[place] = (first, sizes[place]);
            next[place] = first + 1;
        }
    }

    /// Whether `one` is `other` or descends from it.
    fn descends(&self, one: usize, other: usize) -> bool {
        let (first, count) = self.descent[other];
        (first..first + count).contains(&self.descent[one].0)
    }

    fn leads(&self, place: usize) -> bool {
        self.sids[place] == self.pids[place]
    }

    fn leader(&self, session: i32) -> Option<usize> {
        self.places.get(&session).copied()
    }

    fn no_session(&mut self, place: usize, session: i32) {
        self.obstacles.push(Obstacle::Session {
            pid: self.pids[place],
            session,
        });
    }

    /// Works out where everybody is born.
    ///
    /// A process in another session than its parent was either left to it, and then the leader of that session is, or was, one of
    /// the parent's descendants; or it was born before its parent founded a session, and then the parent was born in that other.
    fn settle_births(&mut self) {
        let count = self.pids.len();
        self.births = (0..count)
            .map(|place| (!self.leads(place)).then_some(self.sids[place]))
            .collect();
        // Where the leader is there, it tells which of the two it was.
        for place in (1..count).rev() {
            let parent = self.parents[place];
            let Some(session) = self.elsewhere(place) else {
                continue;
            };
            match self.leader(session) {
                Some(leader) if !self.descends(leader, parent) => {
                    let known = self.births[parent];
                    let may_be = parent != 0 && self.leads(parent);
                    if may_be && known.is_none_or(|known| known == session) {
                        self.births[parent] = Some(session);
                    } else {
                        self.no_session(place, session);
                    }
                }
                _ => {}
            }
        }
        self.settle_births_without_leaders();
    }

    /// Where it is gone, both may be. That the parent was born there is taken first, and best for a session that others are in
    /// who do not descend from it: it leaves the helper to be made further up.
    fn settle_births_without_leaders(&mut self) {
        let count = self.pids.len();
        let mut first: BTreeMap<i32, usize> = BTreeMap::new();
        for (place, &session) in self.sids.iter().enumerate() {
            first.entry(session).or_insert(place);
        }
        let mut wanted: Vec<Vec<(usize, i32)>> = vec![Vec::new(); count];
        for place in (0..count).rev() {
            let children = std::mem::take(&mut wanted[place]);
            if place != 0 && self.leads(place) && self.births[place].is_none() {
                let is_of_others = |&&(_, session): &&(usize, i32)| {
                    first.get(&session).is_some_and(|&first| first < place)
                };
                let best = children.iter().find(is_of_others).or(children.last());
                self.births[place] = best.map(|&(_, session)| session);
            }
            for (child, session) in children {
                if self.leads(place) && self.births[place] == Some(session) {
                    continue;
                }
                let site = *self.sites.entry(session).or_insert(place);
                if self.descends(place, site) {
                    self.sites.insert(session, place);
                } else if !self.descends(site, place) {
                    self.no_session(child, session);
                }
            }
            if let Some(session) = self.elsewhere(place) {
                if self.leader(session).is_none() {
                    wanted[self.parents[place]].push((place, session));
                }
            }
        }
    }

    /// The session in which a process has to be born, if its parent is in another in the end.
    fn elsewhere(&self, place: usize) -> Option<i32> {
        let parents = self.sids[self.parents[place]];
        self.births[place].filter(|&session| place != 0 && session != parents)
    }

    fn birth(&self, place: usize) -> Birth {
        let parent = self.parents[place];
        match self.births[place] {
            Some(session) if session != self.sids[parent] => {
                if self.leads(parent) && self.births[parent] == Some(session) {
                    Birth::Early
                } else if let Some(leader) = self.leader(session) {
                    Birth::FromLeader(leader)
                } else {
                    Birth::FromHelper(self.sites.get(&session).copied().unwrap_or(parent))
                }
            }
            _ => Birth::Inherited,
        }
    }

    /// Who makes whom, by place; `None`: the root is there, and helpers pass nothing on.
    fn makers(&self) -> Vec<Option<usize>> {
        let maker = |place| match self.birth(place) {
            Birth::Inherited | Birth::Early => Some(self.parents[place]),
            Birth::FromLeader(leader) => Some(leader),
            Birth::FromHelper(_) => None,
        };
        (0..self.pids.len())
            .map(|place| (place > 0).then(|| maker(place)).flatten())
            .collect()
    }

    fn making(self, members: &[Member]) -> Result<Making, Vec<Obstacle>> {
        let mut work = Work {
            groups: BTreeMap::from([(self.pids[0], self.pids[0])]),
            helpers: Vec::new(),
            steps: Vec::new(),
            plan: &self,
        };
        let mut obstacles = work.births();
        let mut sharing = Sharing::default();
        if obstacles.is_empty() {
            obstacles = work.join_groups();
            sharing = Sharing::of(members, &self.makers());
            obstacles.append(&mut sharing.obstacles);
        }
        if !obstacles.is_empty() {
            return Err(obstacles);
        }
        let parts = sharing.parts.into_iter();
        let parts = parts.map(|(pid, shares)| Step::Part { pid, shares });
        work.steps.extend(parts);
        let helpers: Vec<i32> = work.helpers.iter().map(|&(helper, _)| helper).collect();
        let ends = work.helpers.iter().rev();
        let ends = ends.map(|&(helper, parent)| Step::Dismiss { parent, helper });
        work.steps.extend(ends);
        Ok(Making {
            steps: work.steps,
            helpers,
            shares: sharing.shares,
        })
    }
}

/// Steps as they come.
struct Work<'p> {
    plan: &'p Plan,
    steps: Vec<Step>,
    /// Helpers and their parents.
    helpers: Vec<(i32, i32)>,
    /// The group of each that was made so far.
    groups: BTreeMap<i32, i32>,
}

impl Work<'_> {
    fn help(&mut self, parent: i32, helper: i32) {
        self.steps.push(Step::Help { parent, helper });
        self.groups.insert(helper, self.group(parent));
        self.helpers.push((helper, parent));
    }

    fn lead(&mut self, pid: i32, step: Step) {
        self.steps.push(step);
        self.groups.insert(pid, pid);
    }

    fn group(&self, pid: i32) -> i32 {
        self.groups.get(&pid).copied().unwrap_or(0)
    }

    fn births(&mut self) -> Vec<Obstacle> {
        let plan = self.plan;
        let count = plan.pids.len();
        let mut waiting: BTreeMap<Event, Vec<usize>> = BTreeMap::new();
        // Children that have to be born before their parent founds its session.
        let mut early = vec![0; count];
        for place in 1..count {
            let parent = plan.parents[place];
            let event = match plan.birth(place) {
                Birth::Inherited => Event::Settled(parent),
                Birth::Early => {
                    early[parent] += 1;
                    Event::Made(parent)
                }
                Birth::FromLeader(leader) => Event::Settled(leader),
                Birth::FromHelper(site) => Event::Made(site),
            };
            waiting.entry(event).or_default().push(place);
        }
        let mut unmade: BTreeSet<usize> = (1..count).collect();
        let mut events = VecDeque::from([Event::Made(0), Event::Settled(0)]);
        while let Some(event) = events.pop_front() {
            for place in waiting.remove(&event).unwrap_or_default() {
                self.bear(place);
                unmade.remove(&place);
                events.push_back(Event::Made(place));
                let is_early = matches!(plan.birth(place), Birth::Early);
                let parent = plan.parents[place];
                if is_early {
                    early[parent] -= 1;
                }
                for settled in [place].into_iter().chain(is_early.then_some(parent)) {
                    if early[settled] > 0 {
                        continue;
                    }
                    if plan.leads(settled) {
                        let pid = plan.pids[settled];
                        self.lead(pid, Step::LeadSession { pid });
                    }
                    events.push_back(Event::Settled(settled));
                }
            }
        }
        let obstacle = |place: usize| Obstacle::Session {
            pid: plan.pids[place],
            session: plan.sids[place],
        };
        unmade.into_iter().map(obstacle).collect()
    }

    fn bear(&mut self, place: usize) {
        let plan = self.plan;
        let (parent, child) = (plan.pids[plan.parents[place]], plan.pids[place]);
        let leader = match plan.birth(place) {
            Birth::Inherited | Birth::Early => {
                self.steps.push(Step::Bear { parent, child });
                self.groups.insert(child, self.group(parent));
                return;
            }
            Birth::FromLeader(leader) => plan.pids[leader],
            Birth::FromHelper(site) => {
                let session = plan.births[place].unwrap_or_default();
                if !self.groups.contains_key(&session) {
                    self.help(plan.pids[site], session);
                    self.lead(session, Step::LeadSession { pid: session });
                }
                session
            }
        };
        self.steps.push(Step::Foster {
            parent,
            leader,
            child,
        });
        self.groups.insert(child, leader);
    }

    /// All groups are founded, then joined. Those who founded one and are in another by now leave it when it has members.
    fn join_groups(&mut self) -> Vec<Obstacle> {
        let plan = self.plan;
        let mut obstacles = Vec::new();
        // Each with its session.
        let mut founded: BTreeMap<i32, i32> = BTreeMap::new();
        for (place, &group) in plan.pgids.iter().enumerate() {
            let session = plan.sids[place];
            if group == session {
                continue;
            }
            let founder = plan.places.get(&group);
            let is_possible = match (founded.get(&group), founder) {
                (Some(&known), _) => known == session,
                (None, Some(&founder)) => plan.sids[founder] == session && !plan.leads(founder),
                // The helper of a session leads that.
                (None, None) => !self.groups.contains_key(&group),
            };
            if !is_possible {
                let pid = plan.pids[place];
                obstacles.push(Obstacle::Group { pid, group });
                continue;
            }
            if founded.insert(group, session).is_none() {
                if founder.is_none() {
                    self.help(plan.pids[place], group);
                }
                self.lead(group, Step::LeadGroup { pid: group });
            }
        }
        if !obstacles.is_empty() {
            return obstacles;
        }
        let mut sizes: BTreeMap<i32, usize> = BTreeMap::new();
        for &group in self.groups.values() {
            *sizes.entry(group).or_default() += 1;
        }
        for moves in [false, true] {
            for (place, &group) in plan.pgids.iter().enumerate() {
                let pid = plan.pids[place];
                let now = self.group(pid);
                if now == group || founded.contains_key(&pid) != moves {
                    continue;
                }
                // A leader of a session stays in its group; an empty group is gone.
                if plan.leads(place) || sizes.get(&group).is_none_or(|&size| size == 0) {
                    obstacles.push(Obstacle::Group { pid, group });
                    continue;
                }
                self.steps.push(Step::Join { pid, group });
                self.groups.insert(pid, group);
                *sizes.entry(group).or_default() += 1;
                if let Some(size) = sizes.get_mut(&now) {
                    *size -= 1;
                }
            }
        }
        obstacles
    }
}

#[cfg(test)]
mod tests;
