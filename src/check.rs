//! `pageferry check`: whether this host can send and receive processes. It only looks.

use nix::unistd::geteuid;
use pageferry_tracee::host;

use crate::cli::Common;
use crate::exit;

/// Prints one line for each thing needed; exit code 3 if one is missing.
pub fn run(common: &Common) -> u8 {
    let findings = host::capabilities();
    let mut code = exit::DONE;
    for finding in &findings {
        if let Some(advice) = &finding.missing {
            eprintln!("missing  {}: {advice}", finding.name);
            code = exit::HOST;
        } else if !common.quiet {
            eprintln!("ok       {}", finding.name);
        }
    }
    code
}

/// The same in one sentence, for verbs that cannot work without: `None` if nothing is missing.
pub fn first_missing() -> Option<String> {
    if !geteuid().is_root() {
        return Some("pageferry needs root here: run it with sudo".into());
    }
    host::capabilities().into_iter().find_map(|finding| finding.missing.map(|advice| format!("{}: {advice}", finding.name)))
}
