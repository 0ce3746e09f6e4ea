//! Signals: actions, pending queues, alternate stacks.

#![allow(missing_docs, reason = "generated fields are documented in image/proto/signals.proto")]

include!("generated/pageferry.signals.rs");
