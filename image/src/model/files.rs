//! Descriptors, open file descriptions and pipes.

#![allow(
    missing_docs,
    reason = "generated fields are documented in image/proto/files.proto"
)]

use super::sockets::Socket;
use super::{Invalid, absolute, ascending, at_most, ensure, limits};

include!("generated/pageferry.files.rs");

/// The memory devices that are carried: null, zero, full, random, urandom.
const DEVICES: [(&str, u64); 5] = [
    ("/dev/null", 0x103),
    ("/dev/zero", 0x105),
    ("/dev/full", 0x107),
    ("/dev/random", 0x108),
    ("/dev/urandom", 0x109),
];
const F_OWNER_PGRP: u32 = 2;

impl Descriptor {
    /// Validates a descriptor table against the open file descriptions of the tree.
    ///
    /// # Errors
    /// The broken rule.
    pub fn validate_all(descriptors: &[Self], files: &[File]) -> Result<(), Invalid> {
        at_most(descriptors.len(), limits::DESCRIPTORS_OPEN, || {
            "descriptor table".into()
        })?;
        ascending(
            descriptors.iter().map(|descriptor| descriptor.fd),
            "descriptors",
        )?;
        for descriptor in descriptors {
            let object = || format!("fd {}", descriptor.fd);
            ensure(
                descriptor.fd < limits::DESCRIPTORS,
                object,
                "is too large a number",
            )?;
            ensure(
                File::find(files, descriptor.file).is_some(),
                object,
                "names no open file",
            )?;
        }
        Ok(())
    }
}

impl File {
    /// The open file description with this id, in a list that [`File::validate_all`] accepts.
    pub fn find(files: &[Self], id: u32) -> Option<&Self> {
        files
            .binary_search_by_key(&id, |file| file.id)
            .ok()
            .and_then(|at| files.get(at))
    }

    /// # Errors
    /// The broken rule.
    pub fn validate(&self) -> Result<(), Invalid> {
        let object = || format!("open file {}", self.id);
        ensure(self.id != 0, object, "has no number")?;
        if let Some(owner) = &self.owner {
            ensure(
                owner.kind <= F_OWNER_PGRP && owner.id >= 0 && owner.signo <= limits::SIGNAL,
                object,
                "has an impossible owner",
            )?;
        }
        match &self.kind {
            None => Err(Invalid::new(object(), "is of no known kind")),
            Some(file::Kind::Regular(regular)) => match &regular.identity {
                Some(identity) => identity.validate(),
                None => Err(Invalid::new(object(), "has no identity")),
            },
            Some(file::Kind::Directory(directory)) => absolute(&directory.path, object),
            Some(file::Kind::Device(device)) => ensure(
                DEVICES.contains(&(device.path.as_str(), device.rdev)),
                object,
                "is no device that is carried",
            ),
            Some(file::Kind::Pipe(end)) => ensure(end.pipe != 0, object, "names no pipe"),
            Some(file::Kind::Eventfd(eventfd)) => {
                ensure(eventfd.count != u64::MAX, object, "has an impossible count")
            }
            Some(file::Kind::Epoll(epoll)) => {
                at_most(epoll.items.len(), limits::EPOLL_ITEMS, object)
            }
            Some(file::Kind::Socket(socket)) => socket.validate(),
            Some(file::Kind::Shared(shared)) => {
                ensure(shared.object != 0, object, "names no shared object")
            }
            Some(file::Kind::Fifo(fifo)) => {
                ensure(fifo.pipe != 0, object, "names no pipe")?;
                ensure(fifo.mode <= 0o7777, object, "has an impossible mode")?;
                absolute(&fifo.path, object)
            }
            Some(file::Kind::Timerfd(_) | file::Kind::Signalfd(_)) => Ok(()),
        }
    }

    /// Validates all open file descriptions of a tree, with its pipes and the table of each process, by pid, the root's first.
    ///
    /// # Errors
    /// The broken rule.
    pub fn validate_all(
        files: &[Self],
        pipes: &[Pipe],
        tables: &[(i32, &[Descriptor])],
    ) -> Result<(), Invalid> {
        at_most(files.len(), limits::DESCRIPTORS_OPEN, || {
            "list of open files".into()
        })?;
        ascending(files.iter().map(|file| file.id), "open files")?;
        ascending(pipes.iter().map(|pipe| pipe.id), "pipes")?;
        files.iter().try_for_each(Self::validate)?;
        for (_, descriptors) in tables {
            Descriptor::validate_all(descriptors, files)?;
        }
        Self::validate_held(files, tables)?;
        Pipe::validate_all(pipes, files)?;
        Epoll::validate_all(files, tables)?;
        Socket::validate_all(files.iter().filter_map(|file| match &file.kind {
            Some(file::Kind::Socket(socket)) => Some((file.id, socket)),
            _ => None,
        }))
    }

