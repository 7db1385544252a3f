//! What sshd says: over the network, of its configuration, in the journal.
//!
//! May not live here: SSH itself, which is `russh`'s.

use std::net::IpAddr;
use std::sync::{Arc, Mutex};

use portcullis::policy::ssh_log::{Credential, accepted};
use portcullis::policy::sshd_drop_in::{Wishes, held, is_ours, text};
use portcullis::policy::{key_path::KeyPlace, sshd_match};
use portcullis::system::{kexinit, sshd as system};

/// The algorithms of a server: printable names, no more of them than bytes came.
pub fn kexinit(data: &[u8]) -> bool {
    let noted = Arc::new(Mutex::new(data.to_vec()));
    let Ok(offered) = kexinit::offered(&noted) else {
        return false;
    };
    let lists = [&offered.kex, &offered.host_keys, &offered.ciphers, &offered.macs];
    for name in lists.into_iter().flatten() {
        assert!(!name.is_empty() && name.bytes().all(|b| b.is_ascii_graphic() && b != b','));
    }
    assert!(lists.iter().map(|list| list.len()).sum::<usize>() <= data.len());
    true
}

/// `sshd -T` and `-V`, and files of sshd's. A drop-in is made of one and is known again; nothing of the text
/// comes onto a line of its own.
pub fn sshd(data: &[u8]) -> bool {
    let said = String::from_utf8_lossy(data);
    let _ = system::parse_version(&said);
    if let Some(includes) = sshd_match::includes(data) {
        assert!(!said.lines().any(|line| line.trim_start().starts_with("Match ")));
        assert!(
            includes
                .iter()
                .all(|path| !path.contains([' ', '\t', '\n', '\r']))
        );
    }
    let Ok(config) = system::parse(&said) else {
        return false;
    };
    let addresses = config.local_addresses();
    assert!(addresses.len() <= config.listen.len());
    assert!(addresses.iter().all(|address| !address.ip().is_unspecified()));
    for wishes in [
        (true, KeyPlace::Home),
        (false, KeyPlace::System),
        (true, KeyPlace::System),
    ] {
        let (harden, keys) = wishes;
        let wishes = Wishes { harden, keys };
        let drop_in = text(wishes, &config).unwrap();
        assert!(is_ours(drop_in.as_bytes()));
        assert!(drop_in.lines().count() <= 10, "{drop_in}");
        if harden {
            assert!(drop_in.contains("\nPasswordAuthentication no\n"));
            assert_eq!(
                held(wishes, &config).is_ok(),
                !(config.password || config.keyboard_interactive) && {
                    let plain = Wishes { harden: false, keys };
                    held(plain, &config).is_ok()
                }
            );
        }
    }
    true
}

/// A line of sshd's tells of a login only if it is that line from its first to its last byte, and says who it
/// was in one way only.
pub fn logins(data: &[u8]) -> bool {
    let Ok(line) = std::str::from_utf8(data) else {
        return false;
    };
    let Some(login) = accepted(line) else {
        return false;
    };
    assert!(line.bytes().all(|byte| (b' '..=b'~').contains(&byte)));
    assert!(line.starts_with("Accepted ") || line.starts_with("Partial publickey "));
    assert!(!line.ends_with(" [preauth]"));
    // The name is all that stands between the first ` for ` and the ` from ` behind it.
    let said = line
        .split_once(" for ")
        .and_then(|(_, rest)| rest.split_once(" from "));
    assert_eq!(said.map(|(user, _)| user), Some(login.user.as_str()));
    if let (Some((_, rest)), Some(from)) = (said, login.from) {
        let address = rest.split(' ').next().unwrap_or_default();
        let address = address.split('%').next().unwrap_or_default();
        assert_eq!(
            address.parse::<IpAddr>().map(|a| a.to_canonical()),
            Ok(from.to_canonical())
        );
    }
    if let Credential::Key { key, authority } = &login.with {
        for fingerprint in [Some(key), authority.as_ref()].into_iter().flatten() {
            assert!(fingerprint.starts_with("SHA256:") && fingerprint.len() == 50);
            assert!(line.contains(fingerprint.as_str()));
        }
    }
    // More on the same line is another line, or none.
    assert_eq!(accepted(&format!("{line}\n")), None);
    assert_eq!(accepted(&format!("x{line}")), None);
    assert_eq!(accepted(&format!("{line} [preauth]")), None);
    true
}
