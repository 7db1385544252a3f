//! The image of local instances: a Debian root made once, and a layer over it with the agent.
//!
//! May not live here: instances. An image has no identity: no host keys, no machine id, no spec.

use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::fcntl::{Flock, FlockArg};
use portcullis_protocol::identity::to_hex;
use sha2::{Digest as _, Sha256};

use super::exec::tail;
use crate::{Error, Progress, Result};

/// What a fresh Debian machine lacks to run local instances.
pub const INSTALL_HINT: &str = "install: apt-get install debootstrap iproute2 util-linux mount";

/// The Debian suite that is used unless another is named: this machine's own, or the nearest one that
/// is not older, so that a package that was built here finds its C library in the image.
pub fn default_suite() -> String {
    suite_for(&read_lossy(Path::new("/etc/os-release")))
}

/// The suite for a machine with this os-release(5).
fn suite_for(os_release: &str) -> String {
    let value = |name: &str| {
        let line = os_release
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        line.unwrap_or_default().trim_matches('"').to_owned()
    };
    let (codename, version) = (value("VERSION_CODENAME"), value("VERSION_ID"));
    match value("ID").as_str() {
        "debian" if !codename.is_empty() => codename,
        // Up to 22.04 the C library is that of bookworm or older; later it is not.
        "ubuntu" if version.as_str() >= "22.10" => "trixie".to_owned(),
        _ => "bookworm".to_owned(),
    }
}

/// What debootstrap installs. cloud-init follows afterwards.
const PACKAGES: &str = "systemd,systemd-sysv,dbus,openssh-server,nftables,iproute2,python3,\
    libpam-systemd,procps,iputils-ping,ncat,sudo,curl,ca-certificates";

/// [`PACKAGES`], and what a suite needs besides.
fn packages(suite: &str) -> String {
    let more = match suite {
        // Its cloud-init, 20.4, can't write what systemd-networkd reads; Debian 11's cloud images have this too.
        "bullseye" => ",ifupdown",
        // systemd 257 loads it when it is wanted, and without it systemd-modules-load fails.
        "trixie" => ",libkmod2",
        _ => "",
    };
    format!("{PACKAGES}{more}")
}

const RECIPE: &str = include_str!("image.sh");

/// Which image to boot.
#[derive(Clone, Debug)]
pub struct ImageRequest {
    /// Debian suite, for example `bookworm`.
    pub suite: String,
    /// The agent's package; looked for with [`find_deb`] when `None`.
    pub deb: Option<PathBuf>,
    /// Boot without the agent when no package is named: for trials of the provider itself.
    pub allow_without_agent: bool,
    /// More Debian packages, as names that apt-get(8) knows.
    pub packages: Vec<String>,
    /// A folder that is laid over it: files that an image builder would have added.
    pub overlay: Option<PathBuf>,
}

impl Default for ImageRequest {
    fn default() -> Self {
        Self {
            suite: default_suite(),
            deb: None,
            allow_without_agent: false,
            packages: Vec::new(),
            overlay: None,
        }
    }
}

/// An image that is there.
#[derive(Clone, Debug)]
pub struct Image {
    /// The layers, the uppermost first.
    pub layers: Vec<PathBuf>,
    /// Whether the agent is in it.
    pub agent: bool,
}

/// The agent's package as `make deb` leaves it, or next to this program.
pub fn find_deb() -> Option<PathBuf> {
    let beside = std::env::current_exe()
        .ok()
        .and_then(|path| path.parent().map(Path::to_owned));
    std::iter::once(PathBuf::from("target/debian"))
        .chain(beside)
        .find_map(|folder| {
            let mut found: Vec<PathBuf> = fs::read_dir(folder)
                .ok()?
                .filter_map(|entry| entry.ok().map(|entry| entry.path()))
                .filter(|path| {
                    let name = path.file_name().unwrap_or_default().to_string_lossy();
                    name.starts_with("portcullis_") && name.ends_with("_amd64.deb")
                })
                .collect();
            found.sort_by_key(|path| fs::metadata(path).and_then(|data| data.modified()).ok());
            found.pop()
        })
}

/// Makes what is missing of an image below `folder` and gives its layers.
pub(crate) fn ensure(folder: &Path, request: &ImageRequest, progress: &dyn Progress) -> Result<Image> {
    let mut image = ensure_layers(folder, request, progress)?;
    if let Some(overlay) = &request.overlay {
        let overlay = fs::canonicalize(overlay).map_err(Error::file("find", overlay))?;
        image.layers.insert(0, super::mountable("overlay", overlay)?);
    }
    Ok(image)
}

