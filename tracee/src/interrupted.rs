//! Interrupted system calls.
