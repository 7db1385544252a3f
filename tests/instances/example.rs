//! docs/after-launch.md, as its reader pastes it.
//!
//! May not live here: other ways to make the same changes.

use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use portcullis_provision::progress::Quiet;

use crate::host_keys::portcullisctl;
use crate::lab::{Lab, Run};

const PAGE: &str = include_str!("../../docs/after-launch.md");

/// The lines that the page says to paste.
fn pasted() -> String {
    let blocks = PAGE.split("```sh\n").skip(1);
    let blocks = blocks.map(|rest| rest.split("```").next().unwrap());
    blocks.collect()
}

#[test]
fn the_page_on_changes_after_launch_works_as_pasted() {
    let lab = Lab::new();
    let image = lab.request("gpu-0", "c-1").image;
    // Its own state, with the images that the other tests have.
    lab.provider.ensure_image(&image, &Quiet).unwrap();
    let shared = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/local");
    for folder in ["images", "layers"] {
        symlink(shared.join(folder), lab.path(folder)).unwrap();
    }
    let ctl = portcullisctl(&lab, &[]);
    let ctl: Vec<_> = ctl.get_args().skip(1).map(|a| a.to_str().unwrap()).collect();
    let script = format!(
        "set -euo pipefail\n\
         portcullisctl() {{ if [ $1 = launch ]; then set -- \"$@\" --deb {}; fi; {} \"$@\"; }}\n{}",
        image.deb.unwrap().display(),
        ctl.join(" "),
        pasted()
    );
    let mut bash = Command::new("timeout");
    bash.args(["300", "bash", "-c", &script]);
    let said = bash.current_dir(env!("CARGO_MANIFEST_DIR")).succeed();

    let outcomes = said.lines().filter(|line| ["open", "closed"].contains(line));
    let promised = PAGE.lines().filter_map(|line| line.split_once(" # "));
    let promised: Vec<&str> = promised.map(|(_, word)| word).collect();
    assert!(promised.len() >= 11, "{promised:?}");
    assert_eq!(outcomes.collect::<Vec<_>>(), promised, "{said}");
    assert_eq!(said.matches(r#""changed":false"#).count(), 1, "{said}");
    assert!(said.contains("READY  since "), "{said}");
    assert!(lab.provider.list().unwrap().is_empty());
}
