//! The memory in which pages lie from when they are read until their peer has acknowledged them: rooms of a few sizes, made once,
//! which all links of a page server share. So eight restores take what one takes.
//!
//! Each link has the same share of the rooms of each size: a peer that does not acknowledge keeps its share, and what it had when
//! there were fewer. None waits for another's peer: who has no room at all gets one beside the others if they are all taken,
//! which ends with its use.

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pageferry_image::page::PAGE_LEN;
use tokio::sync::Notify;

/// Sizes of rooms.
const SIZES: usize = 3;
/// Pages of a room, ascending, and how many there are: 20 MiB. A single restore asks for 64 pages at a time or fewer, and for no
/// more than 1024 pages and 128 times before the first has come: half of the rooms of each size, which are for its bulk
/// link, hold that.
const ROOMS: [Size; SIZES] = [
    Size {
        pages: 4,
        count: 256,
    },
    Size {
        pages: 16,
        count: 128,
    },
    Size {
        pages: 64,
        count: 32,
    },
];

/// Rooms of one size.
#[derive(Debug, Clone, Copy)]
struct Size {
    pages: usize,
    count: usize,
}

/// All rooms. Cloning shares them.
#[derive(Debug, Clone)]
pub struct Rooms(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    sizes: [Size; SIZES],
    state: Mutex<State>,
    /// A room came back, or a link ended.
    changed: Notify,
}

struct State {
    /// Of each size; the last one that came back is taken first: it is still in the processor's cache.
    free: [Vec<Box<[u8]>>; SIZES],
    links: usize,
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("State")
            .field("free", &self.free.each_ref().map(Vec::len))
            .field("links", &self.links)
            .finish()
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Rooms {
    fn default() -> Self {
        Self::new(ROOMS)
    }
}

impl Rooms {
    fn new(sizes: [Size; SIZES]) -> Self {
        // Written to, so that they are there now and not only when many ask.
        let free = sizes.map(|Size { pages, count }| {
            let room = |_| vec![u8::MAX; pages * PAGE_LEN].into_boxed_slice();
            (0..count).map(room).collect()
        });
        Self(Arc::new(Shared {
            sizes,
            state: Mutex::new(State { free, links: 0 }),
            changed: Notify::new(),
        }))
    }

    /// The share of one more link; it ends with its last clone.
    pub fn share(&self) -> Share {
        self.0.state().links += 1;
        Share(Arc::new(Held {
            shared: Arc::clone(&self.0),
            counts: Default::default(),
        }))
    }
}

/// What a link may have of the rooms. Its streams have clones.
#[derive(Debug, Clone)]
pub struct Share(Arc<Held>);

#[derive(Debug)]
struct Held {
    shared: Arc<Shared>,
    /// Rooms of each size that the link has; changed under the lock only.
    counts: [AtomicUsize; SIZES],
}

impl Drop for Held {
    fn drop(&mut self) {
        self.shared.state().links -= 1;
        self.shared.changed.notify_waiters();
    }
}

impl Share {
    /// Waits for room for so many pages, or for as many as there is room for at once.
    pub async fn take(&self, page_count: u64) -> Room {
        loop {
            let changed = self.0.shared.changed.notified();
            tokio::pin!(changed);
            // From here on no change is missed.
            changed.as_mut().enable();
            if let Some(room) = self.try_take(page_count) {
                return room;
            }
            changed.await;
        }
    }

    fn try_take(&self, page_count: u64) -> Option<Room> {
        let shared = &self.0.shared;
        let fits = |size: &Size| size.pages as u64 >= page_count;
        let smallest = shared.sizes.iter().position(fits).unwrap_or(SIZES - 1);
        let mut state = shared.state();
        let counts = &self.0.counts;
        let links = state.links;
        let may_have = |size: &usize| {
            let held = counts[*size].load(Ordering::Relaxed);
            held < (shared.sizes[*size].count / links).max(1)
        };
        let found = (smallest..SIZES)
            .filter(may_have)
            .find_map(|size| Some((size, state.free[size].pop()?)));
        let (size, bytes, is_extra) = match found {
            Some((size, bytes)) => (size, bytes, false),
            None if counts.iter().all(|one| one.load(Ordering::Relaxed) == 0) => {
                let len = shared.sizes[smallest].pages * PAGE_LEN;
                (smallest, vec![0; len].into_boxed_slice(), true)
            }
            None => return None,
        };
        counts[size].fetch_add(1, Ordering::Relaxed);
        Some(Room {
            bytes,
            size,
            is_extra,
            held: Arc::clone(&self.0),
        })
    }
}

/// Memory for some pages, which is given back when it is dropped.
pub struct Room {
    bytes: Box<[u8]>,
    size: usize,
    is_extra: bool,
    held: Arc<Held>,
}

impl fmt::Debug for Room {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Room")
            .field("len", &self.bytes.len())
            .field("is_extra", &self.is_extra)
            .finish_non_exhaustive()
    }
}

