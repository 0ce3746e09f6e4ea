//! `pageferry check`: whether this host can send and receive processes. It only looks.

use nix::unistd::geteuid;
use pageferry_tracee::host;

use crate::cli::Common;
use crate::exit;

/// Prints one line for each thing needed; exit code 3 if one is missing.
pub fn run(common: &Common) -> u8 {
    let mut code = exit::DONE;
    for check in host::checks() {
        if let Some(errno) = check.problem {
            eprintln!("missing  {} ({}): {}", check.name, errno.desc(), check.help);
            code = exit::HOST;
        } else if !common.quiet {
            eprintln!("ok       {}", check.name);
        }
    }
    code
}

/// The same in one sentence, for verbs that cannot work without: `None` if nothing is missing.
pub fn first_missing() -> Option<String> {
    if !geteuid().is_root() {
        return Some("pageferry needs root here: run it with sudo".into());
    }
    host::checks().into_iter().find_map(|check| {
        check
            .problem
            .map(|_| format!("{} is missing: {}", check.name, check.help))
    })
}