fn ensure_layers(folder: &Path, request: &ImageRequest, progress: &dyn Progress) -> Result<Image> {
    let deb = match (&request.deb, request.allow_without_agent) {
        (Some(deb), _) => Some(deb.clone()),
        (None, true) => None,
        (None, false) => Some(find_deb().ok_or_else(|| {
            Error::BadInput(
                "--deb: no agent package found in target/debian or next to this program: \
                 run `make deb`, or name one with --deb FILE"
                    .into(),
            )
        })?),
    };
    check_names(request)?;
    let suite = &request.suite;
    let packages = packages(suite);
    let recipe = &hash(format!("{RECIPE}{packages}").as_bytes())[..8];
    let mut name = format!("{suite}-{recipe}");
    let base = folder.join("images").join(&name);
    let mut layers = vec![base.join("root")];
    build(
        &base,
        progress,
        &format!("making the {suite} image (once, about a minute)"),
        |draft, log| {
            require("debootstrap")?;
            script(&["base", path(&draft.join("root"))?, suite, &packages], log)
        },
    )?;
    if !request.packages.is_empty() {
        let list = request.packages.join(" ");
        name = format!("{name}-{}", &hash(list.as_bytes())[..8]);
        let what = format!("installing {list} in the image (once)");
        add_layer(folder, &name, &mut layers, progress, &what, ["packages", &list])?;
    }
    if let Some(deb) = &deb {
        let deb = fs::canonicalize(deb).map_err(Error::file("find", deb))?;
        let what = format!("installing {} in the image", deb.display());
        let name = format!("{}-{name}", hash_file(&deb)?);
        add_layer(
            folder,
            &name,
            &mut layers,
            progress,
            &what,
            ["agent", path(&deb)?],
        )?;
    }
    Ok(Image {
        layers,
        agent: deb.is_some(),
    })
}

/// Puts the layer of that name on top, made by a step of image.sh if it is not there.
fn add_layer(
    folder: &Path,
    name: &str,
    layers: &mut Vec<PathBuf>,
    progress: &dyn Progress,
    what: &str,
    [step, argument]: [&str; 2],
) -> Result<()> {
    let layer = folder.join("layers").join(name);
    let below = layers
        .iter()
        .map(|layer| path(layer))
        .collect::<Result<Vec<_>>>()?;
    let below = below.join(":");
    build(&layer, progress, what, |draft, log| {
        script(&[step, path(draft)?, &below, argument], log)
    })?;
    layers.insert(0, layer.join("upper"));
    Ok(())
}

/// Suites and packages become words of a command line.
fn check_names(request: &ImageRequest) -> Result<()> {
    let made_of = |text: &str, more: &[u8]| {
        text.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric())
            && text
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || more.contains(&b))
    };
    if !made_of(&request.suite, b"-") {
        return Err(Error::BadInput(format!(
            "--suite: {:?} is not a Debian suite, for example bookworm",
            request.suite
        )));
    }
    // deb-control(5), "Package".
    match request.packages.iter().find(|name| !made_of(name, b"+-.")) {
        Some(name) => Err(Error::BadInput(format!(
            "{name:?} is not the name of a Debian package, for example docker.io"
        ))),
        None => Ok(()),
    }
}

/// Builds `target` by `make` in a draft folder that is renamed when it is whole, one builder at a
/// time. A target that is there is left alone.
fn build(
    target: &Path,
    progress: &dyn Progress,
    what: &str,
    make: impl FnOnce(&Path, &Path) -> Result<()>,
) -> Result<()> {
    let done = target.join("complete");
    if done.exists() {
        return Ok(());
    }
    let parent = target.parent().unwrap_or(target);
    fs::create_dir_all(parent).map_err(Error::file("make", parent))?;
    progress.step(what);
    let _lock = lock(&parent.join(".lock"))?;
    if done.exists() {
        return Ok(());
    }
    let draft = parent.join(".draft");
    for leftover in [draft.as_path(), target] {
        if leftover.exists() {
            fs::remove_dir_all(leftover).map_err(Error::file("remove", leftover))?;
        }
    }
    fs::create_dir(&draft).map_err(Error::file("make", &draft))?;
    let made = make(&draft, &parent.join("build.log"));
    if let Err(error) = made {
        let _ = fs::remove_dir_all(&draft);
        return Err(error);
    }
    fs::write(draft.join("complete"), "").map_err(Error::file("write", &draft))?;
    fs::rename(&draft, target).map_err(Error::file("rename", &draft))
}

