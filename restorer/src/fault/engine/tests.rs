//! The engine against a simulated kernel and source. The simulation keeps, beside what each page holds, what the program may expect to read there;
//! the two must agree at every answered fault and on every page at the end, whatever the order of faults, events and replies was.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use pageferry_image::page::{PAGE_SIZE, PageRange};
use proptest::prelude::*;

use super::*;

fn pages(start: u64, count: u64) -> PageRange {
    PageRange { start: start * PAGE_SIZE, end: (start + count) * PAGE_SIZE }
}

fn page_numbers(range: PageRange) -> std::ops::Range<u64> {
    range.start / PAGE_SIZE..range.end / PAGE_SIZE
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Value {
    /// What this source page holds.
    Source(u64),
    Zero,
    /// Written by the program after the crossing.
    Written(u64),
}

#[derive(Debug, Clone, Copy)]
struct Page {
    present: Option<Value>,
    expected: Value,
    /// Forked in the middle of an unfinished REMOVE: either value is right.
    either: bool,
}

#[derive(Debug, Clone, Copy)]
enum Event {
    Fork { child: usize },
    Remap { from: PageRange, to: u64 },
    Remove { range: PageRange },
    Unmap { range: PageRange },
}

#[derive(Debug, Default)]
struct SimSpace {
    id: Option<SpaceId>,
    /// Registered pages by number.
    pages: BTreeMap<u64, Page>,
    events: VecDeque<Event>,
    faults: VecDeque<u64>,
    waiting: BTreeSet<u64>,
    /// REMOVEs whose event is unread or whose zap is still to come.
    removing: Vec<PageRange>,
    /// REMOVEs whose event was read.
    zaps: Vec<PageRange>,
}

impl SimSpace {
    /// A thread reads a page: it is right, or there is no such page, or the thread waits.
    fn touch(&mut self, page: u64) {
        match self.pages.get(&page) {
            None => {}
            Some(Page { present: None, .. }) => {
                self.waiting.insert(page);
                self.faults.push_back(page);
            }
            Some(Page { present: Some(value), expected, either }) => {
                let zapped = self.removing.iter().any(|range| range.contains(page * PAGE_SIZE));
                assert!(value == expected || *either || zapped, "page {page:#x} reads {value:?}, not {expected:?}");
            }
        }
    }

    fn wake(&mut self, range: PageRange) {
        for page in page_numbers(range) {
            if self.waiting.remove(&page) {
                self.touch(page);
            }
        }
    }

    fn fill(&mut self, range: PageRange, value: impl Fn(u64) -> Value) -> (u64, Option<Stop>) {
        if !self.events.is_empty() {
            return (0, Some(Stop::Again));
        }
        if page_numbers(range).any(|page| !self.pages.contains_key(&page)) {
            return (0, Some(Stop::NoMapping));
        }
        let mut done = 0;
        for page in page_numbers(range) {
            let slot = self.pages.get_mut(&page).expect("checked above");
            if slot.present.is_some() {
                return (done, Some(Stop::Exists));
            }
            slot.present = Some(value(page - range.start / PAGE_SIZE));
            done += 1;
            self.wake(pages(page, 1));
        }
        (done, None)
    }

    fn zap(&mut self) {
        for range in self.zaps.drain(..) {
            for page in page_numbers(range) {
                if let Some(slot) = self.pages.get_mut(&page) {
                    *slot = Page { present: None, expected: Value::Zero, either: false };
                }
            }
            self.removing.retain(|other| *other != range);
        }
    }
}

#[derive(Debug, Clone)]
struct Asked {
    request: RequestId,
    source: PageRange,
}

struct Sim {
    engine: Engine,
    /// What each source page is; absent: a hole.
    source: BTreeMap<u64, RunKind>,
    spaces: Vec<SimSpace>,
    asked: Vec<Asked>,
    /// Replies on the target that the engine still needs.
    replies: BTreeSet<ReplyId>,
    map_at: u64,
    map_done: bool,
    link: bool,
    written: u64,
}

const SOURCE_FIRST: u64 = 0x100;
const SOURCE_LAST: u64 = 0x150;
const ADDRESS_LAST: u64 = 0x1c0;

impl Sim {
    fn new(data: &[bool], options: Options) -> Self {
        let registered = [pages(0x100, 0x20), pages(0x128, 0x28)];
        let resident = [pages(0x104, 2)];
        let source: BTreeMap<u64, RunKind> =
            data.iter().enumerate().filter(|(_, data)| **data).map(|(at, _)| (SOURCE_FIRST + at as u64, RunKind::Data)).collect();
        let mut root = SimSpace { id: Some(SpaceId::ROOT), ..SimSpace::default() };
        for page in registered.iter().flat_map(|range| page_numbers(*range)) {
            let expected = if source.contains_key(&page) { Value::Source(page) } else { Value::Zero };
            let present = resident[0].contains(page * PAGE_SIZE).then_some(expected);
            root.pages.insert(page, Page { present, expected, either: false });
        }
        Self {
            engine: Engine::new(&registered, &resident, &[], options),
            source,
            spaces: vec![root],
            asked: Vec::new(),
            replies: BTreeSet::new(),
            map_at: 0,
            map_done: false,
            link: true,
            written: 0,
        }
    }

    fn fork(&mut self, parent: usize) {
        if self.spaces.len() >= 5 {
            return;
        }
        let from = &self.spaces[parent];
        let mut child = SimSpace { pages: from.pages.clone(), ..SimSpace::default() };
        for range in &from.removing {
            for page in page_numbers(*range) {
                if let Some(slot) = child.pages.get_mut(&page) {
                    slot.either = true;
                }
            }
        }
        let child_index = self.spaces.len();
        self.spaces.push(child);
        self.spaces[parent].events.push_back(Event::Fork { child: child_index });
    }

    /// Another thread is in the middle of dropping part of `range`: a program that races with itself has no defined result.
    fn raced(&self, space: usize, range: PageRange) -> bool {
        self.spaces[space].removing.iter().any(|other| other.intersect(range).is_some())
    }

    fn unmap(&mut self, space: usize, range: PageRange) {
        if self.raced(space, range) {
            return;
        }
        let space = &mut self.spaces[space];
        for page in page_numbers(range) {
            space.pages.remove(&page);
        }
        space.events.push_back(Event::Unmap { range });
    }

    fn remap(&mut self, space: usize, from: PageRange, to: u64) {
        let target = PageRange { start: to, end: to + from.byte_len() };
        if from.intersect(target).is_some() || self.raced(space, from) || self.raced(space, target) {
            return;
        }
        self.unmap(space, target);
        let space = &mut self.spaces[space];
        for page in page_numbers(from) {
            if let Some(slot) = space.pages.remove(&page) {
                space.pages.insert(page - from.start / PAGE_SIZE + to / PAGE_SIZE, slot);
            }
        }
        space.events.push_back(Event::Remap { from, to });
    }

    fn remove(&mut self, space: usize, range: PageRange) {
        if self.raced(space, range) {
            return;
        }
        let space = &mut self.spaces[space];
        space.removing.push(range);
        space.events.push_back(Event::Remove { range });
    }

    fn grow_down(&mut self, space: usize) {
        let space = &mut self.spaces[space];
        if space.id.is_none() {
            return;
        }
        if let Some((&first, _)) = space.pages.iter().next() {
            if !space.removing.iter().any(|range| range.contains((first - 1) * PAGE_SIZE)) {
                space.pages.insert(first - 1, Page { present: None, expected: Value::Zero, either: false });
            }
        }
    }

    fn write(&mut self, space: usize, page: u64) {
        self.written += 1;
        let value = Value::Written(self.written);
        if let Some(slot) = self.spaces[space].pages.get_mut(&page) {
            if slot.present.is_some() {
                *slot = Page { present: Some(value), expected: value, either: false };
            }
        }
    }

    /// read(2): pending faults come before events, whatever happened first.
    fn read(&mut self, index: usize, limit: usize) {
        for _ in 0..limit {
            let space = &mut self.spaces[index];
            let Some(id) = space.id else { return };
            if let Some(page) = space.faults.pop_front() {
                self.engine.handle_fault(id, page * PAGE_SIZE + 7);
                continue;
            }
            match space.events.pop_front() {
                None => return,
                Some(Event::Fork { child }) => self.spaces[child].id = self.engine.handle_fork(id),
                Some(Event::Remap { from, to }) => self.engine.handle_remap(id, from, to),
                Some(Event::Unmap { range }) => self.engine.handle_unmap(id, range),
                Some(Event::Remove { range }) => {
                    self.engine.handle_remove(id, range);
                    space.zaps.push(range);
                }
            }
        }
    }

    fn poll(&mut self, limit: usize) -> usize {
        for done in 0..limit {
            let Some(action) = self.engine.poll_action() else { return done };
            match action {
                Action::Fetch { request, source, priority } => {
                    assert!(self.link, "nothing is asked while the link is down");
                    assert!(priority != Priority::Fault || source.page_count() == 1, "a fault asks for its page alone");
                    self.asked.push(Asked { request, source });
                }
                Action::Install { space, range, reply, source, .. } => {
                    let first = source / PAGE_SIZE;
                    assert!(self.replies.contains(&reply), "bytes are kept until they are released");
                    let result = self.space(space).fill(range, |offset| Value::Source(first + offset));
                    self.engine.handle_result(result.0, result.1);
                }
                Action::Zero { space, range } => {
                    let result = self.space(space).fill(range, |_| Value::Zero);
                    self.engine.handle_result(result.0, result.1);
                }
                Action::Wake { space, range } => self.space(space).wake(range),
                Action::Release { reply } => {
                    assert!(self.replies.remove(&reply), "a reply is released once");
                }
                Action::Poison { .. } | Action::Lost { .. } => panic!("no page is lost here: {action:?}"),
            }
        }
        limit
    }

    fn space(&mut self, id: SpaceId) -> &mut SimSpace {
        self.spaces.iter_mut().find(|space| space.id == Some(id)).expect("the engine knows only what it was told")
    }

    /// The source answers a question, or the first `limit` pages of what is left of it.
    fn reply(&mut self, which: usize, limit: u64) {
        if self.asked.is_empty() {
            return;
        }
        let which = which % self.asked.len();
        let Asked { request, source } = self.asked[which].clone();
        let end = source.start + limit.min(source.page_count()) * PAGE_SIZE;
        let mut runs: Vec<Run> = Vec::new();
        for page in page_numbers(PageRange { start: source.start, end }) {
            let kind = self.source.get(&page).copied().unwrap_or(RunKind::Zero);
            match runs.last_mut() {
                Some(run) if run.kind == kind => run.page_count += 1,
                _ => runs.push(Run { page_count: 1, kind }),
            }
        }
        let reply = self.engine.handle_reply(request, source.start, &runs).expect("the simulated source is honest");
        self.replies.insert(reply);
        if end == source.end {
            self.asked.remove(which);
        } else {
            self.asked[which].source.start = end;
        }
    }

    fn map_piece(&mut self, count: usize) {
        if self.map_done {
            return;
        }
        let piece: Vec<PageRange> = self.source.range(self.map_at..).take(count).map(|(&page, _)| pages(page, 1)).collect();
        match piece.last() {
            Some(last) => self.map_at = last.end / PAGE_SIZE,
            None => {
                self.map_done = true;
                return self.engine.handle_map_end();
            }
        }
        self.engine.handle_map(&piece).expect("ascending");
    }

    fn settle(&mut self) {
        for _ in 0..10_000 {
            let mut work = 0;
            for index in 0..self.spaces.len() {
                let space = &self.spaces[index];
                work += space.faults.len() + space.events.len() + space.zaps.len();
                self.read(index, usize::MAX);
                self.spaces[index].zap();
            }
            work += self.poll(usize::MAX);
            work += self.asked.len();
            while !self.asked.is_empty() {
                self.reply(0, u64::MAX);
            }
            if work == 0 {
                return;
            }
        }
        panic!("the engine never comes to rest");
    }

    fn finish(&mut self) {
        if !self.link {
            self.link = true;
            self.engine.handle_link_restored();
        }
        self.engine.set_drain(true);
        while !self.map_done {
            self.map_piece(8);
        }
        self.settle();
        assert!(self.engine.is_complete(), "drained, yet not complete: {:?}", self.engine);
        assert!(self.replies.is_empty(), "every reply is released");
        for index in 0..self.spaces.len() {
            assert!(self.spaces[index].waiting.is_empty(), "nobody waits");
            let source_pages = self.spaces[index].pages.values().filter(|page| page.present.is_none() && matches!(page.expected, Value::Source(_)));
            assert_eq!(source_pages.filter(|page| !page.either).count(), 0, "complete means every page of the source is here");
            let all: Vec<u64> = self.spaces[index].pages.keys().copied().collect();
            for page in all {
                self.spaces[index].touch(page);
            }
        }
        self.settle();
        for space in &mut self.spaces {
            assert!(space.waiting.is_empty(), "nobody waits");
            let all: Vec<u64> = space.pages.keys().copied().collect();
            for page in all {
                assert!(space.pages[&page].present.is_some());
                space.touch(page);
            }
        }
        assert!(self.asked.is_empty());
        let counted = page_numbers(pages(0x100, 0x20)).chain(page_numbers(pages(0x128, 0x28))).filter(|page| self.source.contains_key(page));
        assert_eq!(self.engine.counters().pages_total, counted.count() as u64);
    }
}

#[derive(Debug, Clone)]
enum Op {
    Touch { space: usize, page: u64 },
    Write { space: usize, page: u64 },
    Fork { space: usize },
    Remap { space: usize, from: u64, to: u64, count: u64 },
    Remove { space: usize, start: u64, count: u64 },
    Unmap { space: usize, start: u64, count: u64 },
    GrowDown { space: usize },
    Read { space: usize, limit: usize },
    Zap { space: usize },
    Poll { limit: usize },
    Reply { which: usize, limit: u64 },
    Map { count: usize },
    Drain { on: bool },
    Link { up: bool },
}

fn op() -> impl Strategy<Value = Op> {
    let space = 0..5_usize;
    let address = SOURCE_FIRST - 8..ADDRESS_LAST;
    let count = 1..24_u64;
    prop_oneof![
        6 => (space.clone(), address.clone()).prop_map(|(space, page)| Op::Touch { space, page }),
        3 => (space.clone(), address.clone()).prop_map(|(space, page)| Op::Write { space, page }),
        1 => space.clone().prop_map(|space| Op::Fork { space }),
        1 => (space.clone(), address.clone(), address.clone(), count.clone()).prop_map(|(space, from, to, count)| Op::Remap { space, from, to, count }),
        1 => (space.clone(), address.clone(), count.clone()).prop_map(|(space, start, count)| Op::Remove { space, start, count }),
        1 => (space.clone(), address, count).prop_map(|(space, start, count)| Op::Unmap { space, start, count }),
        1 => space.clone().prop_map(|space| Op::GrowDown { space }),
        6 => (space.clone(), 1..4_usize).prop_map(|(space, limit)| Op::Read { space, limit }),
        2 => space.prop_map(|space| Op::Zap { space }),
        8 => (1..6_usize).prop_map(|limit| Op::Poll { limit }),
        6 => (any::<usize>(), 1..12_u64).prop_map(|(which, limit)| Op::Reply { which, limit }),
        2 => (1..12_usize).prop_map(|count| Op::Map { count }),
        1 => any::<bool>().prop_map(|on| Op::Drain { on }),
        1 => any::<bool>().prop_map(|up| Op::Link { up }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, max_shrink_iters: 4096, ..ProptestConfig::default() })]
    #[test]
    fn every_page_reads_as_the_program_expects_whatever_the_order(
        data in prop::collection::vec(prop::bool::weighted(0.7), (SOURCE_LAST - SOURCE_FIRST) as usize),
        ops in prop::collection::vec(op(), 1..120),
        drain in any::<bool>(),
        request_pages in 1..20_u64,
        in_flight in 1..40_u64,
    ) {
        let options = Options { bulk_request_pages_max: request_pages, bulk_pages_max: in_flight, drain, lost_pages: LostPages::Wait };
        let mut sim = Sim::new(&data, options);
        for op in ops {
            let known = sim.spaces.len();
            match op {
                Op::Touch { space, page } => if !sim.spaces[space % known].waiting.contains(&page) || page % 2 == 0 { sim.spaces[space % known].touch(page) },
                Op::Write { space, page } => sim.write(space % known, page),
                Op::Fork { space } => sim.fork(space % known),
                Op::Remap { space, from, to, count } => sim.remap(space % known, pages(from, count), to * PAGE_SIZE),
                Op::Remove { space, start, count } => sim.remove(space % known, pages(start, count)),
                Op::Unmap { space, start, count } => sim.unmap(space % known, pages(start, count)),
                Op::GrowDown { space } => sim.grow_down(space % known),
                Op::Read { space, limit } => sim.read(space % known, limit),
                Op::Zap { space } => sim.spaces[space % known].zap(),
                Op::Poll { limit } => { sim.poll(limit); }
                Op::Reply { which, limit } => sim.reply(which, limit),
                Op::Map { count } => sim.map_piece(count),
                Op::Drain { on } => sim.engine.set_drain(on),
                Op::Link { up } => if up != sim.link {
                    sim.link = up;
                    if up { sim.engine.handle_link_restored() } else { sim.asked.clear(); sim.engine.handle_link_lost() }
                },
            }
        }
        sim.finish();
    }
}
