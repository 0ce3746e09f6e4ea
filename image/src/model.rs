//! What is carried, one module per kind of kernel object. The types are generated from `image/proto`; each module adds
//! the rules ([`Invalid`]) that a model from a peer or a file must meet before anything is built from it.

use std::fmt;

pub mod files;
pub mod locks;
pub mod memory;
pub mod relations;
pub mod shared;
pub mod signals;
pub mod sockets;
pub mod task;
pub mod timers;

/// Why a model from a peer or a file is refused: the object and the rule it breaks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Invalid {
    /// The object, as an operator would name it: `thread 12`, `mapping 7f00-7f01`, `fd 9`.
    pub object: String,
    /// The broken rule, a clause: `is over its limit of 4096`.
    pub rule: String,
}

impl Invalid {
    /// `object` breaks `rule`.
    pub fn new(object: impl Into<String>, rule: impl Into<String>) -> Self {
        Self {
            object: object.into(),
            rule: rule.into(),
        }
    }
}

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.object, self.rule)
    }
}

impl std::error::Error for Invalid {}

/// Most of everything: a model is built by a peer, and what is made from it must not outgrow the host.
pub mod limits {
    /// Bytes of an encoded tree: 11 KiB of xsave area a thread is the largest part.
    pub const TREE_LEN: usize = 256 << 20;
    /// Bytes of memory that a decoded tree takes, nearly.
    pub const TREE_MEMORY: usize = 512 << 20;
    /// Processes of a tree.
    pub const PROCESSES: usize = 32_768;
    /// Objects that mappings and open files share. With the address spaces they are numbered within 16 bits.
    pub const SHARED: usize = 32_767;
    /// Everything that has pages: the address spaces, and behind them the shared objects.
    pub const OBJECTS: usize = PROCESSES + SHARED;
    /// Bytes of a memfd's name: what is left of NAME_MAX beside `memfd:`.
    pub const MEMFD_NAME_LEN: usize = 249;
    /// Threads of a process.
    pub const THREADS: usize = 65_536;
    /// Ranges of pages that a process touches first: a few for each thread.
    pub const FIRST_TOUCH: usize = 8 * THREADS;
    /// Flags of a processor.
    pub const CPU_FLAGS: usize = 4096;
    /// Bytes of such a flag, and of a kernel's release.
    pub const HOST_NAME_LEN: usize = 256;
    /// Bytes of a vdso.
    pub const VDSO_LEN: usize = 1 << 20;
    /// Mappings of an address space: four times the kernel's own default limit.
    pub const MAPPINGS: usize = 262_144;
    /// Guard regions of one mapping.
    pub const GUARDS: usize = 1 << 20;
    /// One past the highest address of a mapping: what 4-level page tables reach.
    pub const ADDRESS_END: u64 = 1 << 47;
    /// Bytes that an address space leaves free in one piece, at least: the agent that rebuilds it needs a place, away from stacks
    /// and heap, which grow.
    pub const ROOM_LEN: u64 = 2 << 30;
    /// Bytes of a path, as in PATH_MAX.
    pub const PATH_LEN: usize = 4096;
    /// Bytes of the auxiliary vector.
    pub const AUXV_LEN: usize = 4096;
    /// Bytes of the name of an anonymous mapping.
    pub const MAPPING_NAME_LEN: usize = 79;
    /// Bytes of a build id.
    pub const BUILD_ID_LEN: usize = 64;
    /// One past the highest descriptor: the largest `fs.nr_open` a kernel accepts.
    pub const DESCRIPTORS: u32 = 1 << 30;
    /// Descriptors that are open.
    pub const DESCRIPTORS_OPEN: usize = 1 << 20;
    /// Watches of one epoll instance.
    pub const EPOLL_ITEMS: usize = 1 << 20;
    /// How deep epoll instances may watch each other, as in the kernel.
    pub const EPOLL_DEPTH: usize = 5;
    /// Bytes of a pipe.
    pub const PIPE_CAPACITY: u32 = 1 << 30;
    /// Locks on files.
    pub const LOCKS: usize = 1 << 20;
    /// Options of one socket.
    pub const SOCKET_OPTIONS: usize = 256;
    /// Bytes of one option.
    pub const SOCKET_OPTION_LEN: usize = 4096;
    /// Bytes of a socket address, as in `struct sockaddr_storage`.
    pub const SOCKET_ADDRESS_LEN: usize = 128;
    /// Unread messages of one socket.
    pub const SOCKET_MESSAGES: usize = 1 << 20;
    /// Open files that travel with one message, as SCM_MAX_FD in the kernel.
    pub const MESSAGE_FILES: usize = 253;
    /// Connections that wait at one listening socket.
    pub const SOCKET_WAITING: usize = 65_536;
    /// Signals waiting in one queue.
    pub const PENDING: usize = 65_536;
    /// Highest signal number.
    pub const SIGNAL: u32 = 64;
    /// POSIX timers of a process.
    pub const POSIX_TIMERS: usize = 65_536;
    /// Bytes of the registers: `struct user_regs_struct` of x86-64.
    pub const REGISTERS_LEN: usize = 216;
    /// Bytes of an xsave area, at least: the legacy area and its header.
    pub const XSAVE_LEN_MIN: usize = 576;
    /// Bytes of an xsave area, at most.
    pub const XSAVE_LEN_MAX: usize = 65_536;
    /// Supplementary groups of a thread, as in NGROUPS_MAX.
    pub const GROUPS: usize = 65_536;
    /// Bytes of a CPU mask.
    pub const AFFINITY_LEN: usize = 1024;
    /// Kinds of resource limits.
    pub const RESOURCES: u32 = 16;
}

