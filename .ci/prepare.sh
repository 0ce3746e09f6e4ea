# Sourced by ./demo, ./test and the scripts here: root, Debian packages, a Rust toolchain. Says what it is about to do, on
# standard error; exits with 3 and the line that helps where it cannot go on.

cannot() { # reason, line that helps
    echo "pageferry: $1" >&2
    echo "           $2" >&2
    exit 3
}

need_root() {
    [ "$(id -u)" = 0 ] || cannot "this needs root: it makes namespaces and stops processes" "run: sudo $0"
    # Sent pages arrive by userfaultfd, written ones are found by PAGEMAP_SCAN: both are in every kernel from 6.7 on.
    local release
    release=$(uname -r)
    case $release in
    [0-5].* | 6.[0-6].* | 6.[0-6]-*) cannot "Linux $release lacks PAGEMAP_SCAN" "boot a kernel from 6.7 on, for instance Debian's linux-image-amd64 of trixie or of bookworm-backports" ;;
    esac
    [ "$(uname -m)" = x86_64 ] || cannot "$(uname -m) is not carried yet" "use an x86_64 machine"
    unshare --pid --fork --net --mount --uts --ipc --time true 2>/dev/null ||
        cannot "namespaces cannot be made here" "run it outside of a container, or in one with --privileged"
}

# need_packages PACKAGE…: installs those that are missing.
need_packages() {
    local missing=() package
    for package; do
        dpkg-query --show --showformat '${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || missing+=("$package")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    command -v apt-get >/dev/null || cannot "missing: ${missing[*]}, and there is no apt-get" "install them by the means of your distribution"
    echo "pageferry: about to install these Debian packages: ${missing[*]}" >&2
    # Redis and memcached are run by the tests themselves; as services they would only occupy their ports.
    local policy=/usr/sbin/policy-rc.d
    if [ ! -e $policy ]; then
        printf '#!/bin/sh\nexit 101\n' >$policy
        chmod 755 $policy
        trap 'rm -f /usr/sbin/policy-rc.d' EXIT
    fi
    { apt-get update --quiet && DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet --no-install-recommends "${missing[@]}"; } >&2 ||
        cannot "apt-get failed" "run: apt-get update && apt-get install ${missing[*]}"
    if [ "$(trap -p EXIT)" ]; then
        rm -f $policy
        trap - EXIT
    fi
}

# Finds cargo, also that of the user who said sudo, and builds as that user so that the checkout stays theirs.
need_cargo() {
    local home=$HOME
    [ -z "${SUDO_USER:-}" ] || home=$(getent passwd "$SUDO_USER" | cut -d: -f6)
    if ! command -v cargo >/dev/null; then
        if [ -x "$home/.cargo/bin/cargo" ]; then
            export PATH=$home/.cargo/bin:$PATH CARGO_HOME=${CARGO_HOME:-$home/.cargo} RUSTUP_HOME=${RUSTUP_HOME:-$home/.rustup}
        else
            cannot "there is no Rust toolchain" "see https://rustup.rs, or: apt-get install cargo (1.85 or newer)"
        fi
    fi
    local version
    version=$(cargo --version | sed -E 's/^cargo 1\.([0-9]+)\..*/\1/')
    [ "$version" -ge 85 ] 2>/dev/null || cannot "$(cargo --version) is too old" "1.85 or newer is needed: rustup update stable"
    target=${CARGO_TARGET_DIR:-target}
}

# as_owner COMMAND…: runs it as the owner of the checkout, who is whoever said sudo.
as_owner() {
    local owner
    owner=$(stat -c %U .)
    if [ "$owner" = root ] || [ "$owner" != "${SUDO_USER:-}" ]; then
        "$@"
    else
        runuser -u "$owner" -- env HOME="$(getent passwd "$owner" | cut -d: -f6)" PATH="$PATH" "$@"
    fi
}

# What root's cargo wrote into the owner's build folder becomes the owner's again.
give_back() {
    [ -z "${SUDO_UID:-}" ] || [ ! -d "$target" ] || chown -R --from=0 "$SUDO_UID:${SUDO_GID:-0}" "$target"
}

# A kernel that lacks something says so here, with the line that helps.
need_capable_kernel() {
    "$target/release/pageferry" check >&2 || exit 3
}
