//! `pageferry page-server`: images, served to any number of restores on other hosts.
//!
//! Every connection says which image it is about, and nothing is remembered between two of them: there is nothing to commit
//! and nothing to lose. Pages are read when they are asked for, and none is kept; the memory they take until a peer has
//! acknowledged them is there once for all who ask ([`Rooms`]), and what peers say is bounded, so that eight restores take what
//! one takes.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use pageferry_image::page::{PAGE_SIZE, PageRange};
use pageferry_image::store::Image;
use pageferry_pageserver::at_rest::{self, ImagePages};
use pageferry_tracee::host;
use pageferry_wire::limits::MAP_RANGES_PER_FRAME_MAX;
use pageferry_wire::message::{Abort, AbortCode, Hello, Map, MapEnd, Role, State, Welcome};
use pageferry_wire::{Frame, Phase};
use tokio::time::timeout;

use crate::cli::{Common, PageServerArgs};
use crate::identity::Identity;
use crate::page_service::Shelved;
use crate::rooms::Rooms;
use crate::stop::Stop;
use crate::transport::{self, FramedRecv, FramedSend, HANDSHAKE_TIMEOUT, Link, Listener};
use crate::{exit, migrate, page_service, report};

/// Longest wait for a peer that was turned away to have read why.
const LAST_WORD_WAIT: Duration = Duration::from_secs(2);

/// Threads that read images, at most: as many as a single restore keeps busy, one with what it waits for and one with the rest. They
/// read and unpack faster than the one thread that sends can send, and each takes memory of its own.
const READERS_MAX: usize = 2;

/// Unacknowledged bytes of pages that are kept for a peer: as many as there are rooms for, and what stands around them.
const PAGES_WINDOW: u64 = 64 << 20;
/// Pages of a map that are looked up at once: at most so many ranges.
const MAP_PIECE_PAGES: u64 = MAP_RANGES_PER_FRAME_MAX as u64;

/// The images by the names they are asked for by.
type Shelf = BTreeMap<String, Served>;

/// An image, and what of it does not have to be made anew for each who asks.
#[derive(Debug)]
struct Served {
    pages: ImagePages,
    /// The tree as it travels.
    state: OnceLock<State>,
}

/// Runs the verb; the exit code.
pub fn run(args: &PageServerArgs, _: &Common) -> u8 {
    let shelf = match open_all(args) {
        Ok(shelf) => shelf,
        Err((code, text)) => {
            eprintln!("pageferry: {text}");
            return code;
        }
    };
    let opened = Identity::open_with_peers(&args.identity.identity, &args.trust);
    let (identity, trust) = match opened {
        Ok(opened) => opened,
        Err(error) => {
            eprintln!("pageferry: {}", report::chain(&error));
            return exit::FAILED;
        }
    };
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(READERS_MAX)
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("pageferry: no runtime: {error}");
            return exit::FAILED;
        }
    };
    let code = runtime.block_on(async {
        let bound = Listener::bind(args.listen, &identity, &trust).map(Listener::frugal);
        let (mut listener, mut stop) = match (bound, Stop::new()) {
            (Ok(listener), Ok(stop)) => (listener, stop),
            (Err(error), _) => {
                eprintln!("pageferry: {}", report::chain(&error));
                return exit::FAILED;
            }
            (_, Err(error)) => {
                eprintln!("pageferry: signals cannot be watched: {error}");
                return exit::FAILED;
            }
        };
        let names: Vec<&str> = shelf.keys().map(String::as_str).collect();
        tracing::info!(
            "serving {} on {} as {}",
            names.join(", "),
            listener.local_address(),
            identity.fingerprint()
        );
        let (shelf, rooms) = (Arc::new(shelf), Rooms::default());
        let signal = loop {
            tokio::select! {
                link = listener.accept() => match link {
                    Some(Ok(link)) => {
                        tokio::spawn(attend(link, Arc::clone(&shelf), rooms.clone()));
                    }
                    Some(Err(error)) => tracing::warn!("turned away: {}", report::chain(&error)),
                    None => return exit::FAILED,
                },
                signal = stop.wait() => break signal,
            }
        };
        // Whoever still lacks pages must be told now, not by silence.
        listener.close();
        let _ = timeout(Duration::from_secs(1), listener.wait_idle()).await;
        exit::signalled(signal)
    });
    // A disk that does not answer must not keep us.
    runtime.shutdown_background();
    code
}

/// Opens each image: one that is damaged is better told now than to the first who needs it.
fn open_all(args: &PageServerArgs) -> Result<Shelf, (u8, String)> {
    let mut shelf = Shelf::new();
    for path in &args.image {
        let image = Image::open(path).map_err(|error| {
            let code = if error.is_bad_image() {
                exit::BAD_DATA
            } else {
                exit::FAILED
            };
            (code, report::chain(&error))
        })?;
        let name = path
            .canonicalize()
            .ok()
            .and_then(|path| Some(path.file_name()?.to_str()?.to_owned()))
            .ok_or_else(|| {
                let text = format!("{}: its name is no text; rename it", path.display());
                (exit::FAILED, text)
            })?;
        let served = Served {
            pages: ImagePages::new(image),
            state: OnceLock::new(),
        };
        if shelf.insert(name.clone(), served).is_some() {
            let text = format!(
                "two images are called {name}; rename one, or serve it by another page server"
            );
            return Err((exit::FAILED, text));
        }
    }
    Ok(shelf)
}

