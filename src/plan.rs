//! The plan: what the source says of the process before anything is touched, and what the target answers. Every check
//! that could make a migration fail after the freeze, and can be made before it, is made here; the target names all
//! that is wrong at once.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use nix::libc;
use pageferry_image::model::files::file;
use pageferry_image::model::memory::FileIdentity;
use pageferry_image::model::shared::{Segment, Shared, shared};
use pageferry_image::model::sockets::{unix_name, unix_path};
use pageferry_image::model::task::{Host, Tree};
use pageferry_image::page::PAGE_SIZE;
use pageferry_pageserver::identity;
use pageferry_pageserver::survey::{SurveyOptions, TcpPolicy};
use pageferry_restorer::rebuild::sockets::names;
use pageferry_tracee::{host, procfs, socket, sysv};
use pageferry_wire::message::{self, BoundSocket, Plan, Refusal, Verdict};

use crate::cli::{self, CarryArgs};

/// Memory that must stay free beside the process, bytes: the engine, page tables, and a little air.
const MEMORY_MARGIN: u64 = 64 << 20;

fn refusal(object: impl Into<String>, text: impl Into<String>) -> Refusal {
    Refusal {
        object: object.into(),
        text: text.into(),
    }
}

/// What this host thinks of `plan`. `force_cpu`: the operator of this host accepts any CPU.
pub fn judge(plan: &Plan, force_cpu: bool) -> Verdict {
    let mut refusals = Vec::new();
    let mut notes = Vec::new();
    let process = format!("pid {}", plan.pid);
    judge_cpu(
        plan,
        force_cpu || plan.force_cpu,
        &process,
        &mut refusals,
        &mut notes,
    );
    judge_numbers(plan, &process, &mut refusals);
    for file in &plan.files {
        if let Some(text) = judge_file(file, plan) {
            refusals.push(refusal(format!("{process} file {}", file.path), text));
        }
    }
    for file in &plan.carried {
        if let Some(text) = judge_carried(file) {
            refusals.push(refusal(format!("{process} {}", file.name()), text));
        }
    }
    for bound in &plan.sockets {
        if let Err(text) = judge_address(bound, plan) {
            refusals.push(refusal(format!("{process} fd {}", bound.fd), text));
        }
    }
    let memory_available = host::memory_available_bytes().unwrap_or(0);
    if plan.resident_bytes.saturating_add(MEMORY_MARGIN) > memory_available {
        refusals.push(refusal(
            &process,
            format!(
                "needs {} MiB; the target has {} MiB available (free memory there)",
                plan.resident_bytes >> 20,
                memory_available >> 20
            ),
        ));
    }
    let kernel_release = host::kernel_release().unwrap_or_default();
    let source = plan.host.as_ref().map_or("", |host| &host.kernel_release);
    if kernel_release != source {
        notes.push(format!(
            "kernels differ: source {source}, target {kernel_release}"
        ));
    }
    Verdict {
        refusals,
        notes,
        kernel_release,
        memory_available,
    }
}

/// What distinguishes a file from another one of the same name.
pub type FileKey = (String, u64, u64);

fn key(file: &FileIdentity) -> FileKey {
    (file.path.clone(), file.device, file.inode)
}

/// The files that `tree` maps or has open, each once.
pub fn files_of(tree: &Tree) -> BTreeMap<FileKey, &FileIdentity> {
    let spaces = tree
        .processes
        .iter()
        .filter_map(|process| process.space.as_ref());
    let mapped = spaces.flat_map(|space| {
        let mapped = space.mappings.iter().filter_map(|m| m.file.as_ref());
        mapped.chain(&space.exe)
    });
    let open = tree.files.iter().filter_map(|file| match &file.kind {
        Some(file::Kind::Regular(regular)) => regular.identity.as_ref(),
        _ => None,
    });
    let mut found: BTreeMap<FileKey, &FileIdentity> = BTreeMap::new();
    for file in mapped.chain(open) {
        let known = found.entry(key(file)).or_insert(file);
        // The stricter of two demands.
        if file.must_be_shared {
            *known = file;
        }
    }
    found
}

/// The files of `tree` that `plan` did not name, since they were opened or mapped after it was made, and that are not the same
/// here: a clause about each.
pub fn late_files(tree: &Tree, plan: &Plan) -> Vec<String> {
    let judged: BTreeSet<FileKey> = plan.files.iter().map(key).collect();
    files_of(tree)
        .into_iter()
        .filter(|(key, _)| !judged.contains(key))
        .filter_map(|(_, file)| Some(format!("file {} {}", file.path, judge_file(file, plan)?)))
        .collect()
}

