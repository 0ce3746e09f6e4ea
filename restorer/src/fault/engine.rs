//! Decides what every missing page needs: from whom to ask it, where to put it, when it is zeros. Pure state:
//! `handle_*` tells it what happened, [`Engine::poll_action`] says what to do next. It hides the races between a
//! running program, the kernel's events and the peer's replies.
//!
//! How it stays right: the only truth is each address space's *pending* translation, address → source page. Nothing is
//! decided when a message arrives; a fault, and a reply, are looked up in that translation at the moment they are acted
//! upon. So a reply for memory that has been moved goes to the new address, for memory that has been dropped goes
//! nowhere, and a child born while a page was on its way gets it too: there is no epoch to compare because there is no
//! remembered address. The kernel closes the remaining gap: while a change of layout is unread, UFFDIO_COPY and
//! UFFDIO_ZEROPAGE fail with EAGAIN ([`Stop::Again`]), and the decision is taken anew after the event was handled.
//!
//! **Must never do:** give zeros for a page the source may still hold, give a source page to memory the program has
//! dropped, or forget a waiting thread.
//!
//! Only private memory may be described to the engine: for shared mappings a REMOVE event does not say whether the
//! content is gone (MADV_DONTNEED keeps it), and a child's page is not its own.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::time::Duration;

use pageferry_image::page::{PAGE_SIZE, PageRange};

use super::intervals::{EVERYTHING, PageSet, Stretch, Translation};
use super::pace::Pace;
use super::prefetch::Prefetcher;

/// An address space that is being filled: that of a restored process, or of a child born since.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpaceId(pub u32);

impl SpaceId {
    /// The root of the restored tree.
    pub const ROOT: Self = Self(0);
}

/// A question to the source. Never used twice in a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// Page contents that have arrived and are kept by the caller until [`Action::Release`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReplyId(pub u64);

/// How much a request hurries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Priority {
    /// A thread waits for this one page.
    Fault,
    /// Neighbours of a page that a thread has just waited for.
    Ahead,
    /// The drain.
    Bulk,
}

/// What the source says about a run of pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunKind {
    /// The bytes follow.
    Data,
    /// Never written, or all zero bytes: it reads as zeros.
    Zero,
    /// A guard page (MADV_GUARD_INSTALL). It has no content; its marker was set when the process was rebuilt, so that a
    /// fault can come from here only after the program has removed the guard, and then the kernel's answer is zeros
    /// too.
    Guard,
    /// The source cannot read it any more. Never zeros: the thread waits, or is killed by a poisoned page.
    Gone,
}

/// A run of pages of one kind in a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Length in pages.
    pub page_count: u64,
    /// What they are.
    pub kind: RunKind,
}

/// What the caller has to do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Ask the source for these pages.
    Fetch {
        /// To be named by the reply.
        request: RequestId,
        /// Pages in the source's addresses.
        source: PageRange,
        /// Which queue it belongs to.
        priority: Priority,
    },
    /// UFFDIO_COPY from a reply, then [`Engine::handle_result`] before the next poll.
    Install {
        /// Where to.
        space: SpaceId,
        /// Where to; threads waiting there are woken.
        range: PageRange,
        /// Where from.
        reply: ReplyId,
        /// The source page that belongs to `range.start`; the reply holds it and those after it.
        source: u64,
        /// True if no thread waits for it: the range may have been made a guard region since, unseen, so look before
        /// installing and report what was found with [`Engine::handle_guarded`].
        prefetch: bool,
    },
    /// UFFDIO_ZEROPAGE of one page, then [`Engine::handle_result`] before the next poll.
    Zero {
        /// Where.
        space: SpaceId,
        /// The page.
        range: PageRange,
    },
    /// UFFDIO_POISON, then [`Engine::handle_result`] before the next poll.
    Poison {
        /// Where.
        space: SpaceId,
        /// The pages.
        range: PageRange,
    },
    /// UFFDIO_WAKE: threads there shall look again.
    Wake {
        /// Where.
        space: SpaceId,
        /// The pages.
        range: PageRange,
    },
    /// Tell the operator: the source cannot read these pages. Who touches them waits until [`Engine::set_lost_pages`]
    /// says otherwise.
    Lost {
        /// Pages in the source's addresses.
        source: PageRange,
    },
    /// The bytes of this reply are not needed any more.
    Release {
        /// Which.
        reply: ReplyId,
    },
}

/// Why an install, zero or poison ended before its last page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// EAGAIN: an event is unread or its thread has not yet left the call. Read events, then poll again.
    Again,
    /// EEXIST: the next page is there already.
    Exists,
    /// ENOENT: the range is not inside one registered mapping.
    NoMapping,
}

/// What happens to threads that touch a page the source cannot read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LostPages {
    /// They wait, for ever if need be.
    #[default]
    Wait,
    /// They get SIGBUS.
    Poison,
}

