//! `pageferry image`: looks after images. One thread and no process of its own, since an image may be anybody's.

use std::io::Write as _;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use pageferry_image::page::PAGE_SIZE;
use pageferry_image::store::{Error, Header, Image, shelf};
use serde::Serialize;

use crate::cli::{Common, CoreArgs, ImageArgs, ImageVerb, PruneArgs};
use crate::core_file;
use crate::exit;
use crate::report::{chain, plain};

/// One line on stdout under `--json`: `{"type": …, "data": {…}}`.
#[derive(Debug, Serialize)]
#[serde(tag = "type", content = "data", rename_all = "snake_case")]
enum Line<'a> {
    /// An image, as its header says.
    Image(ImageLine<'a>),
    /// An image is whole.
    Good { path: String },
    /// An image is damaged, or cannot be read.
    Bad { path: String, text: String },
    /// What a dump or a removal has left, or has under way.
    Leftover { path: String },
    /// An image was removed, or, in a dry run, would have been.
    Removed { path: String, dry_run: bool },
    /// A core file was written.
    Core {
        path: String,
        pid: i32,
        threads: usize,
        segments: u64,
        /// Bytes of the file, holes included.
        file_bytes: u64,
        /// Bytes of memory in it that are no holes.
        memory_bytes: u64,
    },
}

/// What `image ls` and `inspect` say of a whole image.
#[derive(Debug, Serialize)]
pub(crate) struct ImageLine<'a> {
    /// Where it lies.
    path: String,
    /// The dump's id.
    id: String,
    /// Nanoseconds since 1970.
    created_ns: u64,
    /// Whose dump it is.
    host: &'a str,
    /// The version of pageferry that wrote it.
    program: &'a str,
    /// The root's pid.
    pid: i32,
    /// The root's name.
    comm: &'a str,
    processes: u32,
    threads: u32,
    /// Bytes of its files.
    stored_bytes: u64,
    /// Bytes of them that are pages.
    stored_pages_bytes: u64,
    data_pages: u64,
    zero_pages: u64,
    hole_pages: u64,
    guard_pages: u64,
}

impl<'a> ImageLine<'a> {
    pub(crate) fn new(path: &Path, header: &'a Header) -> Self {
        Self {
            path: shown(path),
            id: crate::migrate::hex(&header.origin.id),
            created_ns: header.origin.created_ns,
            host: &header.origin.host,
            program: &header.origin.program,
            pid: header.pid,
            comm: &header.comm,
            processes: header.process_count,
            threads: header.thread_count,
            stored_bytes: header.stored_len(),
            stored_pages_bytes: header.stored_pages_len(),
            data_pages: header.counts.data_pages,
            zero_pages: header.counts.zero_pages,
            hole_pages: header.counts.hole_pages,
            guard_pages: header.counts.guard_pages,
        }
    }
}

/// Says it, and gives the exit code: 4 if the image is to blame, 1 if the host is.
pub(crate) fn failed(error: &Error) -> u8 {
    eprintln!("pageferry: {}", chain(error));
    if error.is_bad_image() {
        exit::BAD_DATA
    } else {
        exit::FAILED
    }
}

/// A path as text; what is no UTF-8 is replaced.
fn shown(path: &Path) -> String {
    path.display().to_string()
}

/// Writes a line to stdout.
///
/// # Errors
/// What stdout says; a reader that went away is none.
pub(crate) fn say(text: &str) -> std::io::Result<()> {
    match writeln!(std::io::stdout().lock(), "{text}") {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        result => result,
    }
}

/// The same for a line of JSON.
pub(crate) fn say_json(line: &impl Serialize) -> std::io::Result<()> {
    say(&serde_json::to_string(line)?)
}

/// The worst of two exit codes: a bad image before a host that failed.
fn worst(one: u8, other: u8) -> u8 {
    one.max(other)
}

