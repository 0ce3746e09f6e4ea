//! Husks make husks, and bring each other into sessions and groups: what only a process itself can do about its relations.
//!
//! All of it is done by single calls through the gate, since the agent's memory would be shared with children. A husk is good
//! for nothing but to be killed after an error here.

use nix::errno::Errno;

use crate::agent::CloneArguments;
use crate::choke::{self, Kind};
use crate::husk;
use crate::interrupted::NO_CALL;
use crate::ptrace::{self, Report, Stop};
use crate::registers::Registers;
use crate::tree::{SeizeOptions, below_red_zone, twice};
use crate::{Error, Result, Tracee};

use super::{BELOW_GATE_LEN, Injection, PATIENCE};

/// A child that a husk is to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Birth {
    /// Its process id; `None`: whichever is free.
    pub pid: Option<i32>,
    /// What its parent gets at its end; 0: nothing, and only a wait with `__WALL` finds it then.
    pub exit_signal: u32,
    /// It has its parent's descriptor table, and not one of its own.
    pub shares_table: bool,
    /// The same of working directory, root and umask.
    pub shares_directory: bool,
    /// The same of memory. It never runs in there: see [`crate::family::Family::move_in`].
    pub shares_memory: bool,
    /// The same of signal actions, for which it has to share memory.
    pub shares_actions: bool,
}

impl Birth {
    /// What clone3(2) is told to have in common.
    fn flags(self) -> u64 {
        flag(self.shares_memory, libc::CLONE_VM)
            | flag(self.shares_actions, libc::CLONE_SIGHAND)
            | shared_flags(self.shares_table, self.shares_directory)
    }
}

fn flag(is_set: bool, flag: i32) -> u64 {
    if is_set { flag as u64 } else { 0 }
}

fn shared_flags(table: bool, directory: bool) -> u64 {
    flag(table, libc::CLONE_FILES) | flag(directory, libc::CLONE_FS)
}

/// How a husk ends, as its parent is to be told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct End {
    /// Wait status, as wait4(2) gives it. That a core was dumped is left out: no husk leaves one.
    pub status: u32,
    /// Real user id.
    pub uid: u32,
    /// Its name, of which 15 bytes are taken.
    pub comm: String,
}

/// In a wait status: a core was dumped.
const CORE_DUMPED: u32 = 0x80;

impl Tracee {
    /// In a frozen husk: makes it the leader of a session, and of its first group.
    ///
    /// # Errors
    /// [`Error::Injected`] with what setsid(2) said; whatever stands in the way of a call in the husk.
    pub fn lead_session(&mut self) -> Result<()> {
        Injection::single(self, "setsid", libc::SYS_setsid, [0; 6])
    }

    /// In a frozen husk: puts it into `group` of its session, which it founds if that is its own number.
    ///
    /// # Errors
    /// [`Error::Injected`] with what setpgid(2) said; whatever stands in the way of a call in the husk.
    pub fn join_group(&mut self, group: i32) -> Result<()> {
        let arguments = [0, group as u64, 0, 0, 0, 0];
        Injection::single(self, "setpgid", libc::SYS_setpgid, arguments)
    }

    /// In a frozen husk: gives it a descriptor table, or a working directory and umask, of its own, as those are that it shared.
    ///
    /// # Errors
    /// [`Error::Injected`] with what unshare(2) said; whatever stands in the way of a call in the husk.
    pub fn part(&mut self, table: bool, directory: bool) -> Result<()> {
        let arguments = [shared_flags(table, directory), 0, 0, 0, 0, 0];
        Injection::single(self, "unshare", libc::SYS_unshare, arguments)
    }

