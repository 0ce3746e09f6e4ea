//! `--isolate`: what is restored runs beside the original and changes nothing that the original, or anybody else here, has.
//!
//! It has a pid namespace of its own ([`crate::pid_namespace`]), and network, System V objects, host name and mounts beside. All
//! mounts may only be read, but for
//! - files that the tree writes, maps to write, or has locked: it gets private copies of them, in memory, at their paths. They are
//!   as the files are when the copies are made: an image has no content of files that it finds by path.
//! - folders in which it is to find a socket, a named pipe or a file that is made again, and `/dev/shm`: they are made anew in
//!   memory, with all that is in them shown as it is, to be read.
//!
//! What cannot be kept apart like this is refused by name, before anything is made.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Metadata, OpenOptions, Permissions};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{
    FileExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _,
    fchown, symlink,
};
use std::path::{Path, PathBuf};

use nix::libc;
use pageferry_image::model::files::{self, file};
use pageferry_image::model::shared::shared;
use pageferry_image::model::sockets::unix_path;
use pageferry_image::model::task::Tree;
use pageferry_tracee::shared::next_data;
use pageferry_tracee::{lock, process, surroundings};

use crate::{plan, report};

/// Where POSIX shared memory and semaphores are found.
const SHARED_MEMORY: &str = "/dev/shm";
/// Where what is about to be put in its place lies for a moment: here is nothing that anybody has open.
const ASIDE: &str = "/proc";
/// Folders of these cannot be made anew.
const KERNELS: [&str; 3] = ["/proc", "/sys", "/dev"];
/// Entries of a folder that is made anew: each is a mount.
const ENTRIES_MAX: usize = 1024;
/// Bytes that are copied at a time.
const PIECE_LEN: u64 = 1 << 20;
/// `st_blocks` counts these, bytes.
const BLOCK_LEN: u64 = 512;

/// What a tree must have for itself.
#[derive(Debug, Default)]
pub struct Isolation {
    /// Made anew, those that lie in others behind these.
    folders: BTreeMap<PathBuf, Folder>,
    /// Files in other folders that it gets copies of.
    files: BTreeSet<PathBuf>,
    /// Bytes that each folder, and the copies of [`Isolation::files`] together, may take in memory.
    space: u64,
    /// Files below these may be written to while they are copied.
    same_file: Vec<PathBuf>,
}

/// Entries of a folder that are not shown as they are.
#[derive(Debug, Default)]
struct Folder {
    /// Left out: the tree makes them.
    made: BTreeSet<OsString>,
    /// Copied.
    copied: BTreeSet<OsString>,
}

impl Isolation {
    /// What `tree`, which is valid, needs. `limit`: bytes that copies of files may take together. `same_file`: paths below which
    /// files are taken as they are.
    ///
    /// # Errors
    /// A sentence about each object that cannot be kept apart.
    pub fn of(tree: &Tree, limit: u64, same_file: &[PathBuf]) -> Result<Self, Vec<String>> {
        let carried = tree.shared.iter().filter(|object| {
            // Made anew where it was, and so in a folder's memory.
            matches!(object.kind, Some(shared::Kind::Carried(_)))
        });
        let carried = carried.fold(0_u64, |sum, object| sum.saturating_add(object.size));
        let mut planned = Self {
            space: limit.saturating_add(carried),
            same_file: same_file.to_vec(),
            ..Self::default()
        };
        let mut refusals = planned.make_room(tree);
        if Path::new(SHARED_MEMORY).is_dir() {
            planned.folders.entry(SHARED_MEMORY.into()).or_default();
        }
        refusals.extend(planned.copy_files(tree, limit));
        refusals.extend(planned.folders.keys().filter_map(|folder| {
            let what = unfit(folder)?;
            Some(format!("folder {}: {what}", folder.display()))
        }));
        match refusals.is_empty() {
            true => Ok(planned),
            false => Err(refusals),
        }
    }

