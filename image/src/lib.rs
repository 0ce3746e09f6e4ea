//! A process at rest: the model of every kernel object that is carried, the addresses of its pages, and the image on disk
//! that holds both.
//!
//! This crate holds data and the rules that make it valid. It never touches a process and never speaks to a peer.

#![forbid(unsafe_code)]

pub mod encoding;
pub mod model;
pub mod page;
pub mod store;
