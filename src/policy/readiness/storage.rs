//! The check of encryption at rest: each volume with its evidence, and what to do about the worst.
//!
//! Only what the kernel itself says passes. May not live here: the way down (`policy::storage::walk`).

use portcullis_protocol::{Spec, Status};
use serde_json::{Value, json};

use super::Finding;
use crate::policy::observation::Observed;
use crate::policy::storage::answers::Segment;
use crate::policy::storage::mounts::Number;
use crate::policy::storage::walk::{Judged, State, judge, made_by};
use crate::policy::storage::{Kind, Storage};

/// So many volumes are told, worst first.
const TOLD: usize = 32;
/// So many devices of a way.
const WAY: usize = 12;

const GUIDE: &str = "docs/storage.md";

pub fn encrypted(spec: Option<&Spec>, seen: &Observed<Storage>) -> Finding {
    let storage = match seen {
        Ok(storage) => storage,
        Err(reason) => {
            return Finding::new(Status::Unknown, format!("storage can't be looked at: {reason}"))
                .with("state", State::Unknown.as_str());
        }
    };
    let claims = spec.and_then(|spec| spec.storage.as_ref());
    let claims = claims
        .map(|storage| storage.attested.as_slice())
        .unwrap_or_default();
    let mut judged = judge(storage, claims);
    judged.sort_by(|a, b| {
        let order = |one: &Judged<'_>| (one.is_excused(), one.found.state);
        order(a)
            .cmp(&order(b))
            .then_with(|| a.volume.points.cmp(&b.volume.points))
    });
    let told: Vec<Value> = judged
        .iter()
        .take(TOLD)
        .map(|one| evidence(one, storage))
        .collect();
    let finding = verdict(&judged);
    finding
        .with("volumes", told)
        .with("omitted", judged.len().saturating_sub(TOLD))
}

fn verdict(judged: &[Judged<'_>]) -> Finding {
    let counted: Vec<&Judged<'_>> = judged.iter().filter(|one| !one.is_excused()).collect();
    let excused: Vec<&str> = judged
        .iter()
        .filter(|one| one.is_excused())
        .map(|one| point(one))
        .collect();
    let but = match excused.as_slice() {
        [] => String::new(),
        some => format!("; {} must be plain to boot from", some.join(" and ")),
    };
    // The worst comes first.
    let Some(worst) = counted.first() else {
        return Finding::pass(format!("nothing that is mounted outlives power{but}")).with("state", "none");
    };
    let alike = counted.iter().filter(|one| one.found.state == worst.found.state);
    let others = match alike.count() {
        1 => String::new(),
        more => format!(", and {} more", more - 1),
    };
    let where_it_is = format!("{}{others}", point(worst));
    let reason = &worst.found.reason;
    let lesser = counted
        .iter()
        .find_map(|one| Some((one, one.found.lesser.as_ref()?)));
    let finding = match (worst.found.state, lesser) {
        (State::Absent, _) => Finding::fail(
            format!("{where_it_is}: not encrypted: {reason}"),
            absent_remedy(worst),
        ),
        (State::Unknown, _) => {
            Finding::new(Status::Unknown, format!("{where_it_is}: {reason}")).remedy(unknown_remedy(reason))
        }
        (State::Attested, _) => Finding::warn(
            format!("{where_it_is}: attested, not verified: {reason}"),
            format!(
                "look at the provider's own evidence; only LUKS or ZFS's encryption can be proven here ({GUIDE})"
            ),
        ),
        (State::Verified, Some((one, lesser))) => Finding::warn(
            format!(
                "all {} volumes are encrypted, {} less than asked for: {lesser}{but}",
                counted.len(),
                point(one)
            ),
            format!(
                "make it anew with aes-xts-plain64 and a key of 512 bits, which is AES-256: `cryptsetup reencrypt` ({GUIDE})"
            ),
        ),
        (State::Verified, None) => {
            let algorithms: std::collections::BTreeSet<&String> =
                counted.iter().flat_map(|one| &one.found.algorithms).collect();
            let algorithms: Vec<&str> = algorithms.into_iter().map(String::as_str).collect();
            let count = match counted.len() {
                1 => "the one volume is".to_owned(),
                many => format!("all {many} volumes are"),
            };
            Finding::pass(format!("{count} encrypted with {}{but}", algorithms.join(", ")))
        }
    };
    finding.with("state", worst.found.state.as_str())
}

fn point<'a>(one: &Judged<'a>) -> &'a str {
    let point = one.volume.points.first();
    point.map_or(one.volume.source.as_str(), String::as_str)
}

