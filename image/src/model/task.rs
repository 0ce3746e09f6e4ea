//! A process and its threads.

#![allow(missing_docs, reason = "generated fields are documented in image/proto/task.proto")]

include!("generated/pageferry.task.rs");
