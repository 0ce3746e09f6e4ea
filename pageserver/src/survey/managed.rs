//! Whether somebody would start the process again here once it has left: a service manager or a container runtime.

use pageferry_tracee::procfs;

use crate::Result;

/// How control groups of container runtimes are named.
const RUNTIMES: [&str; 8] = [
    "docker-",
    "libpod",
    "kubepods",
    "cri-containerd",
    "containerd-",
    "crio-",
    "lxc.",
    "machine-",
];
/// Control groups of container runtimes that hold one group a container.
const RUNTIME_FOLDERS: [&str; 4] = ["docker", "containerd", "lxc", "podman"];

/// The unit or container whose manager started the process; `None` if nobody but its parent will notice its end.
///
/// A manager watches the process it started itself: one whose parent is outside of the unit. The others are their parent's.
pub(super) fn unit(pid: i32, parent: i32) -> Result<Option<String>> {
    let groups = procfs::cgroups(pid)?;
    let Some(unit) = groups
        .iter()
        .filter_map(|line| line.splitn(3, ':').nth(2))
        .find_map(managed_by)
    else {
        return Ok(None);
    };
    let parents = match parent {
        0 => Vec::new(),
        parent => match procfs::cgroups(parent) {
            Ok(groups) => groups,
            Err(error) if error.is_gone() => Vec::new(),
            Err(error) => return Err(error.into()),
        },
    };
    Ok((parents != groups).then_some(unit))
}

fn managed_by(path: &str) -> Option<String> {
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    for (index, part) in parts.iter().enumerate().rev() {
        let is_runtime = RUNTIMES.iter().any(|prefix| part.starts_with(prefix))
            || (RUNTIME_FOLDERS.contains(part) && index + 1 < parts.len());
        if is_runtime {
            return Some(format!("the container {}", parts.last().unwrap_or(part)));
        }
        if part.ends_with(".service") {
            return Some(format!("the service {part}"));
        }
        // A login session, or a program a desktop started once: nobody starts it again. A runtime's scope was seen above.
        if part.ends_with(".scope") {
            return None;
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn managers_are_known_by_their_groups() {
        let by = |path: &str| managed_by(path);
        assert_eq!(
            by("/system.slice/redis-server.service").as_deref(),
            Some("the service redis-server.service")
        );
        assert_eq!(
            by("/system.slice/ssh.service/worker").as_deref(),
            Some("the service ssh.service")
        );
        assert_eq!(by("/user.slice/user-1000.slice/session-3.scope"), None);
        assert_eq!(
            by("/user.slice/user-1000.slice/user@1000.service/app.slice/vte-spawn-1.scope"),
            None
        );
        assert_eq!(by("/docker/0a1b").as_deref(), Some("the container 0a1b"));
        assert_eq!(
            by("/system.slice/docker-0a1b.scope").as_deref(),
            Some("the container docker-0a1b.scope")
        );
        assert_eq!(
            by("/kubepods.slice/kubepods-pod1.slice/cri-containerd-9.scope").as_deref(),
            Some("the container cri-containerd-9.scope")
        );
        assert_eq!(
            by("/machine.slice/libpod-77.scope").as_deref(),
            Some("the container libpod-77.scope")
        );
        assert_eq!(by("/"), None);
        assert_eq!(by("/process_api/7356"), None);
    }
}
