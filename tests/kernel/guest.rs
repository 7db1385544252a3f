//! A whole machine with Debian 12's kernel: booted in qemu without KVM, and what its console says.
//!
//! What it boots, and qemu, are brought by `image`; what it does stands in `guest/`. Needs Debian 12's
//! package lists. May not live here: what ought to come out.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::LazyLock;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;

use crate::common::run;

/// A machine that has not said what it should by then hangs.
const LIMIT: Duration = Duration::from_secs(300);

/// The folder with what machines boot.
static IMAGE: LazyLock<PathBuf> = LazyLock::new(|| {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("kernel");
    let (root, agent) = (env!("CARGO_MANIFEST_DIR"), env!("CARGO_BIN_EXE_portcullis"));
    run(&format!("{root}/tests/kernel/image {} {agent}", folder.display()));
    folder
});

/// How one step of a guest's script went.
#[derive(Debug, Default)]
pub struct Step {
    /// Its exit code.
    pub code: i32,
    /// What it wrote.
    pub output: String,
    /// What it complained of.
    pub complaint: String,
    /// How long it took by the machine's clock, to a hundredth of a second.
    pub took: Duration,
}

/// A machine that ends with its test.
pub struct Guest {
    qemu: Child,
    began: Instant,
    console: Receiver<String>,
    said: String,
    running: BTreeMap<String, Step>,
    done: BTreeMap<String, Step>,
}

impl Guest {
    /// Boots a machine that does this script of `guest/`, perhaps with a disk for its state.
    pub fn boot(script: &str, disk: Option<&Path>) -> Self {
        Self::boot_with("", script, disk)
    }

    /// The same, with more on the kernel's command line.
    pub fn boot_with(options: &str, script: &str, disk: Option<&Path>) -> Self {
        Self::boot_on(options, script, disk)
    }

    /// The same, with as many disks as are given: vda and so on, with the serial numbers disk-0 and so on.
    pub fn boot_on<'a>(options: &str, script: &str, disks: impl IntoIterator<Item = &'a Path>) -> Self {
        let mut command = Command::new(IMAGE.join("qemu"));
        command
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            .args([
                "-accel",
                "tcg,thread=multi",
                "-cpu",
                "max",
                "-m",
                "512",
                "-serial",
                "stdio",
            ])
            .args([
                "-append",
                &format!("console=ttyS0 quiet panic=-1 {options} -- {script}"),
            ])
            .arg("-kernel")
            .arg(IMAGE.join("vmlinuz"))
            .arg("-initrd")
            .arg(IMAGE.join("initramfs"));
        for (at, disk) in disks.into_iter().enumerate() {
            let drive = format!("file={},format=raw,if=none,id=d{at}", disk.display());
            let device = format!("virtio-blk-pci,drive=d{at},serial=disk-{at}");
            command.args(["-drive", &drive, "-device", &device]);
        }
        let mut qemu = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("image made the program qemu");
        let lines = BufReader::new(qemu.stdout.take().unwrap()).split(b'\n');
        let (sender, console) = channel();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned();
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Self {
            qemu,
            began: Instant::now(),
            console,
            said: String::new(),
            running: BTreeMap::new(),
            done: BTreeMap::new(),
        }
    }

    /// Waits until it has switched itself off.
    pub fn until_off(&mut self) {
        while self.hear() {}
    }

    /// Waits until this step is done, and cuts the power.
    pub fn cut_after(&mut self, step: &str) {
        while !self.done.contains_key(step) {
            assert!(self.hear(), "it is off before {step}");
        }
        self.qemu.kill().unwrap();
        self.qemu.wait().unwrap();
    }

    /// Takes the next line; false when there is none any more.
    fn hear(&mut self) -> bool {
        let left = LIMIT.saturating_sub(self.began.elapsed());
        let line = match self.console.recv_timeout(left) {
            Ok(line) => line,
            Err(RecvTimeoutError::Disconnected) => return false,
            Err(RecvTimeoutError::Timeout) => panic!("it is not done within {LIMIT:?}"),
        };
        self.said.push_str(&line);
        self.said.push('\n');
        let mut words = line.splitn(3, ' ');
        let (Some(kind), Some(name), Some(text)) = (words.next(), words.next(), words.next()) else {
            return true;
        };
        match kind {
            "OUT" => add_line(&mut self.running.entry(name.to_owned()).or_default().output, text),
            "ERR" => add_line(
                &mut self.running.entry(name.to_owned()).or_default().complaint,
                text,
            ),
            "RESULT" => {
                let mut step = self.running.remove(name).unwrap_or_default();
                let numbers: Vec<f64> = text.split(' ').map(|number| number.parse().unwrap()).collect();
                step.code = numbers[0] as i32;
                step.took = Duration::from_secs_f64(numbers[2] - numbers[1]);
                self.done.insert(name.to_owned(), step);
            }
            _ => {}
        }
        true
    }

    /// How a step went.
    #[track_caller]
    pub fn step(&self, name: &str) -> &Step {
        self.done.get(name).unwrap_or_else(|| panic!("no step {name}"))
    }

    /// What a step wrote that went well.
    #[track_caller]
    pub fn ok(&self, name: &str) -> &str {
        let step = self.step(name);
        assert_eq!(step.code, 0, "{name}: {step:?}");
        &step.output
    }

    /// The JSON that a step wrote, whatever its exit code: an instance without sshd is not ready.
    #[track_caller]
    pub fn json<T: DeserializeOwned>(&self, name: &str) -> T {
        let step = self.step(name);
        serde_json::from_str(&step.output).unwrap_or_else(|error| panic!("{name}: {error}: {step:?}"))
    }

    /// Whether the stranger's knock was answered; if not, then because nothing at all came back.
    #[track_caller]
    pub fn is_open(&self, name: &str) -> bool {
        let step = self.step(name);
        let is_open = step.code == 0;
        assert!(
            is_open || step.complaint.contains("timed out"),
            "{name}: {step:?}"
        );
        is_open
    }
}

fn add_line(text: &mut String, line: &str) {
    text.push_str(line);
    text.push('\n');
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
        if std::thread::panicking() {
            eprintln!("the console:\n{}", self.said);
        }
    }
}
