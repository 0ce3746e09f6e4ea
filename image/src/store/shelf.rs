//! A folder of images: what lies in it, and taking images away. Reads headers only, and touches nothing that is not an image.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::header::Header;
use super::write::{UNFINISHED, parent, sync_folder};
use super::{Damage, Error, FILES, HEADER, Result};

/// How the name of an image that is being removed begins.
const REMOVED: &str = ".removed-";

/// Something in the folder that is an image, or was meant to be one.
#[derive(Debug)]
pub struct Entry {
    /// Where it lies.
    pub path: PathBuf,
    /// What it is.
    pub state: State,
}

/// What an entry of the folder is.
#[derive(Debug)]
pub enum State {
    /// An image. Only its header has been looked at.
    Image(Box<Header>),
    /// An image that is damaged, or cannot be read.
    Bad(Error),
    /// What a dump has not finished, or a removal not ended. It may still be under way.
    Leftover,
}

/// The images in `folder`, the newest first, then what else belongs to images, by name. Other files are passed over.
///
/// # Errors
/// [`Error::Io`] if the folder cannot be listed.
pub fn list(folder: &Path) -> Result<Vec<Entry>> {
    let mut entries = Vec::new();
    let listed = fs::read_dir(folder).map_err(Error::io(folder, "list it"))?;
    for entry in listed {
        let path = entry.map_err(Error::io(folder, "list it"))?.path();
        let is_folder = path.symlink_metadata().is_ok_and(|found| found.is_dir());
        if !is_folder {
            continue;
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let state = if name.starts_with(UNFINISHED) || name.starts_with(REMOVED) {
            State::Leftover
        } else {
            match Header::of(&path) {
                Ok(header) => State::Image(Box::new(header)),
                Err(Error::Bad {
                    damage: Damage::NoHeader | Damage::Magic,
                    ..
                }) => continue,
                Err(error) => State::Bad(error),
            }
        };
        entries.push(Entry { path, state });
    }
    entries.sort_by(|one, other| {
        let key = |entry: &Entry| match &entry.state {
            State::Image(header) => (0, u64::MAX - header.origin.created_ns),
            State::Bad(_) => (1, 0),
            State::Leftover => (2, 0),
        };
        (key(one), &one.path).cmp(&(key(other), &other.path))
    });
    Ok(entries)
}

/// Which images are to go: those that neither rule keeps. `images` is what [`list`] gave.
///
/// The `keep` newest stay, and those that were made within `within_ns` of `now_ns`. Damaged ones and leftovers are nobody's to
/// decide about here.
pub fn to_prune(
    images: &[Entry],
    keep: Option<usize>,
    within_ns: Option<u64>,
    now_ns: u64,
) -> Vec<&Entry> {
    let is_image = |entry: &&Entry| matches!(entry.state, State::Image(_));
    images
        .iter()
        .filter(is_image)
        .skip(keep.unwrap_or(0))
        .filter(|entry| match (&entry.state, within_ns) {
            (State::Image(header), Some(within_ns)) => {
                now_ns.saturating_sub(header.origin.created_ns) > within_ns
            }
            _ => true,
        })
        .collect()
}

/// Removes an image, a damaged one as well, or a leftover of one. It has lost its name before the first file of it goes.
///
/// # Errors
/// [`Error::Bad`] if it is none: it holds something else, or has not the header of an image. [`Error::Io`].
pub fn remove(path: &Path) -> Result<()> {
    let bad = Error::bad(path);
    let found = path
        .symlink_metadata()
        .map_err(Error::io(path, "look at it"))?;
    if !found.is_dir() {
        return Err(bad(Damage::NoHeader));
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let is_leftover = name.starts_with(UNFINISHED) || name.starts_with(REMOVED);
    if !is_leftover {
        match Header::of(path) {
            // What begins as an image was one.
            Ok(_) => {}
            Err(Error::Bad {
                damage:
                    damage @ (Damage::NoHeader | Damage::Magic | Damage::NoFile { file: HEADER }),
                ..
            }) => return Err(bad(damage)),
            Err(Error::Bad { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    for entry in fs::read_dir(path).map_err(Error::io(path, "list it"))? {
        let name = entry.map_err(Error::io(path, "list it"))?.file_name();
        if !FILES.iter().any(|file| name == *file) {
            return Err(bad(Damage::Stranger {
                name: name.to_string_lossy().into_owned(),
            }));
        }
    }
    let unique = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_nanos());
    let removed = parent(path).join(format!("{REMOVED}{}-{unique}", std::process::id()));
    fs::rename(path, &removed).map_err(Error::io(path, "rename it"))?;
    for file in FILES {
        match fs::remove_file(removed.join(file)) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(Error::io(&removed.join(file), "remove it")(error));
            }
            _ => {}
        }
    }
    fs::remove_dir(&removed).map_err(Error::io(&removed, "remove it"))?;
    sync_folder(parent(path))
}
