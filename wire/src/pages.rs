//! Page batches: a range of pages, what each of them is, and the bytes of those that have data. Hides the batch's layout;
//! must never hand out page bytes as good that do not match the checksum taken when they were read on the source.
//!
//! ```text
//! 0         8          16           20          24           28          32
//! | request | address  | page_count | run_count | data_count | object    | runs | checksums | page bytes …
//! ```
//! A run is {kind u32, page_count u32}; a checksum is the CRC-32 of the page's place (8 bytes, little-endian: its address, and
//! in the highest 16 bits the object less 1) followed by its bytes, so that a page put elsewhere fails as well.

use std::ops::Range;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use pageferry_image::page::{PAGE_LEN, PAGE_SIZE, PageRange};

use crate::frame::Tag;
use crate::limits::{self, BATCH_HEADER_LEN};
use crate::{Error, Result};

/// Bytes of an encoded run.
const RUN_LEN: usize = 8;
/// Bytes of a checksum.
const CHECKSUM_LEN: usize = 4;

/// What a page is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum PageKind {
    /// It has data, carried in the batch.
    Data = 1,
    /// Never touched, or the zero page: it reads as zeros.
    Zero = 2,
    /// A guard region (MADV_GUARD_INSTALL): nothing may be installed.
    Guard = 3,
    /// It cannot be had: its host memory failed, or nothing is mapped there. Never to be taken for zeros.
    Gone = 4,
}

impl PageKind {
    fn from_number(number: u32) -> Option<Self> {
        [Self::Data, Self::Zero, Self::Guard, Self::Gone]
            .into_iter()
            .find(|&kind| kind as u32 == number)
    }
}

/// Neighbouring pages of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// What they are.
    pub kind: PageKind,
    /// Where they are.
    pub range: PageRange,
    /// Index of the first one among the batch's data pages; meaningless for other kinds.
    pub data_index: usize,
}

/// Pages on their way. Cloning shares the bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageBatch {
    object: u32,
    request: u64,
    range: PageRange,
    runs: Vec<Run>,
    /// Header, runs and checksums, as on the wire.
    head: Bytes,
    data: Bytes,
}

/// The CRC-32 of a page of `object` at `address`.
pub fn page_checksum(object: u32, address: u64, page: &[u8]) -> u32 {
    let place = u64::from(object.saturating_sub(1)) << 48 | address;
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&place.to_le_bytes());
    hasher.update(page);
    hasher.finalize()
}

impl PageBatch {
    /// The number of the FETCH it answers; 0 if nobody asked.
    pub fn request(&self) -> u64 {
        self.request
    }

    /// Whose pages it brings: the address space of the n-th process of the tree, from 1.
    pub fn object(&self) -> u32 {
        self.object
    }

    /// The pages it speaks of.
    pub fn range(&self) -> PageRange {
        self.range
    }

    /// Its runs, ascending and without gaps.
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// The bytes of all data pages, unverified.
    pub fn data(&self) -> &Bytes {
        &self.data
    }

    /// How many pages have data.
    pub fn data_page_count(&self) -> usize {
        self.data.len() / PAGE_LEN
    }

    /// The bytes of a whole data run, every page of it verified: what is handed to the kernel. Call it just before that.
    ///
    /// # Errors
    /// [`Error::Page`] names the first page that is not what the source read.
    ///
    /// # Panics
    /// If `run` is not a data run of this batch.
    pub fn verify_run(&self, run: &Run) -> Result<Bytes> {
        assert!(
            run.kind == PageKind::Data && self.range.intersect(run.range) == Some(run.range),
            "a data run of this batch"
        );
        let pages = 0..usize::try_from(run.range.page_count()).expect("a batch is small");
        for page in pages.clone() {
            self.verify_at(
                run.range.start + page as u64 * PAGE_SIZE,
                run.data_index + page,
            )?;
        }
        Ok(self
            .data
            .slice(run.data_index * PAGE_LEN..(run.data_index + pages.end) * PAGE_LEN))
    }

    /// The bytes of the data page at `address`, verified; `None` if the batch has no data for it.
    pub fn verify_page(&self, address: u64) -> Result<Option<Bytes>> {
        let Some(run) = self
            .runs
            .iter()
            .find(|run| run.kind == PageKind::Data && run.range.contains(address))
        else {
            return Ok(None);
        };
        let start = PageRange::page_of(address).start;
        let index = run.data_index
            + usize::try_from((start - run.range.start) / PAGE_SIZE).expect("a batch is small");
        self.verify_at(start, index)?;
        Ok(Some(self.data.slice(byte_range(index))))
    }

