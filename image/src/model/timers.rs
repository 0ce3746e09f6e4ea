//! Interval timers and POSIX timers.

#![allow(missing_docs, reason = "generated fields are documented in image/proto/timers.proto")]

include!("generated/pageferry.timers.rs");