impl AsRef<[u8]> for Room {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl AsMut<[u8]> for Room {
    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        let shared = &self.held.shared;
        let mut state = shared.state();
        if !self.is_extra {
            state.free[self.size].push(bytes);
        }
        self.held.counts[self.size].fetch_sub(1, Ordering::Relaxed);
        drop(state);
        shared.changed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// So many rooms of one page, and none of another size that is worth mentioning.
    fn rooms(count: usize) -> Rooms {
        let few = |pages| Size { pages, count: 0 };
        Rooms::new([Size { pages: 1, count }, few(2), few(3)])
    }

    fn take_all(share: &Share) -> Vec<Room> {
        std::iter::from_fn(|| share.try_take(1)).collect()
    }

    #[test]
    fn one_link_may_have_all_and_many_have_equal_shares() {
        let rooms = rooms(8);
        let first = rooms.share();
        let held = take_all(&first);
        assert_eq!(held.len(), 8);
        drop(held);
        let others: Vec<_> = (0..3).map(|_| rooms.share()).collect();
        let held: Vec<_> = others.iter().chain([&first]).map(take_all).collect();
        assert!(held.iter().all(|held| held.len() == 2));
        assert!(rooms.0.state().free[0].is_empty());
        drop((held, others));
        assert_eq!(take_all(&first).len(), 8, "it is alone again");
        assert_eq!(rooms.0.state().free[0].len(), 8);
    }

    #[test]
    fn a_peer_that_keeps_all_does_not_keep_others_out() {
        let rooms = rooms(4);
        let greedy = rooms.share();
        let kept = take_all(&greedy);
        let others: Vec<_> = (0..7).map(|_| rooms.share()).collect();
        let held: Vec<_> = others.iter().map(take_all).collect();
        assert!(held.iter().all(|held| held.len() == 1 && held[0].is_extra));
        drop((held, kept));
        assert_eq!(rooms.0.state().free[0].len(), 4, "extra rooms do not stay");
    }

    #[test]
    fn the_smallest_that_fits_is_taken_and_a_larger_one_when_there_is_none() {
        let size = |pages| Size { pages, count: 1 };
        let rooms = Rooms::new([size(1), size(4), size(16)]);
        let share = rooms.share();
        let pages = |room: &Option<Room>| room.as_ref().map(|room| room.as_ref().len() / PAGE_LEN);
        let held = [2, 1, 1, 1].map(|page_count| share.try_take(page_count));
        assert_eq!(
            held.each_ref().map(pages),
            [Some(4), Some(1), Some(16), None]
        );
        drop(held);
        // More than the largest: as much as there is.
        assert_eq!(pages(&share.try_take(1000)), Some(16));
    }

    #[test]
    fn who_waits_for_a_room_gets_the_next_one() {
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        runtime.expect("a runtime").block_on(async {
            let rooms = rooms(2);
            let share = rooms.share();
            let mut held = take_all(&share);
            let waiting = share.clone();
            let waiting = tokio::spawn(async move { waiting.take(1).await });
            tokio::task::yield_now().await;
            assert!(!waiting.is_finished());
            drop(held.pop());
            let room = waiting.await.expect("it does not panic");
            assert_eq!(room.as_ref().len(), PAGE_LEN);
            // A share that grows because another link ends is noticed, too.
            let other = rooms.share();
            drop(held);
            let waiting = share.clone();
            let waiting = tokio::spawn(async move { waiting.take(1).await });
            tokio::task::yield_now().await;
            assert!(!waiting.is_finished(), "two links, a room each");
            drop(other);
            waiting.await.expect("it does not panic");
        });
    }
}