    fn verify_at(&self, address: u64, index: usize) -> Result<()> {
        let at = BATCH_HEADER_LEN + self.runs.len() * RUN_LEN + index * CHECKSUM_LEN;
        let expected = (&self.head[at..at + CHECKSUM_LEN]).get_u32_le();
        if page_checksum(self.object, address, &self.data[byte_range(index)]) == expected {
            Ok(())
        } else {
            Err(Error::Page { address })
        }
    }

    /// Every rule of a batch but the page checksums: asserted by the builder, an error from the decoder.
    fn validate(
        object: u32,
        request: u64,
        address: u64,
        page_count: u32,
        runs: &[(u32, u32)],
        data_len: usize,
    ) -> Result<Self> {
        let bad = |object: &str, rule: String| Err(Error::rule(Tag::Pages, object, rule));
        crate::message::check_object(Tag::Pages, object)?;
        let end = address.checked_add(u64::from(page_count) * PAGE_SIZE);
        let range = match end.and_then(|end| PageRange::new(address, end)) {
            Some(range) if range.end <= limits::USER_ADDRESS_END => range,
            _ => {
                return bad(
                    "range",
                    format!("of {page_count} pages at {address:#x} is not one of user pages"),
                );
            }
        };
        if page_count == 0 || page_count > limits::BATCH_PAGES_MAX {
            return bad(
                "page count",
                format!("{page_count} is not in 1..={}", limits::BATCH_PAGES_MAX),
            );
        }
        let mut built = Vec::with_capacity(runs.len());
        let (mut at, mut data_index) = (range.start, 0);
        for &(kind, count) in runs {
            let Some(kind) = PageKind::from_number(kind) else {
                return bad("run kind", format!("{kind} is unknown"));
            };
            let run_end = at + u64::from(count) * PAGE_SIZE;
            if count == 0 || run_end > range.end {
                return bad(
                    "run",
                    format!("of {count} pages at {at:#x} does not fit its batch"),
                );
            }
            built.push(Run {
                kind,
                range: PageRange {
                    start: at,
                    end: run_end,
                },
                data_index,
            });
            if kind == PageKind::Data {
                data_index += count as usize;
            }
            at = run_end;
        }
        if at != range.end {
            return bad(
                "run list",
                format!("ends at {at:#x}, before its batch does"),
            );
        }
        if data_index * PAGE_LEN != data_len {
            return bad(
                "data",
                format!("has {data_len} bytes for {data_index} pages"),
            );
        }
        Ok(Self {
            object,
            request,
            range,
            runs: built,
            head: Bytes::new(),
            data: Bytes::new(),
        })
    }

    /// The part of an encoded batch that the frame's checksum covers. For a body that is no batch: all of it.
    pub(crate) fn head_len(body: &[u8]) -> usize {
        let Some(mut counts) = body.get(20..BATCH_HEADER_LEN) else {
            return body.len();
        };
        let (runs, data) = (counts.get_u32_le(), counts.get_u32_le());
        if runs > limits::BATCH_RUNS_MAX || data > limits::BATCH_DATA_PAGES_MAX {
            return body.len();
        }
        (BATCH_HEADER_LEN + runs as usize * RUN_LEN + data as usize * CHECKSUM_LEN).min(body.len())
    }

    pub(crate) fn head(&self) -> &Bytes {
        &self.head
    }

    /// Decodes a body whose checked part has passed its checksum. The page bytes stay where they are.
    pub(crate) fn from_body(mut body: Bytes) -> Result<Self> {
        let bad = |object: &str, rule: &str| Error::rule(Tag::Pages, object, rule);
        if body.len() < BATCH_HEADER_LEN {
            return Err(bad("batch", "is shorter than its header"));
        }
        let mut fields = body.slice(..BATCH_HEADER_LEN);
        let (request, address) = (fields.get_u64_le(), fields.get_u64_le());
        let (page_count, run_count) = (fields.get_u32_le(), fields.get_u32_le());
        let (data_count, object) = (fields.get_u32_le(), fields.get_u32_le());
        if run_count > limits::BATCH_RUNS_MAX || data_count > limits::BATCH_DATA_PAGES_MAX {
            return Err(bad("run or page count", "is over its limit"));
        }
        let head_len =
            BATCH_HEADER_LEN + run_count as usize * RUN_LEN + data_count as usize * CHECKSUM_LEN;
        if body.len() != head_len + data_count as usize * PAGE_LEN {
            return Err(bad("batch", "is not as long as its counts say"));
        }
        let head = body.split_to(head_len);
        let mut encoded = head.slice(BATCH_HEADER_LEN..);
        let runs: Vec<_> = (0..run_count)
            .map(|_| (encoded.get_u32_le(), encoded.get_u32_le()))
            .collect();
        let batch = Self::validate(object, request, address, page_count, &runs, body.len())?;
        Ok(Self {
            head,
            data: body,
            ..batch
        })
    }
}

