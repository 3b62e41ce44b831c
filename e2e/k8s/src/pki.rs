//! The cluster's certificates: one authority, and what it signs. EC keys, since RSA ones take
//! seconds each on an emulated machine.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType,
};

/// Why certificates could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Making a key or a certificate failed.
    #[error("cannot make the certificate of {subject}")]
    Make {
        /// Whose it was to be.
        subject: String,
        /// The cause.
        #[source]
        source: rcgen::Error,
    },
    /// A file could not be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// A certificate and its key, both as PEM.
#[derive(Clone)]
pub struct Pair {
    /// The certificate.
    pub certificate: String,
    /// Its private key.
    pub key: String,
}

/// A certificate authority.
pub struct Authority {
    certificate: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// A new one, with a new key.
    pub fn new(name: &str) -> Result<Self, Error> {
        let failed = failed(name);
        let key = KeyPair::generate().map_err(&failed)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = named(name, &[]);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![
            KeyUsagePurpose::DigitalSignature,
            KeyUsagePurpose::KeyCertSign,
        ];
        let certificate = params.self_signed(&key).map_err(&failed)?.pem();
        Ok(Authority {
            certificate,
            issuer: Issuer::new(params, key),
        })
    }

    /// Its own certificate as PEM.
    pub fn certificate(&self) -> &str {
        &self.certificate
    }

    /// A certificate for a server with these names and addresses.
    pub fn server(&self, name: &str, names: &[&str], addresses: &[IpAddr]) -> Result<Pair, Error> {
        let names = names.iter().map(|name| {
            let name = (*name).try_into().map_err(failed(name))?;
            Ok(SanType::DnsName(name))
        });
        let mut alternatives = names.collect::<Result<Vec<_>, Error>>()?;
        alternatives.extend(addresses.iter().copied().map(SanType::IpAddress));
        let usage = ExtendedKeyUsagePurpose::ServerAuth;
        self.sign(named(name, &[]), alternatives, usage)
            .map_err(failed(name))
    }

    /// A certificate for a client: Kubernetes takes the common name as its user's name and the
    /// organizations as the user's groups.
    pub fn client(&self, user: &str, groups: &[&str]) -> Result<Pair, Error> {
        let usage = ExtendedKeyUsagePurpose::ClientAuth;
        self.sign(named(user, groups), Vec::new(), usage)
            .map_err(failed(user))
    }

    fn sign(
        &self,
        subject: DistinguishedName,
        alternatives: Vec<SanType>,
        usage: ExtendedKeyUsagePurpose,
    ) -> Result<Pair, rcgen::Error> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name = subject;
        params.subject_alt_names = alternatives;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![usage];
        let certificate = params.signed_by(&key, &self.issuer)?;
        Ok(Pair {
            certificate: certificate.pem(),
            key: key.serialize_pem(),
        })
    }
}

/// The key with which tokens of service accounts are signed: its private and its public half as PEM.
pub fn token_key() -> Result<(String, String), Error> {
    let key = KeyPair::generate().map_err(failed("service accounts"))?;
    Ok((key.serialize_pem(), key.public_key_pem()))
}

/// Writes a file that only its owner may read.
pub fn write_private(path: &Path, text: &str) -> Result<(), Error> {
    let written = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .and_then(|mut file| io::Write::write_all(&mut file, text.as_bytes()));
    written.map_err(|source| Error::Write {
        path: path.to_owned(),
        source,
    })
}

fn failed(subject: &str) -> impl Fn(rcgen::Error) -> Error {
    let subject = subject.to_owned();
    move |source| Error::Make {
        subject: subject.clone(),
        source,
    }
}

fn named(common: &str, organizations: &[&str]) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    for organization in organizations {
        name.push(DnType::OrganizationName, *organization);
    }
    name.push(DnType::CommonName, common);
    name
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::process::Command;

    use super::*;

    /// What openssl, which has nothing of ours in it, says of these files.
    fn openssl(folder: &Path, arguments: &str) -> String {
        let output = Command::new("openssl")
            .args(arguments.split(' '))
            .current_dir(folder)
            .output()
            .expect("openssl is installed by `make setup`");
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        text
    }

    #[test]
    fn signed_certificates_are_what_kubernetes_reads_in_them() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| write_private(&folder.path().join(name), text);
        let authority = Authority::new("test-ca").unwrap();
        write("ca.crt", authority.certificate()).unwrap();
        let server = authority
            .server(
                "api",
                &["node", "kubernetes"],
                &["10.0.2.15".parse().unwrap()],
            )
            .unwrap();
        write("server.crt", &server.certificate).unwrap();
        let client = authority
            .client("system:node:node", &["system:nodes"])
            .unwrap();
        write("client.crt", &client.certificate).unwrap();

        let checked = |purpose: &str, file: &str| {
            let text = format!("verify -CAfile ca.crt -purpose {purpose} {file}");
            openssl(folder.path(), &text)
        };
        assert_eq!(checked("sslserver", "server.crt"), "server.crt: OK\n");
        assert_eq!(checked("sslclient", "client.crt"), "client.crt: OK\n");
        let text = openssl(
            folder.path(),
            "x509 -in server.crt -noout -ext subjectAltName",
        );
        assert!(
            text.contains("DNS:node, DNS:kubernetes, IP Address:10.0.2.15"),
            "{text}"
        );
        let subject = openssl(folder.path(), "x509 -in client.crt -noout -subject");
        assert!(subject.contains("O = system:nodes") || subject.contains("O=system:nodes"));
        assert!(subject.contains("system:node:node"), "{subject}");
    }

    #[test]
    fn the_halves_of_the_tokens_key_belong_together_and_only_the_owner_reads_files() {
        let folder = tempfile::tempdir().unwrap();
        let (private, public) = token_key().unwrap();
        let path = folder.path().join("key");
        write_private(&path, "longer than a key").unwrap();
        write_private(&path, &private).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        let derived = openssl(folder.path(), "pkey -in key -pubout");
        assert_eq!(derived.trim(), public.replace("\r\n", "\n").trim());
    }

    #[test]
    fn a_file_that_cannot_be_written_is_named() {
        let error = write_private(Path::new("/nowhere/ca.crt"), "").unwrap_err();
        assert_eq!(error.to_string(), "cannot write /nowhere/ca.crt");
    }
}