/// `Err` naming `object` unless `holds`.
fn ensure(holds: bool, object: impl FnOnce() -> String, rule: &str) -> Result<(), Invalid> {
    if holds {
        Ok(())
    } else {
        Err(Invalid::new(object(), rule))
    }
}

/// `Err` if there are more than `limit`.
fn at_most(count: usize, limit: usize, object: impl FnOnce() -> String) -> Result<(), Invalid> {
    if count <= limit {
        Ok(())
    } else {
        Err(Invalid::new(
            object(),
            format!("has {count}, more than the limit of {limit}"),
        ))
    }
}

/// `Err` unless each element's key is above the one before: in order and without duplicates.
fn ascending<K: Ord>(keys: impl IntoIterator<Item = K>, object: &str) -> Result<(), Invalid> {
    let mut keys = keys.into_iter();
    let Some(mut last) = keys.next() else {
        return Ok(());
    };
    for key in keys {
        ensure(
            last < key,
            || object.to_owned(),
            "are not in ascending order without duplicates",
        )?;
        last = key;
    }
    Ok(())
}

/// `Err` unless `path` is one the kernel could be given: absolute, without NUL, not too long, and not back up.
fn absolute(path: &str, object: impl Fn() -> String) -> Result<(), Invalid> {
    let is_good = path.starts_with('/') && !path.contains('\0') && path.len() < limits::PATH_LEN;
    ensure(is_good, &object, "is not an absolute path")?;
    // The kernel never tells such a path. One that hides where it leads is not followed.
    ensure(
        path.split('/').all(|part| part != ".."),
        object,
        "has `..` in its path",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_absolute_and_lead_where_they_say() {
        let check = |path: &str| absolute(path, || "file".into()).is_ok();
        assert!(check("/") && check("/a/b..c/..d/...") && check("/a (deleted)"));
        for bad in ["", "a", "./a", "/..", "/a/../b", "/a/..", "/a\0b"] {
            assert!(!check(bad), "{bad:?}");
        }
        assert!(!check(&format!("/{}", "a".repeat(limits::PATH_LEN))));
    }
}