/// One connection, from its greeting to its end.
async fn attend(link: Link, shelf: Arc<Shelf>, rooms: Rooms) {
    let (hello, mut sender, mut receiver) = match link.greeted().await {
        Ok(greeted) => greeted,
        Err(error) => return tracing::warn!("{}", report::chain(&error)),
    };
    let opened = open(&hello, &mut sender, &mut receiver, &shelf).await;
    let served = match opened {
        Ok(served) => served,
        Err(refusal) => {
            tracing::warn!("{}: {refusal}", link.remote_address());
            let abort = Abort::new(Phase::Hello, AbortCode::Failed, &refusal);
            if sender.send(abort).await.is_ok() {
                let _ = timeout(LAST_WORD_WAIT, link.closed()).await;
            }
            return link.close();
        }
    };
    if hello.role() == Role::Restore {
        let id = migrate::hex(&hello.id());
        tracing::info!(%id, "{} ({}) restores {}", link.remote_address(), hello.host_name, served.pages.image().path().display());
        if let Err(text) = tell(&mut sender, served).await {
            tracing::warn!(%id, "{text}");
            return link.close();
        }
        let reason = link.closed().await;
        tracing::debug!(%id, "it is done: {}", report::chain(&reason));
    } else {
        // The rooms are the bound.
        link.bound_unacknowledged(PAGES_WINDOW);
        let pages = Shelved {
            pages: served.pages.clone(),
            share: rooms.share(),
        };
        page_service::serve(&link, || pages.clone()).await;
    }
}

/// Agrees on a version and on what this connection is about.
async fn open<'s>(
    hello: &Hello,
    sender: &mut FramedSend,
    receiver: &mut FramedRecv,
    shelf: &'s Shelf,
) -> Result<&'s Served, String> {
    let version = hello.version().map_err(|error| report::chain(&error))?;
    if hello.role() == Role::Control {
        return Err(
            "this is a page server: it has images to restore, and takes no processes (pageferry receive does)".into(),
        );
    }
    let welcome = Welcome {
        version,
        host_name: host::host_name().unwrap_or_default(),
    };
    sender
        .send(welcome)
        .await
        .map_err(|error| report::chain(&error))?;
    let asked = timeout(HANDSHAKE_TIMEOUT, receiver.expect())
        .await
        .map_err(|_| "it did not say which image it wants")?;
    match asked.map_err(|error| report::chain(&error))? {
        Frame::Open(open) => shelf.get(&open.name).ok_or_else(|| {
            format!(
                "there is no image {:?} here; there are: {}",
                open.name,
                shelf.keys().cloned().collect::<Vec<_>>().join(", ")
            )
        }),
        other => Err(format!("{} instead of the name of an image", other.tag())),
    }
}

/// The tree, and which pages have data.
async fn tell(sender: &mut FramedSend, served: &Served) -> Result<(), String> {
    let sent = |error: transport::Error| report::chain(&error);
    let pages = &served.pages;
    let tree = pages.image().tree();
    let state = served.state.get_or_init(|| State::new(tree));
    sender.send(state.clone()).await.map_err(sent)?;
    for (object, wanted) in at_rest::all_mapped(tree) {
        let mut ranges = Vec::new();
        for piece in pieces(&wanted) {
            pages
                .page_map(object, &[piece], |range| ranges.push(range))
                .map_err(|error| report::chain(&error))?;
            // A map may be as large as a hundredth of the memory: no more of it is held than fits a frame or two.
            if ranges.len() >= MAP_RANGES_PER_FRAME_MAX {
                for map in Map::frames(object, &ranges) {
                    sender.send(map).await.map_err(sent)?;
                }
                ranges.clear();
            }
        }
        for map in Map::frames(object, &ranges) {
            sender.send(map).await.map_err(sent)?;
        }
    }
    let end = MapEnd {
        pages_total: pages.image().header().counts.data_pages,
    };
    sender.send(end).await.map_err(sent)
}

/// `ranges` in pieces of at most [`MAP_PIECE_PAGES`].
fn pieces(ranges: &[PageRange]) -> impl Iterator<Item = PageRange> + '_ {
    let len = MAP_PIECE_PAGES * PAGE_SIZE;
    ranges.iter().flat_map(move |range| {
        let end = range.end;
        (range.start..end)
            .step_by(len as usize)
            .map(move |start| PageRange {
                start,
                end: end.min(start + len),
            })
    })
}
