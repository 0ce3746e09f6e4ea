//! The shared objects of a frozen tree as a source of pages: read in place as files, holes left as they are.

use std::fs::File;
use std::os::unix::fs::FileExt as _;

use pageferry_image::page::{PAGE_LEN, PAGE_SIZE, PageRange};
use pageferry_image::store;
use pageferry_tracee::shared;
use pageferry_wire::limits::{BATCH_DATA_PAGES_MAX, BATCH_PAGES_MAX};
use pageferry_wire::{PageBatch, PageBatchBuilder, PageKind};

use crate::capture::shared::SharedPages;
use crate::serve::Piece;
use crate::{Error, Result};

/// Reads the pages of one object.
#[derive(Debug)]
pub struct SharedReader {
    pages: SharedPages,
    file: File,
    buffer: Vec<u8>,
}

impl SharedReader {
    /// Opens the object.
    ///
    /// # Errors
    /// [`Error::Process`].
    pub fn open(pages: SharedPages) -> Result<Self> {
        Ok(Self {
            file: shared::open(&pages.path)?,
            pages,
            buffer: vec![0; BATCH_DATA_PAGES_MAX as usize * PAGE_LEN],
        })
    }

    /// `range` without the hole it begins with: nothing has to be said about that, since the target makes objects of holes. Empty: there
    /// is no more data.
    ///
    /// # Errors
    /// [`Error::Process`].
    pub fn skip_hole(&self, range: PageRange) -> Result<PageRange> {
        let (hole, _) = self.next(range)?;
        Ok(PageRange {
            start: hole.end,
            end: range.end,
        })
    }

    /// The first pages of `range`, as many as one batch takes: go on at the end of the batch's range. Holes are zeros.
    ///
    /// # Errors
    /// [`Error::Process`], [`Error::File`].
    ///
    /// # Panics
    /// If `range` is empty.
    pub fn batch(&mut self, range: PageRange) -> Result<PageBatch> {
        assert!(!range.is_empty(), "pages are asked for");
        let span = u64::from(BATCH_PAGES_MAX) * PAGE_SIZE;
        let end = range.end.min(range.start.saturating_add(span));
        let room = (end - range.start) / PAGE_SIZE;
        let room = room.min(u64::from(BATCH_DATA_PAGES_MAX)) as usize;
        let mut builder = PageBatchBuilder::new(self.pages.object, 0, range.start, room);
        while builder.next_address() < end && builder.has_room() {
            let at = builder.next_address();
            let (hole, data) = self.next(PageRange { start: at, end })?;
            if !hole.is_empty() {
                builder.without_data(PageKind::Zero, pages_of(hole));
            }
            if !builder.has_room() || data.is_empty() {
                continue;
            }
            if builder.data_pages_left() == 0 {
                break;
            }
            let data = self.read(data, builder.data_pages_left())?;
            for page in data.chunks_exact(PAGE_LEN) {
                if !builder.has_room() {
                    break;
                }
                if *page == [0; PAGE_LEN] {
                    builder.without_data(PageKind::Zero, 1);
                } else {
                    builder.data(1).copy_from_slice(page);
                }
            }
        }
        Ok(builder.finish())
    }