/// Runs `image`.
pub fn run(args: &ImageArgs, common: &Common) -> u8 {
    let done = match &args.verb {
        ImageVerb::Verify { images } => each(images, |path| verify(path, common)),
        ImageVerb::Ls { folder } => list(folder, common),
        ImageVerb::Rm { images } => each(images, |path| remove(path, false, common)),
        ImageVerb::Prune(args) => prune(args, common),
        ImageVerb::Core(args) => core(args, common),
    };
    done.unwrap_or_else(|error| {
        eprintln!("pageferry: stdout: {error}");
        exit::FAILED
    })
}

fn each(
    images: &[std::path::PathBuf],
    mut one: impl FnMut(&Path) -> std::io::Result<u8>,
) -> std::io::Result<u8> {
    images
        .iter()
        .try_fold(exit::DONE, |code, path| Ok(worst(code, one(path)?)))
}

/// Tells of an image that cannot be used.
fn bad(path: &Path, error: &Error, common: &Common) -> std::io::Result<u8> {
    if common.json {
        say_json(&Line::Bad {
            path: shown(path),
            text: chain(error),
        })?;
    }
    Ok(failed(error))
}

fn verify(path: &Path, common: &Common) -> std::io::Result<u8> {
    let verified = Image::open(path).and_then(|image| image.verify().map(|()| image));
    let image = match verified {
        Ok(image) => image,
        Err(error) => return bad(path, &error, common),
    };
    if common.json {
        say_json(&Line::Good { path: shown(path) })?;
    }
    if !common.quiet {
        eprintln!(
            "good     {}: {} pages with data in {}",
            plain(&shown(path)),
            image.header().counts.data_pages,
            size(image.header().stored_pages_len())
        );
    }
    Ok(exit::DONE)
}

fn list(folder: &Path, common: &Common) -> std::io::Result<u8> {
    let entries = match shelf::list(folder) {
        Ok(entries) => entries,
        Err(error) => return Ok(failed(&error)),
    };
    let mut code = exit::DONE;
    if !common.json && !entries.is_empty() {
        say(&row([
            "NAME", "ID", "PID", "COMM", "CREATED", "SIZE", "HOST",
        ]))?;
    }
    for entry in &entries {
        match &entry.state {
            shelf::State::Image(header) if common.json => {
                say_json(&Line::Image(ImageLine::new(&entry.path, header)))?;
            }
            shelf::State::Image(header) => say(&row([
                &plain(&entry.path.file_name().unwrap_or_default().to_string_lossy()),
                &crate::migrate::hex(&header.origin.id)[..12],
                &header.pid.to_string(),
                &plain(&header.comm),
                &utc(header.origin.created_ns),
                &size(header.stored_len()),
                &plain(&header.origin.host),
            ]))?,
            shelf::State::Bad(error) => code = worst(code, bad(&entry.path, error, common)?),
            shelf::State::Leftover => {
                if common.json {
                    say_json(&Line::Leftover {
                        path: shown(&entry.path),
                    })?;
                }
                eprintln!(
                    "leftover {}: a dump or removal is under way, or was killed (then: pageferry image rm it)",
                    plain(&shown(&entry.path))
                );
            }
        }
    }
    Ok(code)
}

fn row([name, id, pid, comm, created, size, host]: [&str; 7]) -> String {
    format!("{name:<24} {id:<12} {pid:>7} {comm:<15} {created:<20} {size:>10} {host}")
        .trim_end()
        .to_owned()
}

fn remove(path: &Path, dry_run: bool, common: &Common) -> std::io::Result<u8> {
    if !dry_run {
        if let Err(error) = shelf::remove(path) {
            return bad(path, &error, common);
        }
    }
    if common.json {
        say_json(&Line::Removed {
            path: shown(path),
            dry_run,
        })?;
    }
    if !common.quiet || dry_run {
        eprintln!(
            "{} {}",
            if dry_run { "would remove" } else { "removed" },
            plain(&shown(path))
        );
    }
    Ok(exit::DONE)
}

