//! Everything that touches a live process or asks the kernel about one.
//!
//! This is the only crate of the project with `unsafe` in it: ptrace, injected system calls, shared mappings, raw ioctls and
//! `clone3` live here behind safe functions. It is blocking code without a runtime: ptrace binds a traced process to the one
//! operating-system thread that seized it, so [`Tracee`] is neither `Send` nor shared.
//!
//! Every call that reaches into a traced process goes through [`choke::pass`] first, which is where tests count calls and
//! make the n-th of them fail.

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!("pageferry runs on x86-64 Linux only");
#[cfg(panic = "abort")]
compile_error!("guards thaw the traced process while unwinding: build with panic = \"unwind\"");

pub mod agent;
pub mod choke;
pub mod descriptor;
pub mod error;
pub mod family;
pub mod host;
pub mod husk;
pub mod injection;
mod interrupted;
pub mod leftover;
pub mod lock;
pub mod memory;
pub mod pagemap;
pub mod pipe;
pub mod process;
pub mod procfs;
mod ptrace;
pub mod registers;
pub mod shared;
pub mod socket;
pub mod surroundings;
pub mod sysv;
pub mod timer;
pub mod tree;
pub mod uffd;
pub mod unix_diag;

pub use error::{Error, Result};
pub use family::Family;
pub use injection::{Arg, Batch, Birth, End, Injection, Slot, ThreadStart};
pub use memory::{Pod, RemoteMemory, RemotePtr};
pub use registers::Registers;
pub use tree::{Held, Pumped, RseqConfiguration, SeizeOptions, Tracee};
