//! The address space: mappings and mm fields. Page contents travel apart.

#![allow(
    missing_docs,
    reason = "generated fields are documented in image/proto/memory.proto"
)]

use super::{Invalid, absolute, ascending, at_most, ensure, limits};
use crate::page::PAGE_SIZE;

include!("generated/pageferry.memory.rs");

/// PROT_READ, PROT_WRITE, PROT_EXEC.
const PROTECTIONS: u32 = 7;
/// MADV_RANDOM, SEQUENTIAL, DONTFORK, MERGEABLE, HUGEPAGE, NOHUGEPAGE, DONTDUMP, WIPEONFORK.
const ADVICE: [u32; 8] = [1, 2, 10, 12, 14, 15, 16, 18];

/// `Err` unless `start` to `end` are whole pages of user memory.
pub(super) fn pages(start: u64, end: u64, object: impl FnOnce() -> String) -> Result<(), Invalid> {
    let is_good =
        start < end && end <= limits::ADDRESS_END && start % PAGE_SIZE == 0 && end % PAGE_SIZE == 0;
    ensure(is_good, object, "is no range of user pages")
}

impl FileIdentity {
    /// # Errors
    /// The broken rule.
    pub fn validate(&self) -> Result<(), Invalid> {
        let object = || format!("file {}", self.path);
        absolute(&self.path, object)?;
        ensure(
            self.build_id.len() <= limits::BUILD_ID_LEN,
            object,
            "has too long a build id",
        )?;
        ensure(
            matches!(self.content_sha256.len(), 0 | 32),
            object,
            "has no SHA-256 of 32 bytes",
        )
    }
}

impl Mapping {
    /// # Errors
    /// The broken rule.
    pub fn validate(&self) -> Result<(), Invalid> {
        let object = || format!("mapping {:x}-{:x}", self.start, self.end);
        pages(self.start, self.end, object)?;
        let kind = Kind::try_from(self.kind).unwrap_or(Kind::Invalid);
        ensure(kind != Kind::Invalid, object, "is of no known kind")?;
        ensure(
            self.prot & !PROTECTIONS == 0,
            object,
            "has unknown protection bits",
        )?;
        let is_file = matches!(kind, Kind::FilePrivate | Kind::FileShared);
        let is_of_object = kind == Kind::Shared || kind == Kind::FilePrivate && self.shared != 0;
        ensure(
            (is_file && !is_of_object) == self.file.is_some(),
            object,
            "has a file it must not have, or none it must have",
        )?;
        ensure(
            is_of_object == (self.shared != 0),
            object,
            "has a shared object it must not have, or none it must have",
        )?;
        if let Some(file) = &self.file {
            file.validate()?;
        }
        let last = self
            .offset
            .checked_add(self.end - self.start)
            .is_some_and(|last| i64::try_from(last).is_ok());
        ensure(
            self.offset % PAGE_SIZE == 0 && last && (is_file || is_of_object || self.offset == 0),
            object,
            "has an impossible offset",
        )?;
        ensure(
            !self.file_writable || matches!(kind, Kind::FileShared | Kind::Shared),
            object,
            "is no shared mapping but writes its file",
        )?;
        ensure(
            !self.grows_down || kind == Kind::Anon,
            object,
            "is no stack but grows down",
        )?;
        ensure(
            !self.droppable || kind == Kind::Anon,
            object,
            "is a file's but droppable",
        )?;
        ensure(
            self.name.is_empty() || kind == Kind::Anon,
            object,
            "is not anonymous but has a name",
        )?;
        ensure(
            self.name.len() <= limits::MAPPING_NAME_LEN && !self.name.contains('\0'),
            object,
            "has an impossible name",
        )?;
        ensure(
            self.advice.iter().all(|advice| ADVICE.contains(advice)),
            object,
            "has unknown advice",
        )?;
        ensure(
            self.advice.len() <= ADVICE.len(),
            object,
            "has advice twice",
        )?;
        at_most(self.guards.len(), limits::GUARDS, || {
            format!("{} guard list", object())
        })?;
        ensure(
            self.guards.is_empty() || matches!(kind, Kind::Anon | Kind::FilePrivate | Kind::Shared),
            object,
            "cannot have guard regions",
        )?;
        let mut at = self.start;
        for guard in &self.guards {
            pages(guard.start, guard.end, || {
                format!("guard region {:x}-{:x}", guard.start, guard.end)
            })?;
            ensure(
                at <= guard.start && guard.end <= self.end,
                object,
                "has guard regions outside of it or out of order",
            )?;
            at = guard.end;
        }
        Ok(())
    }
}

