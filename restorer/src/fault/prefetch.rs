//! What a thread will touch next, guessed from what it touched last. Pure: faults in, ranges out.
//!
//! A lone fault is answered with its neighbourhood, an aligned block as the kernel's own fault-around uses. A fault
//! that continues an earlier one doubles the window ahead of it, up to [`WINDOW_PAGES_MAX`]: a scan soon runs behind
//! the prefetch instead of in front of it. A guess is only ever a hint: the engine intersects it with what is still
//! pending, so a wrong one costs bytes, never correctness.

use pageferry_image::page::{PAGE_SIZE, PageRange};

/// Window of a first fault, in pages; also its alignment.
pub const WINDOW_PAGES_MIN: u64 = 8;
/// Window of a long sequential run, in pages. Larger ones would only delay the reply to the next unrelated fault.
pub const WINDOW_PAGES_MAX: u64 = 64;
/// Sequential runs told apart at one time; a machine has few more threads that scan at once.
pub const STREAMS_MAX: usize = 16;

/// One run of faults that follow each other upwards.
#[derive(Debug, Clone, Copy)]
struct Stream {
    /// Lowest page not yet guessed.
    ahead: u64,
    /// The last fault, in bytes.
    last: u64,
    window_pages: u64,
    /// When it last matched, in faults.
    used: u64,
}

/// Recognises sequential faults among interleaved ones.
#[derive(Debug, Default)]
pub struct Prefetcher {
    streams: Vec<Stream>,
    faults: u64,
}

impl Prefetcher {
    /// The pages worth having after a fault at `address` (page aligned, in the source's addresses). Never contains
    /// `address` alone.
    pub fn handle_fault(&mut self, address: u64) -> PageRange {
        self.faults += 1;
        let now = self.faults;
        // A run continues when the fault lies just past the last one or in (or right behind) what was guessed from it.
        let follows = |stream: &Stream| {
            stream.last < address && address <= stream.ahead.max(stream.last + PAGE_SIZE)
        };
        if let Some(stream) = self.streams.iter_mut().find(|stream| follows(stream)) {
            stream.window_pages = (stream.window_pages * 2).min(WINDOW_PAGES_MAX);
            stream.last = address;
            stream.used = now;
            let end = address.saturating_add((stream.window_pages + 1) * PAGE_SIZE);
            let start = stream.ahead.max(address + PAGE_SIZE).min(end);
            stream.ahead = end;
            return PageRange { start, end };
        }
        let block = WINDOW_PAGES_MIN * PAGE_SIZE;
        let start = address / block * block;
        let range = PageRange {
            start,
            end: start.saturating_add(block),
        };
        if self.streams.len() == STREAMS_MAX {
            if let Some(oldest) = (0..STREAMS_MAX).min_by_key(|&index| self.streams[index].used) {
                self.streams.swap_remove(oldest);
            }
        }
        self.streams.push(Stream {
            ahead: range.end,
            last: address,
            window_pages: WINDOW_PAGES_MIN,
            used: now,
        });
        range
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lone_fault_asks_for_its_aligned_block() {
        let mut prefetcher = Prefetcher::default();
        assert_eq!(
            prefetcher.handle_fault(0x1000_3000),
            PageRange {
                start: 0x1000_0000,
                end: 0x1000_8000
            }
        );
    }

    #[test]
    fn a_sequential_run_doubles_its_window_up_to_the_limit_and_never_asks_twice() {
        let mut prefetcher = Prefetcher::default();
        let mut at = prefetcher.handle_fault(0x1000_0000).end;
        for window in [16, 32, 64, 64, 64] {
            let guess = prefetcher.handle_fault(at);
            assert_eq!(
                guess,
                PageRange {
                    start: at + PAGE_SIZE,
                    end: at + (window + 1) * PAGE_SIZE
                }
            );
            at = guess.end;
        }
    }

    #[test]
    fn interleaved_runs_are_told_apart() {
        let mut prefetcher = Prefetcher::default();
        let mut heads: Vec<u64> = (1..=8).map(|n| n << 32).collect();
        for head in &mut heads {
            *head = prefetcher.handle_fault(*head).end;
        }
        for head in &mut heads {
            let guess = prefetcher.handle_fault(*head);
            assert_eq!(
                guess.page_count(),
                16,
                "each of eight interleaved scans keeps its own window"
            );
        }
    }

    #[test]
    fn streams_are_bounded() {
        let mut prefetcher = Prefetcher::default();
        for n in 0..10_000_u64 {
            prefetcher.handle_fault(n << 30);
        }
        assert_eq!(prefetcher.streams.len(), STREAMS_MAX);
    }
}
