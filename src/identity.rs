//! Who this host is and whom it trusts: an Ed25519 key made on first use, fingerprints, and names for other hosts'
//! fingerprints. The private key must never leave its file, and an existing key must never be replaced.

use crate::cli::{Common, IdentityArgs};
use crate::{exit, report};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::ParsedCertificate;
use sha2::{Digest as _, Sha256};

/// Where a host keeps its key unless told otherwise (`--identity DIR`).
pub const DIRECTORY: &str = "/etc/pageferry/identity";
/// Where names of other hosts stand.
pub const PEERS: &str = "/etc/pageferry/peers.toml";

/// The one file in the directory: private key (PKCS #8) and certificate, both PEM, mode 0600. One file, so that they can never
/// be out of step.
const FILE: &str = "identity.pem";
/// The name in every certificate. It means nothing: hosts know each other by key.
pub(crate) const CERTIFICATE_NAME: &str = "pageferry";

/// What can be wrong with an identity or a list of peers.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read or made.
    #[error("{what} {}", path.display())]
    File {
        /// `read`, `create`…
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Others could read the private key.
    #[error("{} holds a private key but has mode {mode:04o}: run `chmod 600 {}` if nobody else can have read it, else make a new one", path.display(), path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The file is there and does not hold an identity.
    #[error("{} holds no usable identity ({what}): restore it from a backup, or remove it for a new key and give its new fingerprint to the peers", path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: &'static str,
    },
    /// The certificate could not be made.
    #[error("a key and its certificate could not be made")]
    Make {
        /// Why not.
        source: rcgen::Error,
    },
    /// A text that is no fingerprint and no name of the peers file.
    #[error("`{text}` is neither a fingerprint (SHA256: and 43 letters, as `pageferry identity` prints it) nor a name in {}", peers.display())]
    UnknownName {
        /// The text.
        text: String,
        /// The file that was looked in.
        peers: PathBuf,
    },
    /// The peers file is not what it should be.
    #[error("{} is not a table `[peers]` of name = \"SHA256:…\" lines", path.display())]
    Peers {
        /// The file.
        path: PathBuf,
        /// What the parser says.
        source: toml::de::Error,
    },
    /// The peers file has a line that is no fingerprint.
    #[error("{}: {name}", path.display())]
    PeersFingerprint {
        /// The file.
        path: PathBuf,
        /// The name on the line.
        name: String,
        /// What is wrong.
        source: NotAFingerprint,
    },
}

/// The name of a public key: the SHA-256 of its DER-encoded SubjectPublicKeyInfo (RFC 5280, 4.1.2.7; outer SEQUENCE included),
/// written `SHA256:` and 43 letters of base64 without padding. What `openssl x509 -in identity.pem -noout -pubkey | openssl pkey
/// -pubin -outform der | openssl dgst -sha256 -binary | base64` prints, but for the trailing `=`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fingerprint([u8; 32]);

impl Fingerprint {
    /// Of a DER-encoded SubjectPublicKeyInfo.
    pub fn of_public_key(spki: &[u8]) -> Self {
        Self(Sha256::digest(spki).into())
    }

    /// Of the key in a certificate; `None` if it cannot be parsed.
    pub fn of_certificate(certificate: &CertificateDer<'_>) -> Option<Self> {
        let parsed = ParsedCertificate::try_from(certificate).ok()?;
        Some(Self::of_public_key(
            parsed.subject_public_key_info().as_ref(),
        ))
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SHA256:{}", STANDARD_NO_PAD.encode(self.0))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text is no fingerprint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{text}` is no fingerprint: `SHA256:` and 43 letters of base64 are expected, as `pageferry identity` prints it"
)]
pub struct NotAFingerprint {
    /// The text.
    pub text: String,
}

impl FromStr for Fingerprint {
    type Err = NotAFingerprint;

    fn from_str(text: &str) -> Result<Self, NotAFingerprint> {
        text.strip_prefix("SHA256:")
            .and_then(|letters| STANDARD_NO_PAD.decode(letters).ok())
            .and_then(|bytes| bytes.try_into().ok())
            .map(Self)
            .ok_or_else(|| NotAFingerprint {
                text: text.to_owned(),
            })
    }
}

/// The keys a host lets in. Empty trusts nobody.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TrustSet(BTreeSet<Fingerprint>);

impl TrustSet {
    /// True if this key is in it.
    pub fn contains(&self, fingerprint: &Fingerprint) -> bool {
        self.0.contains(fingerprint)
    }

    /// True if nobody is trusted.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The keys, in order.
    pub fn iter(&self) -> impl Iterator<Item = &Fingerprint> {
        self.0.iter()
    }
}