    /// For all that is made by path. What cannot be.
    fn make_room(&mut self, tree: &Tree) -> Vec<String> {
        let mut refusals = Vec::new();
        for file in &tree.files {
            match &file.kind {
                Some(file::Kind::Socket(socket)) => {
                    let paths = socket.names().filter_map(unix_path);
                    for path in paths.map(|path| Path::new(OsStr::from_bytes(path))) {
                        self.make_room_for(path, true);
                    }
                    let device = socket.options.iter().find(|option| {
                        (option.level, option.name) == (libc::SOL_SOCKET, libc::SO_BINDTODEVICE)
                    });
                    let device = device.map_or(&[][..], |option| option.value.as_slice());
                    let device = device.split(|&byte| byte == 0).next().unwrap_or_default();
                    if !device.is_empty() && device != b"lo" {
                        refusals.push(format!(
                            "{}: socket is bound to the network interface {}, and with --isolate there is none but lo",
                            holder(tree, file.id),
                            String::from_utf8_lossy(device)
                        ));
                    }
                }
                Some(file::Kind::Fifo(fifo)) => self.make_room_for(Path::new(&fifo.path), true),
                _ => {}
            }
        }
        for object in &tree.shared {
            if let Some(shared::Kind::Carried(carried)) = &object.kind {
                self.make_room_for(Path::new(&carried.path), !carried.deleted);
            }
        }
        refusals
    }

    /// `named`: it gets that name, and what has it here must not be there.
    fn make_room_for(&mut self, path: &Path, named: bool) {
        let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
            return;
        };
        // A folder that is not there is refused by name with all else that is missing here.
        let Ok(folder) = folder.canonicalize() else {
            return;
        };
        let folder = self.folders.entry(folder).or_default();
        if named {
            folder.made.insert(name.to_owned());
        }
    }

    /// Finds the files to copy. What cannot be.
    fn copy_files(&mut self, tree: &Tree, limit: u64) -> Vec<String> {
        let (mut paths, mut refusals) = (BTreeSet::new(), Vec::new());
        for identity in plan::files_of(tree).into_values() {
            if identity.must_be_shared {
                paths.insert(identity.path.as_str());
            }
        }
        for lock in &tree.locks {
            match files::File::find(&tree.files, lock.file).map(|file| &file.kind) {
                Some(Some(file::Kind::Regular(regular))) => {
                    paths.extend(regular.identity.as_ref().map(|file| file.path.as_str()));
                }
                Some(Some(file::Kind::Directory(files::Directory { path, .. })))
                | Some(Some(file::Kind::Device(files::Device { path, .. }))) => {
                    refusals.push(format!(
                        "{}: {} on {path} would be in the original's way, and only files can be copied",
                        holder(tree, lock.file),
                        lock.name()
                    ));
                }
                _ => {}
            }
        }
        let mut taken = 0_u64;
        for name in paths {
            let path = Path::new(name);
            // What is missing is refused by name with all else that is.
            let Ok(metadata) = fs::metadata(path) else {
                continue;
            };
            let shown = path.display();
            let holders = lock::lease_holders(name).unwrap_or_default();
            if let Some(holder) = holders.first() {
                refusals.push(format!(
                    "file {shown}: process {holder} has a write lease on it, which a copy would break"
                ));
                continue;
            }
            if !metadata.is_file() {
                refusals.push(format!(
                    "file {shown}: is no regular file, and cannot be copied"
                ));
                continue;
            }
            taken = taken.saturating_add(metadata.blocks().saturating_mul(BLOCK_LEN));
            if taken > limit {
                refusals.push(format!(
                    "file {shown}: cannot be copied, since all copies up to it take {taken} bytes (--isolate-limit, which is {limit}, if there is memory for them)"
                ));
                continue;
            }
            let folder = path
                .parent()
                .and_then(|folder| self.folders.get_mut(folder));
            match (folder, path.file_name()) {
                (Some(folder), Some(name)) => {
                    folder.copied.insert(name.to_owned());
                }
                _ => {
                    self.files.insert(path.to_owned());
                }
            }
        }
        refusals
    }

    /// Gives this process, and the children made from now on, all of it, and a `/proc` that shows the pid namespace it is in. To be
    /// called with one thread.
    ///
    /// # Errors
    /// What could not be made: a clause.
    pub fn make(&self) -> Result<(), String> {
        let failed = |error: pageferry_tracee::Error| report::chain(&error);
        let network = surroundings::unshare_network_ipc_and_name().map_err(failed)?;
        surroundings::unshare_mounts_for_reading().map_err(failed)?;
        for (path, folder) in &self.folders {
            folder.make(path, self)?;
        }
        self.place_copies()?;
        process::mount_proc().map_err(failed)?;
        // Who is bound to an address of this host is so in there.
        network.settle().map_err(failed)
    }

    fn place_copies(&self) -> Result<(), String> {
        if self.files.is_empty() {
            return Ok(());
        }
        let failed = |error: pageferry_tracee::Error| report::chain(&error);
        let aside = Path::new(ASIDE);
        surroundings::mount_memory(aside, self.space, 0o700, 0, 0).map_err(failed)?;
        for (number, path) in self.files.iter().enumerate() {
            let copy = aside.join(number.to_string());
            self.copy(path, &copy, path)?;
            surroundings::bind(&copy, path).map_err(failed)?;
        }
        surroundings::take_off(aside).map_err(failed)
    }

    /// Copies what is found at `from` and known as `path`.
    fn copy(&self, from: &Path, to: &Path, path: &Path) -> Result<(), String> {
        let failed = |error: io::Error| {
            let shown = path.display();
            match error.kind() {
                io::ErrorKind::StorageFull => {
                    format!(
                        "file {shown} cannot be copied: the copies take more than --isolate-limit"
                    )
                }
                _ => format!("file {shown} cannot be copied: {error}"),
            }
        };
        let same = copy_file(from, to).map_err(failed)?;
        if same {
            return Ok(());
        }
        let shown = path.display();
        if !self.same_file.iter().any(|prefix| path.starts_with(prefix)) {
            return Err(format!(
                "file {shown} cannot be copied: it was written to meanwhile (try again while it is not, or --same-file {shown} to go on)"
            ));
        }
        tracing::warn!("file {shown} was written to while it was copied");
        Ok(())
    }
}

