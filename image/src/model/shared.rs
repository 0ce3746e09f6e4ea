//! Memory with a life of its own: objects that mappings and open files of several processes share. Page contents travel apart.

#![allow(
    missing_docs,
    clippy::module_inception,
    reason = "generated fields are documented in image/proto/shared.proto, and kinds lie in a module with the name of their message"
)]

use std::collections::BTreeSet;

use super::files::{self, File};
use super::memory::{Kind, Mapping};
use super::{Invalid, absolute, at_most, ensure, limits};
use crate::page::{PAGE_SIZE, PageRange};

include!("generated/pageferry.shared.rs");

/// `F_SEAL_SEAL`, `SHRINK`, `GROW`, `WRITE`, `FUTURE_WRITE`, `EXEC`.
const SEALS: u32 = 0x3f;
/// Permission bits of a segment.
const SEGMENT_MODES: u32 = 0o777;
/// Permission bits, with set-user-id, set-group-id and sticky.
const MODES: u32 = 0o7777;

impl Shared {
    /// Its pages: their numbers are offsets in it. The last one may reach beyond its size.
    pub fn pages(&self) -> PageRange {
        PageRange {
            start: 0,
            end: self.size.next_multiple_of(PAGE_SIZE),
        }
    }

    /// The object with this id, in a list that [`Shared::validate_all`] accepts.
    pub fn find(shared: &[Self], id: u32) -> Option<&Self> {
        let index = usize::try_from(id).ok()?.checked_sub(1)?;
        shared.get(index)
    }

    /// The path at which it is made and stays.
    pub fn new_path(&self) -> Option<&str> {
        match &self.kind {
            Some(shared::Kind::Carried(file)) if !file.deleted => Some(&file.path),
            _ => None,
        }
    }

    /// Whether it is made under a name that somebody may have on the target: a path, a number or a key.
    pub fn is_named(&self) -> bool {
        matches!(
            self.kind,
            Some(shared::Kind::Carried(_) | shared::Kind::Segment(_))
        )
    }

    /// What an operator would call it.
    pub fn name(&self) -> String {
        match &self.kind {
            Some(shared::Kind::Memfd(memfd)) => format!("memfd {}", memfd.name),
            Some(shared::Kind::Carried(file)) if file.deleted => {
                format!("deleted file {}", file.path)
            }
            Some(shared::Kind::Carried(file)) => format!("file {}", file.path),
            Some(shared::Kind::Segment(segment)) => {
                format!("System V shared memory {}", segment.number)
            }
            Some(shared::Kind::Anonymous(_)) | None => format!("shared memory {}", self.id),
        }
    }

    /// # Errors
    /// The broken rule.
    pub fn validate(&self) -> Result<(), Invalid> {
        let object = || self.name();
        ensure(
            self.size <= limits::ADDRESS_END,
            object,
            "is larger than an address space",
        )?;
        match &self.kind {
            None => Err(Invalid::new(object(), "is of no known kind")),
            Some(shared::Kind::Anonymous(_)) => {
                let is_whole = self.size != 0 && self.size % PAGE_SIZE == 0;
                ensure(is_whole, object, "is not made of whole pages")
            }
            Some(shared::Kind::Memfd(memfd)) => {
                let is_name =
                    memfd.name.len() <= limits::MEMFD_NAME_LEN && !memfd.name.contains('\0');
                ensure(is_name, object, "has an impossible name")?;
                ensure(memfd.mode & !MODES == 0, object, "has an impossible mode")?;
                ensure(memfd.seals & !SEALS == 0, object, "has unknown seals")
            }
            Some(shared::Kind::Segment(segment)) => {
                ensure(segment.number >= 0, object, "has an impossible number")?;
                ensure(self.size != 0, object, "is empty")?;
                let is_mode = segment.mode & !SEGMENT_MODES == 0;
                ensure(is_mode, object, "has an impossible mode")?;
                ensure(
                    !segment.removed || segment.key == 0,
                    object,
                    "is removed and has a key",
                )
            }
            Some(shared::Kind::Carried(file)) => {
                absolute(&file.path, object)?;
                ensure(!file.path.ends_with('/'), object, "is called like a folder")?;
                ensure(file.mode & !MODES == 0, object, "has an impossible mode")?;
                ensure(
                    file.deleted || !file.nameless,
                    object,
                    "has a name and never had one",
                )
            }
        }
    }

