//! Where a restore takes its pages from: an image on this host, or one that a page server has.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;

use pageferry_image::model::task::Tree;
use pageferry_image::page::{PAGE_SIZE, PageRange};
use pageferry_image::store::{self, Image};
use pageferry_pageserver::at_rest::{self, ImagePages};
use pageferry_restorer::fault::driver::Connections;
use pageferry_restorer::rebuild::{self, Eager};
use pageferry_tracee::host;
use pageferry_wire::limits::{FETCH_PAGES_MAX, MAP_RANGES_MAX};
use pageferry_wire::message::{Fetch, Hello, Open, Role};
use pageferry_wire::{Frame, PageBatch, PageKind};
use tokio::sync::mpsc;

use crate::drain;
use crate::identity::{Identity, TrustSet};
use crate::report;
use crate::transport::{self, FramedRecv, FramedSend, Link, silence_max};

/// Why an image, or pages of it, cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The image on this host.
    #[error(transparent)]
    Image(#[from] store::Error),
    /// Pages of it.
    #[error(transparent)]
    Pages(#[from] pageferry_pageserver::Error),
    /// The link to the page server.
    #[error(transparent)]
    Link(#[from] transport::Error),
    /// What it sent cannot be.
    #[error("page server {address} sent what cannot be: use the same version on both hosts")]
    Protocol {
        /// The page server.
        address: SocketAddr,
        /// The broken rule.
        #[source]
        source: pageferry_wire::Error,
    },
    /// It has another order than the protocol.
    #[error("page server {address} sent {what}: use the same version on both hosts")]
    Order {
        /// The page server.
        address: SocketAddr,
        /// What came.
        what: String,
    },
    /// It gave up.
    #[error("page server {address} refuses: {text}")]
    Refused {
        /// The page server.
        address: SocketAddr,
        /// Why, in its words.
        text: String,
    },
    /// A page that its own map promises.
    #[error("page {address:x} cannot be had")]
    Gone {
        /// Where it belongs.
        address: u64,
    },
    /// The name cannot be resolved.
    #[error("{0}")]
    Name(String),
    /// What came cannot be put where it belongs.
    #[error(transparent)]
    Place(#[from] rebuild::Error),
}

impl Error {
    /// Whether the image or the page server is to blame, not this host or the network.
    pub fn is_bad_data(&self) -> bool {
        match self {
            Self::Image(error) | Self::Pages(pageferry_pageserver::Error::Image(error)) => {
                error.is_bad_image()
            }
            Self::Protocol { .. } | Self::Order { .. } | Self::Gone { .. } => true,
            other => report::is_bad_data(other),
        }
    }
}

type Result<T> = std::result::Result<T, Error>;

/// The ranges of pages with data, or guards that are not in the tree, ascending: of each address space that has any.
type Data = BTreeMap<u32, Vec<PageRange>>;

/// An open image.
#[derive(Debug)]
pub struct Origin {
    /// What it holds: every rule of the model holds.
    pub tree: Tree,
    data: Data,
    place: Place,
}

#[derive(Debug)]
enum Place {
    Here(ImagePages),
    There(Box<Links>),
}

/// The three connections to a page server.
#[derive(Debug)]
struct Links {
    restore: Link,
    faults: Link,
    bulk: Link,
}

impl Origin {
    /// The image at `path`.
    ///
    /// # Errors
    /// [`Error::Image`], [`Error::Pages`].
    pub fn here(path: &Path) -> Result<Self> {
        let image = Image::open(path)?;
        let tree = image.tree().clone();
        let pages = ImagePages::new(image);
        let mut data = Data::new();
        for (object, wanted) in at_rest::all_mapped(&tree) {
            let mut ranges = Vec::new();
            pages.page_map(object, &wanted, |range| ranges.push(range))?;
            data.insert(object, ranges);
        }
        Ok(Self {
            tree,
            data,
            place: Place::Here(pages),
        })
    }

    /// The image `name` of the page server at `from` (host:port), which must be one of `peers`. Must be called inside a tokio
    /// runtime.
    ///
    /// # Errors
    /// All but [`Error::Image`].
    pub async fn there(
        from: &str,
        name: &str,
        identity: &Identity,
        peers: &TrustSet,
        id: [u8; 16],
    ) -> Result<Self> {
        let address = tokio::net::lookup_host(from)
            .await
            .map_err(|error| Error::Name(format!("{from}: {error}")))?
            .next()
            .ok_or_else(|| Error::Name(format!("{from} has no address")))?;
        let connect = async |role| {
            let link = transport::dial(address, identity, peers, role, None).await?;
            let hello = Hello::new(id, role, &host::host_name().unwrap_or_default());
            let (_, mut sender, receiver) = link.greet(hello).await?;
            sender.send(Open::new(name)).await?;
            Ok::<_, Error>((link, sender, receiver))
        };
        let (restore, _sender, mut receiver) = connect(Role::Restore).await?;
        let told = tokio::select! {
            told = hear(&mut receiver, address) => told,
            error = restore.silent_for(silence_max()) => Err(error.into()),
        };
        let (tree, data) = told?;
        let (faults, ..) = connect(Role::Faults).await?;
        let (bulk, ..) = connect(Role::Bulk).await?;
        Ok(Self {
            tree,
            data,
            place: Place::There(Box::new(Links {
                restore,
                faults,
                bulk,
            })),
        })
    }

    /// Bytes of memory that its pages take.
    pub fn resident_bytes(&self) -> u64 {
        let ranges = self.data.values().flatten();
        ranges.map(|range| range.byte_len()).sum()
    }

    /// Where in `wanted`, which ascends, `object` has data, or guards that are not in the tree.
    pub fn data_in(&self, object: u32, wanted: &[PageRange]) -> Vec<PageRange> {
        let mut found = Vec::new();
        let mut rest = self.data.get(&object).map_or(&[][..], Vec::as_slice);
        for want in wanted {
            let skipped = rest.partition_point(|range| range.end <= want.start);
            rest = &rest[skipped..];
            let within = rest.iter().take_while(|range| range.start < want.end);
            found.extend(within.filter_map(|range| range.intersect(*want)));
        }
        found
    }

    /// Brings the pages with data in these ranges of each object.
    ///
    /// # Errors
    /// [`Error`]: one of them cannot be had, or has no place.
    pub async fn read(&self, ranges: &[(u32, Vec<PageRange>)], eager: &mut Eager) -> Result<()> {
        let each = ranges
            .iter()
            .flat_map(|(object, ranges)| ranges.iter().map(|range| (*object, *range)));
        match &self.place {
            Place::Here(pages) => {
                for (object, mut left) in each {
                    while !left.is_empty() {
                        let batch = pages.batch(object, 0, left)?;
                        left.start = batch.range().end;
                        keep(&batch, eager)?;
                    }
                }
            }
            Place::There(links) => {
                let address = links.bulk.remote_address();
                let (mut sender, mut receiver) = links.bulk.open().await?;
                for (object, mut left) in each {
                    while !left.is_empty() {
                        let wanted = PageRange {
                            start: left.start,
                            end: left
                                .end
                                .min(left.start + u64::from(FETCH_PAGES_MAX) * PAGE_SIZE),
                        };
                        let answers = async {
                            ask(object, wanted, &mut sender).await?;
                            let mut missing = wanted;
                            // A page server answers with as much at a time as it has room for.
                            while !missing.is_empty() {
                                let batch = answer(missing, &mut receiver).await?;
                                let came = batch.range();
                                if batch.object() != object
                                    || came.start != missing.start
                                    || came.is_empty()
                                    || came.end > missing.end
                                {
                                    return Err(Error::Order {
                                        address,
                                        what: format!(
                                            "page {:x} instead of {:x}",
                                            came.start, missing.start
                                        ),
                                    });
                                }
                                missing.start = came.end;
                                keep(&batch, eager)?;
                            }
                            Ok(())
                        };
                        tokio::select! {
                            answered = answers => answered?,
                            error = links.bulk.silent_for(silence_max()) => return Err(error.into()),
                        }
                        left.start = wanted.end;
                    }
                }
                drop(sender);
            }
        }
        Ok(())
    }

    /// What the fault driver asks, and by which it learns once that nothing comes any more. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// [`Error::Link`].
    pub async fn connect(&self) -> Result<(Connections, mpsc::UnboundedReceiver<Error>)> {
        match &self.place {
            Place::Here(pages) => Ok(drain::from_image(pages)),
            Place::There(links) => {
                let connections = drain::from_links(&links.faults, &links.bulk).await?;
                let (failed, failures) = mpsc::unbounded_channel();
                for link in [&links.restore, &links.faults, &links.bulk] {
                    let (link, failed) = (link.clone(), failed.clone());
                    tokio::spawn(async move {
                        let _ = failed.send(link.silent_for(silence_max()).await.into());
                    });
                }
                Ok((connections, failures))
            }
        }
    }

    /// Nothing is wanted any more. UDP payload bytes both ways.
    pub fn close(&self) -> u64 {
        match &self.place {
            Place::Here(_) => 0,
            Place::There(links) => [&links.restore, &links.faults, &links.bulk]
                .into_iter()
                .map(|link| {
                    link.close();
                    link.udp_bytes()
                })
                .sum(),
        }
    }
}

/// The tree, and which of its pages have data.
async fn hear(receiver: &mut FramedRecv, address: SocketAddr) -> Result<(Tree, Data)> {
    let wrong = |frame: Frame| match frame {
        Frame::Abort(abort) => Error::Refused {
            address,
            text: abort.text,
        },
        other => Error::Order {
            address,
            what: other.tag().to_string(),
        },
    };
    let broken = |source| Error::Protocol { address, source };
    let tree = match receiver.expect().await? {
        Frame::State(state) => state.decode().map_err(broken)?,
        other => return Err(wrong(other)),
    };
    if tree.host.is_none() {
        return Err(Error::Order {
            address,
            what: "a tree that does not say what host it expects".into(),
        });
    }
    let mut data = Data::new();
    let (mut place, mut count) = ((0, 0), 0);
    loop {
        match receiver.expect().await? {
            Frame::Map(map) => {
                let ranges = map.ranges().map_err(broken)?;
                let (Some(first), Some(last)) = (ranges.first(), ranges.last()) else {
                    continue;
                };
                count += ranges.len();
                if (map.object, first.start) < place || count > MAP_RANGES_MAX {
                    return Err(Error::Order {
                        address,
                        what: "a page map that goes back or has no end".into(),
                    });
                }
                place = (map.object, last.end);
                data.entry(map.object).or_default().extend(ranges);
            }
            Frame::MapEnd(_) => return Ok((tree, data)),
            other => return Err(wrong(other)),
        }
    }
}

/// Asks for pages.
async fn ask(object: u32, wanted: PageRange, sender: &mut FramedSend) -> Result<()> {
    let question = Fetch {
        request: 0,
        address: wanted.start,
        page_count: u32::try_from(wanted.page_count()).unwrap_or(FETCH_PAGES_MAX),
        object,
    };
    Ok(sender.send(question).await?)
}

/// The next batch of those that were asked for.
async fn answer(wanted: PageRange, receiver: &mut FramedRecv) -> Result<PageBatch> {
    match receiver.expect().await? {
        Frame::Pages(batch) => Ok(batch),
        _ => Err(Error::Gone {
            address: wanted.start,
        }),
    }
}

/// Keeps the pages with data, each verified.
fn keep(batch: &PageBatch, eager: &mut Eager) -> Result<()> {
    for run in batch.runs() {
        match run.kind {
            PageKind::Data => {
                let address = run.range.start;
                let bytes = batch.verify_run(run).map_err(|_| Error::Gone { address })?;
                eager.take(batch.object(), address, &bytes)?;
            }
            PageKind::Zero | PageKind::Guard => {}
            PageKind::Gone => {
                return Err(Error::Gone {
                    address: run.range.start,
                });
            }
        }
    }
    Ok(())
}