/// What the survey is to find fit to be carried.
pub fn survey_options(args: &CarryArgs, same_file: Vec<PathBuf>) -> SurveyOptions {
    SurveyOptions {
        tcp: match args.tcp {
            cli::Tcp::Close => TcpPolicy::Close,
            cli::Tcp::Refuse => TcpPolicy::Refuse,
        },
        file_check: identity_check(file_check(args.file_check)),
        same_file,
        unmanaged: args.unmanaged,
        ghost_limit: args.ghost_limit,
        at_rest: false,
    }
}

/// As it travels.
pub fn file_check(check: cli::FileCheck) -> message::FileCheck {
    match check {
        cli::FileCheck::BuildId => message::FileCheck::BuildId,
        cli::FileCheck::Size => message::FileCheck::Size,
        cli::FileCheck::Mtime => message::FileCheck::Mtime,
        cli::FileCheck::Content => message::FileCheck::Content,
    }
}

fn identity_check(check: message::FileCheck) -> identity::FileCheck {
    match check {
        message::FileCheck::Size => identity::FileCheck::Size,
        message::FileCheck::Mtime => identity::FileCheck::Mtime,
        message::FileCheck::Content => identity::FileCheck::Content,
        message::FileCheck::BuildId | message::FileCheck::Invalid => identity::FileCheck::BuildId,
    }
}

/// What this host is, for those that may run its processes.
///
/// # Errors
/// What cannot be read.
pub fn this_host() -> Result<Host, pageferry_tracee::Error> {
    let xsave = host::xsave()?;
    Ok(Host {
        cpu_flags: host::cpu_flags()?.into_iter().collect(),
        xsave_size: xsave.size,
        xcr0: xsave.xcr0,
        kernel_release: host::kernel_release()?,
        vdso: host::vdso()?,
        page_size: u32::try_from(PAGE_SIZE).unwrap_or(0),
    })
}

/// The files that `tree` writes and that somebody else has written to, or has put another in place of, since it was brought to
/// rest: a refusal each. Those under `same_file` are as they are.
pub fn touched_files(tree: &Tree, same_file: &[PathBuf]) -> Vec<Refusal> {
    let pid = tree.processes.first().map_or(0, |root| root.pid);
    files_of(tree)
        .into_values()
        .filter(|file| file.must_be_shared)
        .filter(|file| {
            !same_file
                .iter()
                .any(|prefix| Path::new(&file.path).starts_with(prefix))
        })
        .filter_map(|file| {
            let how = identity::touched(file)?;
            let text = format!(
                "{how} (put it back as it was, or --same-file {} to go on)",
                file.path
            );
            Some(refusal(format!("pid {pid} file {}", file.path), text))
        })
        .collect()
}

/// A plan to run what an image holds: it goes the way of all plans. `resident_bytes`: the memory that will be needed.
pub fn of_tree(tree: &Tree, resident_bytes: u64) -> Plan {
    let root = tree.processes.first();
    let descriptors = || {
        tree.processes
            .iter()
            .flat_map(|process| &process.descriptors)
    };
    let mut bound: Vec<BoundSocket> = Vec::new();
    for file in &tree.files {
        let Some(file::Kind::Socket(socket)) = &file.kind else {
            continue;
        };
        let fd = descriptors()
            .find(|descriptor| descriptor.file == file.id)
            .map_or(0, |descriptor| descriptor.fd);
        // A name that several have is looked at once.
        for name in BoundSocket::of(fd, socket) {
            if bound.iter().all(|other| other.address != name.address) {
                bound.push(name);
            }
        }
    }
    let threads = root.map_or(&[][..], |root| &root.threads);
    Plan {
        pid: root.map_or(0, |root| root.pid),
        comm: threads
            .first()
            .map_or_else(String::new, |leader| leader.comm.clone()),
        tids: tree.numbers(),
        files: files_of(tree).into_values().cloned().collect(),
        carried: tree
            .shared
            .iter()
            .filter(|shared| shared.is_named())
            .cloned()
            .collect(),
        sockets: bound,
        host: tree.host.clone(),
        monotonic_ns: tree.monotonic_ns,
        boottime_ns: tree.boottime_ns,
        realtime_ns: tree.realtime_ns,
        resident_bytes,
        ..Plan::default()
    }
}

