//! What happened, in an order that survives us: every record goes to a file under /run/pageferry and, through a pipe, to
//! the keeper, a process of its own that outlives a killed engine.
//!
//! Records are written, not synced: a frozen tree does not outlive its host, so they must survive only our own death.
//! The file goes away when the outcome leaves nothing to decide; what lies there afterwards is what an operator must
//! look at.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::PathBuf;
use std::time::Duration;

use crate::{exit, report};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pageferry_tracee::procfs;
use pageferry_wire::session::{Record, source_may_run};

/// Where journals lie. On a tmpfs: they mean nothing after a reboot.
const FOLDER: &str = "/run/pageferry";

/// Begins the line by which the keeper learns where the journal lies.
const PATH_WORD: &str = "path ";

/// An open journal of one migration.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    keeper: Option<File>,
}

impl Journal {
    /// Makes `FOLDER/ID.SIDE`. `keeper` is the pipe to the keeper, if this side has one.
    ///
    /// # Errors
    /// What the file system says, with the path.
    pub fn create(id: &str, side: &str, pid: i32, keeper: Option<File>) -> std::io::Result<Self> {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(FOLDER)?;
        let path = PathBuf::from(FOLDER).join(format!("{id}.{side}"));
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)?;
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        writeln!(
            file,
            "pageferry 1 {side} migration {id} pid {pid} boot {}",
            boot.trim()
        )?;
        let mut journal = Self { path, file, keeper };
        if let Some(pipe) = &mut journal.keeper {
            writeln!(pipe, "{PATH_WORD}{}", journal.path.display())?;
        }
        Ok(journal)
    }

    /// Appends one record; it is in the page cache and with the keeper when this returns.
    ///
    /// # Errors
    /// If either cannot be written: the step it announces must then not be taken.
    pub fn record(&mut self, record: Record) -> std::io::Result<()> {
        let line = format!("{record}\n");
        self.file.write_all(line.as_bytes())?;
        if let Some(pipe) = &mut self.keeper {
            pipe.write_all(line.as_bytes())?;
        }
        Ok(())
    }

    /// Makes what was written so far survive a crash of the host. Never inside the freeze.
    ///
    /// # Errors
    /// What the file system says.
    pub fn sync(&self) -> std::io::Result<()> {
        self.file.sync_all()
    }

    /// Where it lies.
    pub fn path(&self) -> &std::path::Path {
        &self.path
    }

    /// The outcome is known to both sides: nothing is left to decide.
    pub fn settle(self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(
                "journal {} could not be removed: {error}",
                self.path.display()
            );
        }
        // An empty folder is ours to take away; one with other journals stays.
        let _ = std::fs::remove_dir(FOLDER);
    }
}

/// What a killed engine cannot do any more: see [`Journal::settle`].
fn settle_for(text: &str) {
    if let Some(path) = text.lines().find_map(|line| line.strip_prefix(PATH_WORD)) {
        let _ = std::fs::remove_file(path);
        let _ = std::fs::remove_dir(FOLDER);
    }
}

/// How long the keeper waits for the kernel to let go of a dead tracer's process.
const RELEASE_WAIT: Duration = Duration::from_millis(5);
const RELEASE_TRIES: u32 = 12_000;
/// So many looks in a row at a process that runs, without a SIGSTOP to come, say that it will go on running: two seconds.
const RUNNING_LOOKS: u32 = 400;

/// Where the process is once the keeper has made good what a killed engine left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Left {
    /// On the target, which has every page; the source copy was ended.
    Moved,
    /// Here, as before.
    Runs,
    /// Here, whole and stopped: it was parked, and could not be continued.
    Parked,
    /// Here, whole and stopped: the target refused it, and it may not have its locks again.
    Unlocked,
    /// It ran on the target, without all its pages; the source copy stays stopped.
    Lost,
    /// COMMIT was recorded: the target may run it, and the source copy stays stopped.
    Undecided,
}

impl Left {
    const ALL: [Self; 6] = [
        Self::Moved,
        Self::Runs,
        Self::Parked,
        Self::Unlocked,
        Self::Lost,
        Self::Undecided,
    ];