    /// Everything is held by a process, or travels in a message to a socket that is.
    fn validate_held(files: &[Self], tables: &[(i32, &[Descriptor])]) -> Result<(), Invalid> {
        let descriptors = tables.iter().flat_map(|(_, descriptors)| *descriptors);
        let named: std::collections::BTreeSet<u32> =
            descriptors.map(|descriptor| descriptor.file).collect();
        let mut held = named.clone();
        // Sockets may lie in each other's queues, in circles too: each is looked into once.
        let mut left: Vec<u32> = named.iter().copied().collect();
        while let Some(id) = left.pop() {
            let Some(Some(file::Kind::Socket(socket))) =
                Self::find(files, id).map(|file| &file.kind)
            else {
                continue;
            };
            for sent in socket.in_flight() {
                ensure(
                    Self::find(files, sent).is_some(),
                    || format!("open file {id}"),
                    "has a message with an open file that is not there",
                )?;
                if held.insert(sent) {
                    left.push(sent);
                }
            }
        }
        ensure(
            held.len() == files.len(),
            || "list of open files".into(),
            "has one that no descriptor names",
        )?;
        for file in files.iter().filter(|file| !named.contains(&file.id)) {
            let has_items =
                matches!(&file.kind, Some(file::Kind::Epoll(epoll)) if !epoll.items.is_empty());
            ensure(
                !has_items && file.owner.is_none(),
                || format!("open file {}", file.id),
                "is held by no process and has what only a process can give it",
            )?;
        }
        Ok(())
    }
}

impl Pipe {
    fn validate_all(pipes: &[Self], files: &[File]) -> Result<(), Invalid> {
        let mut named = std::collections::BTreeSet::new();
        let mut paths = std::collections::BTreeMap::new();
        for file in files {
            match &file.kind {
                Some(file::Kind::Pipe(end)) => {
                    named.insert(end.pipe);
                    paths.insert(end.pipe, None);
                }
                Some(file::Kind::Fifo(fifo)) => {
                    named.insert(fifo.pipe);
                    paths.entry(fifo.pipe).or_insert(Some(&fifo.path));
                }
                _ => {}
            }
        }
        for file in files {
            let path = match &file.kind {
                Some(file::Kind::Pipe(end)) => paths.get(&end.pipe).map(|path| path.is_none()),
                Some(file::Kind::Fifo(fifo)) => {
                    paths.get(&fifo.pipe).map(|path| *path == Some(&fifo.path))
                }
                _ => None,
            };
            ensure(
                path != Some(false),
                || format!("open file {}", file.id),
                "is an end of a pipe of another name",
            )?;
        }
        ensure(
            named.iter().copied().eq(pipes.iter().map(|pipe| pipe.id)),
            || "pipes".into(),
            "are not those their ends name",
        )?;
        for pipe in pipes {
            let object = || format!("pipe {}", pipe.id);
            ensure(pipe.id != 0, object, "has no number")?;
            ensure(
                (1..=limits::PIPE_CAPACITY).contains(&pipe.capacity),
                object,
                "has an impossible capacity",
            )?;
            ensure(
                pipe.content.len() <= pipe.capacity as usize,
                object,
                "holds more than its capacity",
            )?;
        }
        Ok(())
    }
}

