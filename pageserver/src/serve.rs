//! The frozen process as a source of pages.
