//! The command line: what was typed, as types. It reads nothing of the host and decides nothing.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

const AFTER_HELP: &str = "Exit codes: 0 done · 1 failed, the source runs on · 2 usage · 3 host not capable · 4 bad peer data or image · \
5 lost after commit · 6 undecided: the source copy stays stopped · 7 refused: the listed objects cannot be carried, \
the source runs on · 130/143 ended by a signal before commit, the source runs on";

/// Moves a running Linux process to another host with almost no downtime, however much memory it has.
#[derive(Debug, Parser)]
#[command(name = "pageferry", version, after_help = AFTER_HELP, propagate_version = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
    /// Options that every verb takes.
    #[command(flatten)]
    pub common: Common,
}

/// Options that every verb takes.
#[derive(Debug, Args)]
pub struct Common {
    /// Say more (twice: everything)
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// Say only what went wrong
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
    /// How log lines on stderr are written
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
    /// Print one JSON object per line on stdout; the last one of a migration is the ledger
    #[arg(long, global = true)]
    pub json: bool,
}

/// How log lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Look whether this host can send and receive processes; touches nothing
    Check,
    /// Print this host's fingerprint on stdout, making its key on first use
    Identity(IdentityArgs),
    /// Accept migrations on this host (the target)
    Receive(ReceiveArgs),
    /// Move a running process to another host (run on the source)
    Migrate(MigrateArgs),
    /// Write a process to an image on disk and END it, unless --leave-running is given
    Dump(DumpArgs),
    /// Run what an image holds, as often as you like; the image stays
    Restore(RestoreArgs),
    /// Serve images to restores on other hosts, as many at once as ask
    PageServer(PageServerArgs),
    /// Show what an image holds: processes, memory, descriptors, and what they take on disk
    Inspect(InspectArgs),
    /// Look after images: check, list and remove them
    Image(ImageArgs),
}

/// Options of `inspect`.
#[derive(Debug, Clone, Args)]
pub struct InspectArgs {
    /// The image
    #[arg(value_name = "IMAGE")]
    pub image: PathBuf,
}

/// Options of `image`.
#[derive(Debug, Clone, Args)]
pub struct ImageArgs {
    /// What to do.
    #[command(subcommand)]
    pub verb: ImageVerb,
}

/// The verbs of `image`.
#[derive(Debug, Clone, Subcommand)]
pub enum ImageVerb {
    /// Read images to their last byte and check everything
    Verify {
        /// The images
        #[arg(value_name = "IMAGE", required = true)]
        images: Vec<PathBuf>,
    },
    /// List the images in a folder, the newest first
    Ls {
        /// The folder
        #[arg(value_name = "DIR", default_value = ".")]
        folder: PathBuf,
    },
    /// Remove images, and nothing that is not one
    Rm {
        /// The images
        #[arg(value_name = "IMAGE", required = true)]
        images: Vec<PathBuf>,
    },
    /// Remove old images from a folder: those that no option keeps
    Prune(PruneArgs),
    /// Write an ELF core file of one process, which gdb opens
    ///
    /// It holds what the image holds of the process' memory: zeros as holes of the file, and of mapped files the pages that the
    /// program wrote to. The others are left to the file, which NT_FILE names: keep the program and its libraries beside the
    /// core. Memory that the program keeps out of its core files (coredump_filter, MADV_DONTDUMP) is left out, unless --all is
    /// given.
    Core(CoreArgs),
}

/// Options of `image core`.
#[derive(Debug, Clone, Args)]
pub struct CoreArgs {
    /// The image
    #[arg(value_name = "IMAGE")]
    pub image: PathBuf,
    /// Which of its processes; the root if none is named
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(i32).range(2..))]
    pub pid: Option<i32>,
    /// The core file: must not exist, and is readable for nobody else
    #[arg(short, long, value_name = "FILE")]
    pub output: PathBuf,
    /// Also what the program keeps out of its core files
    #[arg(long)]
    pub all: bool,
}

/// Options of `image prune`.
#[derive(Debug, Clone, Args)]
pub struct PruneArgs {
    /// The folder
    #[arg(value_name = "DIR")]
    pub folder: PathBuf,
    /// Keep so many, the newest
    #[arg(long, value_name = "COUNT", required_unless_present = "older_than")]
    pub keep: Option<usize>,
    /// Keep those that are not older than this: 90m, 12h, 7d, 4w
    #[arg(long, value_name = "AGE", value_parser = age)]
    pub older_than: Option<Duration>,
    /// Only say what would be removed
    #[arg(long)]
    pub dry_run: bool,
}