/// A message from the peer that an honest one does not send.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BadPeer {
    /// A reply to a question never asked.
    #[error("reply to request {request}, which was never made")]
    UnknownRequest {
        /// The id.
        request: u64,
    },
    /// A reply with other pages than were asked for, or the same twice.
    #[error(
        "reply to request {request} with pages {start:#x}..{end:#x}, which it does not (or no longer) ask for"
    )]
    NotAsked {
        /// The id.
        request: u64,
        /// First byte, in the source's addresses.
        start: u64,
        /// One past the last byte.
        end: u64,
    },
    /// Page map out of order.
    #[error("page map goes back from {cursor:#x} to {start:#x}")]
    MapOrder {
        /// How far the map had come.
        cursor: u64,
        /// Where the piece starts.
        start: u64,
    },
}

/// Bounds, all configurable because the right figure is about one bandwidth-delay product.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Pages of one drain request.
    pub bulk_request_pages_max: u64,
    /// Pages asked for without hurry and not yet installed.
    pub bulk_pages_max: u64,
    /// What that falls to while answers to faults are slow.
    pub bulk_pages_min: u64,
    /// Beats for which the drain at most waits for the process to become quiet, see [`super::pace`].
    pub hold_beats_max: u32,
    /// Requests without hurry that are not yet answered: in memory full of holes a request may be for a single page.
    pub bulk_requests_max: u64,
    /// Whether the drain starts switched on.
    pub drain: bool,
    /// What to do about pages that cannot be read.
    pub lost_pages: LostPages,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            bulk_request_pages_max: 64,
            bulk_pages_max: 1024,
            bulk_pages_min: 16,
            hold_beats_max: 50,
            bulk_requests_max: 128,
            drain: true,
            lost_pages: LostPages::Wait,
        }
    }
}

/// Counted from the start of the crossing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Pages of the registered ranges that hold data on the source, by its page map; grows until the map has ended.
    pub pages_total: u64,
    /// Distinct source pages that a thread had to wait for over the network.
    pub pages_faulted: u64,
    /// Pages filled with bytes from the source, counted once for each address space.
    pub pages_installed: u64,
    /// Faults answered with zeros.
    pub pages_zero: u64,
    /// Pages the source could not read.
    pub pages_lost: u64,
    /// Bytes of pages that arrived and were wanted nowhere: asked for twice, or dropped by the program meanwhile.
    pub duplicate_bytes: u64,
}

/// Guesses that wait for their turn; older ones are dropped, the drain gets there anyway.
const AHEAD_GUESSES_MAX: usize = 32;
/// Pages of guesses that may be asked for and not yet installed even when the drain holds back: a good guess spares the
/// next fault.
const AHEAD_PAGES_MAX: u64 = 64;

/// A restored address space.
#[derive(Debug, Clone, Copy)]
pub struct Missing<'a> {
    /// What is missing in it.
    pub registered: &'a [PageRange],
    /// Except this.
    pub resident: &'a [PageRange],
    /// Ranges with MADV_WIPEONFORK: the kernel keeps them registered in a child although they must read as zeros there.
    pub wipe_on_fork: &'a [PageRange],
    /// The source page of an address is the address and this, so that no two spaces have a source page in common.
    pub source_offset: u64,
}

#[derive(Debug, Default)]
struct Space {
    /// The restored space that this one is, or has been forked from.
    origin: SpaceId,
    /// Address → source page, for every page that may still hold data there and is not here yet.
    pending: Translation,
    /// The same from the source's side. Private memory: a source page has at most one address in a space.
    reverse: Translation,
    /// Pages (first byte) at which at least one thread waits for an answer.
    waiting: BTreeSet<u64>,
}

impl Space {
    fn insert(&mut self, stretch: Stretch) {
        self.pending.insert(stretch);
        self.reverse.insert(stretch.inverse());
    }

    /// Forgets that pages at these addresses are pending.
    fn remove(&mut self, range: PageRange) {
        let Self {
            pending, reverse, ..
        } = self;
        pending.remove(range, |stretch| {
            reverse.remove(stretch.inverse().range, |_| {})
        });
    }

    /// Forgets that these source pages are pending; returns the waiting pages among them.
    fn remove_source(&mut self, source: PageRange) -> Vec<u64> {
        let Self {
            pending,
            reverse,
            waiting,
            ..
        } = self;
        let mut released = Vec::new();
        reverse.remove(source, |stretch| {
            let here = stretch.inverse().range;
            pending.remove(here, |_| {});
            released.extend(waiting.range(here.start..here.end));
        });
        released
    }

