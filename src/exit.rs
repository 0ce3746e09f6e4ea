//! Exit codes: each answers "where is my process now?".

/// It did what it was asked.
pub const DONE: u8 = 0;
/// It failed; the process runs on, on the source.
pub const FAILED: u8 = 1;
/// The command line cannot be meant. (clap's own code.)
pub const USAGE: u8 = 2;
/// This host cannot do it: no root, or a kernel that lacks something.
pub const HOST: u8 = 3;
/// The peer sent, or an image holds, what cannot be.
pub const BAD_DATA: u8 = 4;
/// The process was lost after COMMIT.
pub const LOST: u8 = 5;
/// COMMIT was sent and not answered: the source copy stays stopped.
pub const UNDECIDED: u8 = 6;
/// Objects that cannot be carried were listed; the process runs on, on the source, and but for what only a frozen process can
/// tell, nothing was touched.
pub const REFUSED: u8 = 7;

/// The shell's code for a run that a signal ended before COMMIT.
pub fn signalled(signal: i32) -> u8 {
    128 + u8::try_from(signal).unwrap_or(0)
}