impl FromIterator<Fingerprint> for TrustSet {
    fn from_iter<I: IntoIterator<Item = Fingerprint>>(fingerprints: I) -> Self {
        Self(fingerprints.into_iter().collect())
    }
}

/// Names for fingerprints, from the peers file:
///
/// ```toml
/// [peers]
/// beta = "SHA256:…"
/// gamma = ["SHA256:…", "SHA256:…"]    # the old key and the new one
/// ```
#[derive(Debug, Clone, Default)]
pub struct Peers {
    path: PathBuf,
    names: BTreeMap<String, Vec<Fingerprint>>,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct PeersFile {
    #[serde(default)]
    peers: BTreeMap<String, OneOrMore>,
}

#[derive(serde::Deserialize)]
#[serde(untagged)]
enum OneOrMore {
    One(String),
    More(Vec<String>),
}

impl Peers {
    /// Reads the file at `path`; one that does not exist names nobody.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            Err(source) => {
                return Err(Error::File {
                    what: "read",
                    path: path.to_owned(),
                    source,
                });
            }
        };
        let file: PeersFile = toml::from_str(&text).map_err(|source| Error::Peers {
            path: path.to_owned(),
            source,
        })?;
        let mut names = BTreeMap::new();
        for (name, entries) in file.peers {
            let entries = match entries {
                OneOrMore::One(entry) => vec![entry],
                OneOrMore::More(entries) => entries,
            };
            let fingerprints = entries
                .iter()
                .map(|entry| entry.parse())
                .collect::<Result<Vec<_>, _>>()
                .map_err(|source| Error::PeersFingerprint {
                    path: path.to_owned(),
                    name: name.clone(),
                    source,
                })?;
            names.insert(name, fingerprints);
        }
        Ok(Self {
            path: path.to_owned(),
            names,
        })
    }

    /// The keys that all of `texts` stand for: each is a fingerprint, or a name of the file.
    pub fn resolve<'a>(&self, texts: impl IntoIterator<Item = &'a str>) -> Result<TrustSet, Error> {
        let mut set = BTreeSet::new();
        for text in texts {
            if let Ok(fingerprint) = text.parse() {
                set.insert(fingerprint);
            } else if let Some(fingerprints) = self.names.get(text) {
                set.extend(fingerprints);
            } else {
                return Err(Error::UnknownName {
                    text: text.to_owned(),
                    peers: self.path.clone(),
                });
            }
        }
        Ok(TrustSet(set))
    }

    /// The name a key has in the file.
    pub fn name_of(&self, fingerprint: &Fingerprint) -> Option<&str> {
        self.names
            .iter()
            .find(|(_, keys)| keys.contains(fingerprint))
            .map(|(name, _)| name.as_str())
    }
}

/// This host's key and certificate.
pub struct Identity {
    pub(crate) certificate: CertificateDer<'static>,
    pub(crate) key: PrivateKeyDer<'static>,
    fingerprint: Fingerprint,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Identity")
            .field(&self.fingerprint)
            .finish_non_exhaustive()
    }
}

impl Clone for Identity {
    fn clone(&self) -> Self {
        Self {
            certificate: self.certificate.clone(),
            key: self.key.clone_key(),
            fingerprint: self.fingerprint,
        }
    }
}

impl Identity {
    /// The identity kept in `directory`, made there if there is none. Two first uses at once end with the same key.
    pub fn open(directory: &Path) -> Result<Self, Error> {
        let path = directory.join(FILE);
        if !path.try_exists().map_err(|source| Error::File {
            what: "look for",
            path: path.clone(),
            source,
        })? {
            create(directory, &path)?;
        }
        Self::load(&path)
    }

    /// The identity in `directory`, and the keys that `texts` stand for, as [`Peers::resolve`] takes them with [`PEERS`].
    ///
    /// # Errors
    /// Whichever of the two cannot be had.
    pub fn open_with_peers(directory: &Path, texts: &[String]) -> Result<(Self, TrustSet), Error> {
        let identity = Self::open(directory)?;
        let peers = Peers::load(PEERS.as_ref())?;
        Ok((identity, peers.resolve(texts.iter().map(String::as_str))?))
    }