    /// In a frozen husk: whether it gets the children of those that end below it.
    ///
    /// # Errors
    /// Whatever stands in the way of a call in the husk.
    pub fn set_subreaper(&mut self, is_one: bool) -> Result<()> {
        let option = libc::PR_SET_CHILD_SUBREAPER as u64;
        let arguments = [option, u64::from(is_one), 0, 0, 0, 0];
        Injection::single(
            self,
            "prctl(PR_SET_CHILD_SUBREAPER)",
            libc::SYS_prctl,
            arguments,
        )
    }

    /// In a frozen husk: takes the end of `signal` as everybody does by default.
    ///
    /// # Errors
    /// Whatever stands in the way of a call in the husk.
    pub fn default_action(&mut self, signal: i32) -> Result<()> {
        Injection::through_gate(self, |injection| injection.reset_action(signal))
    }

    /// In a frozen husk: makes its children. A child is a husk as its parent is, with memory of its own unless it shares that,
    /// frozen, and with the same [`SeizeOptions`]: with `exit_kill` none outlives us.
    ///
    /// # Errors
    /// [`Error::PidTaken`]; [`Error::Injected`] with what clone3(2) said: `EPERM` without CAP_CHECKPOINT_RESTORE in the pid
    /// namespace.
    pub fn bear(&mut self, children: &[Birth]) -> Result<Vec<Self>> {
        let options = self.options;
        Injection::through_gate(self, |injection| {
            // A child arrives attached, with the same options, before it has run an instruction.
            injection.narrowed = true;
            injection.tracee.set_options(SeizeOptions {
                follow: true,
                ..options
            })?;
            children
                .iter()
                .map(|&child| injection.bear(child))
                .collect()
        })
    }

    /// In a frozen husk: waits for a child that has ended, so that its number is free.
    ///
    /// # Errors
    /// [`Error::Injected`] with what wait4(2) said: `ECHILD` for a stranger.
    pub fn reap(&mut self, child: i32) -> Result<()> {
        let arguments = [child as u64, 0, libc::__WALL as u64, 0, 0, 0];
        Injection::single(self, "wait4", libc::SYS_wait4, arguments)
    }

    /// Ends a frozen husk, which its parent finds as a process that has ended. Nothing it did not tell is left of it: no core.
    ///
    /// # Errors
    /// [`Error::WrongEnd`] if it ended otherwise; [`Error::Injected`]; [`Error::Silent`].
    pub fn end(mut self, end: &End) -> Result<()> {
        let pid = self.pid();
        let signal = (end.status & 0x7f) as i32;
        let code = Injection::through_gate(&mut self, |injection| {
            injection.prepare_end(end, signal)?;
            Ok(injection.code)
        })?;
        if signal == 0 {
            let registers = Registers {
                rip: code.syscall,
                rax: libc::SYS_exit_group as u64,
                orig_rax: NO_CALL,
                rdi: u64::from(end.status >> 8 & 0xff),
                ..ptrace::registers(pid)?
            };
            ptrace::set_registers(pid, &registers)?;
        } else {
            ptrace::set_sigmask(pid, 0)?;
            self.send(signal)?;
        }
        let mut forward = 0;
        let found = loop {
            match ptrace::resume(pid, forward) {
                // Killed.
                Err(error) if error.is_gone() => {}
                result => result?,
            }
            match twice(|| ptrace::wait(pid, PATIENCE))? {
                Report::Stopped(Stop::Signal(signal)) => forward = signal,
                Report::Stopped(_) => forward = 0,
                Report::Ended(status) => break status,
                Report::Running => {
                    return Err(Error::Silent {
                        tid: pid,
                        what: "its end",
                    });
                }
            }
        };
        // Nothing is left to be let go of.
        self.threads.clear();
        let wanted = (end.status & !CORE_DUMPED) as i32;
        if found == wanted {
            Ok(())
        } else {
            Err(Error::WrongEnd { pid, wanted, found })
        }
    }
}

