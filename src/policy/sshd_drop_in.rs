//! What our one file among sshd's drop-ins says (sshd_config(5): the first value of an option wins, and
//! `sshd_config.d` is read in the order of names), and whether sshd took it over.
//!
//! Nothing in it makes sshd laxer than it would be without: what may be stricter already is written only
//! where it is not.
//! May not live here: writing it (`system::sshd_config`), when to take it back (`agent::sshd`).

use super::key_path::{KeyPlace, system_entry};
use super::observation::SshdConfig;

/// The drop-in's name: it sorts before what images and cloud-init write.
pub const NAME: &str = "00-portcullis.conf";

/// Its first line: a file without it is somebody else's.
pub const MARKER: &str = "# Written by portcullis: changes here are lost.";

/// The settings that a drop-in is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wishes {
    /// Whether logins need a key.
    pub harden: bool,
    /// Where keys are.
    pub keys: KeyPlace,
}

/// What the drop-in should say; none if there should be no drop-in. `base` is what sshd would do without it.
pub fn text(wishes: Wishes, base: &SshdConfig) -> Option<String> {
    let mut lines = vec![MARKER.to_owned()];
    if wishes.harden {
        lines.push("# [sshd] harden = true in /etc/portcullis/portcullis.toml".to_owned());
        lines.push("PasswordAuthentication no".to_owned());
        // The name before OpenSSH 8.7; later ones still know it.
        let keyboard = match base.version {
            Some(version) if version >= (8, 7) => "KbdInteractiveAuthentication",
            _ => "ChallengeResponseAuthentication",
        };
        lines.push(format!("{keyboard} no"));
        lines.push("PermitEmptyPasswords no".to_owned());
        // `no` and `forced-commands-only` are stricter.
        if base.root_login == "yes" {
            lines.push("PermitRootLogin prohibit-password".to_owned());
        }
        lines.push("X11Forwarding no".to_owned());
    }
    if wishes.keys == KeyPlace::System {
        lines.push("# [keys] file = \"system\" in /etc/portcullis/portcullis.toml".to_owned());
        let ours = system_entry();
        let mut files = base.authorized_keys_files.clone();
        files.retain(|file| *file != ours);
        files.push(ours);
        lines.push(format!("AuthorizedKeysFile {}", files.join(" ")));
    }
    (wishes != Wishes::default()).then(|| lines.join("\n") + "\n")
}

/// Whether a file is ours.
pub fn is_ours(content: &[u8]) -> bool {
    content.split(|byte| *byte == b'\n').next() == Some(MARKER.as_bytes())
}

/// Whether sshd's effective configuration is what the drop-in asks for.
///
/// # Errors
/// What is not, and what may be the cause.
pub fn held(wishes: Wishes, effective: &SshdConfig) -> Result<(), String> {
    let lost = |option: &str| {
        Err(format!(
            "sshd does not take {option} from /etc/ssh/sshd_config.d/{NAME}: put `Include \
             /etc/ssh/sshd_config.d/*.conf` at the top of /etc/ssh/sshd_config"
        ))
    };
    if wishes.harden && effective.password {
        return lost("PasswordAuthentication");
    }
    if wishes.harden && effective.keyboard_interactive {
        return lost("KbdInteractiveAuthentication");
    }
    if wishes.keys == KeyPlace::System && !effective.authorized_keys_files.contains(&system_entry()) {
        return lost("AuthorizedKeysFile");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn base() -> SshdConfig {
        SshdConfig {
            version: Some((9, 2)),
            root_login: "without-password".into(),
            authorized_keys_files: vec![".ssh/authorized_keys".into(), "%h/k".into()],
            password: true,
            ..SshdConfig::default()
        }
    }

    const HARDEN: Wishes = Wishes {
        harden: true,
        keys: KeyPlace::Home,
    };
    const SYSTEM: Wishes = Wishes {
        harden: false,
        keys: KeyPlace::System,
    };

    #[test]
    fn it_says_what_is_wished_and_nothing_without_a_wish() {
        assert_eq!(text(Wishes::default(), &base()), None);
        let hard = text(HARDEN, &base()).unwrap();
        assert!(is_ours(hard.as_bytes()));
        for line in [
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "PermitEmptyPasswords no",
            "X11Forwarding no",
        ] {
            assert!(hard.lines().any(|l| l == line), "{line}: {hard}");
        }
        assert!(!hard.contains("AuthorizedKeysFile") && !hard.contains("MaxAuthTries"));
        let files = "AuthorizedKeysFile .ssh/authorized_keys %h/k /etc/portcullis/authorized_keys.d/%u\n";
        let system = text(SYSTEM, &base()).unwrap();
        assert!(
            system.ends_with(files) && !system.contains("Password"),
            "{system}"
        );
        let both = Wishes {
            harden: true,
            keys: KeyPlace::System,
        };
        let both = text(both, &base()).unwrap();
        assert!(both.starts_with(&hard) && both.ends_with(files));
    }

    /// Written over what it made itself, it is the same.
    #[test]
    fn it_is_a_fixed_point() {
        let mut base = base();
        let once = text(SYSTEM, &base);
        base.authorized_keys_files.push(system_entry());
        assert_eq!(text(SYSTEM, &base), once);
        base.authorized_keys_files.clear();
        assert!(
            text(SYSTEM, &base)
                .unwrap()
                .ends_with("AuthorizedKeysFile /etc/portcullis/authorized_keys.d/%u\n")
        );
    }

    #[test]
    fn it_makes_nothing_laxer() {
        for (root, expected) in [
            ("yes", true),
            ("no", false),
            ("without-password", false),
            ("prohibit-password", false),
            ("forced-commands-only", false),
        ] {
            let base = SshdConfig {
                root_login: root.into(),
                ..base()
            };
            let written = text(HARDEN, &base).unwrap().contains("PermitRootLogin");
            assert_eq!(written, expected, "{root}");
        }
    }

    #[test]
    fn old_versions_get_the_name_that_they_know() {
        for (version, name) in [
            (Some((8, 4)), "ChallengeResponse"),
            (Some((8, 7)), "KbdInteractive"),
            (Some((10, 0)), "KbdInteractive"),
            (None, "ChallengeResponse"),
        ] {
            let base = SshdConfig { version, ..base() };
            let text = text(HARDEN, &base).unwrap();
            assert!(
                text.contains(&format!("{name}Authentication no")),
                "{version:?}: {text}"
            );
        }
    }

    #[test]
    fn what_sshd_did_not_take_over_is_named() {
        let mut effective = base();
        assert!(held(Wishes::default(), &effective).is_ok());
        assert!(
            held(HARDEN, &effective)
                .unwrap_err()
                .contains("PasswordAuthentication")
        );
        effective.password = false;
        assert!(held(HARDEN, &effective).is_ok());
        effective.keyboard_interactive = true;
        assert!(held(HARDEN, &effective).unwrap_err().contains("KbdInteractive"));
        assert!(
            held(SYSTEM, &effective)
                .unwrap_err()
                .contains("AuthorizedKeysFile")
        );
        effective.authorized_keys_files.push(system_entry());
        assert!(held(SYSTEM, &effective).is_ok());
    }

    #[test]
    fn a_file_of_somebody_else_is_not_ours() {
        for other in [
            "",
            "PasswordAuthentication yes\n",
            " # Written by portcullis: changes here are lost.",
        ] {
            assert!(!is_ours(other.as_bytes()), "{other}");
        }
    }
}
