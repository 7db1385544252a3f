//! A spec as cloud-init user-data: what a cloud hands to an instance at its first boot.
//!
//! May not live here: how the user-data gets to the instance (the providers).

use std::collections::BTreeSet;

use base64::Engine as _;
use portcullis_protocol::Spec;
use serde_json::{Value, json};

/// Where the agent looks for the spec of the first boot.
pub const SPEC_PATH: &str = "/etc/portcullis/spec.json";

/// What goes into the user-data besides the spec.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UserDataOptions {
    /// Make the users that the keys are for, if the image lacks them.
    pub create_users: bool,
    /// Let those users become root without a password.
    pub sudo: bool,
}

impl Default for UserDataOptions {
    fn default() -> Self {
        Self {
            create_users: true,
            sudo: true,
        }
    }
}

/// The cloud-config that puts the spec in place and starts the agent. Applying it again changes
/// nothing. The spec's secrets are in it, so it is to be handled like them.
pub fn render(spec: &Spec, options: &UserDataOptions) -> String {
    let mut users = vec![json!("default")];
    if options.create_users {
        let names: BTreeSet<&str> = spec.authorized_keys.iter().map(|key| key.user.as_str()).collect();
        users.extend(
            names
                .into_iter()
                .filter(|name| *name != "root")
                .map(|name| user(name, options)),
        );
    }
    let config = json!({
        "write_files": [{
            "path": SPEC_PATH,
            "owner": "root:root",
            "permissions": "0600",
            "encoding": "b64",
            "content": base64::engine::general_purpose::STANDARD.encode(spec.to_json()),
        }],
        "users": users,
        "ssh_pwauth": false,
        "locale": "C.UTF-8",
        "runcmd": [["systemctl", "--no-block", "start", "portcullis.service"]],
    });
    // JSON is YAML, and nothing has to be quoted by hand.
    format!("#cloud-config\n{config:#}\n")
}

fn user(name: &str, options: &UserDataOptions) -> Value {
    let mut user = json!({"name": name, "lock_passwd": true, "shell": "/bin/bash"});
    if options.sudo {
        user["sudo"] = json!("ALL=(ALL) NOPASSWD:ALL");
    }
    user
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str =
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFkKc52EQpKAMBtUiDp/N8hykSeuzBRx5gN48WTPDhWS alice";

    fn spec(users: &[&str]) -> Spec {
        let keys: Vec<Value> = users
            .iter()
            .map(|user| json!({"user": user, "key": KEY}))
            .collect();
        let spec = json!({"version": 1, "generation": 1, "instance": {"id": "i-1"}, "authorized_keys": keys});
        Spec::from_json(spec.to_string().as_bytes()).unwrap()
    }

    fn parsed(text: &str) -> Value {
        serde_json::from_str(text.strip_prefix("#cloud-config\n").unwrap()).unwrap()
    }

    #[test]
    fn root_is_not_made_and_each_user_once() {
        let config = parsed(&render(
            &spec(&["ubuntu", "root", "alice"]),
            &UserDataOptions::default(),
        ));
        let users = config["users"].as_array().unwrap();
        assert_eq!(users[0], "default");
        let names: Vec<_> = users[1..].iter().map(|u| u["name"].as_str().unwrap()).collect();
        assert_eq!(names, ["alice", "ubuntu"]);
        assert_eq!(users[1]["sudo"], "ALL=(ALL) NOPASSWD:ALL");
        assert_eq!(users[1]["lock_passwd"], true);
    }

    #[test]
    fn options_are_heeded() {
        let options = UserDataOptions {
            create_users: true,
            sudo: false,
        };
        assert!(
            parsed(&render(&spec(&["ubuntu"]), &options))["users"][1]
                .get("sudo")
                .is_none()
        );
        let options = UserDataOptions {
            create_users: false,
            sudo: true,
        };
        assert_eq!(
            parsed(&render(&spec(&["ubuntu"]), &options))["users"],
            json!(["default"])
        );
    }

    proptest::proptest! {
        /// Whatever the names, the spec comes out of the user-data as it went in.
        #[test]
        fn the_spec_survives(id in "[!-~]{1,128}", name in "[!-~]{1,128}") {
            let json = json!({"version": 1, "generation": 7, "instance": {"id": id, "name": name}});
            let spec = Spec::from_json(json.to_string().as_bytes()).unwrap();
            let config = parsed(&render(&spec, &UserDataOptions::default()));
            let file = &config["write_files"][0];
            proptest::prop_assert_eq!(file["permissions"].as_str(), Some("0600"));
            let content = base64::engine::general_purpose::STANDARD
                .decode(file["content"].as_str().unwrap()).unwrap();
            proptest::prop_assert_eq!(Spec::from_json(&content).unwrap(), spec);
        }
    }
}
