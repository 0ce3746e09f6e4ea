//! The source side: what a process consists of, whether that can be carried, and its pages.
//!
//! [`survey`](survey::survey) looks without touching and lists everything that cannot be carried; [`capture`](capture::capture)
//! turns a frozen process into the model of `pageferry-image`; [`serve`] and [`shared`] read its pages in place. Nothing here changes the
//! process: no page of it is allocated, no byte written, and what is asked from inside is asked by an agent that is removed
//! again. The crate knows nothing of the target.
#![forbid(unsafe_code)]

pub mod at_rest;
pub mod capture;
pub mod identity;
pub mod serve;
pub mod shared;
pub mod survey;

mod error;

pub use error::{Error, Result};
