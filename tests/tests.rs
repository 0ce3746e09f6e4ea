//! Everything about pageferry that can be seen from outside, in one binary.
//!
//! Most of it needs root and two hosts made of namespaces; where that cannot be had a test says `skipped:` and why, unless
//! `PAGEFERRY_TEST_STRICT=1`. What takes long is `#[ignore]`d and run by `.ci/full`.

#![forbid(unsafe_code)]

mod architecture;
mod command_line;
mod core_files;
mod failures;
mod ferry;
mod hosts;
mod hosts_themselves;
mod images;
mod isolation;
mod leases;
mod lifecycle;
mod locks;
mod page_servers;
mod pid_namespaces;
mod programs;
mod refusals;
mod subject;
