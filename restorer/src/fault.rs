//! The fault path of the target: a process runs with empty memory, and this fills it.
//!
//! Three floors. [`engine`] decides: which page to ask for, where an arriving page belongs, what a hole is. It is pure:
//! no descriptor, no clock, no peer, so that every race can be replayed in a test. [`prefetch`] guesses, also purely,
//! what a thread will touch next; [`pace`] says how much the drain may ask for beside it. [`driver`] is the thin shell that owns the userfaultfds and carries out what the
//! engine says.
//!
//! **Must never do:** answer a fault with zeros for a page that the source still holds, or with bytes of a page that
//! the program has dropped. When in doubt the thread waits.

pub mod driver;
pub mod engine;
pub mod intervals;
pub mod pace;
pub mod prefetch;