impl Folder {
    /// Makes it at `path`, as a part of `all`.
    fn make(&self, path: &Path, all: &Isolation) -> Result<(), String> {
        let failed = |error: pageferry_tracee::Error| report::chain(&error);
        let refused =
            |error: io::Error| format!("folder {} cannot be made anew: {error}", path.display());
        let aside = Path::new(ASIDE);
        let was = fs::metadata(path).map_err(refused)?;
        surroundings::bind(path, aside).map_err(failed)?;
        surroundings::mount_memory(path, all.space, was.mode(), was.uid(), was.gid())
            .map_err(failed)?;
        for entry in fs::read_dir(aside).map_err(refused)? {
            let entry = entry.map_err(refused)?;
            let name = entry.file_name();
            if self.made.contains(&name) {
                continue;
            }
            let (from, to) = (aside.join(&name), path.join(&name));
            if self.copied.contains(&name) {
                all.copy(&from, &to, &to)?;
                continue;
            }
            let kind = entry.file_type().map_err(refused)?;
            // Whoever opens the original's, or another program's, has its other end on the line: no mount keeps that apart.
            if kind.is_socket() || kind.is_fifo() {
                continue;
            }
            if kind.is_symlink() {
                match fs::read_link(&from) {
                    Ok(target) => symlink(target, &to).map_err(refused)?,
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => return Err(refused(error)),
                }
                continue;
            }
            let place = if kind.is_dir() {
                fs::create_dir(&to)
            } else {
                File::create_new(&to).map(drop)
            };
            place.map_err(refused)?;
            match surroundings::bind(&from, &to) {
                // Somebody has removed it since it was listed: files come and go, in here above all.
                Err(_) if fs::symlink_metadata(&from).is_err() => {
                    let gone = if kind.is_dir() {
                        fs::remove_dir(&to)
                    } else {
                        fs::remove_file(&to)
                    };
                    gone.map_err(refused)?;
                }
                bound => bound.map_err(failed)?,
            }
        }
        surroundings::take_off(aside).map_err(failed)
    }
}

/// Why `folder`, which is there, cannot be made anew; `None`: it can.
fn unfit(folder: &Path) -> Option<String> {
    let is_kernels = KERNELS.iter().any(|kernels| folder.starts_with(kernels));
    if folder == Path::new("/") || is_kernels && folder != Path::new(SHARED_MEMORY) {
        return Some("what is made in it cannot be kept apart from the original's".into());
    }
    match fs::read_dir(folder).map(|entries| entries.take(ENTRIES_MAX + 1).count()) {
        Ok(..=ENTRIES_MAX) => None,
        Ok(_) => Some(format!(
            "has more than {ENTRIES_MAX} entries, so that what is made in it cannot be kept apart from the original's"
        )),
        Err(error) => Some(format!("cannot be read: {error}")),
    }
}

