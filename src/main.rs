//! The binary: exit codes, and the one place where an error chain is printed.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use pageferry::cli::{Cli, Verb};
use pageferry::{
    check, dump, identity, image, inspect, migrate, page_server, receive, report, restore,
};

fn main() -> ExitCode {
    let cli = Cli::parse();
    report::set_up_log(&cli.common);
    pageferry_tracee::choke::configure_from_environment();
    // All descriptors of a tree are ours for a moment; without more of them a large one is refused when it comes to that.
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
    let code = match &cli.verb {
        Verb::Check => check::run(&cli.common),
        Verb::Identity(args) => identity::run(args, &cli.common),
        Verb::Receive(args) => receive::run(args, &cli.common),
        Verb::Migrate(args) => migrate::run(args, &cli.common),
        Verb::Dump(args) => dump::run(args, &cli.common),
        Verb::Restore(args) => restore::run(args, &cli.common),
        Verb::PageServer(args) => page_server::run(args, &cli.common),
        Verb::Inspect(args) => inspect::run(args, &cli.common),
        Verb::Image(args) => image::run(args, &cli.common),
    };
    ExitCode::from(code)
}
