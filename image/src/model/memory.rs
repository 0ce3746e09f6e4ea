//! The address space: mappings and mm fields. Page contents travel apart.

#![allow(missing_docs, reason = "generated fields are documented in image/proto/memory.proto")]

include!("generated/pageferry.memory.rs");