    /// Validates all objects of a tree against what reaches them: mappings and open files.
    ///
    /// # Errors
    /// The broken rule.
    pub fn validate_all<'m>(
        shared: &[Self],
        mappings: impl Iterator<Item = &'m Mapping>,
        files: &[File],
    ) -> Result<(), Invalid> {
        at_most(shared.len(), limits::SHARED, || {
            "list of shared objects".into()
        })?;
        for (object, id) in shared.iter().zip(1..) {
            ensure(
                object.id == id,
                || "shared objects".into(),
                "are not numbered from 1 on",
            )?;
            object.validate()?;
        }
        let mut paths: Vec<&str> = shared.iter().filter_map(Self::new_path).collect();
        paths.sort_unstable();
        if let Some(pair) = paths.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(Invalid::new(format!("file {}", pair[0]), "is made twice"));
        }
        let segments = shared.iter().filter_map(|object| match &object.kind {
            Some(shared::Kind::Segment(segment)) => Some((object, segment)),
            _ => None,
        });
        let (mut numbers, mut keys) = (BTreeSet::new(), BTreeSet::new());
        for (object, segment) in segments {
            let is_one =
                numbers.insert(segment.number) && (segment.key == 0 || keys.insert(segment.key));
            ensure(is_one, || object.name(), "has the number or key of another")?;
        }
        let mut reached = BTreeSet::new();
        for mapping in mappings.filter(|mapping| mapping.shared != 0) {
            let name = || format!("mapping {:x}-{:x}", mapping.start, mapping.end);
            let Some(object) = Self::find(shared, mapping.shared) else {
                return Err(Invalid::new(name(), "names no shared object"));
            };
            // Nothing else could seal it on the target: the kernel refuses while a mapping may write.
            let is_sealed = match &object.kind {
                Some(shared::Kind::Memfd(memfd)) => memfd.seals & SEAL_WRITE != 0,
                _ => false,
            };
            let may_write = mapping.kind() == Kind::Shared && mapping.file_writable;
            ensure(
                !(is_sealed && may_write),
                name,
                "may write an object that is sealed against it",
            )?;
            // It is attached whole, and then cut.
            let is_attached = match &object.kind {
                Some(shared::Kind::Segment(_)) => {
                    mapping.kind() == Kind::Shared
                        && mapping.offset <= mapping.start
                        && mapping.offset + (mapping.end - mapping.start) <= object.pages().end
                        && mapping.start - mapping.offset + object.pages().end
                            <= limits::ADDRESS_END
                }
                _ => true,
            };
            ensure(is_attached, name, "is no part of the segment it names")?;
            reached.insert(mapping.shared);
        }
        for file in files {
            if let Some(files::file::Kind::Shared(open)) = &file.kind {
                let name = || format!("open file {}", file.id);
                let object = Self::find(shared, open.object);
                let is_file = object.is_some_and(|object| {
                    !matches!(
                        object.kind,
                        Some(shared::Kind::Anonymous(_) | shared::Kind::Segment(_))
                    )
                });
                ensure(is_file, name, "names no shared object that can be opened")?;
                reached.insert(open.object);
            }
        }
        ensure(
            reached.len() == shared.len(),
            || "list of shared objects".into(),
            "has one that nothing reaches",
        )
    }
}

/// `F_SEAL_WRITE`.
const SEAL_WRITE: u32 = 8;

#[cfg(test)]
mod tests {
    use super::*;

    fn anonymous(id: u32, size: u64) -> Shared {
        Shared {
            id,
            size,
            kind: Some(shared::Kind::Anonymous(Anonymous::default())),
        }
    }