    /// Removes and returns the waiting pages of a range.
    fn take_waiting(&mut self, range: PageRange) -> Vec<u64> {
        let pages: Vec<u64> = self
            .waiting
            .range(range.start..range.end)
            .copied()
            .collect();
        for page in &pages {
            self.waiting.remove(page);
        }
        pages
    }
}

#[derive(Debug)]
struct Request {
    outstanding: PageSet,
    priority: Priority,
}

/// Pages that have come (or turned out lost) and have yet to be given to every space that lacks them.
#[derive(Debug, Clone, Copy)]
struct Work {
    reply: ReplyId,
    /// The whole run, in the source's addresses.
    source: PageRange,
    /// Spaces below this one are done.
    space: SpaceId,
    /// In `space`, source pages below this one are done.
    at: u64,
    /// Pages for one call: lowered to find the border of a mapping.
    pages_max: u64,
    /// UFFDIO_POISON instead of UFFDIO_COPY; `reply` holds nothing then.
    poison: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lane {
    Urgent,
    Bulk,
}

/// The action whose result is awaited.
#[derive(Debug, Clone, Copy)]
enum Current {
    Install {
        lane: Lane,
        space: SpaceId,
        range: PageRange,
        poison: bool,
    },
    Zero {
        space: SpaceId,
        page: u64,
    },
}

/// See the module's text.
#[derive(Debug)]
pub struct Engine {
    options: Options,
    spaces: BTreeMap<SpaceId, Space>,
    spaces_made: u32,
    registered: PageSet,
    wipe_on_fork: PageSet,

    requests: HashMap<RequestId, Request>,
    requests_made: u64,
    link: bool,
    /// Source pages asked for as [`Priority::Fault`] and not answered.
    urgent: PageSet,
    /// Source pages asked for with less hurry and not answered.
    bulk: PageSet,
    bulk_requests: u64,
    /// Source pages whose bytes are here and not yet everywhere they belong.
    arrived: PageSet,
    /// Source pages the source cannot read.
    lost: PageSet,
    /// Source pages some thread waits for: a page counts once as faulted however many do.
    waited: BTreeSet<u64>,

    /// Faults to decide about.
    faults: VecDeque<(SpaceId, u64)>,
    wakes: VecDeque<(SpaceId, PageRange)>,
    urgent_works: VecDeque<Work>,
    bulk_works: VecDeque<Work>,
    /// Works left per reply.
    replies: HashMap<ReplyId, usize>,
    replies_made: u64,
    notices: VecDeque<Action>,
    current: Option<Current>,

