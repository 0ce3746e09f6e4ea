//! The engine against a simulated kernel and source. The simulation keeps, beside what each page holds, what the
//! program may expect to read there; the two must agree at every answered fault and on every page at the end, whatever
//! the order of faults, events and replies was.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use pageferry_image::page::{PAGE_SIZE, PageRange};
use proptest::prelude::*;

use super::*;

fn pages(start: u64, count: u64) -> PageRange {
    PageRange {
        start: start * PAGE_SIZE,
        end: (start + count) * PAGE_SIZE,
    }
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
            Some(Page {
                present: Some(value),
                expected,
                either,
            }) => {
                let zapped = self
                    .removing
                    .iter()
                    .any(|range| range.contains(page * PAGE_SIZE));
                assert!(
                    value == expected || *either || zapped,
                    "page {page:#x} reads {value:?}, not {expected:?}"
                );
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
                    *slot = Page {
                        present: None,
                        expected: Value::Zero,
                        either: false,
                    };
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
    /// The next reply to be installed turns out damaged.
    spoil: bool,
}

const SOURCE_FIRST: u64 = 0x100;
const SOURCE_LAST: u64 = 0x150;
const ADDRESS_LAST: u64 = 0x1c0;

impl Sim {
    fn new(data: &[bool], options: Options) -> Self {
        let registered = [pages(0x100, 0x20), pages(0x128, 0x28)];
        let resident = [pages(0x104, 2)];
        let source: BTreeMap<u64, RunKind> = data
            .iter()
            .enumerate()
            .filter(|(_, data)| **data)
            .map(|(at, _)| (SOURCE_FIRST + at as u64, RunKind::Data))
            .collect();
        let mut root = SimSpace {
            id: Some(SpaceId::ROOT),
            ..SimSpace::default()
        };
        for page in registered.iter().flat_map(|range| page_numbers(*range)) {
            let expected = if source.contains_key(&page) {
                Value::Source(page)
            } else {
                Value::Zero
            };
            let present = resident[0].contains(page * PAGE_SIZE).then_some(expected);
            root.pages.insert(
                page,
                Page {
                    present,
                    expected,
                    either: false,
                },
            );
        }
        Self {
            engine: engine_of(&registered, &resident, &[], options),
            source,
            spaces: vec![root],
            asked: Vec::new(),
            replies: BTreeSet::new(),
            map_at: 0,
            map_done: false,
            link: true,
            written: 0,
            spoil: false,
        }
    }

    fn fork(&mut self, parent: usize) {
        if self.spaces.len() >= 5 {
            return;
        }
        let from = &self.spaces[parent];
        let mut child = SimSpace {
            pages: from.pages.clone(),
            ..SimSpace::default()
        };
        for range in &from.removing {
            for page in page_numbers(*range) {
                if let Some(slot) = child.pages.get_mut(&page) {
                    slot.either = true;
                }
            }
        }
        let child_index = self.spaces.len();
        self.spaces.push(child);
        self.spaces[parent]
            .events
            .push_back(Event::Fork { child: child_index });
    }

    /// Another thread is in the middle of dropping part of `range`: a program that races with itself has no defined
    /// result.
    fn raced(&self, space: usize, range: PageRange) -> bool {
        self.spaces[space]
            .removing
            .iter()
            .any(|other| other.intersect(range).is_some())
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
        let target = PageRange {
            start: to,
            end: to + from.byte_len(),
        };
        if from.intersect(target).is_some() || self.raced(space, from) || self.raced(space, target)
        {
            return;
        }
        self.unmap(space, target);
        let space = &mut self.spaces[space];
        for page in page_numbers(from) {
            if let Some(slot) = space.pages.remove(&page) {
                space
                    .pages
                    .insert(page - from.start / PAGE_SIZE + to / PAGE_SIZE, slot);
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
            if !space
                .removing
                .iter()
                .any(|range| range.contains((first - 1) * PAGE_SIZE))
            {
                space.pages.insert(
                    first - 1,
                    Page {
                        present: None,
                        expected: Value::Zero,
                        either: false,
                    },
                );
            }
        }
    }

    fn write(&mut self, space: usize, page: u64) {
        self.written += 1;
        let value = Value::Written(self.written);
        if let Some(slot) = self.spaces[space].pages.get_mut(&page) {
            if slot.present.is_some() {
                *slot = Page {
                    present: Some(value),
                    expected: value,
                    either: false,
                };
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
            let Some(action) = self.engine.poll_action() else {
                return done;
            };
            match action {
                Action::Fetch {
                    request,
                    source,
                    priority,
                } => {
                    assert!(self.link, "nothing is asked while the link is down");
                    assert!(
                        priority != Priority::Fault || source.page_count() == 1,
                        "a fault asks for its page alone"
                    );
                    self.asked.push(Asked { request, source });
                }
                Action::Install {
                    space,
                    range,
                    reply,
                    source,
                    ..
                } => {
                    if std::mem::take(&mut self.spoil) {
                        self.engine.handle_spoiled(reply);
                        continue;
                    }
                    let first = source / PAGE_SIZE;
                    assert!(
                        self.replies.contains(&reply),
                        "bytes are kept until they are released"
                    );
                    let result = self
                        .space(space)
                        .fill(range, |offset| Value::Source(first + offset));
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
                Action::Poison { .. } | Action::Lost { .. } => {
                    panic!("no page is lost here: {action:?}")
                }
            }
        }
        limit
    }

    fn space(&mut self, id: SpaceId) -> &mut SimSpace {
        self.spaces
            .iter_mut()
            .find(|space| space.id == Some(id))
            .expect("the engine knows only what it was told")
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
        for page in page_numbers(PageRange {
            start: source.start,
            end,
        }) {
            let kind = self.source.get(&page).copied().unwrap_or(RunKind::Zero);
            match runs.last_mut() {
                Some(run) if run.kind == kind => run.page_count += 1,
                _ => runs.push(Run {
                    page_count: 1,
                    kind,
                }),
            }
        }
        let reply = self
            .engine
            .handle_reply(request, source.start, &runs)
            .expect("the simulated source is honest");
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
        let piece: Vec<PageRange> = self
            .source
            .range(self.map_at..)
            .take(count)
            .map(|(&page, _)| pages(page, 1))
            .collect();
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
                if !self.engine.wants_beats() {
                    return;
                }
                self.engine.handle_beat();
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
        assert!(
            self.engine.is_complete(),
            "drained, yet not complete: {:?}",
            self.engine
        );
        assert!(self.replies.is_empty(), "every reply is released");
        for index in 0..self.spaces.len() {
            assert!(self.spaces[index].waiting.is_empty(), "nobody waits");
            let source_pages = self.spaces[index]
                .pages
                .values()
                .filter(|page| page.present.is_none() && matches!(page.expected, Value::Source(_)));
            assert_eq!(
                source_pages.filter(|page| !page.either).count(),
                0,
                "complete means every page of the source is here"
            );
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
        let counted = page_numbers(pages(0x100, 0x20))
            .chain(page_numbers(pages(0x128, 0x28)))
            .filter(|page| self.source.contains_key(page));
        assert_eq!(self.engine.counters().pages_total, counted.count() as u64);
    }
}

#[derive(Debug, Clone)]
enum Op {
    Touch {
        space: usize,
        page: u64,
    },
    Write {
        space: usize,
        page: u64,
    },
    Fork {
        space: usize,
    },
    Remap {
        space: usize,
        from: u64,
        to: u64,
        count: u64,
    },
    Remove {
        space: usize,
        start: u64,
        count: u64,
    },
    Unmap {
        space: usize,
        start: u64,
        count: u64,
    },
    GrowDown {
        space: usize,
    },
    Read {
        space: usize,
        limit: usize,
    },
    Zap {
        space: usize,
    },
    Poll {
        limit: usize,
    },
    Reply {
        which: usize,
        limit: u64,
    },
    Map {
        count: usize,
    },
    Drain {
        on: bool,
    },
    Link {
        up: bool,
    },
    Spoil,
    Beat,
    AnswerTime {
        us: u64,
    },
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
        1 => Just(Op::Spoil),
        2 => Just(Op::Beat),
        2 => (1..5000_u64).prop_map(|us| Op::AnswerTime { us }),
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
        in_flight_min in 1..40_u64,
        hold_beats in 0..6_u32,
    ) {
        let options = Options { bulk_request_pages_max: request_pages, bulk_pages_max: in_flight, bulk_pages_min: in_flight_min, hold_beats_max: hold_beats, bulk_requests_max: 8, drain, lost_pages: LostPages::Wait };
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
                Op::Spoil => sim.spoil = true,
                Op::Beat => sim.engine.handle_beat(),
                Op::AnswerTime { us } => sim.engine.handle_answer_time(Duration::from_micros(us)),
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

// ---- One hazard at a time ----

/// An engine for one space.
fn engine_of(
    registered: &[PageRange],
    resident: &[PageRange],
    wipe_on_fork: &[PageRange],
    options: Options,
) -> Engine {
    let missing = Missing {
        registered,
        resident,
        wipe_on_fork,
        source_offset: 0,
    };
    Engine::new(&[missing], options)
}

#[test]
fn two_spaces_have_pages_of_their_own_at_the_same_address() {
    const OFFSET: u64 = 1 << 48;
    let lazy = [pages(0x100, 0x10)];
    let missing = |source_offset, resident| Missing {
        registered: &lazy,
        resident,
        wipe_on_fork: &[],
        source_offset,
    };
    let options = Options {
        drain: false,
        ..Options::default()
    };
    let there = [pages(0x100, 4)];
    let mut engine = Engine::new(&[missing(0, &[]), missing(OFFSET, &there)], options);
    let (root, other) = (SpaceId::ROOT, SpaceId(1));
    assert_eq!(engine.pages_pending(), 0x10 + 0xc);
    let elsewhere = |range: PageRange| PageRange {
        start: range.start + OFFSET,
        end: range.end + OFFSET,
    };
    engine.handle_fault(root, address(0x105));
    engine.handle_fault(other, address(0x105));
    assert_eq!(fetch(&mut engine).1, pages(0x105, 1));
    let (request, source, _) = fetch(&mut engine);
    assert_eq!(source, elsewhere(pages(0x105, 1)));
    reply(
        &mut engine,
        request,
        source.start / PAGE_SIZE,
        RunKind::Data,
        1,
    );
    let Some(Action::Install { space, range, .. }) = engine.poll_action() else {
        panic!("the page is here");
    };
    assert_eq!((space, range), (other, pages(0x105, 1)));
    engine.handle_result(1, None);
    let child = engine.handle_fork(other).expect("it lives");
    assert_eq!(child, SpaceId(2));
    assert_eq!(engine.pages_pending(), 0x10 + 0xb, "a child adds nothing");
    // The map goes through one space after the other.
    engine.handle_map(&[pages(0x100, 0x10)]).expect("ascending");
    engine
        .handle_map(&[elsewhere(pages(0x106, 1))])
        .expect("ascending");
    engine.handle_map_end();
    assert_eq!(engine.counters().pages_total, 0x11);
    assert!(engine.is_pending(root, address(0x106)) && engine.is_pending(other, address(0x106)));
    assert!(engine.is_pending(child, address(0x106)));
    assert!(engine.is_pending(root, address(0x107)) && !engine.is_pending(other, address(0x107)));
}

/// Source pages 0x100..0x110 at the same addresses, everything pending, drain off; once on it does not hold back.
fn engine() -> Engine {
    engine_of(
        &[pages(0x100, 0x10)],
        &[],
        &[],
        Options {
            drain: false,
            hold_beats_max: 0,
            ..Options::default()
        },
    )
}

fn address(page: u64) -> u64 {
    page * PAGE_SIZE
}

/// Takes the request that has to come next.
fn fetch(engine: &mut Engine) -> (RequestId, PageRange, Priority) {
    match engine.poll_action() {
        Some(Action::Fetch {
            request,
            source,
            priority,
        }) => (request, source, priority),
        other => panic!("a request, not {other:?}"),
    }
}

/// Faults at `page`, expecting a request.
fn fault(engine: &mut Engine, page: u64) -> RequestId {
    engine.handle_fault(SpaceId::ROOT, address(page));
    let (request, source, priority) = fetch(engine);
    assert_eq!((source, priority), (pages(page, 1), Priority::Fault));
    request
}

fn reply(
    engine: &mut Engine,
    request: RequestId,
    page: u64,
    kind: RunKind,
    page_count: u64,
) -> ReplyId {
    engine
        .handle_reply(request, address(page), &[Run { page_count, kind }])
        .expect("an honest reply")
}

/// All actions there are, every install done in full.
fn run(engine: &mut Engine) -> Vec<Action> {
    let mut actions = Vec::new();
    while let Some(action) = engine.poll_action() {
        if let Action::Install { range, .. }
        | Action::Zero { range, .. }
        | Action::Poison { range, .. } = action
        {
            engine.handle_result(range.page_count(), None);
        }
        actions.push(action);
    }
    actions
}

#[test]
fn a_reply_in_flight_during_mremap_goes_to_the_new_address() {
    let mut engine = engine();
    let request = fault(&mut engine, 0x104);
    engine.handle_remap(SpaceId::ROOT, pages(0x100, 8), address(0x400));
    let reply = reply(&mut engine, request, 0x104, RunKind::Data, 1);
    let actions = run(&mut engine);
    assert_eq!(
        actions[0],
        Action::Wake {
            space: SpaceId::ROOT,
            range: pages(0x104, 1)
        },
        "who waits at the old address looks again"
    );
    assert_eq!(
        actions[1],
        Action::Install {
            space: SpaceId::ROOT,
            range: pages(0x404, 1),
            reply,
            source: address(0x104),
            prefetch: true
        }
    );
    assert_eq!(actions[2..], [Action::Release { reply }]);
}

#[test]
fn a_fault_at_the_new_address_read_before_its_remap_event_is_never_zero() {
    let mut engine = engine();
    engine.handle_fault(SpaceId::ROOT, address(0x404));
    // The kernel refuses the zero page while the event is unread.
    assert_eq!(
        engine.poll_action(),
        Some(Action::Zero {
            space: SpaceId::ROOT,
            range: pages(0x404, 1)
        })
    );
    engine.handle_result(0, Some(Stop::Again));
    engine.handle_remap(SpaceId::ROOT, pages(0x100, 8), address(0x400));
    assert_eq!(fetch(&mut engine).1, pages(0x104, 1));
}

#[test]
fn a_page_dropped_while_in_flight_is_zero_and_its_reply_goes_nowhere() {
    let mut engine = engine();
    let request = fault(&mut engine, 0x104);
    engine.handle_remove(SpaceId::ROOT, pages(0x100, 8));
    assert_eq!(
        run(&mut engine),
        [Action::Zero {
            space: SpaceId::ROOT,
            range: pages(0x104, 1)
        }]
    );
    let reply = reply(&mut engine, request, 0x104, RunKind::Data, 1);
    assert_eq!(run(&mut engine), [Action::Release { reply }]);
    assert_eq!(engine.counters().duplicate_bytes, PAGE_SIZE);
}

#[test]
fn a_mapping_made_where_one_was_unmapped_never_gets_the_old_page() {
    let mut engine = engine();
    let request = fault(&mut engine, 0x104);
    engine.handle_unmap(SpaceId::ROOT, pages(0x104, 1));
    assert_eq!(
        run(&mut engine),
        [Action::Wake {
            space: SpaceId::ROOT,
            range: pages(0x104, 1)
        }]
    );
    engine.handle_fault(SpaceId::ROOT, address(0x104));
    let reply = reply(&mut engine, request, 0x104, RunKind::Data, 1);
    assert_eq!(
        run(&mut engine),
        [
            Action::Zero {
                space: SpaceId::ROOT,
                range: pages(0x104, 1)
            },
            Action::Release { reply }
        ]
    );
}

#[test]
fn a_page_in_flight_at_a_fork_belongs_to_parent_and_child() {
    let mut engine = engine();
    let request = fault(&mut engine, 0x104);
    let child = engine.handle_fork(SpaceId::ROOT).expect("the parent lives");
    let reply = reply(&mut engine, request, 0x104, RunKind::Data, 1);
    let source = address(0x104);
    assert_eq!(
        run(&mut engine),
        [
            Action::Install {
                space: SpaceId::ROOT,
                range: pages(0x104, 1),
                reply,
                source,
                prefetch: false
            },
            Action::Install {
                space: child,
                range: pages(0x104, 1),
                reply,
                source,
                prefetch: true
            },
            Action::Release { reply },
        ]
    );
    assert_eq!(engine.counters().pages_faulted, 1, "one transfer, one page");
}

#[test]
fn a_child_born_between_two_halves_of_a_refused_install_gets_the_page_once() {
    let mut engine = engine();
    let request = fault(&mut engine, 0x104);
    let reply = reply(&mut engine, request, 0x104, RunKind::Data, 1);
    let first = engine.poll_action();
    assert!(matches!(
        first,
        Some(Action::Install {
            space: SpaceId::ROOT,
            ..
        })
    ));
    engine.handle_result(0, Some(Stop::Again));
    let child = engine.handle_fork(SpaceId::ROOT).expect("the parent lives");
    let actions = run(&mut engine);
    assert_eq!(Some(actions[0]), first);
    assert!(matches!(actions[1], Action::Install { space, .. } if space == child));
    assert_eq!(actions[2..], [Action::Release { reply }]);
}

#[test]
fn memory_wiped_on_fork_reads_as_zeros_in_the_child_and_as_itself_in_the_parent() {
    let mut engine = engine_of(
        &[pages(0x100, 0x10)],
        &[],
        &[pages(0x104, 2)],
        Options {
            drain: false,
            ..Options::default()
        },
    );
    let child = engine.handle_fork(SpaceId::ROOT).expect("the parent lives");
    engine.handle_fault(child, address(0x105));
    assert_eq!(
        run(&mut engine),
        [Action::Zero {
            space: child,
            range: pages(0x105, 1)
        }]
    );
    fault(&mut engine, 0x105);
}

#[test]
fn a_child_of_a_forgotten_parent_is_not_answered_with_zeros() {
    let mut engine = engine();
    engine.handle_gone(SpaceId::ROOT);
    assert_eq!(engine.handle_fork(SpaceId::ROOT), None);
}

#[test]
fn stack_growth_below_the_registered_start_is_zero_at_once() {
    let mut engine = engine();
    engine.handle_fault(SpaceId::ROOT, address(0xff) + 4088);
    assert_eq!(
        run(&mut engine),
        [Action::Zero {
            space: SpaceId::ROOT,
            range: pages(0xff, 1)
        }]
    );
    assert_eq!(engine.counters().pages_zero, 1);
}

#[test]
fn several_faults_for_one_page_make_one_request_and_one_install() {
    let mut engine = engine();
    let request = fault(&mut engine, 0x104);
    for _ in 0..3 {
        engine.handle_fault(SpaceId::ROOT, address(0x104) + 8);
    }
    assert_eq!(run(&mut engine), []);
    let reply = reply(&mut engine, request, 0x104, RunKind::Data, 1);
    assert_eq!(run(&mut engine).len(), 2);
    // One more, sent by a thread that was just too late.
    engine.handle_fault(SpaceId::ROOT, address(0x104));
    assert_eq!(
        engine.poll_action(),
        Some(Action::Zero {
            space: SpaceId::ROOT,
            range: pages(0x104, 1)
        })
    );
    engine.handle_result(0, Some(Stop::Exists));
    assert_eq!(
        run(&mut engine),
        [Action::Wake {
            space: SpaceId::ROOT,
            range: pages(0x104, 1)
        }],
        "the page is there: {reply:?}"
    );
    assert_eq!(engine.pages_waiting(), 0);
}

#[test]
fn a_page_that_exists_although_it_was_pending_is_kept_and_its_waiters_woken() {
    let mut engine = engine();
    let request = fault(&mut engine, 0x104);
    reply(&mut engine, request, 0x104, RunKind::Data, 1);
    assert!(matches!(engine.poll_action(), Some(Action::Install { .. })));
    engine.handle_result(0, Some(Stop::Exists));
    assert_eq!(
        engine.poll_action(),
        Some(Action::Wake {
            space: SpaceId::ROOT,
            range: pages(0x104, 1)
        })
    );
}

#[test]
fn a_page_asked_for_in_bulk_is_asked_for_once_more_when_a_thread_needs_it() {
    let mut engine = engine();
    engine.set_drain(true);
    engine.handle_map(&[pages(0x100, 0x10)]).expect("ascending");
    let (bulk, source, _) = fetch(&mut engine);
    assert_eq!(source, pages(0x100, 0x10));
    let urgent = fault(&mut engine, 0x104);
    reply(&mut engine, urgent, 0x104, RunKind::Data, 1);
    run(&mut engine);
    reply(&mut engine, bulk, 0x100, RunKind::Data, 0x10);
    let installed: Vec<_> = run(&mut engine)
        .into_iter()
        .filter_map(|action| match action {
            Action::Install { range, .. } => Some(range),
            _ => None,
        })
        .collect();
    assert_eq!(
        installed,
        [pages(0x100, 4), pages(0x105, 0xb)],
        "around the page that is there"
    );
    assert_eq!(engine.counters().duplicate_bytes, PAGE_SIZE);
}

#[test]
fn a_page_that_has_arrived_but_waits_its_turn_is_installed_first_and_not_asked_for_again() {
    let mut engine = engine();
    engine.set_drain(true);
    engine.handle_map(&[pages(0x100, 0x10)]).expect("ascending");
    let (bulk, ..) = fetch(&mut engine);
    let reply = reply(&mut engine, bulk, 0x100, RunKind::Data, 0x10);
    engine.handle_fault(SpaceId::ROOT, address(0x108));
    let source = address(0x108);
    assert_eq!(
        run(&mut engine)[0],
        Action::Install {
            space: SpaceId::ROOT,
            range: pages(0x108, 1),
            reply,
            source,
            prefetch: false
        }
    );
    assert_eq!(engine.counters().duplicate_bytes, 0);
}

#[test]
fn holes_of_the_page_map_are_never_asked_for() {
    let mut engine = engine();
    engine.set_drain(true);
    engine
        .handle_map(&[pages(0x102, 2), pages(0x108, 1)])
        .expect("ascending");
    engine.handle_map_end();
    assert_eq!(fetch(&mut engine).1, pages(0x102, 2));
    assert_eq!(fetch(&mut engine).1, pages(0x108, 1));
    assert_eq!(run(&mut engine), []);
    assert_eq!(engine.counters().pages_total, 3);
}

#[test]
fn nothing_beyond_the_page_map_is_drained() {
    let mut engine = engine();
    engine.set_drain(true);
    assert_eq!(run(&mut engine), [], "it may be terabytes of holes");
    assert!(!engine.is_complete());
}

#[test]
fn a_thread_waiting_for_a_hole_is_released_by_the_page_map() {
    let mut engine = engine();
    fault(&mut engine, 0x104);
    engine.handle_map_end();
    assert_eq!(
        run(&mut engine),
        [Action::Zero {
            space: SpaceId::ROOT,
            range: pages(0x104, 1)
        }]
    );
}

#[test]
fn a_page_the_source_cannot_read_makes_its_thread_wait_and_is_never_zero() {
    let mut engine = engine();
    let request = fault(&mut engine, 0x104);
    let lost = reply(&mut engine, request, 0x104, RunKind::Gone, 1);
    assert_eq!(
        run(&mut engine),
        [
            Action::Lost {
                source: pages(0x104, 1)
            },
            Action::Release { reply: lost }
        ]
    );
    assert_eq!(engine.pages_waiting(), 1);
    engine.handle_map(&[pages(0x104, 1)]).expect("ascending");
    engine.handle_map_end();
    engine.set_drain(true);
    assert_eq!(run(&mut engine), [], "not asked for again and again");
    assert!(!engine.is_complete(), "the source must not be given up");
    engine.set_lost_pages(LostPages::Poison);
    assert_eq!(
        run(&mut engine)[0],
        Action::Poison {
            space: SpaceId::ROOT,
            range: pages(0x104, 1)
        }
    );
    assert!(engine.is_complete());
}

#[test]
fn a_guard_found_before_a_prefetch_keeps_its_page_out_for_good() {
    let mut engine = engine();
    engine.set_drain(true);
    engine.handle_map(&[pages(0x100, 4)]).expect("ascending");
    engine.handle_map_end();
    let (bulk, ..) = fetch(&mut engine);
    reply(&mut engine, bulk, 0x100, RunKind::Data, 4);
    assert!(matches!(
        engine.poll_action(),
        Some(Action::Install { prefetch: true, .. })
    ));
    engine.handle_guarded(SpaceId::ROOT, pages(0x101, 1));
    engine.handle_result(0, None);
    let installed: Vec<_> = run(&mut engine)
        .into_iter()
        .filter(|action| matches!(action, Action::Install { .. }))
        .collect();
    assert_eq!(installed.len(), 2);
    assert!(engine.is_complete());
    engine.handle_fault(SpaceId::ROOT, address(0x101));
    assert!(
        matches!(run(&mut engine)[..], [Action::Zero { .. }]),
        "once the guard is removed the page is zeros"
    );
}

#[test]
fn an_install_across_the_border_of_two_mappings_is_halved_until_it_fits() {
    let mut engine = engine();
    engine.set_drain(true);
    engine.handle_map(&[pages(0x100, 0x10)]).expect("ascending");
    engine.handle_map_end();
    let (bulk, ..) = fetch(&mut engine);
    reply(&mut engine, bulk, 0x100, RunKind::Data, 0x10);
    let mut installed = Vec::new();
    while let Some(action) = engine.poll_action() {
        if let Action::Install { range, .. } = action {
            // Mappings end at 0x105; 0x109 has none at all, as after MADV_DONTFORK in a child.
            if [0x105, 0x109, 0x10a]
                .iter()
                .any(|&border| range.start < address(border) && address(border) < range.end)
                || range.start == address(0x109)
            {
                engine.handle_result(0, Some(Stop::NoMapping));
            } else {
                installed.extend(page_numbers(range));
                engine.handle_result(range.page_count(), None);
            }
        }
    }
    installed.sort_unstable();
    assert_eq!(
        installed,
        (0x100..0x110)
            .filter(|&page| page != 0x109)
            .collect::<Vec<_>>()
    );
    assert!(engine.is_complete());
}

#[test]
fn threads_wait_while_the_link_is_down_and_are_served_when_it_is_back() {
    let mut engine = engine();
    let lost = fault(&mut engine, 0x104);
    engine.handle_link_lost();
    engine.handle_fault(SpaceId::ROOT, address(0x108));
    assert_eq!(run(&mut engine), [], "nothing is asked, nothing is zeroed");
    engine.handle_link_restored();
    let (first, source, _) = fetch(&mut engine);
    assert_eq!(source, pages(0x104, 1));
    assert_eq!(fetch(&mut engine).1, pages(0x108, 1));
    // What the old connection still brings is not counted on.
    let late = reply(&mut engine, lost, 0x104, RunKind::Data, 1);
    assert_eq!(run(&mut engine), [Action::Release { reply: late }]);
    reply(&mut engine, first, 0x104, RunKind::Data, 1);
    assert!(matches!(run(&mut engine)[0], Action::Install { .. }));
}

#[test]
fn damaged_pages_are_dropped_and_asked_for_again() {
    let mut engine = engine();
    let request = fault(&mut engine, 0x104);
    let spoiled = reply(&mut engine, request, 0x104, RunKind::Data, 1);
    assert!(matches!(engine.poll_action(), Some(Action::Install { .. })));
    engine.handle_spoiled(spoiled);
    assert_eq!(fetch(&mut engine).1, pages(0x104, 1));
    assert_eq!(run(&mut engine), [Action::Release { reply: spoiled }]);
}

#[test]
fn a_peer_that_answers_what_was_not_asked_is_named() {
    let mut engine = engine();
    let runs = [Run {
        page_count: 1,
        kind: RunKind::Data,
    }];
    assert_eq!(
        engine.handle_reply(RequestId(0), 0, &runs),
        Err(BadPeer::UnknownRequest { request: 0 })
    );
    assert_eq!(
        engine.handle_reply(RequestId(9), 0, &runs),
        Err(BadPeer::UnknownRequest { request: 9 })
    );
    let request = fault(&mut engine, 0x104);
    for (start, page_count) in [
        (0x103, 1),
        (0x104, 2),
        (0x104, 0),
        (0x104, u64::MAX),
        (0x104, 1 << 52),
    ] {
        let answer = engine.handle_reply(
            request,
            address(start),
            &[Run {
                page_count,
                kind: RunKind::Data,
            }],
        );
        assert!(
            matches!(answer, Err(BadPeer::NotAsked { .. })),
            "{answer:?}"
        );
    }
    reply(&mut engine, request, 0x104, RunKind::Data, 1);
    engine.handle_map(&[pages(0x108, 1)]).expect("ascending");
    assert!(matches!(
        engine.handle_map(&[pages(0x107, 1)]),
        Err(BadPeer::MapOrder { .. })
    ));
}

#[test]
fn the_drain_keeps_to_its_bounds() {
    let options = Options {
        bulk_request_pages_max: 4,
        bulk_pages_max: 10,
        bulk_pages_min: 10,
        hold_beats_max: 0,
        bulk_requests_max: 2,
        ..Options::default()
    };
    let mut engine = engine_of(&[pages(0x100, 0x100)], &[], &[], options);
    engine
        .handle_map(&[pages(0x100, 0x100)])
        .expect("ascending");
    let asked = run(&mut engine);
    assert_eq!(asked.len(), 2);
    engine.set_drain(false);
    reply(&mut engine, RequestId(1), 0x100, RunKind::Data, 4);
    assert!(
        run(&mut engine)
            .iter()
            .all(|action| !matches!(action, Action::Fetch { .. })),
        "off means off"
    );
}

#[test]
fn the_neighbours_of_a_fault_come_before_the_rest_of_the_drain() {
    let mut engine = engine_of(&[pages(0x100, 0x100)], &[], &[], Options::default());
    engine
        .handle_map(&[pages(0x100, 0x100)])
        .expect("ascending");
    engine.handle_map_end();
    engine.handle_fault(SpaceId::ROOT, address(0x183));
    assert_eq!(fetch(&mut engine).1, pages(0x183, 1));
    let (_, source, priority) = fetch(&mut engine);
    assert_eq!((source, priority), (pages(0x180, 3), Priority::Ahead));
    assert_eq!(fetch(&mut engine).1, pages(0x184, 4));
    assert_eq!(engine.poll_action(), None, "nobody asked for the rest yet");
    reply(&mut engine, RequestId(1), 0x183, RunKind::Data, 1);
    run(&mut engine);
    // The first sees the fault, two more see none.
    for _ in 0..3 {
        assert!(engine.wants_beats());
        assert_eq!(engine.poll_action(), None);
        engine.handle_beat();
    }
    assert_eq!(fetch(&mut engine).2, Priority::Bulk);
}

#[test]
fn the_drain_is_narrow_while_faults_are_slow() {
    let options = Options {
        bulk_request_pages_max: 4,
        bulk_pages_max: 64,
        bulk_pages_min: 4,
        hold_beats_max: 0,
        ..Options::default()
    };
    let mut engine = engine_of(&[pages(0x100, 0x100)], &[], &[], options);
    assert!(!engine.wants_beats(), "there is nothing to drain yet");
    engine
        .handle_map(&[pages(0x100, 0x100)])
        .expect("ascending");
    engine.handle_beat();
    assert_eq!(run(&mut engine).len(), 2, "twice the narrowest");
    engine.handle_answer_time(Duration::from_micros(100));
    assert_eq!(run(&mut engine).len(), 1, "a little more");
    for _ in 0..2 {
        engine.handle_answer_time(Duration::from_millis(5));
    }
    for request in 1..=3 {
        reply(
            &mut engine,
            RequestId(request),
            0xfc + 4 * request,
            RunKind::Data,
            4,
        );
    }
    let asked = run(&mut engine);
    let asked = asked
        .iter()
        .filter(|action| matches!(action, Action::Fetch { .. }));
    assert_eq!(asked.count(), 1, "the narrowest");
}

#[test]
fn an_exec_or_exit_ends_the_space_and_completes_the_engine() {
    let mut engine = engine();
    fault(&mut engine, 0x104);
    engine.handle_gone(SpaceId::ROOT);
    assert_eq!(run(&mut engine), []);
    assert!(engine.is_complete());
}
