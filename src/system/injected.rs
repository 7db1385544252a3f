//! Keys that the platform hands to the instance beside the spec: systemd's credentials, cloud-init's data.
//!
//! May not live here: which of them hold (`policy::key_sources`), writing them.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use portcullis_protocol::UserName;
use serde::Deserialize;

use super::files;
use crate::policy::key_sources::{Injected, is_key_credential};
use crate::policy::observation::Observed;

/// What cloud-init tells of the instance, without secrets (cloud-init's "instance metadata").
pub const INSTANCE_DATA: &str = "/run/cloud-init/instance-data.json";

/// systemd's credentials: the daemon's own (systemd.exec(5), `LoadCredential=`), and those of the whole
/// system, from the machine's firmware or the container's manager (systemd.system-credentials(7)). Those are hidden
/// from a unit with a sandbox; ours is shown them in the last folder (`systemd/portcullis.service`).
pub const CREDENTIALS: [&str; 3] = [
    "/run/credentials/portcullis.service",
    "/run/credentials/@system",
    "/run/portcullis/system-credentials",
];

/// Where credentials are, in the order in which they are looked for: before [`CREDENTIALS`], what this process was
/// told (`$CREDENTIALS_DIRECTORY`), as a unit of another name, or below a container's manager without systemd.
pub fn credential_folders() -> Vec<PathBuf> {
    let told = std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from);
    let told = told.filter(|folder| folder.is_absolute());
    let mut folders: Vec<PathBuf> = told.into_iter().collect();
    folders.extend(CREDENTIALS.map(PathBuf::from));
    folders.dedup();
    folders
}

/// Largest credential that systemd takes, in bytes (systemd.exec(5)).
const MAX_CREDENTIAL: usize = 1 << 20;
/// Platforms' metadata may be in it, a whole user-data included.
const MAX_INSTANCE_DATA: usize = 16 << 20;

/// Reads all of it; cloud-init's keys only if there is a user who gets them.
pub fn read(cloud_init_user: Option<&UserName>) -> Injected {
    Injected {
        credentials: credential_folders()
            .iter()
            .flat_map(|folder| credentials(folder))
            .collect(),
        cloud_init: cloud_init_user
            .and_then(|user| Some((user.clone(), cloud_init(Path::new(INSTANCE_DATA)).transpose()?))),
    }
}

/// Whether a change of what this reads is worth watching, and where.
pub fn watched(cloud_init_user: Option<&UserName>) -> Option<PathBuf> {
    cloud_init_user.map(|_| INSTANCE_DATA.into())
}

/// Credentials of a folder that hold keys, in the order of their names. A folder that is not there holds
/// none.
fn credentials(folder: &Path) -> Vec<(String, Observed<String>)> {
    let listed = match fs::read_dir(folder) {
        Ok(listed) => listed,
        Err(error) if error.kind() == ErrorKind::NotFound => return Vec::new(),
        Err(error) => {
            let reason = format!("{}: {error}", folder.display());
            return vec![(folder.display().to_string(), Err(reason))];
        }
    };
    let names = listed
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok());
    let mut names: Vec<String> = names.filter(|name| is_key_credential(name)).collect();
    names.sort();
    let read = |name: String| {
        let content = text(&folder.join(&name), MAX_CREDENTIAL);
        (name, content.map(Option::unwrap_or_default))
    };
    names.into_iter().map(read).collect()
}

/// cloud-init's keys; none before cloud-init wrote them.
fn cloud_init(file: &Path) -> Observed<Option<Vec<String>>> {
    let Some(text) = text(file, MAX_INSTANCE_DATA)? else {
        return Ok(None);
    };
    let keys = public_keys(&text).map_err(|error| format!("{}: {error}", file.display()))?;
    Ok(Some(keys))
}

/// `v1.public_ssh_keys` of cloud-init's instance metadata.
///
/// # Errors
/// It is no such document.
pub fn public_keys(text: &str) -> serde_json::Result<Vec<String>> {
    #[derive(Deserialize)]
    struct InstanceData {
        v1: V1,
    }
    #[derive(Deserialize)]
    struct V1 {
        #[serde(default)]
        public_ssh_keys: Vec<String>,
    }
    let data: InstanceData = serde_json::from_str(text)?;
    Ok(data.v1.public_ssh_keys)
}

fn text(file: &Path, limit: usize) -> Observed<Option<String>> {
    let named = |error: &dyn std::fmt::Display| format!("{}: {error}", file.display());
    let bytes = files::read(file, limit).map_err(|error| named(&error))?;
    bytes
        .map(|bytes| String::from_utf8(bytes).map_err(|error| named(&error)))
        .transpose()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_credentials_that_hold_keys_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8]| fs::write(folder.path().join(name), bytes).unwrap();
        write("ssh.authorized_keys.root", b"r");
        write("portcullis.authorized_keys.al", b"\xff");
        write("passwd.hashed-password.root", b"secret");
        let read = credentials(folder.path());
        let names: Vec<&str> = read.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(
            names,
            ["portcullis.authorized_keys.al", "ssh.authorized_keys.root"]
        );
        assert!(read[0].1.as_ref().unwrap_err().contains("authorized_keys.al"));
        assert_eq!(read[1].1.as_deref(), Ok("r"));
        assert!(credentials(&folder.path().join("none")).is_empty());
    }

    #[test]
    fn cloud_inits_keys_and_what_is_no_answer() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("instance-data.json");
        assert_eq!(cloud_init(&file), Ok(None));
        for (text, expected) in [
            (
                r#"{"v1":{"public_ssh_keys":["a","b"],"platform":"ec2"},"ds":{}}"#,
                Some(2),
            ),
            (r#"{"v1":{}}"#, Some(0)),
            (r#"{"v1":{"public_ssh_keys":[1]}}"#, None),
            ("{}", None),
            ("{", None),
        ] {
            fs::write(&file, text).unwrap();
            let read = cloud_init(&file).map(|keys| keys.unwrap().len());
            assert_eq!(read.clone().ok(), expected, "{text}: {read:?}");
        }
    }
}
