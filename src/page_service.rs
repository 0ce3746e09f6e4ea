//! The side of a link that has the pages: answers what is asked on any number of streams, from a frozen process or an image.

use std::collections::{BTreeMap, btree_map};
use std::sync::Arc;

use pageferry_image::page::PageRange;
use pageferry_pageserver::Result;
use pageferry_pageserver::at_rest::ImagePages;
use pageferry_pageserver::serve::PageReader;
use pageferry_wire::{Frame, PageBatch};

use crate::report;
use crate::rooms::{Room, Share};
use crate::transport::{FramedRecv, FramedSend, Link};

/// What has pages. Every stream that asks has its own.
pub trait Pages: Send + 'static {
    /// Whether a disk may hold up the answer: it is then waited for beside the thread that keeps the links alive.
    const READS_DISK: bool;

    /// Where the pages of a batch are read to.
    type Room: Send + 'static;

    /// Waits until there is room for a batch, best of so many pages.
    fn room(&self, page_count: u64) -> impl Future<Output = Self::Room> + Send;

    /// The first pages of a range of `object`, which is not empty, as many as one batch takes and there is room for.
    ///
    /// # Errors
    /// They cannot be had from here any more.
    fn batch(
        &mut self,
        object: u32,
        request: u64,
        range: PageRange,
        room: Self::Room,
    ) -> Result<PageBatch>;
}

/// The frozen processes of a tree, in the order of the model: the first has object 1.
#[derive(Debug)]
pub struct Processes {
    pids: Arc<[i32]>,
    open: BTreeMap<u32, PageReader>,
}

impl Processes {
    /// Opens none of them yet.
    pub fn new(pids: Arc<[i32]>) -> Self {
        Self {
            pids,
            open: BTreeMap::new(),
        }
    }

    /// The reader of the process whose address space is `object`.
    ///
    /// # Errors
    /// [`Error::Process`](pageferry_pageserver::Error::Process): there is none any more, or there never was.
    pub fn reader(&mut self, object: u32) -> Result<&mut PageReader> {
        Ok(match self.open.entry(object) {
            btree_map::Entry::Occupied(open) => open.into_mut(),
            btree_map::Entry::Vacant(place) => {
                let index = usize::try_from(object).unwrap_or(0).wrapping_sub(1);
                // Nobody has the process id 0.
                let pid = self.pids.get(index).copied().unwrap_or(0);
                place.insert(PageReader::open(object, pid)?)
            }
        })
    }
}

impl Pages for Processes {
    const READS_DISK: bool = false;

    /// A batch brings its own: one target asks, and no more than fits its send window is under way.
    type Room = ();

    async fn room(&self, _: u64) {}

    fn batch(
        &mut self,
        object: u32,
        request: u64,
        range: PageRange,
        (): Self::Room,
    ) -> Result<PageBatch> {
        // The tree runs elsewhere and waits for this: a call that fails now and then must not end it.
        twice(|| self.reader(object)?.batch(request, range))
    }
}

/// The pages of an image, for one link.
#[derive(Debug, Clone)]
pub struct Shelved {
    /// The image's.
    pub pages: ImagePages,
    /// What the link may have of the memory that all links share.
    pub share: Share,
}

impl Pages for Shelved {
    const READS_DISK: bool = true;

    type Room = Room;

    async fn room(&self, page_count: u64) -> Room {
        self.share.take(page_count).await
    }

    fn batch(
        &mut self,
        object: u32,
        request: u64,
        range: PageRange,
        room: Room,
    ) -> Result<PageBatch> {
        self.pages.batch_within(object, request, range, room)
    }
}

/// Tries again once.
pub fn twice<T, E>(
    mut attempt: impl FnMut() -> std::result::Result<T, E>,
) -> std::result::Result<T, E> {
    attempt().or_else(|_| attempt())
}

/// Answers every page request on `link` until it ends. `open` gives each stream its pages.
pub async fn serve<P: Pages>(link: &Link, open: impl Fn() -> P) {
    while let Ok((sender, receiver)) = link.accept().await {
        let (link, pages) = (link.clone(), open());
        tokio::spawn(async move {
            if let Err(error) = serve_stream(sender, receiver, pages).await {
                tracing::warn!(
                    "pages cannot be served any more: {}",
                    report::chain(error.as_ref())
                );
                // Both sides must learn of it: a page that is asked for would never come.
                link.close();
            }
        });
    }
}

async fn serve_stream<P: Pages>(
    mut sender: FramedSend,
    mut receiver: FramedRecv,
    mut pages: P,
) -> std::result::Result<(), Box<dyn std::error::Error + Send + Sync>> {
    while let Some(frame) = receiver.recv().await? {
        let Frame::Fetch(fetch) = frame else {
            return Err(format!("{:?} on a page stream", frame.tag()).into());
        };
        let mut left = fetch.range();
        while !left.is_empty() {
            let room = pages.room(left.page_count()).await;
            let batch;
            if P::READS_DISK {
                (pages, batch) = tokio::task::spawn_blocking(move || {
                    let batch = pages.batch(fetch.object, fetch.request, left, room);
                    (pages, batch)
                })
                .await?;
            } else {
                batch = pages.batch(fetch.object, fetch.request, left, room);
            }
            let batch = batch?;
            left.start = batch.range().end;
            sender.send(batch).await?;
        }
    }
    Ok(())
}
