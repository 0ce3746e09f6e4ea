//! Connections between the two hosts: QUIC with TLS 1.3, both ends proved by pinned keys, frames on streams. Hides quinn and
//! rustls; must never hand out a link whose peer has not proved that it holds a trusted key, nor send in plain text.
//!
//! The source dials; each connection it makes has a socket of its own (one quinn endpoint is one receiving task). The target
//! has one socket for all.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use nix::sys::socket::{setsockopt, sockopt};
use pageferry_wire::message::{Abort, Hello, Role, Welcome};
use pageferry_wire::{ALPN, Decoder, Frame, Tag};
use quinn::congestion::CubicConfig;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{
    AckFrequencyConfig, ClientConfig, Connection, ConnectionError, Endpoint, EndpointConfig,
    Incoming, MtuDiscoveryConfig, ServerConfig, TransportConfig, VarInt,
};
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, ring, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::NoServerSessionStorage;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, SignatureScheme};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};

use crate::identity::{CERTIFICATE_NAME, Fingerprint, Identity, TrustSet};

/// How long a handshake, and after it the first frame, may take.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// [`silence_max`], unless a test has shortened it.
const SILENCE_MAX: Duration = Duration::from_secs(10);
/// Each end says that it lives when it has nothing else to say: so often in [`silence_max`], that one lost datagram is nothing.
const KEEP_ALIVES_PER_SILENCE: u32 = 5;

/// Largest UDP payload, bytes. quinn sends ten segments in one sendmsg(2): ten of these must stay below 65,507, else EMSGSIZE.
const UDP_PAYLOAD_MAX: u16 = 6500;
/// Kernel buffers of each socket, bytes, if they can be had: the default of 208 KiB loses datagrams at 0.3 GB/s.
const SOCKET_BUFFER_LEN: usize = 16 << 20;
/// Unread bytes a peer may have on its way to us, per stream and per connection.
const RECEIVE_WINDOW: u32 = 16 << 20;
/// Unacknowledged bytes we keep for a peer, per connection.
const SEND_WINDOW: u64 = 16 << 20;
/// The same where peers only ask: requests are small.
const RECEIVE_WINDOW_FRUGAL: u32 = 256 << 10;
/// And what is kept for a peer of which nothing is known yet, see [`Link::bound_unacknowledged`].
const SEND_WINDOW_FRUGAL: u64 = 1 << 20;
/// Streams a peer may have open at once, of each kind.
const STREAMS_MAX: u32 = 256;
/// The same where there are many peers, of streams that both speak on; there are no others. Each that may be opened takes memory.
const STREAMS_FRUGAL: u32 = 16;
/// First congestion window of control and bulk connections, bytes: state and eager pages lie in the freeze, and quinn paces
/// them over a round trip.
const INITIAL_WINDOW: u64 = 512 << 10;
/// First congestion window of the fault connection, bytes: many small replies at once.
const INITIAL_WINDOW_FAULTS: u64 = 256 << 10;
/// How long an acknowledgement may be held back on the fault connection. A lost reply is noticed that much later.
const ACK_DELAY_FAULTS: Duration = Duration::from_millis(1);
/// Handshakes in progress; more are refused until some of these end.
const HANDSHAKES_MAX: usize = 32;
/// Chunks taken from a stream under one lock.
const CHUNKS_PER_READ: usize = 32;

/// The code of an orderly end.
const CLOSE_DONE: u32 = 0;

/// So many looks in a row that find nothing new make a silence.
const SILENT_LOOKS: u32 = 8;

/// Silence after which a peer counts as lost, wherever a phase cannot wait: see [`Link::silent_for`]. Ten seconds, or what
/// `PAGEFERRY_SILENCE_MS` says: tests that kill the other end again and again wait it out each time. Both ends must agree.
pub fn silence_max() -> Duration {
    static SILENCE: OnceLock<Duration> = OnceLock::new();
    *SILENCE.get_or_init(|| {
        std::env::var("PAGEFERRY_SILENCE_MS")
            .ok()
            .and_then(|text| text.parse().ok())
            .map_or(SILENCE_MAX, |ms: u32| Duration::from_millis(u64::from(ms)))
    })
}

fn keep_alive() -> Duration {
    silence_max() / KEEP_ALIVES_PER_SILENCE
}

/// What can be wrong between two hosts. Each says what to do where something can be done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The local address cannot be used.
    #[error("cannot use {address} on this host")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// Why not.
        source: io::Error,
    },
    /// The peer is at the address and proved a key, but nobody said to trust it.
    #[error(
        "{address} has the key {seen}, which is not trusted here: add `{} {seen}` on this host if it is the right machine",
        side.option()
    )]
    UnknownPeer {
        /// Where it is.
        address: SocketAddr,
        /// Its key.
        seen: Fingerprint,
        /// What this host is.
        side: Side,
    },
    /// The peer showed a trusted certificate without holding its key.
    #[error(
        "{address} shows the certificate of {claimed} but does not hold its key: somebody stands between the hosts, or the key file was mixed up"
    )]
    Impostor {
        /// Where it is.
        address: SocketAddr,
        /// Whom it claims to be.
        claimed: Fingerprint,
    },
    /// The peer showed no certificate, or none that can be parsed.
    #[error("{address} did not prove who it is: only pageferry with an identity can connect")]
    NoIdentity {
        /// Where it is.
        address: SocketAddr,
    },
    /// The peer does not let this host in.
    #[error("{address} does not trust this host: add `{} {own}` there if this is the right machine", side.peer_option())]
    NotTrusted {
        /// Where it is.
        address: SocketAddr,
        /// Our key.
        own: Fingerprint,
        /// What this host is.
        side: Side,
    },
    /// The peer speaks QUIC, but not this protocol.
    #[error(
        "{address} does not speak {}: update pageferry on the older host",
        String::from_utf8_lossy(ALPN)
    )]
    OtherProtocol {
        /// Where it is.
        address: SocketAddr,
    },
    /// Nobody answers.
    #[error(
        "{address} does not answer within {} s: is `pageferry receive` running there, and does the firewall let UDP pass?",
        HANDSHAKE_TIMEOUT.as_secs()
    )]
    Unreachable {
        /// The address.
        address: SocketAddr,
    },
    /// The peer is there, but did not say the first word in time.
    #[error("{address} connected but did not greet within {} s", HANDSHAKE_TIMEOUT.as_secs())]
    Mute {
        /// Where it is.
        address: SocketAddr,
    },
    /// The connection could not be tried.
    #[error("cannot connect to {address}")]
    Connect {
        /// The address.
        address: SocketAddr,
        /// Why not.
        source: quinn::ConnectError,
    },
    /// The connection ended.
    #[error("the link to {address} is lost")]
    Lost {
        /// The peer.
        address: SocketAddr,
        /// How.
        source: ConnectionError,
    },
    /// The peer ended one stream, though not the connection.
    #[error("{address} gave up a stream with code {code}")]
    Stream {
        /// The peer.
        address: SocketAddr,
        /// The peer's reason, 0 if it has none.
        code: u64,
    },
    /// The peer ended the stream where a frame was expected.
    #[error("{address} ended the stream where a frame was expected")]
    Ended {
        /// The peer.
        address: SocketAddr,
    },
    /// The peer sent what is not the protocol.
    #[error("{address} sent what it must not")]
    Protocol {
        /// The peer.
        address: SocketAddr,
        /// What.
        source: pageferry_wire::Error,
    },
    /// The peer ended the migration instead of greeting.
    #[error("{address} declined: {}", abort.text)]
    Declined {
        /// The peer.
        address: SocketAddr,
        /// What it says.
        abort: Abort,
    },
    /// This host tried to send what the protocol does not allow: a mistake of its own.
    #[error("a message cannot be sent")]
    Unsendable {
        /// Why not.
        source: pageferry_wire::Error,
    },
    /// The TLS library cannot do what is needed.
    #[error("TLS cannot be set up")]
    Tls {
        /// Why not.
        source: rustls::Error,
    },
}

