//! Sockets.

#![allow(missing_docs, reason = "generated fields are documented in image/proto/sockets.proto")]

include!("generated/pageferry.sockets.rs");