    /// Hands on every page, ascending, as an image holds it; neighbours in pieces. What `sink` gives instead of going on is given
    /// back.
    ///
    /// # Errors
    /// [`Error::Process`], [`Error::File`].
    pub fn read_all<E>(
        &mut self,
        mut sink: impl FnMut(PageRange, Piece<'_>) -> std::result::Result<(), E>,
    ) -> Result<std::result::Result<(), E>> {
        let mut left = self.pages.range();
        while !left.is_empty() {
            let (hole, data) = self.next(left)?;
            if !hole.is_empty() {
                if let Err(error) = sink(hole, Piece::Without(store::PageKind::Hole)) {
                    return Ok(Err(error));
                }
            }
            left.start = hole.end;
            while left.start < data.end {
                let bytes = self.read(
                    PageRange {
                        start: left.start,
                        end: data.end,
                    },
                    usize::MAX,
                )?;
                let range = PageRange {
                    start: left.start,
                    end: left.start + bytes.len() as u64,
                };
                if let Err(error) = sink(range, Piece::Bytes(bytes)) {
                    return Ok(Err(error));
                }
                left.start = range.end;
            }
        }
        Ok(Ok(()))
    }

    /// The hole that `range` begins with, and the data behind it, each perhaps empty.
    fn next(&self, range: PageRange) -> Result<(PageRange, PageRange)> {
        let (start, end) = match shared::next_data(&self.file, range.start, range.end)? {
            // Holes are whole pages, but the file may end within one.
            Some((start, end)) => (
                start & !(PAGE_SIZE - 1),
                end.next_multiple_of(PAGE_SIZE).min(range.end),
            ),
            None => (range.end, range.end),
        };
        let hole = PageRange {
            start: range.start,
            end: start,
        };
        Ok((hole, PageRange { start, end }))
    }

    /// The first pages of `range`, at most `page_count`, filled with zeros behind the end of the object.
    fn read(&mut self, range: PageRange, page_count: usize) -> Result<&[u8]> {
        let room = self.buffer.len().min(page_count.saturating_mul(PAGE_LEN));
        let length = usize::try_from(range.byte_len())
            .unwrap_or(usize::MAX)
            .min(room);
        let inside = self.pages.size.saturating_sub(range.start);
        let inside = usize::try_from(inside).unwrap_or(usize::MAX).min(length);
        let (bytes, behind) = self.buffer[..length].split_at_mut(inside);
        let read = self.file.read_exact_at(bytes, range.start);
        read.map_err(|source| Error::File {
            path: self.pages.path.clone(),
            source,
        })?;
        behind.fill(0);
        Ok(&self.buffer[..length])
    }
}

fn pages_of(range: PageRange) -> u32 {
    u32::try_from(range.page_count()).expect("cut to a batch")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(size: u64) -> (File, SharedReader) {
        let file = shared::memfd("object", 0o600, 0).expect("it can be made");
        file.set_len(size).expect("it may grow");
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
        let pages = SharedPages {
            object: 3,
            size,
            path,
            kept: None,
        };
        let reader = SharedReader::open(pages).expect("it can be opened");
        (file, reader)
    }

    #[test]
    fn an_object_is_read_with_its_holes_and_its_broken_last_page() {
        let page = PAGE_SIZE;
        let (file, mut reader) = object(10 * page + 5);
        for (at, bytes) in [
            (2 * page, &b"two"[..]),
            (4 * page, &[0; PAGE_LEN]),
            (10 * page, b"end"),
        ] {
            file.write_all_at(bytes, at).expect("it is ours");
        }
        let batch = reader.batch(reader.pages.range()).expect("it can be read");
        assert_eq!(batch.range(), reader.pages.range());
        assert_eq!((batch.object(), batch.data_page_count()), (3, 2));
        let last = batch.verify_page(10 * page).expect("it is right");
        assert!(last.is_some_and(|last| last.starts_with(b"end\0\0\0\0")));
        let mut seen = Vec::new();
        reader
            .read_all(|range, piece| {
                let is_data = matches!(piece, Piece::Bytes(_));
                seen.push((range.start / page, range.page_count(), is_data));
                Ok::<(), ()>(())
            })
            .expect("it can be read")
            .expect("nobody objects");
        assert_eq!(
            seen,
            [
                (0, 2, false),
                (2, 1, true),
                (3, 1, false),
                (4, 1, true),
                (5, 5, false),
                (10, 1, true)
            ]
        );
    }

    #[test]
    fn batches_of_an_object_follow_each_other() {
        let data = 2 * u64::from(BATCH_DATA_PAGES_MAX) + 3;
        let (file, mut reader) = object((data + u64::from(BATCH_PAGES_MAX) + 7) * PAGE_SIZE);
        for page in 0..data {
            file.write_all_at(&[1 + page as u8 % 100], page * PAGE_SIZE)
                .expect("it is ours");
        }
        let (mut left, mut count) = (reader.pages.range(), 0);
        while !left.is_empty() {
            let batch = reader.batch(left).expect("it can be read");
            assert_eq!(batch.range().start, left.start);
            count += batch.data_page_count() as u64;
            left.start = batch.range().end;
        }
        assert_eq!(count, data);
        let from = PageRange {
            start: data * PAGE_SIZE,
            end: left.end,
        };
        assert!(reader.skip_hole(from).expect("it can be asked").is_empty());
        let all = reader.pages.range();
        assert_eq!(reader.skip_hole(all).expect("it can be asked"), all);
    }
}