/// Waits for a lock file and holds it until dropped.
pub(crate) fn lock(path: &Path) -> Result<Flock<File>> {
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .map_err(Error::file("open", path))?;
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, e)| Error::File {
        action: "lock",
        path: path.to_owned(),
        source: e.into(),
    })
}

/// Runs image.sh in namespaces of its own, so that its mounts and processes end with it.
fn script(arguments: &[&str], log: &Path) -> Result<()> {
    let folder = tempfile::tempdir().map_err(Error::file("make", Path::new("a temporary folder")))?;
    let file = folder.path().join("image.sh");
    fs::write(&file, RECIPE).map_err(Error::file("write", &file))?;
    let output = File::create(log).map_err(Error::file("make", log))?;
    let errors = output.try_clone().map_err(Error::file("open", log))?;
    let status = Command::new("unshare")
        .args(["--mount", "--pid", "--fork", "--kill-child", "sh"])
        .arg(&file)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(errors)
        .status()
        .map_err(|e| Error::Failed(format!("can't run unshare: {e}; {INSTALL_HINT}")))?;
    if status.success() {
        return Ok(());
    }
    Err(Error::Command {
        command: format!("image.sh {}", arguments.join(" ")),
        status: status.to_string(),
        output: format!(
            "{}\nthe whole log is {}",
            tail(&read_lossy(log), 12),
            log.display()
        ),
    })
}

/// Fails with advice if a program is not installed.
pub(crate) fn require(program: &str) -> Result<()> {
    let folders = std::env::var_os("PATH").unwrap_or_default();
    if std::env::split_paths(&folders).any(|folder| folder.join(program).is_file()) {
        return Ok(());
    }
    Err(Error::Failed(format!(
        "{program} is not installed; {INSTALL_HINT}"
    )))
}

/// A file's text, with what is not UTF-8 replaced; empty if it can't be read.
pub(crate) fn read_lossy(path: &Path) -> String {
    fs::read(path)
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .unwrap_or_default()
}

fn path(path: &Path) -> Result<&str> {
    path.to_str()
        .ok_or_else(|| Error::BadInput(format!("{}: the path is not UTF-8", path.display())))
}

fn hash(bytes: &[u8]) -> String {
    to_hex(&Sha256::digest(bytes))
}

fn hash_file(path: &Path) -> Result<String> {
    let mut file = File::open(path).map_err(Error::file("open", path))?;
    let (mut hasher, mut buffer) = (Sha256::new(), vec![0; 1 << 16]);
    loop {
        match file.read(&mut buffer).map_err(Error::file("read", path))? {
            0 => return Ok(to_hex(&hasher.finalize())),
            length => hasher.update(&buffer[..length]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Quiet;

    #[test]
    fn the_suite_is_not_older_than_this_machine() {
        for (os_release, suite) in [
            ("ID=debian\nVERSION_CODENAME=trixie\n", "trixie"),
            (
                "ID=ubuntu\nVERSION_ID=\"22.04\"\nVERSION_CODENAME=jammy\n",
                "bookworm",
            ),
            (
                "ID=ubuntu\nVERSION_ID=\"24.04\"\nVERSION_CODENAME=noble\n",
                "trixie",
            ),
            ("ID=debian\n", "bookworm"),
            ("", "bookworm"),
        ] {
            assert_eq!(suite_for(os_release), suite, "{os_release}");
        }
    }

    #[test]
    fn an_interrupted_build_leaves_nothing_and_is_repeated() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("images/x");
        let fail = |draft: &Path, _: &Path| {
            fs::write(draft.join("half"), "").unwrap();
            Err(Error::Failed("no".into()))
        };
        assert!(build(&target, &Quiet, "x", fail).is_err());
        assert!(!target.exists() && !target.with_file_name(".draft").exists());
        build(&target, &Quiet, "x", |_, _| Ok(())).unwrap();
        // Now it is there, and is not built again.
        build(&target, &Quiet, "x", fail).unwrap();
        assert!(target.join("complete").exists());
    }

    #[test]
    fn no_package_means_make_deb() {
        let folder = tempfile::tempdir().unwrap();
        let request = ImageRequest {
            deb: Some(folder.path().join("none.deb")),
            ..ImageRequest::default()
        };
        let bad_suite = ImageRequest {
            suite: "../x".into(),
            ..request.clone()
        };
        let bad_package = ImageRequest {
            packages: vec!["busybox".into(), "--allow-remove-essential".into()],
            ..request
        };
        for (bad, expected) in [(bad_suite, "Debian suite"), (bad_package, "Debian package")] {
            let error = ensure(folder.path(), &bad, &Quiet).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
