//! Rebuilds sockets: unbound, bound and listening ones, UNIX sockets with all that is connected to each other, and closed ones
//! in the place of connections that the operator chose to drop.

pub mod names;
pub(crate) mod unix;

use std::os::fd::{AsFd, OwnedFd};

use pageferry_image::model::Invalid;
use pageferry_image::model::sockets::{Socket, State};
use pageferry_tracee::socket;

use super::{Error, Result};

/// Options that must be set before bind(2) to matter; the others are set after it, as the program did.
const BEFORE_BIND: [(i32, i32); 5] = [
    (libc::SOL_SOCKET, libc::SO_REUSEADDR),
    (libc::SOL_SOCKET, libc::SO_REUSEPORT),
    (libc::IPPROTO_IPV6, libc::IPV6_V6ONLY),
    (libc::IPPROTO_IP, libc::IP_FREEBIND),
    (libc::IPPROTO_IP, libc::IP_TRANSPARENT),
];

/// Makes an Internet socket in our process.
pub(crate) fn make(carried: &Socket, object: &str) -> Result<OwnedFd> {
    let state = carried.state();
    let kernel = |call: &'static str| {
        move |error: pageferry_tracee::Error| {
            Error::object(object, call, std::io::Error::other(error))
        }
    };
    let made = socket::create(carried.family, carried.r#type, carried.protocol)
        .map_err(kernel("socket"))?;
    let (before, after): (Vec<_>, Vec<_>) = carried
        .options
        .iter()
        .partition(|option| BEFORE_BIND.contains(&(option.level, option.name)));
    for option in before {
        socket::set_option(made.as_fd(), option.level, option.name, &option.value)
            .map_err(kernel("setsockopt"))?;
    }
    match state {
        State::Bound | State::Listening => {
            socket::bind_raw(made.as_fd(), &carried.local).map_err(kernel("bind"))?;
        }
        State::Unbound | State::Dropped => {}
        State::Paired | State::Waiting | State::Invalid => {
            return Err(Invalid::new(object, "is in no known state").into());
        }
    }
    for option in after {
        socket::set_option(made.as_fd(), option.level, option.name, &option.value)
            .map_err(kernel("setsockopt"))?;
    }
    if state == State::Listening {
        socket::listen(made.as_fd(), carried.backlog).map_err(kernel("listen"))?;
    }
    Ok(made)
}