fn byte_range(page: usize) -> Range<usize> {
    page * PAGE_LEN..(page + 1) * PAGE_LEN
}

/// Memory for the data of a batch. It is dropped with the last who holds the bytes: when the peer has acknowledged them.
pub trait Room: AsRef<[u8]> + AsMut<[u8]> + Send + 'static {}

impl<T: AsRef<[u8]> + AsMut<[u8]> + Send + 'static> Room for T {}

/// Builds one batch, page after page. Data is read by the caller straight into the batch's own memory.
#[derive(Debug)]
pub struct PageBatchBuilder<R = Vec<u8>> {
    object: u32,
    request: u64,
    address: u64,
    page_count: u32,
    runs: Vec<(PageKind, u32)>,
    data: R,
    data_filled: usize,
}

impl PageBatchBuilder {
    /// A batch of pages of `object` that answers `request` (0: nobody asked) and begins at `address`, with room for `data_pages` pages of data.
    ///
    /// # Panics
    /// If `address` is not page aligned or `data_pages` is over [`limits::BATCH_DATA_PAGES_MAX`].
    pub fn new(object: u32, request: u64, address: u64, data_pages: usize) -> Self {
        Self::within(object, request, address, vec![0; data_pages * PAGE_LEN])
    }
}

impl<R: Room> PageBatchBuilder<R> {
    /// The same in memory that the caller gives, which has room for as many pages as fit it; what it holds means nothing.
    ///
    /// # Panics
    /// If `address` is not page aligned or `room` takes more than [`limits::BATCH_DATA_PAGES_MAX`] pages.
    pub fn within(object: u32, request: u64, address: u64, room: R) -> Self {
        assert!(address % PAGE_SIZE == 0, "a batch begins at a page");
        assert!(
            room.as_ref().len() / PAGE_LEN <= limits::BATCH_DATA_PAGES_MAX as usize,
            "a batch is small"
        );
        Self {
            object,
            request,
            address,
            page_count: 0,
            runs: Vec::new(),
            data: room,
            data_filled: 0,
        }
    }

    /// The address of the next page.
    pub fn next_address(&self) -> u64 {
        self.address + u64::from(self.page_count) * PAGE_SIZE
    }

    /// Data pages that still fit.
    pub fn data_pages_left(&self) -> usize {
        self.data.as_ref().len() / PAGE_LEN - self.data_filled
    }

    /// False once another run might not fit: finish the batch and begin the next at [`PageBatchBuilder::next_address`].
    pub fn has_room(&self) -> bool {
        self.runs.len() < limits::BATCH_RUNS_MAX as usize
            && self.page_count < limits::BATCH_PAGES_MAX
    }

    /// True until the first page.
    pub fn is_empty(&self) -> bool {
        self.page_count == 0
    }

    /// The next `page_count` pages have data: read it into what is returned, all of it.
    ///
    /// # Panics
    /// If they do not fit.
    pub fn data(&mut self, page_count: usize) -> &mut [u8] {
        assert!(
            page_count <= self.data_pages_left(),
            "{page_count} pages fit the batch"
        );
        let filled = self.data_filled;
        self.data_filled += page_count;
        self.append(
            PageKind::Data,
            u32::try_from(page_count).expect("a batch is small"),
        );
        &mut self.data.as_mut()[filled * PAGE_LEN..(filled + page_count) * PAGE_LEN]
    }

    /// The next `page_count` pages are of `kind`.
    ///
    /// # Panics
    /// If they do not fit, or for [`PageKind::Data`].
    pub fn without_data(&mut self, kind: PageKind, page_count: u32) {
        assert!(kind != PageKind::Data, "data pages bring data");
        self.append(kind, page_count);
    }

    fn append(&mut self, kind: PageKind, count: u32) {
        self.page_count += count;
        match self.runs.last_mut() {
            Some((last, length)) if *last == kind => *length += count,
            _ if count > 0 => self.runs.push((kind, count)),
            _ => {}
        }
    }

