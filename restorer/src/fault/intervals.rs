//! Sets and translations of page ranges: what the engine's bookkeeping is made of. Pure arithmetic over ordered maps.
//!
//! Memory is proportional to the number of separate ranges, never to the number of pages: a terabyte that nobody has
//! touched is one entry. Nothing here may assume that a peer or a program sends ranges in order.

use std::collections::BTreeMap;

use pageferry_image::page::{PAGE_SIZE, PageRange};

/// A stretch of pages and where its first page leads; page `n` of it leads to `to + n` pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stretch {
    /// The pages.
    pub range: PageRange,
    /// What `range.start` is translated to, in bytes.
    pub to: u64,
}

impl Stretch {
    /// The part inside `window`, if any.
    fn clip(self, window: PageRange) -> Option<Self> {
        let range = self.range.intersect(window)?;
        Some(Self {
            range,
            to: self.to + (range.start - self.range.start),
        })
    }

    /// The same stretch seen from the other side.
    pub fn inverse(self) -> Self {
        Self {
            range: PageRange {
                start: self.to,
                end: self.to + self.range.byte_len(),
            },
            to: self.range.start,
        }
    }
}

/// Disjoint page ranges, each translated by a constant offset of its own.
#[derive(Debug, Clone, Default)]
pub struct Translation {
    // start → (end, to)
    stretches: BTreeMap<u64, (u64, u64)>,
    pages: u64,
}

impl Translation {
    /// Pages in the domain.
    pub fn page_count(&self) -> u64 {
        self.pages
    }

    /// True if nothing is translated.
    pub fn is_empty(&self) -> bool {
        self.stretches.is_empty()
    }

    /// Adds a stretch; whatever its pages led to before is forgotten.
    pub fn insert(&mut self, stretch: Stretch) {
        if stretch.range.is_empty() {
            return;
        }
        self.remove(stretch.range, |_| {});
        self.stretches
            .insert(stretch.range.start, (stretch.range.end, stretch.to));
        self.pages += stretch.range.page_count();
    }

    /// Takes every page of `window` out and shows what was taken, ascending.
    pub fn remove(&mut self, window: PageRange, mut taken: impl FnMut(Stretch)) {
        while let Some(stretch) = self.first_in(window) {
            // `first_in` clips, so the whole stretch has to be found again to know what stays on either side.
            let Some((&start, &(end, to))) =
                self.stretches.range(..=stretch.range.start).next_back()
            else {
                return;
            };
            self.stretches.remove(&start);
            if start < stretch.range.start {
                self.stretches.insert(start, (stretch.range.start, to));
            }
            if stretch.range.end < end {
                self.stretches
                    .insert(stretch.range.end, (end, to + (stretch.range.end - start)));
            }
            self.pages -= stretch.range.page_count();
            taken(stretch);
        }
    }

    /// Where the page at `address` leads.
    pub fn get(&self, address: u64) -> Option<u64> {
        self.around(address)
            .map(|stretch| stretch.to + (address - stretch.range.start))
    }

    /// The whole stretch that holds `address`.
    pub fn around(&self, address: u64) -> Option<Stretch> {
        let (&start, &(end, to)) = self.stretches.range(..=address).next_back()?;
        (address < end).then_some(Stretch {
            range: PageRange { start, end },
            to,
        })
    }

    /// The lowest stretch that has pages in `window`, cut to it.
    pub fn first_in(&self, window: PageRange) -> Option<Stretch> {
        if window.is_empty() {
            return None;
        }
        if let Some(stretch) = self.around(window.start) {
            return stretch.clip(window);
        }
        let (&start, &(end, to)) = self.stretches.range(window.start..window.end).next()?;
        Stretch {
            range: PageRange { start, end },
            to,
        }
        .clip(window)
    }

    /// All stretches, ascending.
    pub fn iter(&self) -> impl Iterator<Item = Stretch> + '_ {
        self.stretches.iter().map(|(&start, &(end, to))| Stretch {
            range: PageRange { start, end },
            to,
        })
    }
}

/// A set of pages.
#[derive(Debug, Clone, Default)]
pub struct PageSet(Translation);

impl PageSet {
    /// Pages in the set.
    pub fn page_count(&self) -> u64 {
        self.0.page_count()
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Adds pages; those already present stay.
    pub fn insert(&mut self, range: PageRange) {
        self.0.insert(Stretch {
            range,
            to: range.start,
        });
    }

    /// Takes pages out and says how many were there.
    pub fn remove(&mut self, range: PageRange) -> u64 {
        let mut taken = 0;
        self.0
            .remove(range, |stretch| taken += stretch.range.page_count());
        taken
    }

    /// True if the page at `address` is in the set.
    pub fn contains(&self, address: u64) -> bool {
        self.0.around(address).is_some()
    }

    /// True if every page of `range` is in the set.
    pub fn covers(&self, range: PageRange) -> bool {
        let mut at = range.start;
        while at < range.end {
            match self.0.around(at) {
                Some(stretch) => at = stretch.range.end,
                None => return false,
            }
        }
        true
    }

    /// The lowest run of `window` that is in the set.
    pub fn first_in(&self, window: PageRange) -> Option<PageRange> {
        self.0.first_in(window).map(|stretch| stretch.range)
    }

    /// Pages of `window` in the set.
    pub fn count_in(&self, mut window: PageRange) -> u64 {
        let mut pages = 0;
        while let Some(run) = self.first_in(window) {
            pages += run.page_count();
            window.start = run.end;
        }
        pages
    }

    /// All runs, ascending.
    pub fn iter(&self) -> impl Iterator<Item = PageRange> + '_ {
        self.0.iter().map(|stretch| stretch.range)
    }
}

/// Every page below the last: the window that holds everything.
pub const EVERYTHING: PageRange = PageRange {
    start: 0,
    end: !(PAGE_SIZE - 1),
};

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn pages(start: u64, count: u64) -> PageRange {
        PageRange {
            start: start * PAGE_SIZE,
            end: (start + count) * PAGE_SIZE,
        }
    }

    proptest! {
        #[test]
        fn a_translation_agrees_with_a_map_of_single_pages(steps in prop::collection::vec((any::<bool>(), 0_u64..40, 1_u64..12, 0_u64..1000), 1..60)) {
            let mut translation = Translation::default();
            let mut model = BTreeMap::new();
            for (insert, start, count, to) in steps {
                if insert {
                    translation.insert(Stretch { range: pages(start, count), to: to * PAGE_SIZE });
                    for page in 0..count {
                        model.insert(start + page, to + page);
                    }
                } else {
                    let mut taken = BTreeMap::new();
                    translation.remove(pages(start, count), |stretch| {
                        for page in 0..stretch.range.page_count() {
                            taken.insert(stretch.range.start / PAGE_SIZE + page, stretch.to / PAGE_SIZE + page);
                        }
                    });
                    let expected: BTreeMap<_, _> = (start..start + count).filter_map(|page| model.remove(&page).map(|to| (page, to))).collect();
                    prop_assert_eq!(taken, expected);
                }
                prop_assert_eq!(translation.page_count(), model.len() as u64);
                for page in 0..60 {
                    prop_assert_eq!(translation.get(page * PAGE_SIZE), model.get(&page).map(|to| to * PAGE_SIZE));
                    let window = pages(page, 7);
                    let first = model.range(page..page + 7).next().map(|(page, to)| (page * PAGE_SIZE, to * PAGE_SIZE));
                    prop_assert_eq!(translation.first_in(window).map(|stretch| (stretch.range.start, stretch.to)), first);
                }
            }
        }
    }
}