impl Error {
    /// True if the connection ended, by whatever cause: another one could be made.
    pub fn is_lost(&self) -> bool {
        matches!(self, Self::Lost { .. })
    }
}

/// What this host is to the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// It dials, and pins the target by `--peer`.
    Source,
    /// It listens, and lets sources in by `--trust`.
    Target,
}

impl Side {
    fn option(self) -> &'static str {
        match self {
            Self::Source => "--peer",
            Self::Target => "--trust",
        }
    }

    fn peer_option(self) -> &'static str {
        match self {
            Self::Source => Self::Target.option(),
            Self::Target => Self::Source.option(),
        }
    }
}

// ---- Keys ----

/// What the verifier of one handshake saw, for the error message.
#[derive(Debug, Clone, Copy)]
enum Seen {
    Nothing,
    Unparsable,
    Untrusted(Fingerprint),
    WithoutKey(Fingerprint),
    Trusted(Fingerprint),
}

/// Lets in who holds the private key of a trusted public key. One per handshake. Names, dates and signers in the certificate mean
/// nothing; the key is all.
struct Pinned {
    trust: TrustSet,
    algorithms: WebPkiSupportedAlgorithms,
    seen: Mutex<Seen>,
}

impl fmt::Debug for Pinned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pinned")
            .field("trust", &self.trust)
            .field("seen", &self.seen)
            .finish_non_exhaustive()
    }
}

impl Pinned {
    fn new(trust: &TrustSet, provider: &CryptoProvider) -> Arc<Self> {
        Arc::new(Self {
            trust: trust.clone(),
            algorithms: provider.signature_verification_algorithms,
            seen: Mutex::new(Seen::Nothing),
        })
    }

    fn seen(&self) -> Seen {
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn see(&self, seen: Seen) {
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = seen;
    }

    fn check_key(&self, certificate: &CertificateDer<'_>) -> Result<(), rustls::Error> {
        let Some(fingerprint) = Fingerprint::of_certificate(certificate) else {
            self.see(Seen::Unparsable);
            return Err(CertificateError::BadEncoding.into());
        };
        if !self.trust.contains(&fingerprint) {
            self.see(Seen::Untrusted(fingerprint));
            return Err(CertificateError::ApplicationVerificationFailure.into());
        }
        // Not yet: the key is proved by the signature that follows.
        self.see(Seen::WithoutKey(fingerprint));
        Ok(())
    }

    fn check_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let valid = verify_tls13_signature(message, certificate, signature, &self.algorithms)?;
        if let Seen::WithoutKey(fingerprint) = self.seen() {
            self.see(Seen::Trusted(fingerprint));
        }
        Ok(valid)
    }

    /// What a failed handshake with `address` comes to; `None` if keys have nothing to do with it.
    fn explain(&self, address: SocketAddr, side: Side) -> Option<Error> {
        match self.seen() {
            Seen::Untrusted(seen) => Some(Error::UnknownPeer {
                address,
                seen,
                side,
            }),
            Seen::WithoutKey(claimed) => Some(Error::Impostor { address, claimed }),
            Seen::Unparsable => Some(Error::NoIdentity { address }),
            Seen::Nothing | Seen::Trusted(_) => None,
        }
    }
}

/// TLS 1.2 is not even compiled in; rustls asks all the same.
fn no_tls12() -> rustls::Error {
    rustls::Error::General("TLS 1.2 is not spoken here".to_owned())
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.check_key(end_entity)
            .map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.check_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }
}

impl ClientCertVerifier for Pinned {
    fn offer_client_auth(&self) -> bool {
        true
    }

    fn client_auth_mandatory(&self) -> bool {
        true
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.check_key(end_entity)
            .map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.check_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }
}

/// What this host shows and signs with. That the two belong together was seen when the identity was read.
fn shown(identity: &Identity, provider: &CryptoProvider) -> Result<Arc<SingleCertAndKey>, Error> {
    let key = provider
        .key_provider
        .load_private_key(identity.key.clone_key())
        .map_err(|source| Error::Tls { source })?;
    Ok(Arc::new(
        CertifiedKey::new(vec![identity.certificate.clone()], key).into(),
    ))
}

/// TLS as the target speaks it. Sessions are never resumed: a resumed one would not look at the keys again.
fn server_tls(
    identity: &Identity,
    trust: &TrustSet,
) -> Result<(QuicServerConfig, Arc<Pinned>), Error> {
    let provider = Arc::new(ring::default_provider());
    let pinned = Pinned::new(trust, &provider);
    let shown = shown(identity, &provider)?;
    let mut tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|source| Error::Tls { source })?
        .with_client_cert_verifier(pinned.clone())
        .with_cert_resolver(shown);
    tls.alpn_protocols = vec![ALPN.to_vec()];
    tls.session_storage = Arc::new(NoServerSessionStorage {});
    tls.send_tls13_tickets = 0;
    let quic = QuicServerConfig::try_from(tls).expect("ring has the suite QUIC begins with");
    Ok((quic, pinned))
}

