//! What processes have in common though they are none of each other's threads: a descriptor table (`CLONE_FILES`), the
//! working directory and umask (`CLONE_FS`), memory (`CLONE_VM`), or the signal actions with it (`CLONE_SIGHAND`).
//!
//! It comes about at birth only, from who makes the process. So all those between two that share have to have it too until the
//! last is born; those that had not then get one of their own, as unshare(2) gives it. Nobody can pass on two in turn. Nor can
//! anybody part with memory or signal actions, but by executing another program: these must be had by all that pass them on.

use std::collections::{BTreeMap, BTreeSet};

use super::{Member, Obstacle};

/// Kinds of things that processes have in common.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Shares {
    /// The descriptor table.
    pub table: bool,
    /// The working directory and umask.
    pub directory: bool,
    /// The memory.
    pub memory: bool,
    /// The signal actions; the memory then, too.
    pub actions: bool,
}

impl Shares {
    const NONE: Self = Self {
        table: false,
        directory: false,
        memory: false,
        actions: false,
    };
    const TABLE: Self = Self {
        table: true,
        ..Self::NONE
    };
    const DIRECTORY: Self = Self {
        directory: true,
        ..Self::NONE
    };
    const MEMORY: Self = Self {
        memory: true,
        ..Self::NONE
    };
    const ACTIONS: Self = Self {
        actions: true,
        ..Self::NONE
    };

    fn add(&mut self, other: Self) {
        self.table |= other.table;
        self.directory |= other.directory;
        self.memory |= other.memory;
        self.actions |= other.actions;
    }

    /// Whether one who has it can get one of its own.
    fn can_part(self) -> bool {
        !self.memory && !self.actions
    }
}

/// How a tree comes to what its processes have in common.
#[derive(Debug, Default)]
pub(super) struct Sharing {
    /// What is had in common with the maker at birth.
    pub(super) shares: BTreeMap<i32, Shares>,
    /// Who gets what for itself after the last birth.
    pub(super) parts: BTreeMap<i32, Shares>,
    pub(super) obstacles: Vec<Obstacle>,
}

impl Sharing {
    /// `makers`: by place, in no circle. `None`: nothing comes from there.
    pub(super) fn of(members: &[Member], makers: &[Option<usize>]) -> Self {
        let mut sharing = Self::default();
        let mut depths = None;
        for (kind, owner_of) in [
            (Shares::TABLE, (|one| one.table_of) as fn(&Member) -> i32),
            (Shares::DIRECTORY, |one| one.directory_of),
            (Shares::MEMORY, |one| one.memory_of),
            (Shares::ACTIONS, |one| one.actions_of),
        ] {
            let sets = sets(members, owner_of);
            if !sets.is_empty() {
                let depths = depths.get_or_insert_with(|| depths_of(makers));
                sharing.add(members, makers, depths, kind, owner_of, &sets);
            }
        }
        sharing
    }

    fn add(
        &mut self,
        members: &[Member],
        makers: &[Option<usize>],
        depths: &[usize],
        kind: Shares,
        owner_of: fn(&Member) -> i32,
        sets: &BTreeMap<i32, Vec<usize>>,
    ) {
        // Who has what is of which set, when the last is born.
        let mut had: BTreeMap<usize, i32> = BTreeMap::new();
        for (&owner, set) in sets {
            // The lowest first: where two ways meet, there is one left to be followed.
            let mut ends: BTreeSet<(usize, usize)> =
                set.iter().map(|&place| (depths[place], place)).collect();
            while let Some((_, place)) = ends.pop_last() {
                let member = &members[place];
                let pid = member.pid;
                let is_last = ends.is_empty();
                let maker = makers[place].filter(|_| !is_last);
                let is_free = *had.entry(place).or_insert(owner) == owner;
                let parts = pid != owner && owner_of(member) != owner;
                if !is_free || (maker.is_none() && !is_last) || (parts && !kind.can_part()) {
                    let last = set.last().map_or(pid, |&last| members[last].pid);
                    self.obstacles.push(Obstacle::Sharing {
                        pid: last,
                        other: owner,
                        shares: kind,
                    });
                    break;
                }
                if let Some(maker) = maker {
                    self.shares.entry(pid).or_default().add(kind);
                    ends.insert((depths[maker], maker));
                }
                if parts {
                    self.parts.entry(pid).or_default().add(kind);
                }
            }
        }
    }
}

/// The processes of each set, by its owner.
fn sets(members: &[Member], owner_of: fn(&Member) -> i32) -> BTreeMap<i32, Vec<usize>> {
    let places: BTreeMap<i32, usize> = (0..)
        .zip(members)
        .map(|(place, member)| (member.pid, place))
        .collect();
    let mut sets: BTreeMap<i32, Vec<usize>> = BTreeMap::new();
    for (place, member) in members.iter().enumerate() {
        if let Some(&first) = places.get(&owner_of(member)) {
            sets.entry(owner_of(member))
                .or_insert_with(|| vec![first])
                .push(place);
        }
    }
    sets
}

/// How many there are above each.
fn depths_of(makers: &[Option<usize>]) -> Vec<usize> {
    let mut depths = vec![None; makers.len()];
    for place in 0..makers.len() {
        let mut way = Vec::new();
        let mut at = place;
        let mut depth = loop {
            match (depths[at], makers[at]) {
                (Some(known), _) => break known,
                (None, Some(maker)) => {
                    way.push(at);
                    at = maker;
                }
                (None, None) => {
                    depths[at] = Some(0);
                    break 0;
                }
            }
        };
        while let Some(below) = way.pop() {
            depth += 1;
            depths[below] = Some(depth);
        }
    }
    depths.into_iter().map(Option::unwrap_or_default).collect()
}
