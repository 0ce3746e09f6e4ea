//! Shared objects: which there are, each once however many mappings and descriptors reach it, and who else does.
//!
//! An object is known by its device and inode. What it holds is not read here.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::Metadata;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt as _;
use std::sync::Arc;

use pageferry_image::model::limits;
use pageferry_image::model::shared::{Anonymous, Carried, Memfd, Segment, Shared, shared};
use pageferry_image::page::PageRange;
use pageferry_image::store::ObjectId;
use pageferry_tracee::choke::{self, Kind as Call};
use pageferry_tracee::procfs::{self, FileKey, Vma};
use pageferry_tracee::{Error as ProcessError, shared as kernel, sysv};

use super::files::{TMPFS, Verdict, storage};
use crate::survey::{Object, Pids, Refusal, RefusalKind};
use crate::{Error, Result};

/// What the kernel calls shared anonymous memory.
const ANONYMOUS: &str = "/dev/zero (deleted)";
const MEMFD: &str = "/memfd:";

/// Whether a mapping or descriptor of this name reaches an object that is carried.
pub(crate) fn is_object(name: &str) -> bool {
    name == ANONYMOUS || name.starts_with(MEMFD) || sysv::is_name(name)
}

/// Where the pages of an object of the frozen tree are had from.
#[derive(Debug, Clone)]
pub struct SharedPages {
    /// Its number.
    pub object: u32,
    /// Its size, bytes.
    pub size: u64,
    /// Leads to it for as long as the tree is frozen.
    pub path: String,
    /// What the path leads through, if it was only in a message that nobody has received.
    pub kept: Option<Arc<OwnedFd>>,
}

impl SharedPages {
    /// All of them; the last may reach beyond the size.
    pub fn range(&self) -> PageRange {
        PageRange {
            start: 0,
            end: self.size.next_multiple_of(pageferry_image::page::PAGE_SIZE),
        }
    }
}

/// What went with the tree and stays here under its name: a file, or a segment of System V shared memory.
#[derive(Debug, Clone)]
pub struct Moved {
    name: String,
    place: Place,
}

#[derive(Debug, Clone)]
enum Place {
    File { path: String, key: FileKey },
    Segment { id: i32 },
}

impl Moved {
    /// What an operator would call it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether only processes could use it: without them it is of no use, even to an image.
    pub fn is_memory(&self) -> bool {
        matches!(self.place, Place::Segment { .. })
    }