    /// The batch, with a checksum for each page.
    ///
    /// # Panics
    /// If it breaks a rule of batches (it is empty, over a limit or leaves the address space): the builder's own mistake.
    pub fn finish(self) -> PageBatch {
        let runs: Vec<_> = self
            .runs
            .iter()
            .map(|&(kind, count)| (kind as u32, count))
            .collect();
        assert!(
            runs.len() <= limits::BATCH_RUNS_MAX as usize,
            "the caller asks has_room before each run"
        );
        let data_len = self.data_filled * PAGE_LEN;
        let data = match data_len {
            0 => Bytes::new(),
            _ => Bytes::from_owner(self.data).slice(..data_len),
        };
        let mut batch = PageBatch::validate(
            self.object,
            self.request,
            self.address,
            self.page_count,
            &runs,
            data_len,
        )
        .unwrap_or_else(|error| panic!("a batch built here is a batch: {error:?}"));
        let mut head = BytesMut::with_capacity(
            BATCH_HEADER_LEN + runs.len() * RUN_LEN + self.data_filled * CHECKSUM_LEN,
        );
        head.put_u64_le(self.request);
        head.put_u64_le(self.address);
        head.put_u32_le(self.page_count);
        head.put_u32_le(u32::try_from(runs.len()).expect("bounded above"));
        head.put_u32_le(u32::try_from(self.data_filled).expect("bounded by new"));
        head.put_u32_le(self.object);
        for (kind, count) in runs {
            head.put_u32_le(kind);
            head.put_u32_le(count);
        }
        for run in batch.runs.iter().filter(|run| run.kind == PageKind::Data) {
            for page in 0..usize::try_from(run.range.page_count()).expect("a batch is small") {
                let bytes = &data[byte_range(run.data_index + page)];
                head.put_u32_le(page_checksum(
                    self.object,
                    run.range.start + page as u64 * PAGE_SIZE,
                    bytes,
                ));
            }
        }
        batch.head = head.freeze();
        batch.data = data;
        batch
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Decoder, Frame};
    use proptest::prelude::*;

    const AT: u64 = 0x5555_0000_0000;

    fn fill(page: &mut [u8], index: usize) {
        for (at, byte) in page.iter_mut().enumerate() {
            *byte = (at * 7 + index * 31) as u8;
        }
    }

    /// A batch over the wire.
    fn carried(batch: &PageBatch, spoil: impl Fn(&mut [u8])) -> Result<Option<Frame>> {
        let mut bytes = Frame::from(batch.clone())
            .encode()
            .expect("within its limits")
            .into_parts()
            .concat();
        spoil(&mut bytes);
        let mut decoder = Decoder::new();
        decoder.push(&bytes);
        decoder.pull()
    }

    #[test]
    fn a_full_batch_is_carried_and_verified_page_by_page() {
        let mut builder = PageBatchBuilder::new(1, 3, AT, 256);
        for (index, page) in builder.data(256).chunks_exact_mut(PAGE_LEN).enumerate() {
            fill(page, index);
        }
        assert_eq!(builder.data_pages_left(), 0);
        let batch = builder.finish();
        let Ok(Some(Frame::Pages(back))) = carried(&batch, |_| ()) else {
            panic!("it is a batch")
        };
        assert_eq!(back, batch);
        assert_eq!(
            (back.request(), back.data_page_count(), back.runs().len()),
            (3, 256, 1)
        );
        assert_eq!(
            back.verify_run(&back.runs()[0]).expect("good pages"),
            *batch.data()
        );
        let mut page = vec![0; PAGE_LEN];
        fill(&mut page, 200);
        let address = AT + 200 * PAGE_SIZE;
        assert_eq!(
            back.verify_page(address + 5)
                .expect("a good page")
                .expect("it has data"),
            page
        );
        assert_eq!(back.verify_page(AT - 1).expect("not asked"), None);
    }

    #[test]
    fn a_spoiled_page_is_named_and_its_neighbours_are_good() {
        let mut builder = PageBatchBuilder::new(1, 0, AT, 3);
        builder.without_data(PageKind::Guard, 2);
        builder.data(3).fill(1);
        let batch = builder.finish();
        let length = batch.head().len() + crate::limits::FRAME_HEADER_LEN;
        let Ok(Some(Frame::Pages(back))) =
            carried(&batch, |bytes| bytes[length + PAGE_LEN + 9] ^= 1)
        else {
            panic!("page bytes are not the frame's to check")
        };
        let bad = AT + 3 * PAGE_SIZE;
        assert!(
            matches!(back.verify_run(&back.runs()[1]), Err(Error::Page { address }) if address == bad)
        );
        assert!(matches!(back.verify_page(bad), Err(Error::Page { address }) if address == bad));
        assert!(
            back.verify_page(AT + 2 * PAGE_SIZE)
                .is_ok_and(|page| page.is_some())
        );
        assert!(
            back.verify_page(AT).is_ok_and(|page| page.is_none()),
            "a guard has no data"
        );
    }