    /// What the keeper says of it to its parent, by way of its own exit status.
    pub fn status(self) -> i32 {
        self as i32
    }

    /// The reverse of [`Left::status`]. A keeper that ended in any other way leaves the worst that can be.
    pub fn from_status(status: i32) -> Self {
        Self::ALL
            .into_iter()
            .find(|left| left.status() == status)
            .unwrap_or(Self::Undecided)
    }

    /// pageferry's exit code for an engine that was killed.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Moved => exit::DONE,
            Self::Runs => exit::FAILED,
            Self::Lost => exit::LOST,
            Self::Parked | Self::Unlocked | Self::Undecided => exit::UNDECIDED,
        }
    }

    /// The second half of a sentence on the engine's death.
    pub fn text(self, pid: i32) -> String {
        match self {
            Self::Moved => {
                "every page had arrived; it lives on the target and the source copy was ended"
                    .to_owned()
            }
            Self::Runs => format!("pid {pid} runs on here, as before"),
            Self::Parked => format!(
                "COMMIT was not sent; pid {pid} is whole here but still stopped. Let it run: kill -CONT {}",
                report::all_of(&pid)
            ),
            Self::Unlocked => format!(
                "the target has not got it; pid {pid} is whole here but still stopped, perhaps without its locks on files that the target may see. Let it run all the same: kill -CONT {}",
                report::all_of(&pid)
            ),
            Self::Lost => format!(
                "it ran on the target, without all its pages; the source copy pid {pid} stays stopped"
            ),
            Self::Undecided => format!(
                "the target may run it; the source copy pid {pid} stays stopped, perhaps without its locks on files that the target may see. Look at the target before continuing it"
            ),
        }
    }
}

