//! Page addresses and ranges. A page index, a page count and a byte length are never mixed.

/// Bytes in a page. arm64 kernels with 16 or 64 KiB pages are refused at hello.
pub const PAGE_SIZE: u64 = 4096;
/// The same for indexing slices.
pub const PAGE_LEN: usize = 4096;

/// A half-open range of page-aligned virtual addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageRange {
    /// First byte; a multiple of [`PAGE_SIZE`].
    pub start: u64,
    /// One past the last byte; a multiple of [`PAGE_SIZE`], never below `start`.
    pub end: u64,
}

impl PageRange {
    /// `None` unless both ends are page aligned and in order.
    pub fn new(start: u64, end: u64) -> Option<Self> {
        (start % PAGE_SIZE == 0 && end % PAGE_SIZE == 0 && start <= end)
            .then_some(Self { start, end })
    }

    /// The page that holds `address`.
    pub fn page_of(address: u64) -> Self {
        let start = address & !(PAGE_SIZE - 1);
        Self {
            start,
            end: start.saturating_add(PAGE_SIZE),
        }
    }

    /// Length in pages.
    pub fn page_count(self) -> u64 {
        (self.end - self.start) / PAGE_SIZE
    }

    /// Length in bytes.
    pub fn byte_len(self) -> u64 {
        self.end - self.start
    }

    /// True if it covers nothing.
    pub fn is_empty(self) -> bool {
        self.start == self.end
    }

    /// True if `address` lies inside.
    pub fn contains(self, address: u64) -> bool {
        self.start <= address && address < self.end
    }

    /// What both cover; `None` if nothing.
    pub fn intersect(self, other: Self) -> Option<Self> {
        let start = self.start.max(other.start);
        let end = self.end.min(other.end);
        (start < end).then_some(Self { start, end })
    }
}