/// A time as a number and its unit.
fn age(text: &str) -> Result<Duration, String> {
    let units = [
        ('s', 1),
        ('m', 60),
        ('h', 3600),
        ('d', 86_400),
        ('w', 7 * 86_400),
    ];
    units
        .iter()
        .find_map(|&(unit, seconds)| {
            let number: u64 = text.strip_suffix(unit)?.parse().ok()?;
            Some(Duration::from_secs(number.checked_mul(seconds)?))
        })
        .ok_or_else(|| "a number and one of s, m, h, d, w".to_owned())
}

/// Where this host's key lies.
#[derive(Debug, Clone, Args)]
pub struct IdentityArgs {
    /// Folder of this host's key and certificate; made on first use, 0700
    #[arg(long, value_name = "DIR", default_value = "/etc/pageferry/identity")]
    pub identity: PathBuf,
}

/// Options of `receive`.
#[derive(Debug, Clone, Args)]
pub struct ReceiveArgs {
    /// Address and UDP port to listen on
    #[arg(long, value_name = "ADDR:PORT")]
    pub listen: SocketAddr,
    /// Where this host's key lies.
    #[command(flatten)]
    pub identity: IdentityArgs,
    /// A source that may send processes here: SHA256:… or a name from /etc/pageferry/peers.toml. It gets root on this host
    #[arg(long, value_name = "FINGERPRINT|NAME", required = true)]
    pub trust: Vec<String>,
    /// Take one migration, then exit with its code
    #[arg(long)]
    pub once: bool,
    /// Where its process ids are taken here: run the process in a pid namespace of its own, which stays as long as anybody is in it
    #[arg(long, requires = "once")]
    pub new_pid_ns: bool,
    /// Fetch all pages behind the running process (on), or only those it touches (off); with off, SIGTERM or Ctrl-C switches it on
    #[arg(long, value_enum, default_value_t = Drain::On)]
    pub drain: Drain,
    /// Keep the process's monotonic and boot-time clocks going, in a time namespace, or let them jump to this host's
    #[arg(long, value_enum, default_value_t = Clock::Keep)]
    pub clock: Clock,
    /// Accept a process from a CPU with features or register state that this one lacks
    #[arg(long)]
    pub force_cpu: bool,
}

/// Options of `migrate`.
#[derive(Debug, Clone, Args)]
pub struct MigrateArgs {
    /// The process to move
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(i32).range(2..))]
    pub pid: i32,
    /// The target: where `pageferry receive` listens
    #[arg(long, value_name = "HOST:PORT")]
    pub to: String,
    /// Where this host's key lies.
    #[command(flatten)]
    pub identity: IdentityArgs,
    /// The target's fingerprint: SHA256:… or a name from /etc/pageferry/peers.toml
    #[arg(long, value_name = "FINGERPRINT|NAME", required = true)]
    pub peer: Vec<String>,
    /// How memory moves
    #[arg(long, value_enum, default_value_t = Mode::PostCopy)]
    pub mode: Mode,
    /// What may be carried.
    #[command(flatten)]
    pub carry: CarryArgs,
    /// Files under this path are the same on both hosts although no network file system says so
    #[arg(long, value_name = "PATH")]
    pub same_file: Vec<PathBuf>,
    /// Migrate although the target's CPU lacks features or register state that this one has
    #[arg(long)]
    pub force_cpu: bool,
}

/// What of a process may be carried.
#[derive(Debug, Clone, Args)]
pub struct CarryArgs {
    /// Established TCP connections: refuse the process, or close them
    #[arg(long, value_enum, default_value_t = Tcp::Refuse)]
    pub tcp: Tcp,
    /// How files that the process only reads are compared with those it finds where it goes on
    #[arg(long, value_enum, default_value_t = FileCheck::BuildId)]
    pub file_check: FileCheck,
    /// Go on although a service manager or container runtime may start the process again here
    #[arg(long)]
    pub unmanaged: bool,
    /// Deleted files that the process still has are carried with their content up to this size (on a tmpfs: any)
    #[arg(long, value_name = "BYTES", default_value_t = 1 << 20)]
    pub ghost_limit: u64,
}

/// Options of `dump`.
#[derive(Debug, Clone, Args)]
pub struct DumpArgs {
    /// The process
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(i32).range(2..))]
    pub pid: i32,
    /// The image: a folder that is made, and must not exist
    #[arg(long, value_name = "DIR")]
    pub image: PathBuf,
    /// Let the process run on instead of ending it
    #[arg(long)]
    pub leave_running: bool,
    /// How pages are stored
    #[arg(long, value_enum, default_value_t = Compress::Lz4)]
    pub compress: Compress,
    /// What may be carried.
    #[command(flatten)]
    pub carry: CarryArgs,
}

