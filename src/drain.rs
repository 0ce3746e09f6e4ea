//! Joins the fault driver to the links: what it asks for goes out on a stream of each link, what comes back goes in.
//!
//! Faults travel on a connection of their own, so that bulk never stands in front of one.

use pageferry_restorer::fault::driver::{Connections, Driver, DriverHandle, FaultError, Memory};
use pageferry_restorer::fault::engine::Options;
use pageferry_restorer::rebuild::Rebuilt;
use pageferry_wire::message::Fetch;
use pageferry_wire::{Frame, PageBatch};
use tokio::sync::mpsc;

use crate::report;
use crate::transport::{self, Link};

/// Batches that may wait for the driver before a link's reader pauses: QUIC's flow control then slows the source down.
const BATCHES_WAITING_MAX: usize = 64;

/// Why the drain could not begin.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No stream to ask for pages on.
    #[error("pages cannot be asked for")]
    Link(#[from] transport::Error),
    /// The driver.
    #[error("page faults cannot be answered")]
    Fault(#[from] FaultError),
}

/// Takes charge of a rebuilt process that does not run yet. Must be called inside a tokio runtime.
///
/// # Errors
/// The process must then never run.
pub async fn start(
    pid: i32,
    rebuilt: Rebuilt,
    faults: &Link,
    bulk: &Link,
    drain: bool,
) -> Result<(Driver, DriverHandle), Error> {
    let (fault_fetches, fault_pages) = channel(faults).await?;
    let (bulk_fetches, bulk_pages) = channel(bulk).await?;
    let Rebuilt {
        uffd,
        lazy,
        resident,
        wipe_on_fork,
    } = rebuilt;
    let memory = Memory {
        pid,
        uffd,
        lazy,
        resident,
        wipe_on_fork,
    };
    let connections = Connections {
        fault_fetches,
        fault_pages,
        bulk_fetches,
        bulk_pages,
    };
    Ok(Driver::new(
        memory,
        connections,
        Options {
            drain,
            ..Options::default()
        },
    )?)
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