/// TLS as the source speaks it. `None` for the identity is a source without a certificate, which no target lets in.
fn client_tls(
    identity: Option<&Identity>,
    peers: &TrustSet,
) -> Result<(QuicClientConfig, Arc<Pinned>), Error> {
    let provider = Arc::new(ring::default_provider());
    let pinned = Pinned::new(peers, &provider);
    let shown = identity
        .map(|identity| shown(identity, &provider))
        .transpose()?;
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|source| Error::Tls { source })?
        .dangerous()
        .with_custom_certificate_verifier(pinned.clone());
    let mut tls = match shown {
        Some(shown) => builder.with_client_cert_resolver(shown),
        None => builder.with_no_client_auth(),
    };
    tls.alpn_protocols = vec![ALPN.to_vec()];
    tls.resumption = Resumption::disabled();
    let quic = QuicClientConfig::try_from(tls).expect("ring has the suite QUIC begins with");
    Ok((quic, pinned))
}

// ---- Sockets and QUIC ----

/// A socket with large buffers where they can be had: beyond the host's limit with CAP_NET_ADMIN, up to it without.
fn socket(address: SocketAddr) -> Result<UdpSocket, Error> {
    let socket = UdpSocket::bind(address).map_err(|source| Error::Bind { address, source })?;
    if setsockopt(&socket, sockopt::RcvBufForce, &SOCKET_BUFFER_LEN).is_err() {
        // Best effort: with small buffers the transfer is slower, not wrong.
        let _ = setsockopt(&socket, sockopt::RcvBuf, &SOCKET_BUFFER_LEN);
    }
    if setsockopt(&socket, sockopt::SndBufForce, &SOCKET_BUFFER_LEN).is_err() {
        let _ = setsockopt(&socket, sockopt::SndBuf, &SOCKET_BUFFER_LEN);
    }
    Ok(socket)
}

fn endpoint(address: SocketAddr) -> Result<Endpoint, Error> {
    let mut config = EndpointConfig::default();
    // The receiver's word: without it a peer never sends more than 1472 bytes, whatever its own settings.
    config
        .max_udp_payload_size(UDP_PAYLOAD_MAX)
        .expect("between 1200 and 65,527");
    let runtime = quinn::default_runtime().expect("called inside a tokio runtime");
    Endpoint::new(config, None, socket(address)?, runtime)
        .map_err(|source| Error::Bind { address, source })
}

/// What one connection may take: bytes on their way, and streams that the peer may open.
#[derive(Debug, Clone, Copy)]
struct Allowance {
    receive_window: u32,
    send_window: u64,
    streams_both_ways: u32,
    streams_one_way: u32,
}

const WIDE: Allowance = Allowance {
    receive_window: RECEIVE_WINDOW,
    send_window: SEND_WINDOW,
    streams_both_ways: STREAMS_MAX,
    streams_one_way: STREAMS_MAX,
};

const FRUGAL: Allowance = Allowance {
    receive_window: RECEIVE_WINDOW_FRUGAL,
    send_window: SEND_WINDOW_FRUGAL,
    streams_both_ways: STREAMS_FRUGAL,
    streams_one_way: 0,
};

/// `role` is `None` on the target, which does not know it before the hello.
fn transport(role: Option<Role>, allowance: Allowance) -> Arc<TransportConfig> {
    let mut mtu = MtuDiscoveryConfig::default();
    mtu.upper_bound(UDP_PAYLOAD_MAX);
    let mut congestion = CubicConfig::default();
    congestion.initial_window(if role == Some(Role::Faults) {
        INITIAL_WINDOW_FAULTS
    } else {
        INITIAL_WINDOW
    });
    let mut config = TransportConfig::default();
    config
        .mtu_discovery_config(Some(mtu))
        .congestion_controller_factory(Arc::new(congestion))
        .stream_receive_window(VarInt::from_u32(allowance.receive_window))
        .receive_window(VarInt::from_u32(allowance.receive_window))
        .send_window(allowance.send_window)
        .max_concurrent_bidi_streams(VarInt::from_u32(allowance.streams_both_ways))
        .max_concurrent_uni_streams(VarInt::from_u32(allowance.streams_one_way))
        .datagram_receive_buffer_size(None)
        .keep_alive_interval(Some(keep_alive()))
        // Silence alone never ends a connection: after COMMIT a page is waited for as long as it takes, and before it the
        // phases watch `silent_for`.
        .max_idle_timeout(None);
    if role != Some(Role::Bulk) {
        let mut acks = AckFrequencyConfig::default();
        acks.max_ack_delay(Some(ACK_DELAY_FAULTS));
        config.ack_frequency_config(Some(acks));
    }
    Arc::new(config)
}

/// The TLS alert (RFC 8446, 6) in a QUIC error code, if it is one (RFC 9001, 4.8).
fn tls_alert(error: &ConnectionError) -> Option<u8> {
    let code = match error {
        ConnectionError::TransportError(error) => u64::from(error.code),
        ConnectionError::ConnectionClosed(close) => u64::from(close.error_code),
        _ => return None,
    };
    (0x100..0x200)
        .contains(&code)
        .then_some((code & 0xff) as u8)
}

/// Alerts by which a peer says that it does not like our certificate: bad_certificate to certificate_unknown, unknown_ca,
/// access_denied, decrypt_error, certificate_required.
const CERTIFICATE_ALERTS: [u8; 9] = [42, 43, 44, 45, 46, 48, 49, 51, 116];
/// no_application_protocol.
const PROTOCOL_ALERT: u8 = 120;

/// What a host is on its links, for error messages.
#[derive(Debug, Clone, Copy)]
struct Place {
    address: SocketAddr,
    own: Fingerprint,
    side: Side,
}

impl Place {
    fn lost(self, source: ConnectionError) -> Error {
        let Self { address, own, side } = self;
        let by_peer = matches!(source, ConnectionError::ConnectionClosed(_));
        match tls_alert(&source) {
            Some(PROTOCOL_ALERT) => Error::OtherProtocol { address },
            Some(alert) if by_peer && CERTIFICATE_ALERTS.contains(&alert) => {
                Error::NotTrusted { address, own, side }
            }
            _ => Error::Lost { address, source },
        }
    }
}

