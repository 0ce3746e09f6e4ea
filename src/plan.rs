//! The plan: what the source says of the process before anything is touched, and what the target answers. Every check
//! that could make a migration fail after the freeze, and can be made before it, is made here; the target names all
//! that is wrong at once.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::os::fd::AsFd;

use nix::libc;
use pageferry_image::model::files::file;
use pageferry_image::model::memory::FileIdentity;
use pageferry_image::model::task::Tree;
use pageferry_image::page::PAGE_SIZE;
use pageferry_pageserver::identity;
use pageferry_tracee::{host, procfs, socket};
use pageferry_wire::message::{self, BoundSocket, Plan, Refusal, Verdict};

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
    if u64::from(plan.page_size) != PAGE_SIZE {
        refusals.push(refusal(
            &process,
            format!(
                "pages of {} bytes; this version moves pages of {PAGE_SIZE}",
                plan.page_size
            ),
        ));
    }
    judge_cpu(
        plan,
        force_cpu || plan.force_cpu,
        &process,
        &mut refusals,
        &mut notes,
    );
    for &tid in &plan.tids {
        if let Ok(status) = procfs::status(tid, tid) {
            let what = if tid == plan.pid {
                "process id"
            } else {
                "thread id"
            };
            refusals.push(refusal(
                format!("{process} thread {tid}"),
                format!("{what} {tid} is taken on the target by {:?}; end it, or receive in a pid namespace of its own", status.name),
            ));
        }
    }
    for file in &plan.files {
        if let Some(text) = judge_file(file, plan) {
            refusals.push(refusal(format!("{process} file {}", file.path), text));
        }
    }
    for bound in &plan.sockets {
        if let Err(text) = judge_address(bound) {
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
    if kernel_release != plan.kernel_release {
        notes.push(format!(
            "kernels differ: source {}, target {kernel_release}",
            plan.kernel_release
        ));
    }
    Verdict {
        refusals,
        notes,
        kernel_release,
        memory_available,
    }
}

/// The files of `tree` that `plan` did not name, since they were opened or mapped after it was made, and that are not the same
/// here: a clause about each.
pub fn late_files(tree: &Tree, plan: &Plan) -> Vec<String> {
    let Some(process) = &tree.root else {
        return Vec::new();
    };
    let space = process.space.as_ref();
    let mapped = space.into_iter().flat_map(|space| {
        let mapped = space.mappings.iter().filter_map(|m| m.file.as_ref());
        mapped.chain(&space.exe)
    });
    let open = tree.files.iter().filter_map(|file| match &file.kind {
        Some(file::Kind::Regular(regular)) => regular.identity.as_ref(),
        _ => None,
    });
    let key = |file: &FileIdentity| (file.path.clone(), file.device, file.inode);
    let judged: BTreeSet<_> = plan.files.iter().map(key).collect();
    let late: BTreeMap<_, _> = mapped
        .chain(open)
        .map(|file| (key(file), file))
        .filter(|(key, _)| !judged.contains(key))
        .collect();
    late.values()
        .filter_map(|file| Some(format!("file {} {}", file.path, judge_file(file, plan)?)))
        .collect()
}

fn judge_cpu(
    plan: &Plan,
    force: bool,
    process: &str,
    refusals: &mut Vec<Refusal>,
    notes: &mut Vec<String>,
) {
    let mut found = Vec::new();
    let ours = host::cpu_flags().unwrap_or_default();
    let missing: Vec<&str> = plan
        .cpu_flags
        .iter()
        .filter(|flag| !ours.contains(*flag))
        .map(String::as_str)
        .collect();
    if !missing.is_empty() {
        found.push(format!("the target's CPU lacks {}", missing.join(" ")));
    }
    match host::xsave() {
        Ok(here) if plan.xcr0 == here.xcr0 && plan.xsave_size <= here.size => {}
        Ok(here) => found.push(format!(
            "register state differs: source {:#x} in {} bytes, target {:#x} in {} bytes",
            plan.xcr0, plan.xsave_size, here.xcr0, here.size
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
    if host::vdso().is_ok_and(|vdso| vdso != plan.vdso) {
        refusals.push(refusal(
            process,
            "the target's kernel brings another vdso; run the same kernel build on both hosts",
        ));
    }
}

/// Whether the file at the same path here is the one the process means.
fn judge_file(file: &FileIdentity, plan: &Plan) -> Option<String> {
    let check = match plan.file_check() {
        message::FileCheck::Size => identity::FileCheck::Size,
        message::FileCheck::Mtime => identity::FileCheck::Mtime,
        message::FileCheck::Content => identity::FileCheck::Content,
        message::FileCheck::BuildId | message::FileCheck::Invalid => identity::FileCheck::BuildId,
    };
    identity::difference(file, check)
}

/// Whether the address can be bound here: tried, and given back at once.
fn judge_address(bound: &BoundSocket) -> Result<(), String> {
    let number = |value: u32| i32::try_from(value).unwrap_or(0);
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
            root: Some(Process::default()),
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
                xcr0,
                xsave_size,
                vdso: host::vdso().expect("this kernel has one"),
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