/// A process that has an open file, and where, as an operator knows it.
fn holder(tree: &Tree, id: u32) -> String {
    let found = tree.processes.iter().find_map(|process| {
        let mut descriptors = process.descriptors.iter();
        let descriptor = descriptors.find(|descriptor| descriptor.file == id)?;
        Some(format!("pid {} fd {}", process.pid, descriptor.fd))
    });
    found.unwrap_or_else(|| format!("open file {id}"))
}

/// With its holes, owners, mode and time. Whether it is what the file still is: nobody was seen to write to that meanwhile.
fn copy_file(from: &Path, to: &Path) -> io::Result<bool> {
    // Nobody's lease is waited for.
    let source = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(from)?;
    let before = source.metadata()?;
    let mut options = OpenOptions::new();
    // Nobody else may open it before it is as it was.
    let copy = options.write(true).create_new(true).mode(0o600).open(to)?;
    copy.set_len(before.len())?;
    let mut at = 0;
    let mut piece = vec![0; PIECE_LEN as usize];
    while let Some((start, end)) = next_data(&source, at, before.len()).map_err(io::Error::other)? {
        at = start;
        while at < end {
            let len = usize::try_from(PIECE_LEN.min(end - at)).unwrap_or(0);
            let bytes = &mut piece[..len];
            match source.read_exact_at(bytes, at) {
                // It became shorter.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
                read => read?,
            }
            copy.write_all_at(bytes, at)?;
            at += len as u64;
        }
    }
    fchown(&copy, Some(before.uid()), Some(before.gid()))?;
    // Behind the owner, whose change takes the set-user-id bit away.
    copy.set_permissions(Permissions::from_mode(before.mode() & 0o7777))?;
    copy.set_modified(before.modified()?)?;
    Ok(state(&source.metadata()?) == state(&before))
}

fn state(metadata: &Metadata) -> (u64, i64, i64) {
    (metadata.len(), metadata.mtime(), metadata.mtime_nsec())
}

#[cfg(test)]
mod tests {
    use pageferry_image::model::files::{Descriptor, Fifo, Regular};
    use pageferry_image::model::locks::{Kind, Lock};
    use pageferry_image::model::memory::FileIdentity;
    use pageferry_image::model::sockets::{self, Socket};
    use pageferry_image::model::task::Process;

    use super::*;

    fn tree(kinds: Vec<file::Kind>) -> Tree {
        let files = (1..).zip(kinds).map(|(id, kind)| files::File {
            id,
            kind: Some(kind),
            ..files::File::default()
        });
        let files: Vec<files::File> = files.collect();
        let descriptors = files.iter().map(|file| Descriptor {
            fd: file.id + 2,
            file: file.id,
            close_on_exec: false,
        });
        let process = Process {
            pid: 77,
            descriptors: descriptors.collect(),
            ..Process::default()
        };
        Tree {
            processes: vec![process],
            files,
            ..Tree::default()
        }
    }

    fn regular(path: &Path, must_be_shared: bool) -> file::Kind {
        file::Kind::Regular(Regular {
            identity: Some(FileIdentity {
                path: path.display().to_string(),
                must_be_shared,
                ..FileIdentity::default()
            }),
            position: 0,
        })
    }

    #[test]
    fn what_is_written_or_locked_is_copied_up_to_the_limit() {
        let folder = tempfile::tempdir().expect("a folder");
        let folder = folder.path().canonicalize().expect("it is there");
        let path = |name: &str| folder.join(name);
        for name in ["read", "written", "locked"] {
            fs::write(path(name), [7; 9000]).expect("written");
        }
        let missing = path("missing");
        let mut tree = tree(vec![
            regular(&path("read"), false),
            regular(&path("written"), true),
            regular(&path("locked"), false),
            regular(&missing, true),
        ]);
        tree.locks.push(Lock {
            kind: Kind::Flock.into(),
            pid: 77,
            file: 3,
            ..Lock::default()
        });
        let planned = Isolation::of(&tree, 1 << 20, &[]).expect("there is room");
        assert_eq!(planned.files, [path("locked"), path("written")].into());
        let refusals = Isolation::of(&tree, 20_000, &[]).expect_err("one of them is too much");
        assert_eq!(refusals.len(), 1, "{refusals:?}");
        assert!(refusals[0].contains("written") && refusals[0].contains("--isolate-limit"));
    }