// ---- Listening and dialling ----

/// The target's door.
#[derive(Debug)]
pub struct Listener {
    endpoint: Endpoint,
    identity: Identity,
    trust: TrustSet,
    allowance: Allowance,
    handshakes: JoinSet<Result<Link, Error>>,
}

impl Listener {
    /// Listens at `address` for hosts in `trust`. Must be called inside a tokio runtime.
    pub fn bind(address: SocketAddr, identity: &Identity, trust: &TrustSet) -> Result<Self, Error> {
        let endpoint = endpoint(address)?;
        let (tls, _) = server_tls(identity, trust)?;
        endpoint.set_server_config(Some(ServerConfig::with_crypto(Arc::new(tls))));
        Ok(Self {
            endpoint,
            identity: identity.clone(),
            trust: trust.clone(),
            allowance: WIDE,
            handshakes: JoinSet::new(),
        })
    }

    /// Gives each peer little room until [`Link::bound_unacknowledged`] says otherwise: there may be many.
    #[must_use]
    pub fn frugal(self) -> Self {
        Self {
            allowance: FRUGAL,
            ..self
        }
    }

    /// Where it listens: the port is known here when 0 was asked for.
    pub fn local_address(&self) -> SocketAddr {
        self.endpoint
            .local_addr()
            .expect("a bound socket has an address")
    }

    /// The next host that has proved itself, or why one has not: an error ends that attempt only, so report it and call again.
    /// `None` after [`Listener::close`]. May be dropped and called again without losing anybody.
    pub async fn accept(&mut self) -> Option<Result<Link, Error>> {
        loop {
            tokio::select! {
                Some(ended) = self.handshakes.join_next() => match ended {
                    Ok(result) => return Some(result),
                    Err(_) => tracing::debug!("a handshake was given up"),
                },
                incoming = self.endpoint.accept() => self.admit(incoming?),
            }
        }
    }

    /// Begins the handshake, with a verifier of its own so that a refusal can name the key it saw.
    fn admit(&mut self, incoming: Incoming) {
        if self.handshakes.len() >= HANDSHAKES_MAX {
            incoming.refuse();
            return;
        }
        let endpoint = self.endpoint.clone();
        let (identity, trust) = (self.identity.clone(), self.trust.clone());
        let allowance = self.allowance;
        self.handshakes.spawn(async move {
            let place = Place {
                address: incoming.remote_address(),
                own: identity.fingerprint(),
                side: Side::Target,
            };
            let (tls, pinned) = server_tls(&identity, &trust)?;
            let mut config = ServerConfig::with_crypto(Arc::new(tls));
            config.transport_config(transport(None, allowance));
            let explain = |source| {
                pinned
                    .explain(place.address, place.side)
                    .unwrap_or_else(|| refused(place, source))
            };
            let connecting = incoming.accept_with(Arc::new(config)).map_err(explain)?;
            let connection = timeout(HANDSHAKE_TIMEOUT, connecting)
                .await
                .map_err(|_| Error::Unreachable {
                    address: place.address,
                })?
                .map_err(explain)?;
            Link::new(connection, endpoint, place, &pinned)
        });
    }

    /// Lets nobody in any more and ends every link of this listener.
    pub fn close(&self) {
        self.endpoint.close(CLOSE_DONE.into(), b"");
    }

    /// Resolves when every link's end has reached its peer, or could not.
    pub async fn wait_idle(&self) {
        self.endpoint.wait_idle().await;
    }
}

/// What a failed handshake comes to on the target: without a certificate from the peer there is nothing to look at.
fn refused(place: Place, source: ConnectionError) -> Error {
    const CERTIFICATE_REQUIRED: u8 = 116;
    match tls_alert(&source) {
        Some(CERTIFICATE_REQUIRED) => Error::NoIdentity {
            address: place.address,
        },
        _ => place.lost(source),
    }
}

/// Connects to the target at `address`, whose key must be in `peers`, from `local` (`None`: any address and port). Each call
/// makes a socket of its own. Must be called inside a tokio runtime.
///
/// When this returns, the target has proved itself; that it lets *us* in is known only when it answers the first frame
/// ([`Link::greet`]), since TLS 1.3 lets a client speak first.
pub async fn dial(
    address: SocketAddr,
    identity: &Identity,
    peers: &TrustSet,
    role: Role,
    local: Option<SocketAddr>,
) -> Result<Link, Error> {
    dial_as(address, Some(identity), peers, role, local).await
}

async fn dial_as(
    address: SocketAddr,
    identity: Option<&Identity>,
    peers: &TrustSet,
    role: Role,
    local: Option<SocketAddr>,
) -> Result<Link, Error> {
    let any = match address {
        SocketAddr::V4(_) => SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0),
        SocketAddr::V6(_) => SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), 0),
    };
    let endpoint = endpoint(local.unwrap_or(any))?;
    let (tls, pinned) = client_tls(identity, peers)?;
    let mut config = ClientConfig::new(Arc::new(tls));
    config.transport_config(transport(Some(role), WIDE));
    let own = identity.map_or(Fingerprint::of_public_key(&[]), Identity::fingerprint);
    let place = Place {
        address,
        own,
        side: Side::Source,
    };
    let connecting = endpoint
        .connect_with(config, address, CERTIFICATE_NAME)
        .map_err(|source| Error::Connect { address, source })?;
    let connection = timeout(HANDSHAKE_TIMEOUT, connecting)
        .await
        .map_err(|_| Error::Unreachable { address })?
        .map_err(|source| {
            pinned
                .explain(address, Side::Source)
                .unwrap_or_else(|| place.lost(source))
        })?;
    Link::new(connection, endpoint, place, &pinned)
}

// ---- Links ----

/// One connection to a host that has proved itself. Cloning shares it; it ends when [`Link::close`] is called or the last clone
/// and stream are dropped.
#[derive(Debug, Clone)]
pub struct Link {
    connection: Connection,
    /// Keeps a dialled connection's socket alive.
    endpoint: Endpoint,
    place: Place,
    peer: Fingerprint,
}