fn absent_remedy(one: &Judged<'_>) -> String {
    let how = match (one.volume.kind.as_str(), one.volume.fscrypt) {
        ("swap", _) => "`swapoff` it, or put it on dm-crypt with a random key (crypttab(5), `swap`)",
        (_, true) => "fscrypt covers folders, never all of a file system: put it on LUKS2",
        _ => "put it on LUKS2 (`cryptsetup luksFormat`)",
    };
    format!("{how}; if the provider encrypts the disk, say so in the spec: storage.attested ({GUIDE})")
}

fn unknown_remedy(reason: &str) -> String {
    let how = if reason.contains("portcullis-storage.socket") || reason.contains("its cipher") {
        "`portcullis check` as root asks for itself; for the daemon, `systemctl status portcullis-storage.socket`"
    } else if reason.contains("OPAL") {
        "`cryptsetup luksDump` and `sedutil-cli --query` say what the drive claims"
    } else if reason.contains("ZFS") {
        "`zfs get encryption,keystatus`, `zpool list -v`"
    } else if reason.contains("another machine") {
        "ask who keeps it; if the provider attests it, name it in the spec: storage.attested"
    } else {
        "`lsblk -s` shows what is beneath, `dmsetup table` what encrypts"
    };
    format!("{how} ({GUIDE})")
}

fn evidence(one: &Judged<'_>, storage: &Storage) -> Value {
    let Judged { volume, found } = one;
    let way: Vec<Value> = found
        .path
        .iter()
        .take(WAY)
        .filter_map(|number| device(*number, storage))
        .collect();
    let mut told = json!({
        "mounts": volume.points,
        "type": volume.kind,
        "source": volume.source,
        "state": found.state.as_str(),
        "reason": found.reason,
        "way": way,
        "algorithms": found.algorithms,
        "seen_in": match volume.kind.as_str() {
            "swap" => "/proc/swaps".to_owned(),
            kind if volume.points.is_empty() => format!("/sys/fs/{kind}"),
            _ => "/proc/1/mountinfo".to_owned(),
        },
    });
    if volume.points.is_empty() {
        told["elsewhere"] = "in use, and mounted where the first process does not see it".into();
    }
    if one.is_excused() {
        told["excused"] = "firmware and boot loader have to read it; root alone can write there".into();
    }
    if volume.fscrypt {
        told["fscrypt"] = "single folders may be encrypted; the file system as a whole is not".into();
    }
    if let Some(lesser) = &found.lesser {
        told["lesser"] = lesser.clone().into();
    }
    told
}

/// A step of the way: what it is, and by which file that was seen.
fn device(number: Number, storage: &Storage) -> Option<Value> {
    let device = storage.devices.get(&number)?;
    let seen = format!("/sys/dev/block/{number}");
    let mut told = json!({"device": device.name, "number": number.to_string(), "seen_in": seen});
    match &device.kind {
        Kind::Mapped { name, uuid } => {
            told["what"] = made_by(uuid).unwrap_or("device mapper").into();
            told["name"] = name.clone().into();
            let table = storage.answers.tables.get(name).map(Vec::as_slice);
            if let Some(
                [
                    first @ Segment::Crypt {
                        cipher,
                        key_bits,
                        options,
                        ..
                    },
                    ..,
                ],
            ) = table
            {
                told["cipher"] = cipher.clone().into();
                told["key_bits"] = (*key_bits).into();
                told["algorithm"] = first.algorithm().map(|one| one.name).into();
                // Discards show which blocks are in use; that is the operator's to weigh.
                told["options"] = options.clone().into();
                told["cipher_seen_in"] = "dmsetup table".into();
            }
        }
        Kind::Raid { level } => told["what"] = level.clone().into(),
        Kind::Loop { file, removed } => {
            told["what"] = "loop".into();
            told["file"] = file.clone().into();
            told["removed"] = (*removed).into();
        }
        Kind::Partition => told["what"] = "partition".into(),
        Kind::Memory => told["what"] = "memory".into(),
        Kind::Bcache { .. } => told["what"] = "bcache".into(),
        Kind::Disk { serial } => {
            told["what"] = "disk".into();
            told["serial"] = serial.clone().into();
        }
    }
    Some(told)
}