    /// What peers are told to trust.
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    fn load(path: &Path) -> Result<Self, Error> {
        let file = |what| {
            move |source| Error::File {
                what,
                path: path.to_owned(),
                source,
            }
        };
        let mode = fs::metadata(path)
            .map_err(file("examine"))?
            .permissions()
            .mode()
            & 0o7777;
        if mode & 0o077 != 0 {
            return Err(Error::Exposed {
                path: path.to_owned(),
                mode,
            });
        }
        let text = fs::read(path).map_err(file("read"))?;
        let unusable = |what| Error::Unusable {
            path: path.to_owned(),
            what,
        };
        let key = PrivatePkcs8KeyDer::from_pem_slice(&text)
            .map_err(|_| unusable("no PKCS #8 private key"))?;
        let certificate =
            CertificateDer::from_pem_slice(&text).map_err(|_| unusable("no certificate"))?;
        let pair = rcgen::KeyPair::from_pkcs8_der_and_sign_algo(&key, &rcgen::PKCS_ED25519)
            .map_err(|_| unusable("the private key is not an Ed25519 key"))?;
        let fingerprint = Fingerprint::of_certificate(&certificate)
            .ok_or_else(|| unusable("the certificate cannot be parsed"))?;
        if fingerprint != of_key_pair(&pair) {
            return Err(unusable("the certificate is another key's"));
        }
        Ok(Self {
            certificate,
            key: key.into(),
            fingerprint,
        })
    }
}

fn of_key_pair(pair: &rcgen::KeyPair) -> Fingerprint {
    Fingerprint::of_public_key(&rcgen::PublicKeyData::subject_public_key_info(pair))
}

fn make() -> Result<(rcgen::KeyPair, rcgen::Certificate), rcgen::Error> {
    let pair = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519)?;
    let certificate =
        rcgen::CertificateParams::new([CERTIFICATE_NAME.to_owned()])?.self_signed(&pair)?;
    Ok((pair, certificate))
}

/// Makes the file by writing another and linking it to its name: link(2), unlike rename(2), never replaces.
fn create(directory: &Path, path: &Path) -> Result<(), Error> {
    let (pair, certificate) = make().map_err(|source| Error::Make { source })?;
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .map_err(|source| Error::File {
            what: "create",
            path: directory.to_owned(),
            source,
        })?;
    let temporary = directory.join(format!(".{FILE}.{}", std::process::id()));
    let file = |what| {
        let path = temporary.clone();
        move |source| Error::File { what, path, source }
    };
    // One left behind by a crash of a process with our id, before anyone can have known its fingerprint.
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(file("remove")(error)),
        _ => {}
    }
    let mut written = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&temporary)
        .map_err(file("create"))?;
    let linked = written
        .write_all(pair.serialize_pem().as_bytes())
        .and_then(|()| written.write_all(certificate.pem().as_bytes()))
        .and_then(|()| written.sync_all())
        .and_then(|()| match fs::hard_link(&temporary, path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            other => other,
        })
        .map_err(file("write"));
    fs::remove_file(&temporary).map_err(file("remove"))?;
    linked?;
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(|source| Error::File {
            what: "sync",
            path: directory.to_owned(),
            source,
        })
}

/// `pageferry identity`: prints this host's fingerprint, alone, on stdout; makes the key on first use.
pub fn run(args: &IdentityArgs, common: &Common) -> u8 {
    match Identity::open(&args.identity) {
        Ok(identity) if common.json => println!(
            "{{\"type\":\"identity\",\"data\":{{\"fingerprint\":\"{}\"}}}}",
            identity.fingerprint()
        ),
        Ok(identity) => println!("{}", identity.fingerprint()),
        Err(error) => {
            eprintln!("pageferry: {}", report::chain(&error));
            return exit::FAILED;
        }
    }
    exit::DONE
}

#[cfg(test)]
impl Identity {
    /// A new identity that is nowhere on disk.
    pub(crate) fn ephemeral() -> Self {
        let (pair, certificate) = make().expect("a key can be made");
        let fingerprint = of_key_pair(&pair);
        let key = PrivatePkcs8KeyDer::from(pair.serialize_der()).into();
        Self {
            certificate: certificate.der().clone(),
            key,
            fingerprint,
        }
    }