impl Link {
    fn new(
        connection: Connection,
        endpoint: Endpoint,
        place: Place,
        pinned: &Pinned,
    ) -> Result<Self, Error> {
        // A handshake that ended well has passed both checks of the verifier; believe nothing else.
        let Seen::Trusted(peer) = pinned.seen() else {
            connection.close(CLOSE_DONE.into(), b"");
            return Err(Error::NoIdentity {
                address: place.address,
            });
        };
        Ok(Self {
            connection,
            endpoint,
            place,
            peer,
        })
    }

    /// The peer's proved key. Links of one migration must agree in it.
    pub fn peer(&self) -> Fingerprint {
        self.peer
    }

    /// Where the peer is.
    pub fn remote_address(&self) -> SocketAddr {
        self.connection.remote_address()
    }

    /// Where this end is: what a target sees, unless a NAT stands between.
    pub fn local_address(&self) -> SocketAddr {
        self.endpoint
            .local_addr()
            .expect("a bound socket has an address")
    }

    /// UDP payload bytes sent and received so far on this connection: the ledger's `wire_bytes`.
    pub fn udp_bytes(&self) -> u64 {
        let stats = self.connection.stats();
        stats.udp_tx.bytes + stats.udp_rx.bytes
    }

    /// Keeps so many unacknowledged bytes for the peer at most: [`FramedSend::send`] waits until there is room.
    pub fn bound_unacknowledged(&self, bytes: u64) {
        self.connection.set_send_window(bytes);
    }

    /// The current estimate of the round trip.
    pub fn rtt(&self) -> Duration {
        self.connection.rtt()
    }

    /// Source: opens a stream and greets. The answer proves that the target lets this host in.
    ///
    /// The stream goes on as the connection's first: on the control link it carries the session.
    pub async fn greet(&self, hello: Hello) -> Result<(Welcome, FramedSend, FramedRecv), Error> {
        let greeting = async {
            let (mut send, mut receive) = self.open().await?;
            send.send(hello).await?;
            match receive.expect().await? {
                Frame::Welcome(welcome) => Ok((welcome, send, receive)),
                Frame::Abort(abort) => Err(Error::Declined {
                    address: self.place.address,
                    abort,
                }),
                other => Err(self.out_of_order(other.tag())),
            }
        };
        timeout(HANDSHAKE_TIMEOUT, greeting)
            .await
            .map_err(|_| Error::Mute {
                address: self.place.address,
            })?
    }

    /// Target: waits for the source's first stream and its hello. Answer on the stream with a [`Welcome`] or an [`Abort`].
    pub async fn greeted(&self) -> Result<(Hello, FramedSend, FramedRecv), Error> {
        let greeting = async {
            let (send, mut receive) = self.accept().await?;
            match receive.expect().await? {
                Frame::Hello(hello) => Ok((hello, send, receive)),
                other => Err(self.out_of_order(other.tag())),
            }
        };
        timeout(HANDSHAKE_TIMEOUT, greeting)
            .await
            .map_err(|_| Error::Mute {
                address: self.place.address,
            })?
    }

    fn out_of_order(&self, tag: Tag) -> Error {
        let source = pageferry_wire::Error::Order {
            tag,
            phase: pageferry_wire::Phase::Hello,
        };
        Error::Protocol {
            address: self.place.address,
            source,
        }
    }

    /// Opens a stream that both ends speak on. The peer learns of it with the first frame.
    pub async fn open(&self) -> Result<(FramedSend, FramedRecv), Error> {
        let (send, receive) = self
            .connection
            .open_bi()
            .await
            .map_err(|source| self.place.lost(source))?;
        Ok((self.framed_send(send), self.framed_recv(receive)))
    }

    /// The next stream that the peer opened to speak on together.
    pub async fn accept(&self) -> Result<(FramedSend, FramedRecv), Error> {
        let (send, receive) = self
            .connection
            .accept_bi()
            .await
            .map_err(|source| self.place.lost(source))?;
        Ok((self.framed_send(send), self.framed_recv(receive)))
    }

    /// Opens a stream that only this end speaks on.
    pub async fn open_uni(&self) -> Result<FramedSend, Error> {
        let send = self
            .connection
            .open_uni()
            .await
            .map_err(|source| self.place.lost(source))?;
        Ok(self.framed_send(send))
    }

    /// The next stream that the peer opened to speak on alone.
    pub async fn accept_uni(&self) -> Result<FramedRecv, Error> {
        let receive = self
            .connection
            .accept_uni()
            .await
            .map_err(|source| self.place.lost(source))?;
        Ok(self.framed_recv(receive))
    }

    fn framed_send(&self, stream: quinn::SendStream) -> FramedSend {
        FramedSend {
            stream,
            place: self.place,
        }
    }

    fn framed_recv(&self, stream: quinn::RecvStream) -> FramedRecv {
        FramedRecv {
            stream,
            decoder: Decoder::new(),
            chunks: Default::default(),
            place: self.place,
        }
    }

    /// Resolves, with the reason, when the connection has ended.
    pub async fn closed(&self) -> Error {
        self.place.lost(self.connection.closed().await)
    }

    /// Resolves when no datagram has come for `silence` (or the connection has ended). A living peer is never silent for longer
    /// than a few seconds, so with [`silence_max`] this means: it, its host or the network is gone.
    pub async fn silent_for(&self, silence: Duration) -> Error {
        let heard = || self.connection.stats().udp_rx.datagrams;
        let (mut last, mut looks) = (heard(), 0);
        loop {
            let pause = Instant::now() + silence / SILENT_LOOKS;
            if let Ok(reason) = timeout_at(pause, self.connection.closed()).await {
                return self.place.lost(reason);
            }
            // Looks are counted, not time: this thread may have been kept from running for as long, and what came meanwhile waits
            // behind it.
            match heard() {
                datagrams if datagrams != last => (last, looks) = (datagrams, 0),
                _ => looks += 1,
            }
            if looks == SILENT_LOOKS {
                return self.place.lost(ConnectionError::TimedOut);
            }
        }
    }

    /// Ends the connection at once; what is still on its way may be lost. [`FramedSend::finish`] first where it matters.
    pub fn close(&self) {
        self.connection.close(CLOSE_DONE.into(), b"");
    }

    /// Source: ends the connection and waits until the peer knows or cannot be told. Only for a dialled link, whose endpoint is
    /// its own.
    pub async fn close_and_wait(self) {
        self.close();
        self.endpoint.wait_idle().await;
    }
}

/// The sending half of a stream.
#[derive(Debug)]
pub struct FramedSend {
    stream: quinn::SendStream,
    place: Place,
}