/// How an image's pages are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Compress {
    /// Blocks of 64 KiB, each packed where that makes it shorter.
    Lz4,
    /// As they are: twice the speed of a lazy restore, and more room.
    None,
}

/// Options of `page-server`.
#[derive(Debug, Clone, Args)]
pub struct PageServerArgs {
    /// An image; its name is that of the folder
    #[arg(long, value_name = "DIR", required = true)]
    pub image: Vec<PathBuf>,
    /// Address and UDP port to listen on
    #[arg(long, value_name = "ADDR:PORT")]
    pub listen: SocketAddr,
    /// Where this host's key lies.
    #[command(flatten)]
    pub identity: IdentityArgs,
    /// A host that may read the images: SHA256:… or a name from /etc/pageferry/peers.toml. Memory holds secrets
    #[arg(long, value_name = "FINGERPRINT|NAME", required = true)]
    pub trust: Vec<String>,
}

/// Options of `restore`.
#[derive(Debug, Clone, Args)]
pub struct RestoreArgs {
    /// The image, on this host
    #[arg(
        long,
        value_name = "DIR",
        required_unless_present = "from",
        conflicts_with = "from"
    )]
    pub image: Option<PathBuf>,
    /// The page server that has the image
    #[arg(long, value_name = "HOST:PORT", requires = "peer", requires = "name")]
    pub from: Option<String>,
    /// The page server's fingerprint: SHA256:… or a name from /etc/pageferry/peers.toml. It gets root on this host
    #[arg(long, value_name = "FINGERPRINT|NAME", requires = "from")]
    pub peer: Vec<String>,
    /// The image's name there
    #[arg(long, value_name = "IMAGE", requires = "from")]
    pub name: Option<String>,
    /// Where this host's key lies.
    #[command(flatten)]
    pub identity: IdentityArgs,
    /// Let the process run at once and read its pages behind it
    #[arg(long)]
    pub lazy: bool,
    /// With --lazy: read all pages (on), or only those it touches (off); with off, SIGTERM or Ctrl-C switches it on
    #[arg(long, value_enum, default_value_t = Drain::On, requires = "lazy")]
    pub drain: Drain,
    /// Leave it stopped: SIGCONT lets it run
    #[arg(long)]
    pub stopped: bool,
    /// Exit with 0 once it has all its pages, instead of waiting for its end and exiting with its status
    #[arg(long)]
    pub detach: bool,
    /// Where its process ids are taken here: run the process in a pid namespace of its own, which stays as long as anybody is in it
    #[arg(long)]
    pub new_pid_ns: bool,
    /// Run a copy for looking at, beside the original: in pid, network, IPC, UTS and mount namespaces of its own. It finds this
    /// host's files, can write to private copies of those it writes, and reaches no network; but whatever UNIX sockets and named
    /// pipes it finds by path are this host's
    #[arg(long, conflicts_with = "from")]
    pub isolate: bool,
    /// With --isolate: private copies of files may take so much memory together, and what it writes to them and to each folder
    /// made anew no more than that
    #[arg(long, value_name = "BYTES", default_value_t = 1 << 30, requires = "isolate")]
    pub isolate_limit: u64,
    /// Keep the process's monotonic and boot-time clocks going, in a time namespace, or let them jump to this host's
    #[arg(long, value_enum, default_value_t = Clock::Keep)]
    pub clock: Clock,
    /// How files that the process only reads are compared with those of the dump
    #[arg(long, value_enum, default_value_t = FileCheck::BuildId)]
    pub file_check: FileCheck,
    /// Files under this path may have been written to since the dump
    #[arg(long, value_name = "PATH")]
    pub same_file: Vec<PathBuf>,
    /// Go on although this CPU lacks features or register state of the dump's
    #[arg(long)]
    pub force_cpu: bool,
}

/// How memory moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// The process runs on the target at once; its pages are fetched behind it.
    PostCopy,
}

impl std::fmt::Display for Mode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("post-copy")
    }
}

/// What becomes of established TCP connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Tcp {
    /// The process finds them closed on the target.
    Close,
    /// The process is refused, naming each.
    Refuse,
}

/// How files are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum FileCheck {
    /// ELF files by build id, others by size and modification time.
    BuildId,
    /// By size.
    Size,
    /// By size and modification time.
    Mtime,
    /// By SHA-256 of the content.
    Content,
}

/// Whether pages are fetched behind the running process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Drain {
    /// Until all are resident.
    On,
    /// Only what is touched.
    Off,
}

/// What becomes of the process's clocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Clock {
    /// They go on from where they were.
    Keep,
    /// They jump to the target's.
    Jump,
}