    prefetcher: Prefetcher,
    ahead: VecDeque<PageRange>,
    pace: Pace,
    /// Where the drain goes on.
    drain_cursor: u64,
    /// Source addresses below this are covered by the page map.
    map_cursor: u64,
    map_ended: bool,
    counters: Counters,
}

impl Engine {
    /// An engine for these spaces, which get the ids from [`SpaceId::ROOT`] on.
    pub fn new(missing: &[Missing<'_>], options: Options) -> Self {
        let mut spaces = BTreeMap::new();
        let (mut all, mut wiped) = (PageSet::default(), PageSet::default());
        let mut spaces_made = 0;
        for missing in missing {
            let source = |range: PageRange| PageRange {
                start: range.start + missing.source_offset,
                end: range.end + missing.source_offset,
            };
            let origin = SpaceId(spaces_made);
            let mut space = Space {
                origin,
                ..Space::default()
            };
            for &range in missing.registered {
                all.insert(source(range));
                space.insert(Stretch {
                    range,
                    to: source(range).start,
                });
            }
            for &range in missing.resident {
                space.remove(range);
            }
            for &range in missing.wipe_on_fork {
                wiped.insert(source(range));
            }
            spaces.insert(origin, space);
            spaces_made += 1;
        }
        Self {
            options,
            spaces,
            spaces_made,
            registered: all,
            wipe_on_fork: wiped,
            requests: HashMap::new(),
            // 0 stands for "nobody asked" in a page batch.
            requests_made: 1,
            link: true,
            urgent: PageSet::default(),
            bulk: PageSet::default(),
            bulk_requests: 0,
            arrived: PageSet::default(),
            lost: PageSet::default(),
            waited: BTreeSet::new(),
            faults: VecDeque::new(),
            wakes: VecDeque::new(),
            urgent_works: VecDeque::new(),
            bulk_works: VecDeque::new(),
            replies: HashMap::new(),
            replies_made: 0,
            notices: VecDeque::new(),
            current: None,
            prefetcher: Prefetcher::default(),
            ahead: VecDeque::new(),
            pace: Pace::new(
                options.bulk_pages_min,
                options.bulk_pages_max,
                options.hold_beats_max,
            ),
            drain_cursor: 0,
            map_cursor: 0,
            map_ended: false,
            counters: Counters::default(),
        }
    }

    // ---- what the running tree does ----

    /// A thread waits at `address`.
    pub fn handle_fault(&mut self, space: SpaceId, address: u64) {
        let page = PageRange::page_of(address).start;
        if let Some(found) = self.spaces.get_mut(&space) {
            found.waiting.insert(page);
            self.faults.push_back((space, page));
        }
    }

    /// `parent` has forked. The child lacks exactly what the parent lacks: the kernel lets nothing be installed between
    /// the fork and the reading of its event. `None` if the parent has been forgotten; such a child must not be
    /// answered at all.
    pub fn handle_fork(&mut self, parent: SpaceId) -> Option<SpaceId> {
        let parent = self.spaces.get(&parent)?;
        let mut child = Space {
            origin: parent.origin,
            pending: parent.pending.clone(),
            reverse: parent.reverse.clone(),
            waiting: BTreeSet::new(),
        };
        for range in self.wipe_on_fork.iter() {
            child.remove_source(range);
        }
        let id = SpaceId(self.spaces_made);
        self.spaces_made += 1;
        self.spaces.insert(id, child);
        Some(id)
    }

    /// `from` (one range) now lies at `to`. Pages on their way follow.
    pub fn handle_remap(&mut self, space: SpaceId, from: PageRange, to: u64) {
        let Some(found) = self.spaces.get_mut(&space) else {
            return;
        };
        let mut moved = Vec::new();
        // From the source's side each of these is overwritten below.
        found.pending.remove(from, |stretch| moved.push(stretch));
        // What was pending at the destination has been unmapped by the kernel.
        found.remove(PageRange {
            start: to,
            end: to + from.byte_len(),
        });
        for stretch in moved {
            let start = to + (stretch.range.start - from.start);
            found.insert(Stretch {
                range: PageRange {
                    start,
                    end: start + stretch.range.byte_len(),
                },
                to: stretch.to,
            });
        }
        self.wake_all(space, from);
    }

    /// The program has dropped the content of `range` (MADV_DONTNEED and the like): it reads as zeros from now on,
    /// whatever is on its way.
    pub fn handle_remove(&mut self, space: SpaceId, range: PageRange) {
        let Some(found) = self.spaces.get_mut(&space) else {
            return;
        };
        found.remove(range);
        for page in found.waiting.range(range.start..range.end) {
            self.faults.push_back((space, *page));
        }
    }

    /// `range` is not mapped any more. Whoever waits there shall look again and die, or find what was mapped instead.
    pub fn handle_unmap(&mut self, space: SpaceId, range: PageRange) {
        let Some(found) = self.spaces.get_mut(&space) else {
            return;
        };
        found.remove(range);
        self.wake_all(space, range);
    }

    /// The program has made `range` a guard region, which drops its content.
    pub fn handle_guarded(&mut self, space: SpaceId, range: PageRange) {
        self.handle_remove(space, range);
    }

    /// ESRCH: the process has exited or called execve.
    pub fn handle_gone(&mut self, space: SpaceId) {
        self.spaces.remove(&space);
        match self.current {
            Some(Current::Install { space: other, .. } | Current::Zero { space: other, .. })
                if other == space =>
            {
                self.current = None
            }
            _ => {}
        }
    }

    // ---- what the source says ----

    /// A piece of the source's page map: the ranges that hold data, ascending over all pieces.
    pub fn handle_map(&mut self, ranges: &[PageRange]) -> Result<(), BadPeer> {
        for &range in ranges {
            if range.start < self.map_cursor || self.map_ended {
                return Err(BadPeer::MapOrder {
                    cursor: self.map_cursor,
                    start: range.start,
                });
            }
            self.forget_holes(PageRange {
                start: self.map_cursor,
                end: range.start,
            });
            self.counters.pages_total += self.registered.count_in(range);
            self.map_cursor = range.end;
        }
        Ok(())
    }

    /// The page map is complete: what it did not name is a hole.
    pub fn handle_map_end(&mut self) {
        if !self.map_ended {
            self.forget_holes(PageRange {
                start: self.map_cursor,
                end: EVERYTHING.end,
            });
            self.map_cursor = EVERYTHING.end;
            self.map_ended = true;
        }
    }

    /// Pages have come, all or some of those a request asked for. The returned id names their bytes in
    /// [`Action::Install`] and [`Action::Release`].
    pub fn handle_reply(
        &mut self,
        request: RequestId,
        start: u64,
        runs: &[Run],
    ) -> Result<ReplyId, BadPeer> {
        let byte_len = runs.iter().try_fold(0_u64, |sum, run| {
            sum.checked_add(run.page_count.checked_mul(PAGE_SIZE)?)
        });
        let end = byte_len
            .and_then(|byte_len| start.checked_add(byte_len))
            .unwrap_or(u64::MAX);
        let source = PageRange { start, end };
        if request.0 == 0 || request.0 >= self.requests_made {
            return Err(BadPeer::UnknownRequest { request: request.0 });
        }
        let reply = ReplyId(self.replies_made);
        self.replies_made += 1;
        // A known but closed request was given up when the link was lost: what it brings has been asked for again.
        if let Some(open) = self.requests.get_mut(&request) {
            if source.is_empty() || start % PAGE_SIZE != 0 || !open.outstanding.covers(source) {
                return Err(BadPeer::NotAsked {
                    request: request.0,
                    start,
                    end,
                });
            }
            let urgent = open.priority == Priority::Fault;
            open.outstanding.remove(source);
            if open.outstanding.is_empty() {
                self.requests.remove(&request);
                self.bulk_requests -= u64::from(!urgent);
            }
            if urgent {
                self.urgent.remove(source);
            } else {
                self.bulk.remove(source);
            }
            self.replies.insert(reply, 1);
            let mut at = start;
            for run in runs {
                let range = PageRange {
                    start: at,
                    end: at + run.page_count * PAGE_SIZE,
                };
                match run.kind {
                    RunKind::Data => self.accept(reply, range, urgent),
                    RunKind::Zero | RunKind::Guard => self.forget_holes(range),
                    RunKind::Gone => self.lose(range),
                }
                at = range.end;
            }
            self.finish(reply);
        } else {
            self.counters.duplicate_bytes += data_bytes(runs);
            self.notices.push_back(Action::Release { reply });
        }
        Ok(reply)
    }

    /// The bytes of a reply are not what the source read. They are dropped and their pages asked for again. Also the
    /// answer to an [`Action::Install`] from that reply.
    pub fn handle_spoiled(&mut self, reply: ReplyId) {
        self.current = None;
        for lane in [Lane::Urgent, Lane::Bulk] {
            let (spoiled, kept) = std::mem::take(self.works(lane))
                .into_iter()
                .partition(|work: &Work| work.reply == reply);
            *self.works(lane) = kept;
            for work in spoiled {
                self.arrived.remove(work.source);
                self.finish(reply);
            }
        }
        self.drain_cursor = 0;
        self.ask_again();
    }

    /// The connections are gone: everything asked for has to be asked again. Threads wait.
    pub fn handle_link_lost(&mut self) {
        self.link = false;
        self.requests.clear();
        self.urgent = PageSet::default();
        self.bulk = PageSet::default();
        self.bulk_requests = 0;
        self.pace.handle_link_lost();
    }

    /// The source can be asked again.
    pub fn handle_link_restored(&mut self) {
        self.link = true;
        self.drain_cursor = 0;
        self.ask_again();
    }

    // ---- how time goes by ----

    /// The first answer to a [`Priority::Fault`] request came so long after its fetch.
    pub fn handle_answer_time(&mut self, took: Duration) {
        self.pace.handle_answer(took);
    }

    /// A beat has passed. They need to come only while [`Engine::wants_beats`].
    pub fn handle_beat(&mut self) {
        self.pace.handle_beat(!self.urgent.is_empty());
    }

    /// Whether the drain holds back and waits for beats to go on.
    pub fn wants_beats(&self) -> bool {
        // Before the first piece of the page map there is nothing to drain, and perhaps nothing runs yet: that is no quiet.
        self.options.drain && self.link && self.map_cursor > 0 && self.pace.wants_beats()
    }

    // ---- what the operator wants ----

    /// Off: only what is touched is fetched.
    pub fn set_drain(&mut self, on: bool) {
        self.options.drain = on;
    }

    /// What happens to pages that cannot be read, including those already known.
    pub fn set_lost_pages(&mut self, policy: LostPages) {
        if policy == LostPages::Poison && self.options.lost_pages == LostPages::Wait {
            let lost: Vec<_> = self.lost.iter().collect();
            for range in lost {
                self.poison(range);
            }
        }
        self.options.lost_pages = policy;
    }

    // ---- what became of an action ----

    /// The last `Install`, `Zero` or `Poison` did `page_count` pages and then ended or stopped.
    pub fn handle_result(&mut self, page_count: u64, stop: Option<Stop>) {
        match self.current.take() {
            None => {}
            Some(Current::Zero { space, page }) => self.zero_result(space, page, stop),
            Some(Current::Install {
                lane,
                space,
                range,
                poison,
            }) => self.install_result(lane, space, range, poison, page_count, stop),
        }
    }

    // ---- what to do ----

    /// The next thing to do; `None` until something happens. After `Install`, `Zero` and `Poison` the result has to be
    /// reported first.
    pub fn poll_action(&mut self) -> Option<Action> {
        debug_assert!(
            self.current.is_none(),
            "the result of the last action has not been reported"
        );
        if let Some((space, range)) = self.wakes.pop_front() {
            return Some(Action::Wake { space, range });
        }
        while let Some((space, page)) = self.faults.pop_front() {
            if let Some(action) = self.answer(space, page) {
                return Some(action);
            }
        }
        if let Some(action) = self.next_install(Lane::Urgent) {
            return Some(action);
        }
        if let Some(notice) = self.notices.pop_front() {
            return Some(notice);
        }
        // Requests before installs: the link stays busy while pages are copied.
        if let Some(action) = self.next_bulk_fetch() {
            return Some(action);
        }
        if let Some(action) = self.next_install(Lane::Bulk) {
            return Some(action);
        }
        self.notices.pop_front()
    }

    /// Everything the source holds is here, in every space: nothing will ever be asked again.
    pub fn is_complete(&self) -> bool {
        // Nobody is left to wait for anything.
        if self.spaces.is_empty() {
            return true;
        }
        self.map_ended
            && self.requests.is_empty()
            && self.replies.is_empty()
            && self.faults.is_empty()
            && self.wakes.is_empty()
            && self.notices.is_empty()
            && self
                .spaces
                .values()
                .all(|space| space.pending.is_empty() && space.waiting.is_empty())
    }

    /// See [`Counters`].
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Source pages still pending: of each restored space and those forked from it, what the one lacks that lacks most. Before
    /// the page map has ended, holes are among them.
    pub fn pages_pending(&self) -> u64 {
        let mut most: BTreeMap<SpaceId, u64> = BTreeMap::new();
        for space in self.spaces.values() {
            let most = most.entry(space.origin).or_default();
            *most = (*most).max(space.pending.page_count());
        }
        most.values().sum()
    }

    /// Pages at which threads wait now.
    pub fn pages_waiting(&self) -> u64 {
        self.spaces
            .values()
            .map(|space| space.waiting.len() as u64)
            .sum()
    }

    /// Whether the page at `address` may still hold data that is not here.
    pub fn is_pending(&self, space: SpaceId, address: u64) -> bool {
        self.spaces
            .get(&space)
            .is_some_and(|space| space.pending.get(address).is_some())
    }

    // ---- inside ----

    /// Every waiting thread is looked at again.
    fn ask_again(&mut self) {
        for (&id, space) in &self.spaces {
            self.faults
                .extend(space.waiting.iter().map(|&page| (id, page)));
        }
    }

    /// What a waiting thread needs, by the state of this moment.
    fn answer(&mut self, space: SpaceId, page: u64) -> Option<Action> {
        let found = self.spaces.get(&space)?;
        if !found.waiting.contains(&page) {
            return None;
        }
        let Some(source) = found.pending.get(page) else {
            self.current = Some(Current::Zero { space, page });
            return Some(Action::Zero {
                space,
                range: PageRange::page_of(page),
            });
        };
        if self.waited.insert(source) {
            self.counters.pages_faulted += 1;
        }
        if self.arrived.contains(source) {
            self.hurry(source);
            return None;
        }
        // A page asked for in bulk is asked for again: it may stand behind megabytes. Once; the second copy is counted.
        if !self.link || self.urgent.contains(source) || self.lost.contains(source) {
            return None;
        }
        self.pace.handle_fault();
        if self.options.drain {
            if self.ahead.len() == AHEAD_GUESSES_MAX {
                self.ahead.pop_front();
            }
            self.ahead.push_back(self.prefetcher.handle_fault(source));
        }
        Some(self.fetch(PageRange::page_of(source), Priority::Fault))
    }

    fn fetch(&mut self, source: PageRange, priority: Priority) -> Action {
        let request = RequestId(self.requests_made);
        self.requests_made += 1;
        let mut outstanding = PageSet::default();
        outstanding.insert(source);
        self.requests.insert(
            request,
            Request {
                outstanding,
                priority,
            },
        );
        match priority {
            Priority::Fault => self.urgent.insert(source),
            Priority::Ahead | Priority::Bulk => {
                self.bulk_requests += 1;
                self.bulk.insert(source);
            }
        }
        Action::Fetch {
            request,
            source,
            priority,
        }
    }

    /// Moves a page that is here, but queued behind others, to the front.
    fn hurry(&mut self, source: u64) {
        let holds = |work: &&Work| !work.poison && work.source.contains(source);
        if self.urgent_works.iter().any(|work| holds(&work)) {
            return;
        }
        if let Some(work) = self.bulk_works.iter().find(holds).copied() {
            self.queue_page(&work, source);
        }
    }

    /// Queues one page of a work ahead of the rest of it; the rest passes over it later, because it is not pending
    /// then.
    fn queue_page(&mut self, work: &Work, source: u64) {
        let page = PageRange::page_of(source);
        *self.replies.entry(work.reply).or_default() += 1;
        self.urgent_works.push_back(Work {
            source: page,
            space: SpaceId::ROOT,
            at: page.start,
            pages_max: u64::MAX,
            ..*work
        });
    }

    /// Takes the bytes of a run in.
    fn accept(&mut self, reply: ReplyId, source: PageRange, urgent: bool) {
        let mut wanted = 0;
        for page in (source.start..source.end).step_by(PAGE_SIZE as usize) {
            wanted += u64::from(
                !self.arrived.contains(page)
                    && self
                        .spaces
                        .values()
                        .any(|space| space.reverse.get(page).is_some()),
            );
        }
        self.counters.duplicate_bytes += (source.page_count() - wanted) * PAGE_SIZE;
        if wanted == 0 {
            return;
        }
        let work = Work {
            reply,
            source,
            space: SpaceId::ROOT,
            at: source.start,
            pages_max: u64::MAX,
            poison: false,
        };
        self.arrived.insert(source);
        *self.replies.entry(reply).or_default() += 1;
        if urgent {
            self.urgent_works.push_back(work);
        } else {
            let waited: Vec<u64> = self
                .waited
                .range(source.start..source.end)
                .copied()
                .collect();
            for page in waited {
                self.queue_page(&work, page);
            }
            self.bulk_works.push_back(work);
        }
    }

    /// These source pages hold nothing: whoever waits for them gets zeros, and so does every later fault.
    fn forget_holes(&mut self, source: PageRange) {
        if source.is_empty() {
            return;
        }
        for (&id, space) in &mut self.spaces {
            for page in space.remove_source(source) {
                self.faults.push_back((id, page));
            }
        }
        self.forget_waited(source);
    }

    fn forget_waited(&mut self, source: PageRange) {
        let pages: Vec<u64> = self
            .waited
            .range(source.start..source.end)
            .copied()
            .collect();
        for page in pages {
            self.waited.remove(&page);
        }
    }

    fn lose(&mut self, source: PageRange) {
        self.counters.pages_lost += source.page_count() - self.lost.count_in(source);
        self.lost.insert(source);
        self.notices.push_back(Action::Lost { source });
        if self.options.lost_pages == LostPages::Poison {
            self.poison(source);
        }
    }

    fn poison(&mut self, source: PageRange) {
        let reply = ReplyId(self.replies_made);
        self.replies_made += 1;
        self.replies.insert(reply, 1);
        let work = Work {
            reply,
            source,
            space: SpaceId::ROOT,
            at: source.start,
            pages_max: u64::MAX,
            poison: true,
        };
        self.urgent_works.push_back(work);
    }

    fn works(&mut self, lane: Lane) -> &mut VecDeque<Work> {
        match lane {
            Lane::Urgent => &mut self.urgent_works,
            Lane::Bulk => &mut self.bulk_works,
        }
    }

    /// The next piece of the first work that some space still lacks, looked up now.
    fn next_install(&mut self, lane: Lane) -> Option<Action> {
        while let Some(mut work) = self.works(lane).pop_front() {
            while let Some((&id, space)) = self.spaces.range(work.space..).next() {
                if id > work.space {
                    (work.space, work.at) = (id, work.source.start);
                }
                let window = PageRange {
                    start: work.at,
                    end: work.source.end,
                };
                let Some(stretch) = space.reverse.first_in(window) else {
                    (work.space, work.at) = (SpaceId(id.0 + 1), work.source.start);
                    continue;
                };
                work.at = stretch.range.start;
                let pages = stretch.range.page_count().min(work.pages_max);
                let range = PageRange {
                    start: stretch.to,
                    end: stretch.to + pages * PAGE_SIZE,
                };
                let prefetch = pages > 1 || !space.waiting.contains(&range.start);
                self.current = Some(Current::Install {
                    lane,
                    space: id,
                    range,
                    poison: work.poison,
                });
                self.works(lane).push_front(work);
                return Some(if work.poison {
                    Action::Poison { space: id, range }
                } else {
                    Action::Install {
                        space: id,
                        range,
                        reply: work.reply,
                        source: work.at,
                        prefetch,
                    }
                });
            }
            if !work.poison {
                self.arrived.remove(work.source);
            }
            self.forget_waited(work.source);
            self.finish(work.reply);
        }
        None
    }

    fn finish(&mut self, reply: ReplyId) {
        if let Some(left) = self.replies.get_mut(&reply) {
            *left -= 1;
            if *left == 0 {
                self.replies.remove(&reply);
                self.notices.push_back(Action::Release { reply });
            }
        }
    }

    fn next_bulk_fetch(&mut self) -> Option<Action> {
        if !self.link || !self.options.drain {
            return None;
        }
        if self.bulk_requests >= self.options.bulk_requests_max {
            return None;
        }
        let busy = self.bulk.page_count() + self.arrived.page_count();
        let room_in = |window: u64| {
            window
                .saturating_sub(busy)
                .min(self.options.bulk_request_pages_max)
        };
        let room = room_in(self.pace.window());
        let ahead_window = AHEAD_PAGES_MAX.min(self.options.bulk_pages_max);
        let ahead_room = room.max(room_in(ahead_window));
        if ahead_room == 0 {
            return None;
        }
        while let Some(guess) = self.ahead.pop_front() {
            if let Some(source) = self.next_wanted(guess, ahead_room) {
                if source.end < guess.end {
                    self.ahead.push_front(PageRange {
                        start: source.end,
                        end: guess.end,
                    });
                }
                return Some(self.fetch(source, Priority::Ahead));
            }
        }
        if room == 0 {
            return None;
        }
        // Only where the page map has been: beyond it lie perhaps terabytes of holes.
        let known = PageRange {
            start: self.drain_cursor,
            end: self.map_cursor.max(self.drain_cursor),
        };
        let source = self.next_wanted(known, room).or_else(|| {
            self.next_wanted(
                PageRange {
                    start: 0,
                    end: known.start,
                },
                room,
            )
        })?;
        self.drain_cursor = source.end;
        Some(self.fetch(source, Priority::Bulk))
    }

    /// The lowest run of source pages in `window` that some space lacks and that is not on its way.
    fn next_wanted(&self, window: PageRange, pages_max: u64) -> Option<PageRange> {
        let mut at = window.start;
        while at < window.end {
            let rest = PageRange {
                start: at,
                end: window.end,
            };
            let wanted = self
                .spaces
                .values()
                .filter_map(|space| space.reverse.first_in(rest))
                .map(|stretch| stretch.range)
                .min()?;
            let mut run = PageRange {
                start: wanted.start,
                end: wanted.end.min(wanted.start + pages_max * PAGE_SIZE),
            };
            for on_its_way in [&self.bulk, &self.urgent, &self.arrived, &self.lost] {
                if let Some(busy) = on_its_way.first_in(run) {
                    if busy.start == run.start {
                        at = busy.end;
                        run.end = run.start;
                        break;
                    }
                    run.end = busy.start;
                }
            }
            if !run.is_empty() {
                return Some(run);
            }
        }
        None
    }

    fn wake_all(&mut self, space: SpaceId, range: PageRange) {
        let Some(found) = self.spaces.get_mut(&space) else {
            return;
        };
        for page in found.take_waiting(range) {
            self.wakes.push_back((space, PageRange::page_of(page)));
        }
    }

    fn zero_result(&mut self, space: SpaceId, page: u64, stop: Option<Stop>) {
        match stop {
            Some(Stop::Again) => self.faults.push_front((space, page)),
            Some(Stop::Exists | Stop::NoMapping) => self.wake_all(space, PageRange::page_of(page)),
            None => {
                self.counters.pages_zero += 1;
                if let Some(found) = self.spaces.get_mut(&space) {
                    found.waiting.remove(&page);
                }
            }
        }
    }

    fn install_result(
        &mut self,
        lane: Lane,
        space: SpaceId,
        range: PageRange,
        poison: bool,
        page_count: u64,
        stop: Option<Stop>,
    ) {
        let page_count = page_count.min(range.page_count());
        let done = PageRange {
            start: range.start,
            end: range.start + page_count * PAGE_SIZE,
        };
        let Some(found) = self.spaces.get_mut(&space) else {
            return;
        };
        found.remove(done);
        found.take_waiting(done);
        if !poison {
            self.counters.pages_installed += page_count;
        }
        let rest = range.page_count() - page_count;
        let next = PageRange {
            start: done.end,
            end: done.end + PAGE_SIZE,
        };
        let mut pages_max = u64::MAX;
        match stop {
            Some(Stop::Exists) if rest > 0 => {
                found.remove(next);
                self.wake_all(space, next);
            }
            // A mapping ends inside the range, and the kernel fills only within one: halve until it fits. A single page
            // that has no mapping needs none; the next may be like it, so go on by single pages until one fits.
            Some(Stop::NoMapping) if rest > 1 => pages_max = rest / 2,
            Some(Stop::NoMapping) if rest == 1 => {
                found.remove(next);
                self.wake_all(space, next);
                pages_max = 1;
            }
            _ => {}
        }
        if let Some(work) = self.works(lane).front_mut() {
            work.pages_max = pages_max;
        }
    }
}

fn data_bytes(runs: &[Run]) -> u64 {
    runs.iter()
        .filter(|run| run.kind == RunKind::Data)
        .fold(0, |sum, run| {
            sum.saturating_add(run.page_count.saturating_mul(PAGE_SIZE))
        })
}

#[cfg(test)]
mod tests;