    /// Someone who has copied a certificate but not its key.
    pub(crate) fn with_certificate_of(self, other: &Self) -> Self {
        Self {
            certificate: other.certificate.clone(),
            key: self.key,
            fingerprint: other.fingerprint,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_identity_is_made_once_and_kept() {
        let parent = tempfile::tempdir().expect("a folder");
        let directory = parent.path().join("pageferry/identity");
        let first = Identity::open(&directory).expect("made");
        let mode = |path: &Path| {
            fs::metadata(path)
                .expect("it is there")
                .permissions()
                .mode()
                & 0o7777
        };
        assert_eq!(mode(&directory), 0o700);
        assert_eq!(mode(&directory.join(FILE)), 0o600);
        assert_eq!(
            fs::read_dir(&directory).expect("readable").count(),
            1,
            "nothing temporary is left"
        );
        let second = Identity::open(&directory).expect("read");
        assert_eq!(first.fingerprint(), second.fingerprint());
        assert_eq!(first.certificate, second.certificate);
    }

    #[test]
    fn first_uses_at_once_end_with_one_key() {
        let directory = tempfile::tempdir().expect("a folder");
        let make = |name: &str| {
            // What a second process does: the same, but for its temporary name.
            let (pair, certificate) = make().expect("a key can be made");
            let temporary = directory.path().join(name);
            fs::write(&temporary, pair.serialize_pem() + &certificate.pem()).expect("writable");
            fs::set_permissions(&temporary, fs::Permissions::from_mode(0o600)).expect("ours");
            fs::hard_link(&temporary, directory.path().join(FILE))
        };
        make("a").expect("the first is linked");
        let first = Identity::open(directory.path())
            .expect("read")
            .fingerprint();
        assert_eq!(
            make("b").expect_err("never replaced").kind(),
            io::ErrorKind::AlreadyExists
        );
        create(directory.path(), &directory.path().join(FILE))
            .expect("that the other was first is no error");
        assert_eq!(
            Identity::open(directory.path())
                .expect("read")
                .fingerprint(),
            first
        );
    }

    #[test]
    fn a_key_that_others_can_read_is_refused() {
        let directory = tempfile::tempdir().expect("a folder");
        Identity::open(directory.path()).expect("made");
        fs::set_permissions(
            directory.path().join(FILE),
            fs::Permissions::from_mode(0o640),
        )
        .expect("ours");
        assert!(matches!(
            Identity::open(directory.path()),
            Err(Error::Exposed { mode: 0o640, .. })
        ));
    }

    #[test]
    fn a_certificate_of_another_key_is_refused() {
        let directory = tempfile::tempdir().expect("a folder");
        let ((pair, _), (_, certificate)) = (make().expect("a key"), make().expect("a key"));
        let path = directory.path().join(FILE);
        fs::write(&path, pair.serialize_pem() + &certificate.pem()).expect("writable");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("ours");
        assert!(matches!(
            Identity::open(directory.path()),
            Err(Error::Unusable { .. })
        ));
        fs::write(&path, "nothing").expect("writable");
        assert!(matches!(
            Identity::open(directory.path()),
            Err(Error::Unusable { .. })
        ));
    }

    #[test]
    fn fingerprints_are_written_as_they_are_read() {
        let fingerprint = Fingerprint::of_public_key(b"");
        let text = fingerprint.to_string();
        assert_eq!(text, "SHA256:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU");
        assert_eq!(text.parse(), Ok(fingerprint));
        let (pair, certificate) = make().expect("a key");
        assert_eq!(
            Fingerprint::of_certificate(certificate.der()),
            Some(of_key_pair(&pair))
        );
        for bad in [
            "",
            "SHA256:",
            &text[7..],
            &text[..49],
            &format!("{text}="),
            &format!(" {text}"),
            &format!("{}V", &text[..49]),
        ] {
            assert!(bad.parse::<Fingerprint>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn names_of_the_peers_file_stand_for_fingerprints() {
        let directory = tempfile::tempdir().expect("a folder");
        let path = directory.path().join("peers.toml");
        let [a, b, c] = [b"a", b"b", b"c"].map(|key| Fingerprint::of_public_key(key));
        assert!(
            Peers::load(&path)
                .expect("no file names nobody")
                .resolve(["beta"])
                .is_err()
        );
        fs::write(
            &path,
            format!("[peers]\nbeta = \"{a}\"\ngamma = [\"{a}\", \"{b}\"]\n"),
        )
        .expect("writable");
        let peers = Peers::load(&path).expect("good");
        assert_eq!(
            peers.resolve(["beta"]).expect("a name"),
            TrustSet::from_iter([a])
        );
        let text = c.to_string();
        assert_eq!(
            peers
                .resolve(["gamma", text.as_str()])
                .expect("a name and a key"),
            TrustSet::from_iter([a, b, c])
        );
        assert!(
            matches!(peers.resolve(["delta"]), Err(Error::UnknownName { text, .. }) if text == "delta")
        );
        assert_eq!(peers.name_of(&b), Some("gamma"));
        fs::write(&path, "[peers]\nbeta = \"SHA256:short\"\n").expect("writable");
        assert!(
            matches!(Peers::load(&path), Err(Error::PeersFingerprint { name, .. }) if name == "beta")
        );
        fs::write(&path, "peer = 1\n").expect("writable");
        assert!(matches!(Peers::load(&path), Err(Error::Peers { .. })));
    }
}