    /// Removes it here, unless something else is at its path by now. A segment must have no user left.
    ///
    /// # Errors
    /// What the kernel says; that it is gone is none.
    pub fn remove(&self) -> std::io::Result<()> {
        let (path, key) = match &self.place {
            Place::File { path, key } => (path, *key),
            Place::Segment { id } => return sysv::remove(*id).map_err(std::io::Error::other),
        };
        match std::fs::symlink_metadata(path) {
            Ok(found) if (found.dev(), found.ino()) == key => std::fs::remove_file(path),
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

/// The objects of a tree, as they are met.
#[derive(Debug, Default)]
pub(crate) struct Objects {
    known: BTreeMap<FileKey, usize>,
    /// Segments, by number.
    segments: BTreeMap<i32, usize>,
    found: Vec<Found>,
    /// Inodes of files that the tree writes, once somebody has asked.
    written: Option<BTreeSet<u64>>,
    /// Those of files that are sent to be written.
    sent: BTreeSet<u64>,
}

#[derive(Debug)]
struct Found {
    /// `(0, 0)` for a segment.
    key: FileKey,
    model: Shared,
    /// Leads to it.
    path: String,
    /// Where it was met first.
    at: (i32, Object),
    /// Memory it takes.
    bytes: u64,
    /// Of a segment: the mappings that were met, by process and address.
    attached: BTreeSet<(i32, u64)>,
}

impl Objects {
    /// The object behind a mapping of `pid`, of this name. `limit`: bytes of a deleted file that is carried.
    pub(crate) fn mapped(
        &mut self,
        pid: i32,
        vma: &Vma,
        name: &str,
        limit: u64,
    ) -> Result<Verdict<u32>> {
        let (start, end) = (vma.start, vma.end);
        let path = format!("/proc/{pid}/map_files/{start:x}-{end:x}");
        let at = (pid, Object::Mapping { start, end });
        if sysv::is_name(name) {
            return self.attached(at, path, vma);
        }
        let id = match self.met((vma.device, vma.inode)) {
            Some(id) => Ok(id),
            None => self.meet(at, path, name, limit)?,
        };
        if let (Ok(id), true) = (&id, vma.flags.has("nr")) {
            self.no_reserve(*id);
        }
        Ok(id)
    }

    /// The object that a descriptor of `pid` refers to, as [`Objects::mapped`].
    pub(crate) fn opened(
        &mut self,
        pid: i32,
        fd: u32,
        name: &str,
        limit: u64,
    ) -> Result<Verdict<u32>> {
        let path = format!("/proc/{pid}/fd/{fd}");
        self.meet((pid, Object::Fd(fd)), path, name, limit)
    }

    /// Whether the object is known already.
    pub(crate) fn has(&self, key: FileKey) -> bool {
        self.known.contains_key(&key)
    }

    /// Whether a process of the tree has a file with this inode open for writing, or mapped so.
    pub(crate) fn is_written(&mut self, pids: &[i32], inode: u64) -> Result<bool> {
        if self.written.is_none() {
            self.written = Some(written(pids)?);
        }
        let written = self.written.as_ref();
        Ok(self.sent.contains(&inode) || written.is_some_and(|written| written.contains(&inode)))
    }

    /// Notes the inode of a file that travels in a message and may be written by who receives it.
    pub(crate) fn will_be_written(&mut self, inode: u64) {
        self.sent.insert(inode);
    }

    fn met(&self, key: FileKey) -> Option<u32> {
        self.known.get(&key).map(|&index| number(index))
    }

    fn meet(
        &mut self,
        at: (i32, Object),
        path: String,
        name: &str,
        limit: u64,
    ) -> Result<Verdict<u32>> {
        let metadata = look_at(&path)?;
        let key = (metadata.dev(), metadata.ino());
        if let Some(id) = self.met(key) {
            return Ok(Ok(id));
        }
        if metadata.len() > limits::ADDRESS_END {
            let bytes = metadata.len();
            return Ok(Err(RefusalKind::SharedSize { bytes }));
        }
        if self.found.len() == limits::SHARED {
            let limit = limits::SHARED;
            return Ok(Err(RefusalKind::SharedCount { limit }));
        }
        let kind = if name == ANONYMOUS {
            shared::Kind::Anonymous(Anonymous::default())
        } else {
            let kind = if name.starts_with(MEMFD) {
                memfd(&path, name, &metadata)?.map(shared::Kind::Memfd)
            } else {
                carried(&path, name, &metadata, limit)?.map(shared::Kind::Carried)
            };
            match kind {
                Ok(kind) => kind,
                Err(refusal) => return Ok(Err(refusal)),
            }
        };
        let id = number(self.found.len());
        self.known.insert(key, self.found.len());
        self.found.push(Found {
            key,
            model: Shared {
                id,
                size: metadata.len(),
                kind: Some(kind),
            },
            path,
            at,
            bytes: metadata.blocks().saturating_mul(512),
            attached: BTreeSet::new(),
        });
        Ok(Ok(id))
    }

    /// The segment that is attached at `vma`.
    fn attached(&mut self, at: (i32, Object), path: String, vma: &Vma) -> Result<Verdict<u32>> {
        let place = (at.0, vma.start);
        let refused = || RefusalKind::SysvMemory {
            path: vma.path.clone(),
        };
        // Where the rest of it would lie, as it does where a part was cut off. What is not shared was not attached.
        let is_attached = vma.shared && vma.offset <= vma.start;
        let Some(id) = i32::try_from(vma.inode).ok().filter(|_| is_attached) else {
            return Ok(Err(refused()));
        };
        if let Some(&index) = self.segments.get(&id) {
            self.found[index].attached.insert(place);
            return Ok(Ok(number(index)));
        }
        let metadata = look_at(&path)?;
        let is_it = |segment: &sysv::Segment| segment.size == metadata.len();
        let Some(segment) = sysv::segment(id)?.filter(is_it) else {
            return Ok(Err(refused()));
        };
        if segment.huge {
            return Ok(Err(RefusalKind::HugePages));
        }
        if segment.size > limits::ADDRESS_END {
            let bytes = segment.size;
            return Ok(Err(RefusalKind::SharedSize { bytes }));
        }
        if self.found.len() == limits::SHARED {
            let limit = limits::SHARED;
            return Ok(Err(RefusalKind::SharedCount { limit }));
        }
        let index = self.found.len();
        self.segments.insert(id, index);
        self.found.push(Found {
            key: (0, 0),
            model: Shared {
                id: number(index),
                size: segment.size,
                kind: Some(shared::Kind::Segment(Segment {
                    number: id,
                    key: segment.key,
                    mode: segment.mode,
                    uid: segment.uid,
                    gid: segment.gid,
                    removed: segment.removed,
                    locked: segment.locked,
                })),
            },
            bytes: metadata.blocks().saturating_mul(512),
            path,
            at,
            attached: BTreeSet::from([place]),
        });
        Ok(Ok(number(index)))
    }

    /// Segments to which a process outside of the tree is attached too.
    fn attached_outside(&self, pids: &[i32]) -> Result<Vec<Refusal>> {
        let mut refusals = Vec::new();
        for (&id, &index) in &self.segments {
            let found = &self.found[index];
            let count = sysv::segment(id)?.map_or(0, |segment| segment.attached);
            let count = count.saturating_sub(found.attached.len() as u64);
            if count == 0 {
                continue;
            }
            let mut holders = sysv::holders(&BTreeSet::from([id]))?;
            let mut others = holders.remove(&id).unwrap_or_default();
            others.retain(|holder| !pids.contains(holder));
            let (pid, object) = found.at;
            refusals.push(Refusal {
                pid,
                object,
                what: match others.is_empty() {
                    true => RefusalKind::SysvOutside { id, count },
                    false => RefusalKind::SharedOutside {
                        holders: Pids(others.into_iter().collect()),
                    },
                },
            });
        }
        Ok(refusals)
    }

    fn no_reserve(&mut self, id: u32) {
        let model = id.checked_sub(1).and_then(|index| {
            let found = self.found.get_mut(usize::try_from(index).ok()?)?;
            found.model.kind.as_mut()
        });
        if let Some(shared::Kind::Anonymous(anonymous)) = model {
            anonymous.no_reserve = true;
        }
    }

    /// Memory that all of them take, bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.found.iter().map(|found| found.bytes).sum()
    }

    /// Those that will be made on the target under their names.
    pub(crate) fn carried(&self) -> Vec<Shared> {
        let models = self.found.iter().map(|found| &found.model);
        models.filter(|model| model.is_named()).cloned().collect()
    }

    /// What goes along and has a name: here it is in the way once the tree is elsewhere.
    pub(crate) fn moved(&self) -> Vec<Moved> {
        let moved = self.found.iter().filter_map(|found| {
            let place = match &found.model.kind {
                Some(shared::Kind::Segment(segment)) => Place::Segment { id: segment.number },
                _ => Place::File {
                    path: found.model.new_path()?.to_owned(),
                    key: found.key,
                },
            };
            let name = found.model.name();
            Some(Moved { name, place })
        });
        moved.collect()
    }

    /// What tells them from all other files.
    pub(crate) fn keys(&self) -> BTreeSet<FileKey> {
        self.known.keys().copied().collect()
    }

    /// Those of `keys`, and segments, that a process outside of the tree, whose processes are `pids`, reaches too.
    pub(crate) fn held_outside(
        &self,
        pids: &[i32],
        keys: &BTreeSet<FileKey>,
    ) -> Result<Vec<Refusal>> {
        let own = std::process::id() as i32;
        let mut holders = procfs::file_holders(keys)?;
        let mut refusals = self.attached_outside(pids)?;
        for found in &self.found {
            let mut others = holders.remove(&found.key).unwrap_or_default();
            others.retain(|holder| *holder != own && !pids.contains(holder));
            if !others.is_empty() {
                let (pid, object) = found.at;
                let holders = Pids(others.into_iter().collect());
                refusals.push(Refusal {
                    pid,
                    object,
                    what: RefusalKind::SharedOutside { holders },
                });
            }
        }
        Ok(refusals)
    }

    /// What is carried of them, and where the pages of each are, in a tree of `process_count` processes.
    pub(crate) fn into_models(self, process_count: usize) -> (Vec<Shared>, Vec<SharedPages>) {
        let each = self.found.into_iter().enumerate().map(|(index, found)| {
            let pages = SharedPages {
                object: ObjectId::shared(process_count, index).0,
                size: found.model.size,
                path: found.path,
                kept: None,
            };
            (found.model, pages)
        });
        each.unzip()
    }
}

/// The id of the object at `index`; there are few.
fn number(index: usize) -> u32 {
    u32::try_from(index).map_or(u32::MAX, |index| index.saturating_add(1))
}

fn look_at(path: &str) -> Result<Metadata> {
    choke::pass(Call::Memory).map_err(|errno| ProcessError::path("stat", path, errno))?;
    std::fs::metadata(path).map_err(|source| Error::File {
        path: path.to_owned(),
        source,
    })
}

fn memfd(path: &str, name: &str, metadata: &Metadata) -> Result<Verdict<Memfd>> {
    /// What `statfs(2)` says of hugetlbfs, where memfds of huge pages are.
    const HUGETLBFS: i64 = 0x9584_58f6;
    match storage(path)? {
        TMPFS => {}
        HUGETLBFS => return Ok(Err(RefusalKind::MemfdHuge { path: name.into() })),
        _ => return Ok(Err(RefusalKind::Memfd { path: name.into() })),
    }
    let own = name
        .strip_prefix(MEMFD)
        .and_then(|name| name.strip_suffix(" (deleted)"))
        // What is no text is shown with this in its place, and could not be told again.
        .filter(|name| !name.contains('\u{fffd}'));
    let Some(own) = own else {
        return Ok(Err(RefusalKind::Memfd { path: name.into() }));
    };
    Ok(Ok(Memfd {
        name: own.to_owned(),
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        seals: kernel::seals(&kernel::open(path)?)?,
    }))
}

fn carried(path: &str, name: &str, metadata: &Metadata, limit: u64) -> Result<Verdict<Carried>> {
    let deleted = metadata.nlink() == 0;
    let own = match deleted {
        true => name.strip_suffix(" (deleted)").unwrap_or(name),
        false => name,
    };
    let refused = |refusal: fn(String) -> RefusalKind| Ok(Err(refusal(own.to_owned())));
    if own.contains('\u{fffd}') || !own.starts_with('/') {
        return refused(|path| RefusalKind::UnreachablePath { path });
    }
    if metadata.nlink() > 1 {
        return Ok(Err(RefusalKind::HardLinks {
            path: own.to_owned(),
            count: metadata.nlink(),
        }));
    }
    // What lies on a tmpfs is memory already.
    if deleted && metadata.blocks().saturating_mul(512) > limit && storage(path)? != TMPFS {
        return Ok(Err(RefusalKind::GhostLimit {
            path: own.to_owned(),
            bytes: metadata.blocks().saturating_mul(512),
        }));
    }
    if kernel::has_attributes(&kernel::open(path)?)? {
        return refused(|path| RefusalKind::FileAttributes { path });
    }
    let nameless = format!("/#{}", metadata.ino());
    Ok(Ok(Carried {
        path: own.to_owned(),
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        mtime_ns: metadata
            .mtime()
            .saturating_mul(1_000_000_000)
            .saturating_add(metadata.mtime_nsec()),
        deleted,
        nameless: deleted && own.ends_with(&nameless),
    }))
}

/// Inodes of the files that these processes have open for writing, or mapped so. Not told apart by device: a file that is taken for
/// one that is written goes along, too.
fn written(pids: &[i32]) -> Result<BTreeSet<u64>> {
    let mut found = BTreeSet::new();
    for &pid in pids {
        let gone = |error: &ProcessError| error.is_gone() && !procfs::exists(pid);
        let mappings = match procfs::maps(pid) {
            Err(error) if gone(&error) => continue,
            mappings => mappings?,
        };
        found.extend(
            mappings
                .iter()
                .filter(|vma| vma.shared && vma.write)
                .map(|vma| vma.inode),
        );
        let entries = match procfs::descriptors(pid) {
            Err(error) if gone(&error) => continue,
            entries => entries?,
        };
        found.extend(
            entries
                .iter()
                .filter(|entry| entry.info.flags as i32 & libc::O_ACCMODE != libc::O_RDONLY)
                .map(|entry| entry.info.ino),
        );
    }
    Ok(found)
}