fn prune(args: &PruneArgs, common: &Common) -> std::io::Result<u8> {
    let entries = match shelf::list(&args.folder) {
        Ok(entries) => entries,
        Err(error) => return Ok(failed(&error)),
    };
    let nanoseconds = |duration: std::time::Duration| u64::try_from(duration.as_nanos());
    let now_ns = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| nanoseconds(since).unwrap_or(u64::MAX));
    let within_ns = args
        .older_than
        .map(|age| nanoseconds(age).unwrap_or(u64::MAX));
    let mut code = exit::DONE;
    for entry in shelf::to_prune(&entries, args.keep, within_ns, now_ns) {
        code = worst(code, remove(&entry.path, args.dry_run, common)?);
    }
    // Nobody can say how old these are: they stay, and somebody has to look.
    for entry in &entries {
        if let shelf::State::Bad(error) = &entry.state {
            code = worst(code, bad(&entry.path, error, common)?);
        }
    }
    Ok(code)
}

fn core(args: &CoreArgs, common: &Common) -> std::io::Result<u8> {
    let image = match Image::open(&args.image) {
        Ok(image) => image,
        Err(error) => return bad(&args.image, &error, common),
    };
    let written = match core_file::write(&image, args.pid, &args.output, args.all) {
        Ok(written) => written,
        Err(core_file::Error::Image(error)) => return bad(&args.image, &error, common),
        Err(error) => {
            eprintln!("pageferry: {}", chain(&error));
            return Ok(exit::FAILED);
        }
    };
    if common.json {
        say_json(&Line::Core {
            path: shown(&args.output),
            pid: written.pid,
            threads: written.thread_count,
            segments: written.segment_count,
            file_bytes: written.len,
            memory_bytes: written.memory_len,
        })?;
    }
    if !common.quiet {
        eprintln!(
            "wrote {}: process {} with {} threads, {} of memory; open it with: gdb PROGRAM {}",
            plain(&shown(&args.output)),
            written.pid,
            written.thread_count,
            size(written.memory_len),
            plain(&shown(&args.output))
        );
    }
    Ok(exit::DONE)
}

/// A length as people read it.
pub(crate) fn size(bytes: u64) -> String {
    let mut unit = ["KiB", "MiB", "GiB", "TiB", "PiB"].into_iter();
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let (mut value, mut name) = (bytes as f64 / 1024.0, unit.next().unwrap_or_default());
    while value >= 1024.0 {
        let Some(next) = unit.next() else { break };
        (value, name) = (value / 1024.0, next);
    }
    format!("{value:.1} {name}")
}

/// So many pages as people read it.
pub(crate) fn size_of_pages(page_count: u64) -> String {
    size(page_count.saturating_mul(PAGE_SIZE))
}

/// A time as people read it: `2026-11-21 12:23:45Z`.
pub(crate) fn utc(created_ns: u64) -> String {
    let seconds = created_ns / 1_000_000_000;
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // The calendar repeats every 400 years of 146,097 days; years begin in March here, so that the leap day is the last.
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year + era * 400 + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02}Z",
        second / 3600,
        second / 60 % 60,
        second % 60
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_those_of_the_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00:00Z"),
            (951_782_399, "2000-02-28 23:59:59Z"),
            (951_782_400, "2000-02-29 00:00:00Z"),
            (951_868_800, "2000-03-01 00:00:00Z"),
            (1_795_263_825, "2026-11-21 12:23:45Z"),
            (4_107_542_400, "2100-03-01 00:00:00Z"),
        ] {
            assert_eq!(utc(seconds * 1_000_000_000), text);
        }
    }

    #[test]
    fn sizes_are_rounded_to_one_place() {
        let texts = [0, 1023, 1024, 1536, 1 << 20, 3 << 30, u64::MAX].map(size);
        assert_eq!(
            texts,
            [
                "0 B",
                "1023 B",
                "1.0 KiB",
                "1.5 KiB",
                "1.0 MiB",
                "3.0 GiB",
                "16384.0 PiB"
            ]
        );
    }
}