    #[test]
    fn folders_are_made_anew_for_what_is_made_in_them() {
        let folder = tempfile::tempdir().expect("a folder");
        let folder = folder.path().canonicalize().expect("it is there");
        fs::write(folder.join("written"), "text").expect("written");
        let fifo = |path: &Path| {
            file::Kind::Fifo(Fifo {
                pipe: 1,
                path: path.display().to_string(),
                ..Fifo::default()
            })
        };
        let kinds = vec![
            fifo(&folder.join("fifo")),
            regular(&folder.join("written"), true),
        ];
        let planned = Isolation::of(&tree(kinds), 1 << 20, &[]).expect("there is room");
        assert!(planned.files.is_empty());
        let made = &planned.folders[&folder];
        assert_eq!(made.made, ["fifo".into()].into());
        assert_eq!(made.copied, ["written".into()].into());
        for nowhere in ["/fifo", "/dev/fifo"] {
            let refusals = Isolation::of(&tree(vec![fifo(Path::new(nowhere))]), 0, &[]);
            assert!(refusals.is_err_and(|all| all[0].contains("kept apart")));
        }
    }

    #[test]
    fn a_socket_of_one_interface_is_refused() {
        let bound = |device: &[u8]| {
            tree(vec![file::Kind::Socket(Socket {
                family: libc::AF_INET,
                options: vec![sockets::Option {
                    level: libc::SOL_SOCKET,
                    name: libc::SO_BINDTODEVICE,
                    value: device.to_vec(),
                }],
                ..Socket::default()
            })])
        };
        let refusals = Isolation::of(&bound(b"eth0\0"), 0, &[]).expect_err("there is none");
        assert!(
            refusals[0].starts_with("pid 77 fd 3: ") && refusals[0].contains("eth0"),
            "{refusals:?}"
        );
        assert!(Isolation::of(&bound(b"lo\0"), 0, &[]).is_ok());
    }

    #[test]
    fn a_file_that_is_written_to_meanwhile_is_copied_only_if_that_is_said() {
        let folder = tempfile::tempdir().expect("a folder");
        let from = folder.path().join("from");
        fs::write(&from, vec![7; 16 << 20]).expect("written");
        let stop = std::sync::atomic::AtomicBool::new(false);
        let copies = std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut file = OpenOptions::new().append(true).open(&from).expect("open");
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    io::Write::write_all(&mut file, b"more").expect("written");
                }
            });
            let copies = [vec![], vec![folder.path().to_owned()]].map(|same_file| {
                let to = folder.path().join(format!("to {}", same_file.len()));
                let planned = Isolation {
                    same_file,
                    ..Isolation::default()
                };
                planned.copy(&from, &to, &from)
            });
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            copies
        });
        let refusal = copies[0].as_ref().expect_err("it was written to");
        assert!(refusal.contains("--same-file"), "{refusal}");
        assert_eq!(copies[1], Ok(()));
    }

    #[test]
    fn a_copy_is_what_the_file_was() {
        let folder = tempfile::tempdir().expect("a folder");
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        let file = File::create(&from).expect("made");
        file.write_all_at(b"text", 10 << 20).expect("written");
        file.set_len(64 << 20).expect("set");
        file.set_permissions(Permissions::from_mode(0o751))
            .expect("set");
        file.set_modified(std::time::SystemTime::UNIX_EPOCH)
            .expect("set");
        assert!(copy_file(&from, &to).expect("copied"));
        let (was, is) = (fs::metadata(&from), fs::metadata(&to));
        let (was, is) = (was.expect("there"), is.expect("there"));
        assert_eq!((state(&was), was.mode()), (state(&is), is.mode()));
        assert!(is.blocks() * BLOCK_LEN < 1 << 20, "holes were filled");
        assert_eq!(fs::read(&from).ok(), fs::read(&to).ok());
        assert!(copy_file(&from, &to).is_err(), "it is there");
    }
}