impl FramedSend {
    /// Sends one frame; page bytes and long bodies are not copied. Returns when quinn has taken it all, which it does not before
    /// there is room in the send window. If it is dropped before, the stream is of no use any more.
    pub async fn send(&mut self, frame: impl Into<Frame>) -> Result<(), Error> {
        let encoded = frame
            .into()
            .encode()
            .map_err(|source| Error::Unsendable { source })?;
        self.stream
            .write_all_chunks(&mut encoded.into_parts())
            .await
            .map_err(|error| self.failed(error))
    }

    /// Higher is sent first among the streams of one connection. 0 unless set.
    pub fn set_priority(&self, priority: i32) {
        // Fails only on a stream that has ended, where there is nothing left to order.
        let _ = self.stream.set_priority(priority);
    }

    /// Ends the stream and waits until the peer has acknowledged all of it.
    pub async fn finish(mut self) -> Result<(), Error> {
        // A stream that was stopped says so below.
        let _ = self.stream.finish();
        match self.stream.stopped().await {
            Ok(None) => Ok(()),
            Ok(Some(code)) => Err(Error::Stream {
                address: self.place.address,
                code: code.into_inner(),
            }),
            Err(quinn::StoppedError::ConnectionLost(source)) => Err(self.place.lost(source)),
            Err(quinn::StoppedError::ZeroRttRejected) => unreachable!("0-RTT is never used"),
        }
    }

    fn failed(&self, error: quinn::WriteError) -> Error {
        let address = self.place.address;
        match error {
            quinn::WriteError::Stopped(code) => Error::Stream {
                address,
                code: code.into_inner(),
            },
            quinn::WriteError::ConnectionLost(source) => self.place.lost(source),
            quinn::WriteError::ClosedStream => Error::Stream { address, code: 0 },
            quinn::WriteError::ZeroRttRejected => unreachable!("0-RTT is never used"),
        }
    }
}

/// The receiving half of a stream.
#[derive(Debug)]
pub struct FramedRecv {
    stream: quinn::RecvStream,
    decoder: Decoder,
    chunks: [Bytes; CHUNKS_PER_READ],
    place: Place,
}

impl FramedRecv {
    /// The next frame; `None` when the peer has ended the stream between frames. May be dropped and called again without losing
    /// anything.
    pub async fn recv(&mut self) -> Result<Option<Frame>, Error> {
        loop {
            if let Some(frame) = self
                .decoder
                .pull()
                .map_err(|source| self.protocol(source))?
            {
                return Ok(Some(frame));
            }
            let Some(count) = self
                .stream
                .read_chunks(&mut self.chunks)
                .await
                .map_err(|error| self.failed(error))?
            else {
                self.decoder
                    .finish()
                    .map_err(|source| self.protocol(source))?;
                return Ok(None);
            };
            for chunk in &mut self.chunks[..count] {
                self.decoder.push(chunk);
                // The datagram it came in is kept as long as any part of it.
                *chunk = Bytes::new();
            }
        }
    }

    /// The next frame, where the stream must not end.
    pub async fn expect(&mut self) -> Result<Frame, Error> {
        self.recv().await?.ok_or(Error::Ended {
            address: self.place.address,
        })
    }

    fn protocol(&self, source: pageferry_wire::Error) -> Error {
        Error::Protocol {
            address: self.place.address,
            source,
        }
    }