/// The keeper: reads records until the engine is gone, then makes good what it left in the tree whose root is `pid`.
///
/// 1. The engine dies. Its pipe closes, its traced threads are let go by the kernel, in either order.
/// 2. If PARK stands without COMMIT, each process runs into the queued SIGSTOP and stays in state T. COMMIT was never
///    sent, so all are continued.
/// 3. If COMMIT stands there, the target may run them: they stay stopped for good. If REFUSED does, too, it does not: they are
///    continued as after 2, unless they may have lost their locks.
/// 4. If THAWED stands there, they run.
/// 5. If RESIDENT stands there, the target has every page: the stopped copies are ended, children before their parents.
pub fn keep(mut pipe: File, pid: i32, was_stopped: bool) -> Left {
    let start = procfs::stat(pid, pid).map(|stat| stat.start_time_ticks);
    let mut text = String::new();
    // What a dying engine wrote is whole lines: each is one write of a few bytes to a pipe.
    let _ = pipe.read_to_string(&mut text);
    let records: Vec<Record> = text.lines().filter_map(Record::from_name).collect();
    let still_it = || match (&start, procfs::stat(pid, pid)) {
        (Ok(then), Ok(now)) => *then == now.start_time_ticks,
        _ => false,
    };
    if source_may_run(&records) {
        let is_held = records.contains(&Record::Park) && !records.contains(&Record::Thawed);
        let left = match is_held && still_it() {
            true if records.contains(&Record::Unlocked) => Left::Unlocked,
            true if !was_stopped && !release_all(pid) => Left::Parked,
            _ => Left::Runs,
        };
        settle_for(&text);
        left
    } else if records.contains(&Record::Resident) {
        if !records.contains(&Record::Done) && still_it() {
            for pid in tree_of(pid).into_iter().rev() {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
        settle_for(&text);
        Left::Moved
    } else if records.contains(&Record::Run) {
        Left::Lost
    } else {
        Left::Undecided
    }
}

/// The processes of a tree that stands still, or is about to.
fn tree_of(root: i32) -> Vec<i32> {
    procfs::descendants(root).unwrap_or_else(|_| vec![root])
}

/// Whether all processes of the tree run again, or are gone.
fn release_all(root: i32) -> bool {
    let mut left: Vec<(i32, u32)> = tree_of(root).into_iter().map(|pid| (pid, 0)).collect();
    let mut all = true;
    for _ in 0..RELEASE_TRIES {
        left.retain_mut(|(pid, running)| match released(*pid, running) {
            None => true,
            Some(well) => {
                all &= well;
                false
            }
        });
        if left.is_empty() {
            return all;
        }
        std::thread::sleep(RELEASE_WAIT);
    }
    false
}

/// Whether one process runs again, or is gone; `None` if that cannot be told yet. `running`: so many looks in a row saw it run.
fn released(pid: i32, running: &mut u32) -> Option<bool> {
    let status = match procfs::status(pid, pid) {
        Ok(status) => status,
        Err(error) => return error.is_gone().then_some(true),
    };
    // Let go, it may not be at the queued SIGSTOP yet, or just between taking it off the queue and stopping. Without one for
    // a while it runs: the engine died before it was queued, or somebody's SIGCONT took it away.
    let is_queued = status.shd_pnd & (1 << (Signal::SIGSTOP as i32 - 1)) != 0;
    match status.state {
        'T' if status.tracer_pid == 0 => {
            return Some(kill(Pid::from_raw(pid), Signal::SIGCONT).is_ok());
        }
        'Z' | 'X' => return Some(true),
        _ if status.tracer_pid == 0 && !is_queued => *running += 1,
        _ => *running = 0,
    }
    (*running == RUNNING_LOOKS).then_some(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_is_told_by_status_and_in_words() {
        for left in Left::ALL {
            assert_eq!(Left::from_status(left.status()), left);
        }
        for status in [Left::ALL.len() as i32, 101, -1] {
            assert_eq!(Left::from_status(status), Left::Undecided);
        }
        // All are exit 6; only one may not be continued without a look at the target.
        assert_eq!(
            Left::Parked.exit_code(),
            Left::Undecided.exit_code(),
            "a stopped copy"
        );
        assert!(Left::Parked.text(7).contains("kill -CONT 7"));
        assert!(!Left::Parked.text(7).contains("may run it"));
        assert_eq!(Left::Unlocked.exit_code(), Left::Parked.exit_code());
        assert!(Left::Unlocked.text(7).contains("kill -CONT 7"));
        assert!(Left::Undecided.text(7).contains("the target may run it"));
        assert!(!Left::Undecided.text(7).contains("kill -CONT"));
    }

    /// What the keeper makes of a process that an engine parked, and then wrote down these words and died; and whether it is stopped.
    fn kept(words: &[&str]) -> (Left, bool) {
        let mut child = std::process::Command::new("sleep")
            .arg("1000")
            .spawn()
            .expect("it is there");
        let pid = i32::try_from(child.id()).expect("a process id");
        kill(Pid::from_raw(pid), Signal::SIGSTOP).expect("it is ours");
        let state = || procfs::stat(pid, pid).expect("it is not reaped").state;
        while state() != 'T' {
            std::thread::sleep(RELEASE_WAIT);
        }
        let (read, write) = nix::unistd::pipe().expect("a pipe");
        let mut write = File::from(write);
        for word in words {
            writeln!(write, "{word}").expect("there is room");
        }
        drop(write);
        let left = keep(File::from(read), pid, false);
        let is_stopped = state() == 'T';
        child
            .kill()
            .and_then(|()| child.wait())
            .expect("it is ours");
        (left, is_stopped)
    }

    /// The engine was killed when the target had refused, before the copy here was let go, or had its locks again.
    #[test]
    fn what_the_target_refused_is_let_go_by_the_keeper_unless_it_may_lack_its_locks() {
        assert_eq!(kept(&["park"]), (Left::Runs, false));
        assert_eq!(kept(&["park", "commit", "refused"]), (Left::Runs, false));
        let unlocked = ["park", "commit", "unlocked", "refused"];
        assert_eq!(kept(&unlocked), (Left::Unlocked, true));
        assert_eq!(kept(&unlocked[..3]), (Left::Undecided, true));
        // Stopped by somebody else, then.
        let thawed = ["park", "commit", "unlocked", "refused", "thawed"];
        assert_eq!(kept(&thawed), (Left::Runs, true));
    }
}