impl Epoll {
    /// Every watch is on a descriptor that its holder has open, once, and no instance watches itself, however indirectly.
    fn validate_all(files: &[File], tables: &[(i32, &[Descriptor])]) -> Result<(), Invalid> {
        let by_pid: std::collections::BTreeMap<i32, &[Descriptor]> =
            tables.iter().copied().collect();
        let file_of = |epoll: &Self, fd: u32| {
            let table = match epoll.holder {
                0 => tables.first()?.1,
                holder => *by_pid.get(&holder)?,
            };
            let at = table
                .binary_search_by_key(&fd, |descriptor| descriptor.fd)
                .ok()?;
            File::find(files, table[at].file)
        };
        // How many instances stand above each: grows in as many steps as they are deep, without end in a circle.
        let mut level: Vec<&File> = Vec::new();
        for file in files {
            let Some(file::Kind::Epoll(epoll)) = &file.kind else {
                continue;
            };
            let object = || format!("open file {} (epoll)", file.id);
            let mut watched: Vec<u32> = epoll.items.iter().map(|item| item.fd).collect();
            watched.sort_unstable();
            watched.dedup();
            ensure(
                watched.len() == epoll.items.len(),
                object,
                "watches a descriptor twice",
            )?;
            ensure(
                epoll
                    .items
                    .iter()
                    .all(|item| file_of(epoll, item.fd).is_some()),
                object,
                "watches a closed descriptor",
            )?;
            level.push(file);
        }
        for _ in 0..=limits::EPOLL_DEPTH {
            let mut below: Vec<&File> = level
                .iter()
                .filter_map(|file| match &file.kind {
                    Some(file::Kind::Epoll(epoll)) => Some(
                        epoll
                            .items
                            .iter()
                            .filter_map(|item| file_of(epoll, item.fd)),
                    ),
                    _ => None,
                })
                .flatten()
                .filter(|file| matches!(file.kind, Some(file::Kind::Epoll(_))))
                .collect();
            below.sort_unstable_by_key(|file| file.id);
            below.dedup_by_key(|file| file.id);
            level = below;
        }
        ensure(
            level.is_empty(),
            || "epoll instances".into(),
            "watch each other in a circle or too deep",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::super::sockets::{Attached, State};
    use super::*;

    fn open(id: u32, kind: file::Kind) -> File {
        File {
            id,
            kind: Some(kind),
            ..File::default()
        }
    }

    fn table(files: &[File]) -> Vec<Descriptor> {
        files
            .iter()
            .map(|file| Descriptor {
                fd: file.id + 2,
                file: file.id,
                close_on_exec: false,
            })
            .collect()
    }

    fn validate(files: &[File], pipes: &[Pipe]) -> Result<(), Invalid> {
        File::validate_all(files, pipes, &[(7, &table(files))])
    }

    fn validate_table(files: &[File], descriptors: &[Descriptor]) -> Result<(), Invalid> {
        File::validate_all(files, &[], &[(7, descriptors)])
    }

    fn epoll(fds: &[u32]) -> file::Kind {
        file::Kind::Epoll(Epoll {
            holder: 0,
            items: fds
                .iter()
                .map(|&fd| EpollItem {
                    fd,
                    events: 1,
                    data: 0,
                })
                .collect(),
        })
    }

    #[test]
    fn tables_and_files_name_each_other() {
        let files = [
            open(1, file::Kind::Eventfd(Eventfd::default())),
            open(2, file::Kind::Signalfd(Signalfd::default())),
        ];
        assert_eq!(validate(&files, &[]), Ok(()));
        let descriptors = table(&files);
        assert!(
            validate_table(&files, &descriptors[..1]).is_err(),
            "nobody holds file 2"
        );
        assert!(
            validate_table(&files[..1], &descriptors).is_err(),
            "file 2 is missing"
        );
        let twice = [descriptors[0], descriptors[0], descriptors[1]];
        assert!(
            validate_table(&files, &twice).is_err(),
            "a descriptor twice"
        );
        assert!(
            validate(&[files[1].clone(), files[0].clone()], &[]).is_err(),
            "out of order"
        );
        assert!(
            validate(
                &[File {
                    id: 1,
                    ..File::default()
                }],
                &[]
            )
            .is_err(),
            "no kind"
        );
    }

    #[test]
    fn pipes_have_ends_and_no_more_than_they_hold() {
        let end = |id, pipe| {
            open(
                id,
                file::Kind::Pipe(PipeEnd {
                    pipe,
                    write_end: false,
                }),
            )
        };
        let pipe = |capacity, content: &[u8]| Pipe {
            id: 1,
            capacity,
            content: content.to_vec(),
        };
        assert_eq!(validate(&[end(1, 1)], &[pipe(4096, b"x")]), Ok(()));
        assert!(validate(&[end(1, 2)], &[pipe(4096, b"x")]).is_err());
        assert!(validate(&[], &[pipe(4096, b"x")]).is_err());
        assert!(validate(&[end(1, 1)], &[pipe(1, b"xy")]).is_err());
    }

    #[test]
    fn a_named_pipe_has_one_name() {
        let fifo = |id, path: &str| {
            open(
                id,
                file::Kind::Fifo(Fifo {
                    pipe: 1,
                    path: path.into(),
                    mode: 0o600,
                    ..Fifo::default()
                }),
            )
        };
        let pipes = [Pipe {
            id: 1,
            capacity: 4096,
            content: Vec::new(),
        }];
        assert_eq!(validate(&[fifo(1, "/a"), fifo(2, "/a")], &pipes), Ok(()));
        assert!(validate(&[fifo(1, "/a"), fifo(2, "/b")], &pipes).is_err());
        assert!(validate(&[fifo(1, "a")], &pipes).is_err(), "a relative one");
        assert!(validate(&[fifo(1, "/a")], &[]).is_err(), "no pipe");
        let end = open(
            2,
            file::Kind::Pipe(PipeEnd {
                pipe: 1,
                write_end: true,
            }),
        );
        assert!(validate(&[fifo(1, "/a"), end], &pipes).is_err(), "both");
    }

    #[test]
    fn epoll_instances_do_not_watch_themselves() {
        let leaf = open(3, file::Kind::Eventfd(Eventfd::default()));
        let good = [open(1, epoll(&[4, 5])), open(2, epoll(&[5])), leaf.clone()];
        assert_eq!(validate(&good, &[]), Ok(()));
        assert!(validate(&[open(1, epoll(&[3]))], &[]).is_err(), "itself");
        assert!(
            validate(&[open(1, epoll(&[4])), open(2, epoll(&[3]))], &[]).is_err(),
            "each other"
        );
        assert!(
            validate(&[open(1, epoll(&[9]))], &[]).is_err(),
            "a closed one"
        );
        assert!(
            validate(&[open(1, epoll(&[5, 5])), open(2, epoll(&[])), leaf], &[]).is_err(),
            "twice"
        );
    }

    #[test]
    fn a_file_is_held_by_any_process_and_an_epoll_instance_numbers_by_its_holder() {
        let leaf = open(2, file::Kind::Eventfd(Eventfd::default()));
        let watching = |holder| {
            let items = vec![EpollItem {
                fd: 40,
                events: 1,
                data: 0,
            }];
            [
                open(1, file::Kind::Epoll(Epoll { items, holder })),
                leaf.clone(),
            ]
        };
        let row = |fd, file| Descriptor {
            fd,
            file,
            close_on_exec: false,
        };
        let (root, child) = ([row(3, 1)], [row(3, 1), row(40, 2)]);
        let tables: [(i32, &[Descriptor]); 2] = [(7, &root), (8, &child)];
        let check = |holder| File::validate_all(&watching(holder), &[], &tables);
        assert_eq!(check(8), Ok(()));
        assert!(check(0).is_err(), "the root has no fd 40");
        assert!(check(9).is_err(), "a holder that is not in the tree");
        assert!(
            File::validate_all(&watching(8), &[], &tables[..1]).is_err(),
            "file 2 is held by a process that is not there"
        );
    }

    #[test]
    fn socket_pairs_are_whole() {
        let end = |id, peer_closed| {
            open(
                id,
                file::Kind::Socket(Socket {
                    family: 1,
                    r#type: 1,
                    state: State::Paired.into(),
                    pair: 1,
                    peer_closed,
                    ..Socket::default()
                }),
            )
        };
        assert_eq!(validate(&[end(1, false), end(2, false)], &[]), Ok(()));
        assert_eq!(validate(&[end(1, true)], &[]), Ok(()));
        assert!(validate(&[end(1, false)], &[]).is_err());
        assert!(validate(&[end(1, true), end(2, false)], &[]).is_err());
        assert!(validate(&[end(1, false), end(2, false), end(3, false)], &[]).is_err());
    }

    #[test]
    fn what_travels_in_a_message_is_held_by_who_receives_it() {
        let end = |id, sent: &[u32]| {
            open(
                id,
                file::Kind::Socket(Socket {
                    family: 1,
                    r#type: 1,
                    state: State::Paired.into(),
                    pair: 1,
                    queue: vec![b"x".to_vec()],
                    attached: vec![Attached {
                        files: sent.to_vec(),
                        ..Attached::default()
                    }],
                    ..Socket::default()
                }),
            )
        };
        let row = [Descriptor {
            fd: 3,
            file: 1,
            close_on_exec: false,
        }];
        let leaf = open(3, file::Kind::Eventfd(Eventfd::default()));
        let check = |files: &[File]| validate_table(files, &row);
        let nested = [end(1, &[2, 2]), end(2, &[1, 3]), leaf.clone()];
        assert_eq!(check(&nested), Ok(()), "in a circle, too");
        assert!(
            check(&[end(1, &[2]), end(2, &[1]), leaf]).is_err(),
            "nobody"
        );
        assert!(check(&[end(1, &[2]), end(2, &[9])]).is_err(), "not there");
        let watching = [end(1, &[2, 3]), end(2, &[3]), open(3, epoll(&[3]))];
        assert!(check(&watching).is_err(), "watches what a process has");
        let owned = File {
            owner: Some(Owner::default()),
            ..nested[2].clone()
        };
        assert!(check(&[nested[0].clone(), nested[1].clone(), owned]).is_err());
    }

    #[test]
    fn only_memory_devices_are_carried() {
        let device = |path: &str, rdev| {
            open(
                1,
                file::Kind::Device(Device {
                    path: path.into(),
                    rdev,
                    position: 0,
                }),
            )
        };
        assert_eq!(validate(&[device("/dev/null", 0x103)], &[]), Ok(()));
        assert!(validate(&[device("/dev/sda", 0x800)], &[]).is_err());
        assert!(validate(&[device("/dev/null", 0x800)], &[]).is_err());
    }
}