    #[test]
    fn a_page_at_another_address_has_another_checksum() {
        assert_ne!(
            page_checksum(1, AT, &[0; PAGE_LEN]),
            page_checksum(1, AT + PAGE_SIZE, &[0; PAGE_LEN])
        );
        assert_ne!(
            page_checksum(1, AT, &[0; PAGE_LEN]),
            page_checksum(2, AT, &[0; PAGE_LEN]),
            "in another process"
        );
    }

    #[test]
    fn batches_that_break_their_rules_are_refused() {
        let validate = |address, page_count, runs: &[(u32, u32)], data_pages: usize| {
            PageBatch::validate(1, 1, address, page_count, runs, data_pages * PAGE_LEN).is_ok()
        };
        assert!(validate(AT, 3, &[(1, 1), (2, 2)], 1));
        for object in [0, limits::OBJECTS_MAX + 1] {
            assert!(PageBatch::validate(object, 1, AT, 1, &[(2, 1)], 0).is_err());
        }
        assert!(
            !validate(AT + 1, 3, &[(1, 1), (2, 2)], 1),
            "an address inside a page"
        );
        assert!(
            !validate(u64::MAX - 4095, 3, &[(1, 1), (2, 2)], 1),
            "a range past the end"
        );
        assert!(
            !validate(limits::USER_ADDRESS_END - PAGE_SIZE, 2, &[(2, 2)], 0),
            "kernel addresses"
        );
        assert!(!validate(AT, 0, &[], 0), "no pages");
        assert!(
            !validate(
                AT,
                limits::BATCH_PAGES_MAX + 1,
                &[(2, limits::BATCH_PAGES_MAX + 1)],
                0
            ),
            "too many pages"
        );
        assert!(
            !validate(AT, 3, &[(1, 1), (2, 1)], 1),
            "runs that end early"
        );
        assert!(!validate(AT, 3, &[(1, 1), (2, 3)], 1), "runs that end late");
        assert!(
            !validate(AT, 3, &[(1, 1), (2, u32::MAX)], 1),
            "a run that wraps"
        );
        assert!(
            !validate(AT, 3, &[(1, 1), (2, 0), (2, 2)], 1),
            "an empty run"
        );
        assert!(!validate(AT, 3, &[(0, 1), (2, 2)], 0), "kind zero");
        assert!(!validate(AT, 3, &[(5, 1), (2, 2)], 0), "an unknown kind");
        assert!(
            !validate(AT, 3, &[(1, 2), (2, 1)], 1),
            "less data than said"
        );
        assert!(
            !validate(AT, 3, &[(1, 1), (2, 2)], 2),
            "more data than said"
        );
    }

    #[test]
    #[should_panic(expected = "fit the batch")]
    fn a_builder_takes_no_more_data_than_it_has_room_for() {
        PageBatchBuilder::new(1, 0, AT, 1).data(2);
    }

    #[test]
    #[should_panic(expected = "a batch built here is a batch")]
    fn an_empty_batch_cannot_be_built() {
        let _ = PageBatchBuilder::new(1, 0, AT, 1).finish();
    }

    proptest! {
        #[test]
        fn any_mixture_of_runs_is_carried(kinds in proptest::collection::vec((1u32..=4, 1usize..6), 1..40)) {
            let data: usize = kinds.iter().filter(|(kind, _)| *kind == 1).map(|(_, count)| count).sum();
            let mut builder = PageBatchBuilder::new(1, 8, AT, data);
            for &(kind, count) in &kinds {
                prop_assert!(builder.has_room());
                match PageKind::from_number(kind) {
                    Some(PageKind::Data) => builder.data(count).fill(kind as u8),
                    Some(other) => builder.without_data(other, u32::try_from(count).expect("small")),
                    None => unreachable!("1 to 4 are kinds"),
                }
            }
            let batch = builder.finish();
            let Ok(Some(Frame::Pages(back))) = carried(&batch, |_| ()) else { panic!("it is a batch") };
            prop_assert_eq!(&back, &batch);
            // Page for page what was put in, and every data page verifies.
            let pages = kinds.iter().flat_map(|&(kind, count)| std::iter::repeat_n(kind, count));
            for (index, kind) in pages.enumerate() {
                let address = AT + index as u64 * PAGE_SIZE;
                let run = back.runs().iter().find(|run| run.range.contains(address)).expect("runs cover the batch");
                prop_assert_eq!(run.kind as u32, kind);
                prop_assert_eq!(back.verify_page(address).expect("good").is_some(), kind == 1);
            }
        }
    }
}
