//! Throw-away certificates for trying things by hand. No hub and no node reads them by itself.

use anyhow::{Context, Result, bail};
use mesh_process::{Clock, SystemClock, files};
use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, date_time_ymd};
use std::path::Path;
use std::time::Duration;

const DAY: Duration = Duration::from_secs(24 * 3600);
const LIFE_DAYS: u32 = 30;
const FILES: [&str; 6] = ["ca.pem", "ca.key", "server.pem", "server.key", "client.pem", "client.key"];

/// Writes `ca`, `server` and `client`, each as `.pem` (certificate) and `.key`, all with mode 0600.
/// The server's names are localhost, 127.0.0.1 and ::1. They end after thirty days.
pub fn make(dir: &Path, force: bool) -> Result<()> {
    if !force && let Some(there) = FILES.iter().find(|f| dir.join(f).exists()) {
        bail!("{} is there already; --force replaces all of them", dir.join(there).display());
    }
    std::fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;

    let ca_key = KeyPair::generate()?;
    let mut ca = params("Cortex throw-away CA", &[])?;
    ca.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    ca.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let ca_pem = ca.self_signed(&ca_key)?.pem();
    let issuer = Issuer::new(ca, ca_key);

    let leaf = |name: &str, hosts: &[&str], usage| -> Result<(String, String)> {
        let key = KeyPair::generate()?;
        let mut p = params(name, hosts)?;
        p.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        p.extended_key_usages = vec![usage];
        p.use_authority_key_identifier_extension = true;
        Ok((p.signed_by(&key, &issuer)?.pem(), key.serialize_pem()))
    };
    let (server, server_key) = leaf("localhost", &["localhost", "127.0.0.1", "::1"], ExtendedKeyUsagePurpose::ServerAuth)?;
    let (client, client_key) = leaf("throw-away client", &["client.test"], ExtendedKeyUsagePurpose::ClientAuth)?;
    let ca_key = issuer.key().serialize_pem();

    for (name, text) in FILES.iter().zip([ca_pem, ca_key, server, server_key, client, client_key]) {
        let path = dir.join(name);
        files::write_private(&path, text.as_bytes()).with_context(|| format!("write {}", path.display()))?;
    }
    println!("{} files in {}, good for {LIFE_DAYS} days", FILES.len(), dir.display());
    Ok(())
}

fn params(name: &str, hosts: &[&str]) -> Result<CertificateParams> {
    let mut p = CertificateParams::new(hosts.iter().map(|h| h.to_string()).collect::<Vec<_>>())?;
    p.distinguished_name = rcgen::DistinguishedName::new();
    p.distinguished_name.push(DnType::CommonName, name);
    let now = date_time_ymd(1970, 1, 1) + Duration::from_millis(SystemClock::new().now_ms().max(0) as u64);
    p.not_before = now - DAY;
    p.not_after = now + DAY * LIFE_DAYS;
    Ok(p)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn private_and_never_over_a_file_unasked() {
        let dir = std::env::temp_dir().join(format!("xtask-certs-{}", std::process::id()));
        make(&dir, false).unwrap();
        for f in FILES {
            let path = dir.join(f);
            assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600, "{f}");
            assert!(std::fs::read_to_string(&path).unwrap().starts_with("-----BEGIN"), "{f}");
        }
        let before = std::fs::read(dir.join("ca.key")).unwrap();
        assert!(make(&dir, false).unwrap_err().to_string().contains("--force"));
        assert_eq!(std::fs::read(dir.join("ca.key")).unwrap(), before);
        make(&dir, true).unwrap();
        assert_ne!(std::fs::read(dir.join("ca.key")).unwrap(), before);
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