    fn memfd(id: u32, change: impl FnOnce(&mut Memfd)) -> Shared {
        let mut memfd = Memfd {
            name: "kept".into(),
            mode: 0o777,
            ..Memfd::default()
        };
        change(&mut memfd);
        Shared {
            id,
            size: 5,
            kind: Some(shared::Kind::Memfd(memfd)),
        }
    }

    fn carried(id: u32, change: impl FnOnce(&mut Carried)) -> Shared {
        let mut file = Carried {
            path: "/dev/shm/kept".into(),
            mode: 0o600,
            ..Carried::default()
        };
        change(&mut file);
        Shared {
            id,
            size: 5,
            kind: Some(shared::Kind::Carried(file)),
        }
    }

    fn mapping(shared: u32, file_writable: bool) -> Mapping {
        Mapping {
            start: 0x1000,
            end: 0x2000,
            kind: Kind::Shared.into(),
            shared,
            file_writable,
            ..Mapping::default()
        }
    }

    fn open(object: u32) -> File {
        File {
            id: 1,
            kind: Some(files::file::Kind::Shared(files::SharedFile {
                object,
                position: 3,
            })),
            ..File::default()
        }
    }

    #[test]
    fn objects_follow_their_rules() {
        assert_eq!(anonymous(1, 0x3000).validate(), Ok(()));
        assert_eq!(memfd(1, |_| ()).validate(), Ok(()));
        assert_eq!(memfd(1, |_| ()).pages().page_count(), 1);
        for (why, bad) in [
            ("empty", anonymous(1, 0)),
            ("half a page", anonymous(1, 0x1800)),
            ("huge", anonymous(1, limits::ADDRESS_END + 0x1000)),
            (
                "of no kind",
                Shared {
                    kind: None,
                    ..anonymous(1, 0x1000)
                },
            ),
            ("name", memfd(1, |memfd| memfd.name = "x".repeat(300))),
            ("NUL", memfd(1, |memfd| memfd.name = "a\0b".into())),
            ("mode", memfd(1, |memfd| memfd.mode = 0o100_644)),
            ("seals", memfd(1, |memfd| memfd.seals = 0x40)),
            ("path", carried(1, |file| file.path = "kept".into())),
            ("above", carried(1, |file| file.path = "/a/../b".into())),
            ("folder", carried(1, |file| file.path = "/dev/shm/".into())),
            ("file mode", carried(1, |file| file.mode = 0o100_600)),
            ("nameless", carried(1, |file| file.nameless = true)),
        ] {
            assert!(bad.validate().is_err(), "{why}");
        }
    }

    #[test]
    fn objects_are_numbered_and_reached() {
        let validate = |shared: &[Shared], mappings: &[Mapping], files: &[File]| {
            Shared::validate_all(shared, mappings.iter(), files)
        };
        let two = [anonymous(1, 0x1000), memfd(2, |_| ())];
        assert_eq!(validate(&two, &[mapping(1, true)], &[open(2)]), Ok(()));
        let both = [mapping(1, true), mapping(2, true)];
        assert_eq!(validate(&two, &both, &[]), Ok(()));
        assert!(validate(&two, &both[..1], &[]).is_err(), "nobody has it");
        assert!(
            validate(&two, &[mapping(1, true), mapping(3, true)], &[open(2)]).is_err(),
            "there is no third"
        );
        assert!(
            validate(&two, &both, &[open(1)]).is_err(),
            "anonymous memory cannot be opened"
        );
        assert!(
            validate(&[anonymous(2, 0x1000)], &[mapping(2, true)], &[]).is_err(),
            "numbered wrongly"
        );
        let same = [carried(1, |_| ()), carried(2, |_| ())];
        assert!(validate(&same, &both, &[]).is_err(), "one path for two");
        let replaced = [carried(1, |_| ()), carried(2, |file| file.deleted = true)];
        assert_eq!(validate(&replaced, &both, &[]), Ok(()));
        let sealed = [memfd(1, |memfd| memfd.seals = SEAL_WRITE)];
        assert_eq!(validate(&sealed, &[mapping(1, false)], &[]), Ok(()));
        assert!(
            validate(&sealed, &[mapping(1, true)], &[]).is_err(),
            "a sealed one is written"
        );
    }
}
