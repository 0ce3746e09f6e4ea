//! The target side: it prepares a husk (the operator reads "prepared process"), rebuilds every kernel object of the
//! captured process in it, and fills its memory on demand once it runs.
//!
//! Nothing here decides whether the process may run: that is the program's commit protocol.

#![forbid(unsafe_code)]

pub mod fault;
pub mod rebuild;
