//! pageferry