impl Injection<'_> {
    /// Does `work` by single calls in a husk, without the agent.
    pub(super) fn through_gate<T>(
        tracee: &mut Tracee,
        work: impl FnOnce(&mut Injection<'_>) -> Result<T>,
    ) -> Result<T> {
        let mut injection = Injection::new(tracee, 0)?;
        injection.open_first_gate()?;
        let done = work(&mut injection)?;
        injection.cure()?;
        Ok(done)
    }

    fn single(
        tracee: &mut Tracee,
        what: &'static str,
        number: i64,
        arguments: [u64; 6],
    ) -> Result<()> {
        Self::through_gate(tracee, |injection| {
            injection.must(what, number, arguments).map(drop)
        })
    }

    fn must(&mut self, what: &'static str, number: i64, arguments: [u64; 6]) -> Result<u64> {
        let tid = self.tracee.pid();
        self.call(what, number, arguments)?
            .map_err(|errno| Error::Injected { what, tid, errno })
    }

    /// Puts the arguments of a call on the husk's stack, below where the gate's frame can be.
    fn put(&mut self, bytes: &[u8]) -> Result<u64> {
        let place = below_red_zone(self.homes[0].registers.rsp, BELOW_GATE_LEN);
        self.memory.write(place, bytes)?;
        Ok(place)
    }

    fn bear(&mut self, birth: Birth) -> Result<Tracee> {
        let parent = self.tracee.pid();
        let wanted = birth.pid.unwrap_or(parent);
        choke::pass(Kind::Spawn).map_err(|errno| Error::kernel("clone3", wanted, errno))?;
        let place = below_red_zone(self.homes[0].registers.rsp, BELOW_GATE_LEN);
        let arguments = CloneArguments::new(birth.flags(), u64::from(birth.exit_signal), birth.pid);
        let words = arguments.words_at(place);
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.put(&bytes)?;
        let made = self.call(
            "clone3",
            libc::SYS_clone3,
            [place, CloneArguments::LEN, 0, 0, 0, 0],
        )?;
        let pid = match (made, birth.pid) {
            (Ok(made), _) => made as i32,
            (Err(Errno::EEXIST), Some(pid)) => {
                return Err(Error::PidTaken {
                    pid,
                    holder: husk::holder_of(pid),
                });
            }
            (Err(errno), _) => {
                return Err(Error::Injected {
                    what: "clone3",
                    tid: wanted,
                    errno,
                });
            }
        };
        let home = &self.homes[0];
        let mut child = Tracee::newborn(pid, self.tracee.options, &home.healed, home.sigmask)?;
        child.code = Some(self.code);
        Ok(child)
    }

    fn reset_action(&mut self, signal: i32) -> Result<()> {
        // struct sigaction of the kernel: SIG_DFL, no flags, no restorer, no mask.
        let place = self.put(&[0; 32])?;
        let arguments = [signal as u64, place, 0, 8, 0, 0];
        self.must("rt_sigaction", libc::SYS_rt_sigaction, arguments)
            .map(drop)
    }

    fn prepare_end(&mut self, end: &End, signal: i32) -> Result<()> {
        let prctl = |option: i32, value: u64| [option as u64, value, 0, 0, 0, 0];
        let mut comm = end.comm.as_bytes().to_vec();
        comm.truncate(15);
        comm.resize(16, 0);
        let place = self.put(&comm)?;
        self.must(
            "prctl(PR_SET_NAME)",
            libc::SYS_prctl,
            prctl(libc::PR_SET_NAME, place),
        )?;
        let id = u64::from(end.uid);
        self.must("setresuid", libc::SYS_setresuid, [id, id, id, 0, 0, 0])?;
        // Behind the change of user, which sets it too: a process that is not dumpable leaves no core, be there a pipe for it or not.
        self.must(
            "prctl(PR_SET_DUMPABLE)",
            libc::SYS_prctl,
            prctl(libc::PR_SET_DUMPABLE, 0),
        )?;
        if signal != 0 && signal != libc::SIGKILL {
            self.reset_action(signal)?;
        }
        Ok(())
    }
}
