//! A running subject program: started, asked, told to end.
//!
//! Hides the file protocol that `tests/subjects/subject.h` describes.

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::hosts::{Host, Pair, Process, compile, eventually, patience, say_skipped};

/// As an ordinary service: no capabilities, none to be had.
pub(crate) const ORDINARY: &[&str] = &[
    "--reuid=65534",
    "--regid=65534",
    "--clear-groups",
    "--no-new-privs",
    "--bounding-set=-all",
    "--inh-caps=-all",
];

/// As root, with all it has.
pub(crate) const ROOT: &[&str] = &["--reuid=0"];

/// A subject that has said READY.
#[derive(Debug)]
pub(crate) struct Subject {
    /// Its number, the same on every host.
    pub(crate) pid: i32,
    heartbeat_address: u64,
    state: PathBuf,
    program: PathBuf,
    asked: u32,
}

/// What a subject answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// All is as it must be.
    Pass,
    /// It is not; the reason.
    Fail(String),
}

impl Subject {
    /// Compiles `tests/subjects/NAME.c`, starts it on `host` and waits until it is set up. `None`: the machine lacks what
    /// it is about, which it has said on stderr.
    #[track_caller]
    pub(crate) fn start(
        pair: &Pair,
        host: &Host,
        name: &str,
        privileges: &[&str],
        arguments: &[&str],
    ) -> Option<Self> {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/subjects/{name}.c"));
        Self::start_program(pair, host, &source, privileges, arguments)
    }

    /// The same for any C program that speaks as subjects do.
    #[track_caller]
    pub(crate) fn start_program(
        pair: &Pair,
        host: &Host,
        source: &Path,
        privileges: &[&str],
        arguments: &[&str],
    ) -> Option<Self> {
        let name = source
            .file_stem()
            .and_then(|name| name.to_str())
            .expect("a source has a name");
        let program = compile(source, name, &[]);
        let mut command = vec![program.to_str().expect("it is ASCII")];
        let state = pair.path(&format!("{name}.state"));
        command.extend(["--state", state.to_str().expect("it is ASCII")]);
        command.extend(arguments);
        Self::launch(pair, host, name, &program, privileges, &command)
    }

    /// Starts `command` as it stands, but for `--state FILE`, which is added to a command of one word. `program` is what
    /// `/proc/PID/exe` will show.
    #[track_caller]
    pub(crate) fn launch(
        pair: &Pair,
        host: &Host,
        name: &str,
        program: &Path,
        privileges: &[&str],
        command: &[&str],
    ) -> Option<Self> {
        let state = pair.path(&format!("{name}.state"));
        let mut command = command.to_vec();
        if command.len() == 1 {
            command.extend(["--state", state.to_str().expect("it is ASCII")]);
        }
        // One of the same name may have been here before.
        for old in [
            state.clone(),
            PathBuf::from(format!("{}.ask", state.display())),
        ] {
            let _ = fs::remove_file(old);
        }
        host.start(privileges, &command);
        let first = eventually(&format!("{name} to be READY"), || {
            lines(&state).into_iter().find(|line| {
                ["READY ", "SKIP ", "FAIL "]
                    .iter()
                    .any(|word| line.starts_with(word))
            })
        });
        if let Some(what) = first.strip_prefix("SKIP ") {
            // Only a subject that has looked may say so, of what the machine does not have at all.
            say_skipped(&format!("{name}: {what}"));
            return None;
        }
        let fields: Vec<&str> = first.split(' ').collect();
        let ["READY", pid, address] = fields[..] else {
            panic!("{name} says {first:?}")
        };
        Some(Self {
            pid: pid.parse().expect("READY gives the pid"),
            heartbeat_address: u64::from_str_radix(address, 16).expect("READY gives an address"),
            state,
            program: program.to_owned(),
            asked: 0,
        })
    }

    /// Asks it to look at itself; waits for the answer.
    #[track_caller]
    pub(crate) fn ask(&mut self) -> Answer {
        self.ask_only();
        self.answer()
    }

    /// Asks it to look at itself, without waiting.
    pub(crate) fn ask_only(&mut self) {
        self.asked += 1;
        self.put_question(&format!("{}\n", self.asked));
    }

