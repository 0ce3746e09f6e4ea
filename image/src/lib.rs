//! A process at rest: the model of every kernel object that is carried, and the addresses of its pages.
//!
//! This crate holds data and the rules that make it valid. It never touches a process and never speaks to a peer.

#![forbid(unsafe_code)]

pub mod model;
pub mod page;