/// A number is taken by whoever has it as a process or thread, and as the session or group of anybody.
fn judge_numbers(plan: &Plan, process: &str, refusals: &mut Vec<Refusal>) {
    let groups = procfs::groups_and_sessions().unwrap_or_default();
    for &number in &plan.tids {
        let holder = match procfs::status(number, number) {
            Ok(status) => format!("{:?}", status.name),
            Err(_) if groups.contains(&number) => "a process group or session".to_owned(),
            Err(_) => continue,
        };
        let (object, what) = if number == plan.pid {
            (process.to_owned(), "process id")
        } else {
            (format!("{process} thread {number}"), "id")
        };
        refusals.push(refusal(
            object,
            format!("{what} {number} is taken on the target by {holder}; end it, or give receive or restore --new-pid-ns"),
        ));
    }
}

fn judge_cpu(
    plan: &Plan,
    force: bool,
    process: &str,
    refusals: &mut Vec<Refusal>,
    notes: &mut Vec<String>,
) {
    let mut found = Vec::new();
    let nobody = Host::default();
    let wanted = plan.host.as_ref().unwrap_or(&nobody);
    let ours = host::cpu_flags().unwrap_or_default();
    let missing: Vec<&str> = wanted
        .cpu_flags
        .iter()
        .filter(|flag| !ours.contains(*flag))
        .map(String::as_str)
        .collect();
    if !missing.is_empty() {
        found.push(format!("the target's CPU lacks {}", missing.join(" ")));
    }
    match host::xsave() {
        Ok(here) if wanted.xcr0 == here.xcr0 && wanted.xsave_size <= here.size => {}
        Ok(here) => found.push(format!(
            "register state differs: source {:#x} in {} bytes, target {:#x} in {} bytes",
            wanted.xcr0, wanted.xsave_size, here.xcr0, here.size
        )),
        Err(error) => found.push(format!(
            "the target's register state cannot be read: {error}"
        )),
    }
    for text in found {
        if force {
            notes.push(text);
        } else {
            refusals.push(refusal(
                process,
                format!("{text} (--force-cpu to go on: the process may die of SIGILL)"),
            ));
        }
    }
    if host::vdso().is_ok_and(|vdso| vdso != wanted.vdso) {
        refusals.push(refusal(
            process,
            "the target's kernel brings another vdso; run the same kernel build on both hosts",
        ));
    }
}

/// Whether the file at the same path here is the one the process means.
fn judge_file(file: &FileIdentity, plan: &Plan) -> Option<String> {
    identity::difference(file, identity_check(plan.file_check()))
}

/// Whether a file can be made here, with its name or without, or a segment with its number and key.
fn judge_carried(file: &Shared) -> Option<String> {
    let carried = match &file.kind {
        Some(shared::Kind::Carried(carried)) => carried,
        Some(shared::Kind::Segment(segment)) => return judge_segment(segment),
        _ => return None,
    };
    if file.new_path().is_some() && Path::new(&carried.path).symlink_metadata().is_ok() {
        return Some("is there on the target already, and may be another's (remove it there, or --same-file if it is the same)".into());
    }
    let folder = Path::new(&carried.path).parent()?;
    (!folder.is_dir()).then(|| {
        let folder = folder.display();
        format!("cannot be made: there is no folder {folder} on the target (make it)")
    })
}

fn judge_segment(segment: &Segment) -> Option<String> {
    if !sysv::can_number() {
        return Some("cannot get its number on the target, whose kernel is built without CONFIG_CHECKPOINT_RESTORE".into());
    }
    if !matches!(sysv::segment(segment.number), Ok(None)) {
        return Some(
            "has a number that another segment has on the target (remove that with ipcrm)".into(),
        );
    }
    let taken = (segment.key != 0).then(|| sysv::with_key(segment.key));
    let other = taken.flatten()?;
    let key = segment.key;
    Some(format!(
        "has the key {key:#010x}, which segment {other} has on the target (remove that with ipcrm)"
    ))
}

