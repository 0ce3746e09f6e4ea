//! The side of a link that has the pages: answers what is asked on any number of streams, from a frozen process or an image.

use pageferry_image::page::PageRange;
use pageferry_pageserver::at_rest::ImagePages;
use pageferry_pageserver::serve::PageReader;
use pageferry_pageserver::{Error, Result};
use pageferry_wire::{Frame, PageBatch};

use crate::report;
use crate::transport::{FramedRecv, FramedSend, Link};

/// What has pages. Every stream that asks has its own.
pub trait Pages: Send + 'static {
    /// The first pages of `range`, which is not empty, as many as one batch takes.
    ///
    /// # Errors
    /// They cannot be had from here any more.
    fn batch(&mut self, request: u64, range: PageRange) -> Result<PageBatch>;
}

impl Pages for PageReader {
    fn batch(&mut self, request: u64, range: PageRange) -> Result<PageBatch> {
        // The process runs elsewhere and waits for this: a call that fails now and then must not end it.
        twice(|| Self::batch(self, request, range))
    }
}

impl Pages for ImagePages {
    fn batch(&mut self, request: u64, range: PageRange) -> Result<PageBatch> {
        Self::batch(self, request, range)
    }
}

/// Tries again once.
pub fn twice<T, E>(
    mut attempt: impl FnMut() -> std::result::Result<T, E>,
) -> std::result::Result<T, E> {
    attempt().or_else(|_| attempt())
}

/// Answers every page request on `link` until it ends. `open` gives each stream its pages.
pub async fn serve<P: Pages>(link: &Link, open: impl Fn() -> Result<P>) {
    while let Ok((sender, receiver)) = link.accept().await {
        let (link, pages) = (link.clone(), twice(&open));
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
    pages: std::result::Result<P, Error>,
) -> std::result::Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let mut pages = pages?;
    while let Some(frame) = receiver.recv().await? {
        let Frame::Fetch(fetch) = frame else {
            return Err(format!("{:?} on a page stream", frame.tag()).into());
        };
        let mut left = fetch.range();
        while !left.is_empty() {
            let batch = pages.batch(fetch.request, left)?;
            left.start = batch.range().end;
            sender.send(batch).await?;
        }
    }
    Ok(())
}
