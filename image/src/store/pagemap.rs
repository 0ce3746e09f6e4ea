//! The page map: which pages there are, what they are, and which of the stored data pages is theirs. Holds the rules that
//! writer and reader share; knows of no file.

use super::header::Counts;
use super::{Damage, ObjectId, PageKind};
use crate::model::limits::ADDRESS_END;
use crate::model::memory::Kind;
use crate::model::task::Tree;
use crate::page::{PAGE_SIZE, PageRange};

/// Bytes of a range's record.
pub(super) const RANGE_LEN: usize = 32;
/// Bytes of a block's record.
pub(super) const BLOCK_LEN: usize = 16;

/// Neighbouring pages of one kind, as in the map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) object: ObjectId,
    pub(super) kind: PageKind,
    pub(super) pages: PageRange,
    /// How many data pages all ranges before have: the number of the first of these, if they are data.
    pub(super) data_before: u64,
}

impl Range {
    pub(super) fn encode(&self) -> [u8; RANGE_LEN] {
        let mut record = [0; RANGE_LEN];
        record[..4].copy_from_slice(&self.object.0.to_le_bytes());
        record[4..8].copy_from_slice(&(self.kind as u32).to_le_bytes());
        for (at, value) in [
            (8, self.pages.start / PAGE_SIZE),
            (16, self.pages.page_count()),
            (24, self.data_before),
        ] {
            record[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        record
    }

    /// # Errors
    /// The broken rule. The range lies in user addresses.
    pub(super) fn decode(record: &[u8; RANGE_LEN]) -> Result<Self, &'static str> {
        let [object, kind] = [0, 4].map(|at| u32::from_le_bytes(array(record, at)));
        let [start, count, data_before] =
            [8, 16, 24].map(|at| u64::from_le_bytes(array(record, at)));
        let kind = PageKind::from_number(kind).ok_or("is of an unknown kind")?;
        if count == 0 {
            return Err("is empty");
        }
        let end_of_space = ADDRESS_END / PAGE_SIZE;
        if start >= end_of_space {
            return Err("does not begin at a user address");
        }
        if count > end_of_space - start {
            return Err("leaves the address space");
        }
        Ok(Self {
            object: ObjectId(object),
            kind,
            pages: PageRange {
                start: start * PAGE_SIZE,
                end: (start + count) * PAGE_SIZE,
            },
            data_before,
        })
    }
}

/// Where a block of data pages lies in `pages`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Block {
    pub(super) offset: u64,
    /// Bytes it takes; as many as its pages have if it is not compressed.
    pub(super) stored_len: u32,
    /// CRC-32 of these bytes.
    pub(super) checksum: u32,
}

impl Block {
    pub(super) fn encode(&self) -> [u8; BLOCK_LEN] {
        let mut record = [0; BLOCK_LEN];
        record[..8].copy_from_slice(&self.offset.to_le_bytes());
        record[8..12].copy_from_slice(&self.stored_len.to_le_bytes());
        record[12..].copy_from_slice(&self.checksum.to_le_bytes());
        record
    }

    pub(super) fn decode(record: &[u8; BLOCK_LEN]) -> Self {
        Self {
            offset: u64::from_le_bytes(array(record, 0)),
            stored_len: u32::from_le_bytes(array(record, 8)),
            checksum: u32::from_le_bytes(array(record, 12)),
        }
    }
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(&bytes[at..at + N]);
    array
}

/// The pages a map has to tell, and what it has told so far. Ranges come in the order of the map.
#[derive(Debug)]
pub(super) struct Coverage {
    /// Ascending, disjoint, and no two touch.
    wanted: Vec<(ObjectId, PageRange)>,
    /// The one that is being told.
    current: usize,
    /// Up to where it has been.
    at: u64,
    /// The guard regions of the model, ascending.
    guards: Vec<(ObjectId, PageRange)>,
    /// The last address space; behind it are shared objects, which have no guard regions.
    last_space: ObjectId,
    counts: Counts,
}

