//! Files of certificates and keys that are refused, with what was expected.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;

use limosa_migrate::link::{Address, Tls, TlsError};

use super::{Authority, says};

#[test]
fn files_that_do_not_fit_are_named_with_what_was_expected() {
    let authority = Authority::new();
    authority.issue("one", |_| {});
    authority.issue("two", |_| {});
    let path = |name: &str| authority.path(name);
    let load = |ca: &str, certificate: &str, key: &str, name: Option<&str>| {
        Tls::load(&path(ca), &path(certificate), &path(key), name).unwrap_err().to_string()
    };
    let named = |name: &str| path(name).display().to_string();
    std::fs::write(path("text"), "no PEM at all").unwrap();
    std::fs::write(path("empty"), "").unwrap();
    let pem = std::fs::read_to_string(path("one")).unwrap();
    std::fs::write(path("cut"), &pem[..pem.len() / 2]).unwrap();
    std::fs::write(path("none"), "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n").unwrap();
    let encrypted = "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n";
    std::fs::write(path("encrypted"), encrypted).unwrap();
    std::fs::write(path("large"), vec![b'-'; 2 << 20]).unwrap();
    says(&load("absent", "one", "one.key", None), &[&named("absent"), "cannot be opened", "No such file"]);
    says(&load(".", "one", "one.key", None), &["it is a folder; expected a PEM file"]);
    says(&load("large", "one", "one.key", None), &[&named("large"), "1 MiB"]);
    says(&load("ca", "one", "two.key", None), &[&named("two.key"), "does not belong to", &named("one")]);
    says(&load("ca", "one", "one", None), &[&named("one"), "expected a private key", "holds a certificate"]);
    says(
        &load("ca", "one.key", "one.key", None),
        &[&named("one.key"), "expected certificates", "a private key"],
    );
    says(&load("ca", "one", "encrypted", None), &[&named("encrypted"), "passphrase"]);
    for wrong in ["text", "empty"] {
        says(&load(wrong, "one", "one.key", None), &[&named(wrong), "not a PEM file"]);
        says(&load("ca", wrong, "one.key", None), &[&named(wrong), "not a PEM file"]);
        says(&load("ca", "one", wrong, None), &[&named(wrong), "not a PEM file"]);
    }
    says(&load("none", "one", "one.key", None), &[&named("none"), "certificate 1 is not valid"]);
    says(&load("ca", "none", "one.key", None), &[&named("none")]);
    says(&load("cut", "one", "one.key", None), &[&named("cut"), "damaged"]);
    says(&load("ca", "one", "one.key", Some("no name")), &["`no name`", "host name"]);
    for (mode, is_private) in [(0o640, false), (0o604, false), (0o620, false), (0o400, true), (0o600, true)] {
        std::fs::set_permissions(path("one.key"), Permissions::from_mode(mode)).unwrap();
        match Tls::load(&path("ca"), &path("one"), &path("one.key"), None) {
            Ok(_) => assert!(is_private, "{mode:o}"),
            Err(error) => {
                assert!(!is_private, "{mode:o}: {error}");
                says(&error.to_string(), &[&named("one.key"), &format!("{mode:04o}"), "chmod 600"]);
            }
        }
    }
    let unix = authority.load("one", None).expected_name(&Address::Unix("socket".into()));
    assert!(matches!(unix, Err(TlsError::NoName { .. })), "{unix:?}");
    let named = authority.load("one", Some("::1")).expected_name(&Address::Unix("socket".into()));
    assert_eq!(named.unwrap().to_str(), "::1");
}