    /// What it says to the last question when all is well.
    pub(crate) fn asked_line(&self) -> String {
        format!("PASS {}", self.asked)
    }

    /// All it has said.
    pub(crate) fn lines(&self) -> Vec<String> {
        lines(&self.state)
    }

    /// The answer to the last question.
    #[track_caller]
    pub(crate) fn answer(&self) -> Answer {
        let started = Instant::now();
        let (pass, fail) = (
            format!("PASS {}", self.asked),
            format!("FAIL {} ", self.asked),
        );
        loop {
            for line in lines(&self.state) {
                if line == pass {
                    return Answer::Pass;
                }
                if let Some(reason) = line.strip_prefix(&fail) {
                    return Answer::Fail(reason.to_owned());
                }
            }
            if started.elapsed() > patience() {
                return Answer::Fail(format!(
                    "no answer within {:?}: {}",
                    patience(),
                    self.description()
                ));
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }

    /// Asks, and fails the test unless the answer is PASS.
    #[track_caller]
    pub(crate) fn must_pass(&mut self, when: &str) {
        let answer = self.ask();
        assert_eq!(answer, Answer::Pass, "{} {when}", self.name());
    }

    /// Tells it to end and waits until it is gone from `host`.
    #[track_caller]
    pub(crate) fn end(self, host: &Host) {
        self.end_copy(host);
    }

    /// The same for one that lies in an image and will run again: nothing is asked of it until then.
    #[track_caller]
    pub(crate) fn end_copy(&self, host: &Host) {
        self.tell_to_end();
        eventually(&format!("{} to end", self.name()), || {
            host.process(self.pid).is_none().then_some(())
        });
        assert_eq!(
            lines(&self.state).last().map(String::as_str),
            Some("BYE"),
            "{} did not end by itself",
            self.name()
        );
        self.forget_the_end();
    }

    /// Tells every copy of it to end, without waiting; [`Subject::forget_the_end`] before the next one runs.
    pub(crate) fn tell_to_end(&self) {
        self.put_question("end\n");
    }

    /// Copies that run from now on are not told to end.
    pub(crate) fn forget_the_end(&self) {
        let _ = fs::remove_file(format!("{}.ask", self.state.display()));
    }

    /// True when the process with its number on this host is it, and runs (or sleeps) untouched by a debugger's stop.
    pub(crate) fn runs_on(&self, host: &Host) -> bool {
        self.copy_on(host)
            .is_some_and(|process| matches!(process.state, 'R' | 'S' | 'D'))
    }

    /// The process on this host that executes its program under its number, in whatever state.
    pub(crate) fn copy_on(&self, host: &Host) -> Option<Process> {
        let process = host.process(self.pid)?;
        (fs::read_link(process.proc("exe")).ok()? == self.program).then_some(process)
    }

    /// Its counter, read from the memory of the copy on this host; `None` when that page is not there (yet).
    pub(crate) fn heartbeat(&self, host: &Host) -> Option<u64> {
        let bytes = host.process(self.pid)?.memory(self.heartbeat_address, 8)?;
        Some(u64::from_le_bytes(
            bytes.try_into().expect("eight bytes were asked for"),
        ))
    }

    /// What it is called.
    pub(crate) fn name(&self) -> &str {
        self.program
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or_default()
    }

    fn put_question(&self, question: &str) {
        // Written aside and renamed, so that it never reads half a question.
        let ask = PathBuf::from(format!("{}.ask", self.state.display()));
        let fresh = PathBuf::from(format!("{}.fresh", self.state.display()));
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o644)
            .open(&fresh)
            .expect("the directory is ours");
        file.write_all(question.as_bytes()).expect("there is room");
        drop(file);
        fs::rename(&fresh, &ask).expect("both lie in one directory");
    }

    fn description(&self) -> String {
        format!("{} said {:?}", self.name(), lines(&self.state))
    }
}

/// The complete lines of a state file.
fn lines(path: &Path) -> Vec<String> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let complete = text.rfind('\n').map_or("", |end| &text[..end]);
    complete.lines().map(str::to_owned).collect()
}