impl Coverage {
    /// The pages of `tree` that an image holds: all of every private mapping, then all of every shared object.
    pub(super) fn of(tree: &Tree) -> Self {
        let mut wanted: Vec<(ObjectId, PageRange)> = Vec::new();
        let mut guards = Vec::new();
        let spaces = tree
            .processes
            .iter()
            .enumerate()
            .filter_map(|(index, process)| Some((ObjectId::space(index), process.space.as_ref()?)));
        for (object, space) in spaces {
            for mapping in &space.mappings {
                if !matches!(mapping.kind(), Kind::Anon | Kind::FilePrivate) {
                    continue;
                }
                match wanted.last_mut() {
                    Some((last, before)) if *last == object && before.end == mapping.start => {
                        before.end = mapping.end;
                    }
                    _ => wanted.push((
                        object,
                        PageRange {
                            start: mapping.start,
                            end: mapping.end,
                        },
                    )),
                }
                guards.extend(mapping.guards.iter().map(|guard| {
                    (
                        object,
                        PageRange {
                            start: guard.start,
                            end: guard.end,
                        },
                    )
                }));
            }
        }
        for (index, shared) in tree.shared.iter().enumerate() {
            if !shared.pages().is_empty() {
                let object = ObjectId::shared(tree.processes.len(), index);
                wanted.push((object, shared.pages()));
            }
        }
        Self {
            at: wanted.first().map_or(0, |(_, range)| range.start),
            wanted,
            current: 0,
            guards,
            last_space: ObjectId(ObjectId::shared(tree.processes.len(), 0).0 - 1),
            counts: Counts::default(),
        }
    }

    /// Data pages told so far.
    pub(super) fn data_pages(&self) -> u64 {
        self.counts.data_pages
    }

    /// Takes the next range.
    ///
    /// # Errors
    /// It is not the next one.
    pub(super) fn take(
        &mut self,
        object: ObjectId,
        range: PageRange,
        kind: PageKind,
    ) -> Result<(), Damage> {
        let Some(&(wanted_object, wanted)) = self.wanted.get(self.current) else {
            return Err(Damage::Unasked { object, range });
        };
        if (wanted_object, self.at) < (object, range.start) {
            return Err(Damage::Uncovered {
                object: wanted_object,
                range: PageRange {
                    start: self.at,
                    end: if wanted_object == object {
                        wanted.end.min(range.start)
                    } else {
                        wanted.end
                    },
                },
            });
        }
        if (wanted_object, self.at) != (object, range.start) || range.end > wanted.end {
            return Err(Damage::Unasked { object, range });
        }
        if kind == PageKind::Guard {
            if object > self.last_space {
                return Err(Damage::Guarded { object, range });
            }
        } else {
            let first = self
                .guards
                .partition_point(|(guarded, guard)| (*guarded, guard.end) <= (object, range.start));
            if let Some(guard) = self
                .guards
                .get(first)
                .filter(|(guarded, _)| *guarded == object)
                .and_then(|(_, guard)| guard.intersect(range))
            {
                return Err(Damage::Unguarded {
                    object,
                    range: guard,
                });
            }
        }
        self.counts.add(kind, range.page_count());
        self.at = range.end;
        if self.at == wanted.end {
            self.current += 1;
            if let Some((_, next)) = self.wanted.get(self.current) {
                self.at = next.start;
            }
        }
        Ok(())
    }

    /// All has been told.
    ///
    /// # Errors
    /// What has not.
    pub(super) fn finish(self) -> Result<Counts, Damage> {
        match self.wanted.get(self.current) {
            None => Ok(self.counts),
            Some(&(object, range)) => Err(Damage::Uncovered {
                object,
                range: PageRange {
                    start: self.at,
                    end: range.end,
                },
            }),
        }
    }
}
