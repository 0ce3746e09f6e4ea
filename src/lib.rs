//! The program: one command on each host. It reads the command line, makes a plan that can no longer be wrong, walks the
//! phases of a crossing, and is the only place that parks, kills or resumes anybody's process.

#![forbid(unsafe_code)]

pub mod check;
pub mod cli;
pub mod commit;
pub mod core_file;
pub mod cradle;
pub mod drain;
pub mod dump;
pub mod exit;
pub mod identity;
pub mod image;
pub mod inspect;
pub mod isolation;
pub mod journal;
pub mod migrate;
pub mod origin;
pub mod page_server;
pub mod page_service;
pub mod pid_namespace;
pub mod plan;
pub mod receive;
pub mod report;
pub mod restore;
pub mod rooms;
pub mod stop;
pub mod transport;
