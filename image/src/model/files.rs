//! Descriptors, open file descriptions and pipes.

#![allow(missing_docs, reason = "generated fields are documented in image/proto/files.proto")]

include!("generated/pageferry.files.rs");
