//! Joins the fault driver to where pages come from. Over the network what it asks for goes out on a stream of each link, what
//! comes back goes in: faults have a connection of their own, so that bulk never stands in front of one. From an image, each
//! kind has a thread of its own.

use pageferry_pageserver::at_rest::ImagePages;
use pageferry_restorer::fault::driver::{Connections, Driver, DriverHandle, FaultError, Memory};
use pageferry_restorer::fault::engine::Options;
use pageferry_restorer::rebuild::Rebuilt;
use pageferry_wire::message::Fetch;
use pageferry_wire::{Frame, PageBatch};
use tokio::sync::mpsc;

use crate::transport::{self, Link};
use crate::{origin, report};

/// Batches that may wait for the driver before a link's reader pauses: QUIC's flow control then slows the source down.
const BATCHES_WAITING_MAX: usize = 64;

/// Takes charge of the rebuilt memory of a tree that does not run yet. Must be called inside a tokio runtime.
///
/// # Errors
/// The tree must then never run.
pub fn start(
    rebuilt: Vec<Rebuilt>,
    connections: Connections,
    drain: bool,
) -> Result<(Driver, DriverHandle), FaultError> {
    let memories = rebuilt.into_iter().map(|rebuilt| {
        let Rebuilt {
            object,
            pids,
            uffd,
            lazy,
            resident,
            zeros: _,
            wipe_on_fork,
        } = rebuilt;
        Memory {
            object,
            pids,
            uffd,
            lazy,
            resident,
            wipe_on_fork,
        }
    });
    let options = Options {
        drain,
        ..Options::default()
    };
    Driver::new(memories.collect(), connections, options)
}

/// Pages come from the host at the other end of two links.
///
/// # Errors
/// If a stream cannot be opened.
pub async fn from_links(faults: &Link, bulk: &Link) -> Result<Connections, transport::Error> {
    let (fault_fetches, fault_pages) = channel(faults).await?;
    let (bulk_fetches, bulk_pages) = channel(bulk).await?;
    Ok(Connections {
        fault_fetches,
        fault_pages,
        bulk_fetches,
        bulk_pages,
    })
}

/// Pages come from an image on this host. Why they do not come any more is told once, before a channel closes. Must be called
/// inside a tokio runtime.
pub fn from_image(pages: &ImagePages) -> (Connections, mpsc::UnboundedReceiver<origin::Error>) {
    let (failed, failures) = mpsc::unbounded_channel();
    let serve = || {
        let (fetches, mut wanted) = mpsc::unbounded_channel::<Fetch>();
        let (arrived, batches) = mpsc::channel(BATCHES_WAITING_MAX);
        let (pages, failed) = (pages.clone(), failed.clone());
        tokio::task::spawn_blocking(move || {
            while let Some(fetch) = wanted.blocking_recv() {
                let mut left = fetch.range();
                while !left.is_empty() {
                    let batch = match pages.batch(fetch.object, fetch.request, left) {
                        Ok(batch) => batch,
                        Err(error) => {
                            // Whoever waits for the pages is told by the closed channel, too.
                            let _ = failed.send(error.into());
                            return;
                        }
                    };
                    left.start = batch.range().end;
                    if arrived.blocking_send(batch).is_err() {
                        return;
                    }
                }
            }
        });
        (fetches, batches)
    };
    let (fault_fetches, fault_pages) = serve();
    let (bulk_fetches, bulk_pages) = serve();
    let connections = Connections {
        fault_fetches,
        fault_pages,
        bulk_fetches,
        bulk_pages,
    };
    (connections, failures)
}

/// A page stream on `link`.
async fn channel(
    link: &Link,
) -> Result<(mpsc::UnboundedSender<Fetch>, mpsc::Receiver<PageBatch>), transport::Error> {
    let (mut sender, mut receiver) = link.open().await?;
    let (fetches, mut wanted) = mpsc::unbounded_channel::<Fetch>();
    let (arrived, pages) = mpsc::channel(BATCHES_WAITING_MAX);
    tokio::spawn(async move {
        while let Some(fetch) = wanted.recv().await {
            if let Err(error) = sender.send(fetch).await {
                tracing::debug!(
                    "a request for pages was not sent: {}",
                    report::chain(&error)
                );
                return;
            }
        }
    });
    tokio::spawn(async move {
        loop {
            match receiver.recv().await {
                Ok(Some(Frame::Pages(batch))) => {
                    if arrived.send(batch).await.is_err() {
                        return;
                    }
                }
                Ok(Some(other)) => {
                    tracing::error!("the source sent {:?} instead of pages", other.tag());
                    return;
                }
                Ok(None) => return,
                Err(error) => {
                    tracing::debug!("a page stream ended: {}", report::chain(&error));
                    return;
                }
            }
        }
    });
    Ok((fetches, pages))
}