/// Whether the address can be bound here: tried, and given back at once.
fn judge_address(bound: &BoundSocket, plan: &Plan) -> Result<(), String> {
    let number = |value: u32| i32::try_from(value).unwrap_or(0);
    if number(bound.family) == libc::AF_UNIX {
        let path = unix_path(&bound.address).map(|path| Path::new(OsStr::from_bytes(path)));
        let is_same = |path: &Path| plan.same_file.iter().any(|prefix| path.starts_with(prefix));
        let own = path.is_some_and(is_same).then_some(bound.inode);
        let judged = names::judge(&bound.address, number(bound.kind), own.unwrap_or(0));
        return judged.map_err(|text| {
            let name = unix_name(&bound.address).unwrap_or_default();
            format!("UNIX socket {name} {text}")
        });
    }
    let tried = socket::create(
        number(bound.family),
        number(bound.kind),
        number(bound.protocol),
    )
    .and_then(|fd| {
        // So that an address in TIME_WAIT does not refuse what the real socket may take.
        socket::set_option(
            fd.as_fd(),
            libc::SOL_SOCKET,
            libc::SO_REUSEADDR,
            &1i32.to_le_bytes(),
        )?;
        socket::bind_raw(fd.as_fd(), &bound.address)
    });
    tried.map_err(|error| {
        format!(
            "address {} cannot be bound on the target ({error}); free it, or bring the address over first",
            address_text(&bound.address)
        )
    })
}

/// `struct sockaddr_in` and `sockaddr_in6` as people write them; anything else by its length.
fn address_text(raw: &[u8]) -> String {
    let family = raw
        .first_chunk::<2>()
        .map_or(0, |bytes| i32::from(u16::from_le_bytes(*bytes)));
    let port = || {
        raw.get(2..4)
            .map_or(0, |bytes| u16::from_be_bytes([bytes[0], bytes[1]]))
    };
    match family {
        libc::AF_INET if raw.len() >= 8 => {
            SocketAddr::from(([raw[4], raw[5], raw[6], raw[7]], port())).to_string()
        }
        libc::AF_INET6 if raw.len() >= 24 => {
            let mut address = [0; 16];
            address.copy_from_slice(&raw[8..24]);
            SocketAddr::from((address, port())).to_string()
        }
        _ => format!("of family {family}"),
    }
}

#[cfg(test)]
mod tests {
    use pageferry_image::model::files::{File, Regular};
    use pageferry_image::model::task::Process;

    use super::*;

    #[test]
    fn a_file_opened_after_the_plan_must_be_the_same_here() {
        let identity = |path: &str, inode| FileIdentity {
            path: path.into(),
            mode: libc::S_IFREG,
            inode,
            ..FileIdentity::default()
        };
        let regular = |identity| File {
            kind: Some(file::Kind::Regular(Regular {
                identity: Some(identity),
                position: 0,
            })),
            ..File::default()
        };
        let tree = Tree {
            processes: vec![Process::default()],
            files: ["/nonexistent/judged", "/nonexistent/late"]
                .map(|path| regular(identity(path, 7)))
                .into(),
            ..Tree::default()
        };
        let mut plan = Plan {
            files: vec![identity("/nonexistent/judged", 7)],
            ..Plan::default()
        };
        assert_eq!(
            late_files(&tree, &plan),
            ["file /nonexistent/late is missing"]
        );
        // Another file under a name that was judged is another file.
        plan.files[0].inode = 8;
        assert_eq!(late_files(&tree, &plan).len(), 2);
    }

    #[test]
    fn register_state_that_does_not_fit_is_refused_unless_forced() {
        let here = host::xsave().expect("this processor has it");
        let judge = |xcr0, xsave_size, force| {
            let (mut refusals, mut notes) = (Vec::new(), Vec::new());
            let plan = Plan {
                host: Some(Host {
                    xcr0,
                    xsave_size,
                    vdso: host::vdso().expect("this kernel has one"),
                    ..Host::default()
                }),
                ..Plan::default()
            };
            judge_cpu(&plan, force, "pid 7", &mut refusals, &mut notes);
            (refusals, notes)
        };
        assert_eq!(judge(here.xcr0, here.size, false), (vec![], vec![]));
        for (xcr0, size) in [
            (here.xcr0 | 1 << 62, here.size),
            (here.xcr0, here.size + 64),
        ] {
            let (refusals, notes) = judge(xcr0, size, false);
            assert!(notes.is_empty() && refusals.len() == 1);
            assert!(
                refusals[0]
                    .text
                    .starts_with("register state differs: source ")
                    && refusals[0].text.contains("--force-cpu"),
                "{refusals:?}"
            );
            let (refusals, notes) = judge(xcr0, size, true);
            assert!(refusals.is_empty() && notes.len() == 1);
        }
    }
}