    fn failed(&self, error: quinn::ReadError) -> Error {
        let address = self.place.address;
        match error {
            quinn::ReadError::Reset(code) => Error::Stream {
                address,
                code: code.into_inner(),
            },
            quinn::ReadError::ConnectionLost(source) => self.place.lost(source),
            quinn::ReadError::ClosedStream => Error::Ended { address },
            quinn::ReadError::IllegalOrderedRead => unreachable!("streams are read in order only"),
            quinn::ReadError::ZeroRttRejected => unreachable!("0-RTT is never used"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry_image::page::PAGE_LEN;
    use pageferry_wire::PageBatchBuilder;
    use pageferry_wire::message::{AbortCode, Commit, Fetch, State};

    const LOOPBACK: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

    fn run(test: impl Future<Output = ()>) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        runtime.block_on(async {
            timeout(Duration::from_secs(60), test)
                .await
                .expect("in time")
        });
    }

    fn trusting(identities: &[&Identity]) -> TrustSet {
        identities
            .iter()
            .map(|identity| identity.fingerprint())
            .collect()
    }

    fn hello(role: Role) -> Hello {
        Hello::new([7; 16], role, "alpha")
    }

    /// Both ends of a link that has been greeted on, with its first stream.
    async fn joined(role: Role) -> (Listener, Link, Link, [(FramedSend, FramedRecv); 2]) {
        let (source, target) = (Identity::ephemeral(), Identity::ephemeral());
        let mut listener = Listener::bind(LOOPBACK, &target, &trusting(&[&source])).expect("bound");
        let address = listener.local_address();
        let dialling = async {
            let link = dial(address, &source, &trusting(&[&target]), role, None)
                .await
                .expect("trusted");
            let (welcome, send, receive) = link.greet(hello(role)).await.expect("greeted");
            assert_eq!(welcome.host_name, "beta");
            (link, (send, receive))
        };
        let accepting = async {
            let link = listener.accept().await.expect("open").expect("trusted");
            let (hello, mut send, receive) = link.greeted().await.expect("greeted");
            assert_eq!((hello.role(), hello.id()), (role, [7; 16]));
            send.send(Welcome {
                version: 1,
                host_name: "beta".into(),
            })
            .await
            .expect("sent");
            (link, (send, receive))
        };
        let ((dialled, first), (accepted, second)) = tokio::join!(dialling, accepting);
        assert_eq!(
            (dialled.peer(), accepted.peer()),
            (target.fingerprint(), source.fingerprint())
        );
        (listener, dialled, accepted, [first, second])
    }

    /// What both ends see of a handshake, and of the first frame where it comes to that.
    async fn meet(
        source: Option<&Identity>,
        peers: &TrustSet,
        target: &Identity,
        trust: &TrustSet,
    ) -> (Result<(), Error>, Result<(), Error>) {
        let mut listener = Listener::bind(LOOPBACK, target, trust).expect("bound");
        let address = listener.local_address();
        let dialling = async {
            let link = dial_as(address, source, peers, Role::Control, None).await?;
            link.greet(hello(Role::Control)).await.map(drop)
        };
        let accepting = async {
            let link = listener.accept().await.expect("open")?;
            let (_, mut send, _receive) = link.greeted().await?;
            send.send(Welcome {
                version: 1,
                host_name: "beta".into(),
            })
            .await?;
            link.closed().await;
            Ok(())
        };
        tokio::join!(dialling, accepting)
    }

    #[test]
    fn hosts_that_trust_each_other_meet() {
        run(async {
            let (source, target) = (Identity::ephemeral(), Identity::ephemeral());
            let ends = meet(
                Some(&source),
                &trusting(&[&target]),
                &target,
                &trusting(&[&source]),
            )
            .await;
            assert!(matches!(ends, (Ok(()), Ok(()))), "{ends:?}");
        });
    }

    #[test]
    fn a_target_that_is_not_pinned_is_refused_and_its_key_is_shown() {
        run(async {
            let (source, target, other) = (
                Identity::ephemeral(),
                Identity::ephemeral(),
                Identity::ephemeral(),
            );
            let (here, there) = meet(
                Some(&source),
                &trusting(&[&other]),
                &target,
                &trusting(&[&source]),
            )
            .await;
            let here = here.expect_err("not pinned");
            assert!(
                matches!(here, Error::UnknownPeer { seen, .. } if seen == target.fingerprint()),
                "{here:?}"
            );
            assert!(
                here.to_string()
                    .contains(&format!("add `--peer {}`", target.fingerprint())),
                "{here}"
            );
            let there = there.expect_err("it is told");
            assert!(
                there
                    .to_string()
                    .contains(&format!("add `--peer {}` there", target.fingerprint())),
                "{there}"
            );
            // Nobody is trusted by an empty set.
            let (here, _) = meet(
                Some(&source),
                &TrustSet::default(),
                &target,
                &trusting(&[&source]),
            )
            .await;
            assert!(matches!(here, Err(Error::UnknownPeer { .. })), "{here:?}");
        });
    }

    #[test]
    fn a_source_that_is_not_trusted_is_refused_and_its_key_is_shown() {
        run(async {
            let (source, target, other) = (
                Identity::ephemeral(),
                Identity::ephemeral(),
                Identity::ephemeral(),
            );
            let (here, there) = meet(
                Some(&source),
                &trusting(&[&target]),
                &target,
                &trusting(&[&other]),
            )
            .await;
            let there = there.expect_err("not trusted");
            assert!(
                matches!(there, Error::UnknownPeer { seen, .. } if seen == source.fingerprint()),
                "{there:?}"
            );
            assert!(
                there
                    .to_string()
                    .contains(&format!("add `--trust {}`", source.fingerprint())),
                "{there}"
            );
            let here = here.expect_err("it is told");
            assert!(
                matches!(here, Error::NotTrusted { own, .. } if own == source.fingerprint()),
                "{here:?}"
            );
            assert!(
                here.to_string()
                    .contains(&format!("add `--trust {}` there", source.fingerprint())),
                "{here}"
            );
        });
    }

    #[test]
    fn a_pinned_certificate_with_another_key_is_refused_both_ways() {
        run(async {
            let (source, target) = (Identity::ephemeral(), Identity::ephemeral());
            let (peers, trust) = (trusting(&[&target]), trusting(&[&source]));
            let impostor = Identity::ephemeral().with_certificate_of(&target);
            let (here, there) = meet(Some(&source), &peers, &impostor, &trust).await;
            assert!(
                matches!(here, Err(Error::Impostor { claimed, .. }) if claimed == target.fingerprint()),
                "{here:?}"
            );
            assert!(there.is_err());
            let impostor = Identity::ephemeral().with_certificate_of(&source);
            let (here, there) = meet(Some(&impostor), &peers, &target, &trust).await;
            assert!(
                matches!(there, Err(Error::Impostor { claimed, .. }) if claimed == source.fingerprint()),
                "{there:?}"
            );
            assert!(here.is_err());
        });
    }

    #[test]
    fn a_source_without_a_certificate_is_refused() {
        run(async {
            let (source, target) = (Identity::ephemeral(), Identity::ephemeral());
            let (here, there) =
                meet(None, &trusting(&[&target]), &target, &trusting(&[&source])).await;
            assert!(matches!(there, Err(Error::NoIdentity { .. })), "{there:?}");
            assert!(matches!(here, Err(Error::NotTrusted { .. })), "{here:?}");
        });
    }

    #[test]
    fn a_refused_stranger_does_not_keep_the_next_host_out() {
        run(async {
            let (source, target, stranger) = (
                Identity::ephemeral(),
                Identity::ephemeral(),
                Identity::ephemeral(),
            );
            let mut listener =
                Listener::bind(LOOPBACK, &target, &trusting(&[&source])).expect("bound");
            let (address, peers) = (listener.local_address(), trusting(&[&target]));
            let accepting = async {
                let (first, second) = (
                    listener.accept().await.expect("open"),
                    listener.accept().await.expect("open"),
                );
                [first, second]
                    .into_iter()
                    .filter_map(Result::ok)
                    .map(|link| link.peer())
                    .collect::<Vec<_>>()
            };
            let (let_in, _, _link) = tokio::join!(
                accepting,
                dial(address, &stranger, &peers, Role::Control, None),
                dial(address, &source, &peers, Role::Control, None),
            );
            assert_eq!(let_in, [source.fingerprint()]);
        });
    }

    #[test]
    fn frames_go_there_and_back_and_streams_end() {
        run(async {
            let (_listener, dialled, accepted, [(mut send, mut receive), (mut reply, mut heard)]) =
                joined(Role::Faults).await;
            let fetch = Fetch {
                request: 5,
                address: 0x7000,
                page_count: 2,
                object: 1,
            };
            reply.send(fetch).await.expect("sent");
            assert_eq!(receive.expect().await.expect("came"), Frame::Fetch(fetch));
            let mut builder = PageBatchBuilder::new(1, 5, 0x7000, 2);
            builder.data(2).fill(9);
            send.send(builder.finish()).await.expect("sent");
            let Frame::Pages(batch) = heard.expect().await.expect("came") else {
                panic!("pages")
            };
            assert_eq!(
                batch.verify_run(&batch.runs()[0]).expect("good"),
                vec![9; 2 * PAGE_LEN]
            );
            let (ended, rest) = tokio::join!(send.finish(), heard.recv());
            ended.expect("acknowledged");
            assert_eq!(rest.expect("an orderly end"), None);
            // A stream that only one end speaks on, and a body too long to be copied.
            let mut bulk = dialled.open_uni().await.expect("opened");
            bulk.send(State {
                tree: vec![4; 1 << 20].into(),
            })
            .await
            .expect("sent");
            bulk.send(Commit {}).await.expect("sent");
            let mut heard = accepted.accept_uni().await.expect("came");
            assert!(
                matches!(heard.expect().await, Ok(Frame::State(state)) if state.tree.len() == 1 << 20)
            );
            let (ended, commit) = tokio::join!(bulk.finish(), heard.recv());
            ended.expect("acknowledged");
            assert_eq!(commit.expect("came"), Some(Frame::Commit(Commit {})));
            dialled.close();
            assert!(accepted.closed().await.is_lost());
        });
    }

    #[test]
    fn a_target_that_declines_is_quoted() {
        run(async {
            let (source, target) = (Identity::ephemeral(), Identity::ephemeral());
            let mut listener =
                Listener::bind(LOOPBACK, &target, &trusting(&[&source])).expect("bound");
            let address = listener.local_address();
            let accepting = async {
                let link = listener.accept().await.expect("open").expect("trusted");
                let (_, mut send, _receive) = link.greeted().await.expect("greeted");
                let abort = Abort::new(
                    pageferry_wire::Phase::Hello,
                    AbortCode::Busy,
                    "another migration is under way",
                );
                send.send(abort).await.expect("sent");
                link.closed().await;
            };
            let dialling = async {
                let link = dial(address, &source, &trusting(&[&target]), Role::Control, None)
                    .await
                    .expect("trusted");
                let declined = link.greet(hello(Role::Control)).await.expect_err("busy");
                link.close_and_wait().await;
                declined
            };
            let ((), declined) = tokio::join!(accepting, dialling);
            assert!(
                declined
                    .to_string()
                    .ends_with("declined: another migration is under way"),
                "{declined}"
            );
        });
    }

    #[test]
    fn bytes_that_are_no_frame_are_an_error_of_the_peer() {
        run(async {
            let (_listener, dialled, accepted, _first) = joined(Role::Control).await;
            let mut raw = dialled.connection.open_uni().await.expect("opened");
            raw.write_all(b"GET / HTTP/1.1\r\n\r\n")
                .await
                .expect("sent");
            let mut heard = accepted.accept_uni().await.expect("came");
            assert!(matches!(heard.recv().await, Err(Error::Protocol { .. })));
            let mut raw = dialled.connection.open_uni().await.expect("opened");
            raw.write_all(&[9, 0, 0]).await.expect("sent");
            raw.finish().expect("open");
            let mut heard = accepted.accept_uni().await.expect("came");
            let cut = pageferry_wire::Error::Truncated { missing: 9 };
            assert!(
                matches!(heard.recv().await, Err(Error::Protocol { source, .. }) if source.to_string() == cut.to_string())
            );
        });
    }

    #[test]
    fn bulk_is_carried_whole_in_large_datagrams_and_counted() {
        run(async {
            const BATCHES: u64 = 64;
            let (_listener, dialled, accepted, _first) = joined(Role::Bulk).await;
            let batch = {
                let mut builder = PageBatchBuilder::new(1, 0, 0x1000_0000, 256);
                builder.data(256).fill(0xa5);
                builder.finish()
            };
            let sending = async {
                let mut bulk = dialled.open_uni().await.expect("opened");
                for _ in 0..BATCHES {
                    bulk.send(batch.clone()).await.expect("sent");
                }
                bulk.finish().await.expect("acknowledged");
            };
            let receiving = async {
                let mut heard = accepted.accept_uni().await.expect("came");
                let mut count = 0;
                while let Some(frame) = heard.recv().await.expect("good frames") {
                    let Frame::Pages(batch) = frame else {
                        panic!("pages")
                    };
                    batch.verify_run(&batch.runs()[0]).expect("good pages");
                    count += 1;
                }
                count
            };
            let began = Instant::now();
            let ((), count) = tokio::join!(sending, receiving);
            let elapsed = began.elapsed();
            assert_eq!(count, BATCHES);
            let carried = BATCHES << 20;
            println!(
                "{:.2} GB/s, mtu {}",
                carried as f64 / elapsed.as_secs_f64() / 1e9,
                dialled.connection.stats().path.current_mtu
            );
            for link in [&dialled, &accepted] {
                assert!(
                    (carried..carried + carried / 4).contains(&link.udp_bytes()),
                    "{}",
                    link.udp_bytes()
                );
            }
            assert!(
                dialled.connection.stats().path.current_mtu > 4000,
                "the loopback carries more than Ethernet does"
            );
        });
    }

    #[test]
    fn a_living_peer_is_never_silent_and_a_vanished_one_is() {
        let (source, target) = (Identity::ephemeral(), Identity::ephemeral());
        let (trust, peers) = (trusting(&[&source]), trusting(&[&target]));
        let (told, address) = std::sync::mpsc::channel();
        let (vanish, vanished) = tokio::sync::oneshot::channel::<()>();
        // A host of its own: its runtime, once dropped, sends nothing more, not even a farewell.
        let host = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime");
            let alive = runtime.block_on(async {
                let mut listener = Listener::bind(LOOPBACK, &target, &trust).expect("bound");
                told.send(listener.local_address()).expect("awaited");
                let link = listener.accept().await.expect("open").expect("trusted");
                vanished.await.expect("told to");
                (listener, link)
            });
            drop(runtime);
            drop(alive);
        });
        let address = address.recv().expect("told");
        run(async {
            let link = dial(address, &source, &peers, Role::Control, None)
                .await
                .expect("trusted");
            let silence = keep_alive() + Duration::from_millis(500);
            assert!(
                timeout(silence * 2, link.silent_for(silence))
                    .await
                    .is_err(),
                "it lives"
            );
            vanish.send(()).expect("awaited");
            let lost = timeout(silence * 2, link.silent_for(silence))
                .await
                .expect("it is gone");
            assert!(
                matches!(
                    lost,
                    Error::Lost {
                        source: ConnectionError::TimedOut,
                        ..
                    }
                ),
                "{lost:?}"
            );
        });
        host.join().expect("it ended");
    }
}