impl Space {
    /// # Errors
    /// The broken rule.
    pub fn validate(&self) -> Result<(), Invalid> {
        at_most(self.mappings.len(), limits::MAPPINGS, || {
            "list of mappings".into()
        })?;
        self.mappings.iter().try_for_each(Mapping::validate)?;
        ascending(
            self.mappings
                .iter()
                .flat_map(|mapping| [(mapping.start, 0), (mapping.end - 1, 1)]),
            "mappings",
        )?;
        let mut at = 0;
        let has_room = self
            .mappings
            .iter()
            .map(|mapping| (mapping.start, mapping.end))
            .chain([(limits::ADDRESS_END, limits::ADDRESS_END)])
            .any(|(start, end)| start - std::mem::replace(&mut at, end) >= limits::ROOM_LEN);
        ensure(
            has_room,
            || "address space".into(),
            "leaves no room for the agent that rebuilds it",
        )?;
        let vdsos = self
            .mappings
            .iter()
            .filter(|mapping| mapping.kind() == Kind::Vdso)
            .count();
        ensure(
            vdsos <= 1,
            || "address space".into(),
            "has more than one vdso",
        )?;
        for (name, start, end) in [
            ("code", self.start_code, self.end_code),
            ("data", self.start_data, self.end_data),
            ("heap", self.start_brk, self.brk),
            ("arguments", self.arg_start, self.arg_end),
            ("environment", self.env_start, self.env_end),
        ] {
            ensure(
                start <= end && end <= limits::ADDRESS_END,
                || name.to_owned(),
                "is no range of user memory",
            )?;
        }
        ensure(
            self.start_stack <= limits::ADDRESS_END,
            || "stack".into(),
            "does not start in user memory",
        )?;
        let is_auxv = self.auxv.len() <= limits::AUXV_LEN && self.auxv.len() % 16 == 0;
        ensure(
            is_auxv,
            || "auxiliary vector".into(),
            "is no list of pairs of words",
        )?;
        match &self.exe {
            Some(exe) => exe.validate(),
            None => Err(Invalid::new("address space", "has no program file")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> FileIdentity {
        FileIdentity {
            path: "/bin/true".into(),
            ..FileIdentity::default()
        }
    }

    fn anonymous(start: u64, end: u64) -> Mapping {
        Mapping {
            start,
            end,
            prot: 3,
            kind: Kind::Anon.into(),
            ..Mapping::default()
        }
    }

    fn space(mappings: Vec<Mapping>) -> Space {
        Space {
            mappings,
            exe: Some(file()),
            ..Space::default()
        }
    }

    #[test]
    fn mappings_follow_their_rules() {
        let good = anonymous(0x1000, 0x5000);
        assert_eq!(good.validate(), Ok(()));
        let shared = Mapping {
            kind: Kind::FileShared.into(),
            file: Some(file()),
            file_writable: true,
            offset: 0x2000,
            ..good.clone()
        };
        assert_eq!(shared.validate(), Ok(()));
        let of_object = Mapping {
            kind: Kind::Shared.into(),
            shared: 1,
            file_writable: true,
            offset: 0x2000,
            ..good.clone()
        };
        assert_eq!(of_object.validate(), Ok(()));
        let private_of_object = Mapping {
            kind: Kind::FilePrivate.into(),
            file_writable: false,
            ..of_object.clone()
        };
        assert_eq!(private_of_object.validate(), Ok(()));
        for (why, bad) in [
            ("empty", anonymous(0x1000, 0x1000)),
            ("backwards", anonymous(0x2000, 0x1000)),
            ("unaligned", anonymous(0x1000, 0x1800)),
            (
                "high",
                anonymous(limits::ADDRESS_END, limits::ADDRESS_END + 0x1000),
            ),
            (
                "kind",
                Mapping {
                    kind: 77,
                    ..good.clone()
                },
            ),
            (
                "protection",
                Mapping {
                    prot: 8,
                    ..good.clone()
                },
            ),
            (
                "no file",
                Mapping {
                    kind: Kind::FilePrivate.into(),
                    ..good.clone()
                },
            ),
            (
                "a file",
                Mapping {
                    file: Some(file()),
                    ..good.clone()
                },
            ),
            (
                "an object",
                Mapping {
                    shared: 1,
                    ..good.clone()
                },
            ),
            (
                "an object beside the file",
                Mapping {
                    shared: 1,
                    ..shared.clone()
                },
            ),
            (
                "a file beside the object",
                Mapping {
                    file: Some(file()),
                    ..of_object.clone()
                },
            ),
            (
                "no object",
                Mapping {
                    shared: 0,
                    ..of_object.clone()
                },
            ),
            (
                "relative",
                Mapping {
                    file: Some(FileIdentity {
                        path: "x".into(),
                        ..file()
                    }),
                    ..shared.clone()
                },
            ),
            (
                "offset",
                Mapping {
                    offset: 1,
                    ..shared.clone()
                },
            ),
            (
                "offset past the end",
                Mapping {
                    offset: u64::MAX - 0xfff,
                    ..shared.clone()
                },
            ),
            (
                "growing file",
                Mapping {
                    grows_down: true,
                    ..shared.clone()
                },
            ),
            (
                "advice",
                Mapping {
                    advice: vec![4],
                    ..good.clone()
                },
            ),
            (
                "name",
                Mapping {
                    name: "x".repeat(80),
                    ..good.clone()
                },
            ),
            (
                "guard outside",
                Mapping {
                    guards: vec![Range {
                        start: 0,
                        end: 0x2000,
                    }],
                    ..good.clone()
                },
            ),
            (
                "guards overlap",
                Mapping {
                    guards: vec![
                        Range {
                            start: 0x1000,
                            end: 0x3000,
                        },
                        Range {
                            start: 0x2000,
                            end: 0x4000,
                        },
                    ],
                    ..good.clone()
                },
            ),
        ] {
            assert!(bad.validate().is_err(), "{why}");
        }
    }

    #[test]
    fn spaces_do_not_overlap_themselves() {
        assert_eq!(
            space(vec![anonymous(0x1000, 0x2000), anonymous(0x2000, 0x3000)]).validate(),
            Ok(())
        );
        assert!(
            space(vec![anonymous(0x1000, 0x3000), anonymous(0x2000, 0x4000)])
                .validate()
                .is_err()
        );
        assert!(
            space(vec![anonymous(0x2000, 0x3000), anonymous(0x1000, 0x2000)])
                .validate()
                .is_err()
        );
        assert!(
            Space {
                brk: 1,
                start_brk: 2,
                ..space(Vec::new())
            }
            .validate()
            .is_err()
        );
        assert!(
            Space {
                exe: None,
                ..space(Vec::new())
            }
            .validate()
            .is_err()
        );
        assert!(
            Space {
                auxv: vec![0; 17],
                ..space(Vec::new())
            }
            .validate()
            .is_err()
        );
        let all = limits::ADDRESS_END - limits::ROOM_LEN;
        assert_eq!(space(vec![anonymous(0, all)]).validate(), Ok(()));
        assert!(
            space(vec![
                anonymous(0, all),
                anonymous(all + 0x1000, all + 0x2000)
            ])
            .validate()
            .is_err(),
            "no room for the agent"
        );
        let vdso = |start| Mapping {
            kind: Kind::Vdso.into(),
            ..anonymous(start, start + 0x1000)
        };
        assert!(space(vec![vdso(0x1000), vdso(0x2000)]).validate().is_err());
    }
}
