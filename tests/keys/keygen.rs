//! The parser of public keys beside OpenSSH's own: what it accepts, `ssh-keygen -l` accepts too, as the same
//! key.
//!
//! May not live here: what a key may say beside itself (`lines`).

use std::fs;
use std::path::Path;
use std::process::Command;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use portcullis_protocol::PublicKey;

/// How many mutations of each key are tried.
const MUTATIONS: usize = 3000;

/// Made by ssh-keygen of OpenSSH 9.2; newer ones make none any more.
const DSA: &str = "ssh-dss \
    AAAAB3NzaC1kc3MAAACBANkpisfY+u1sAjakk6XYCNnMNXT7ho879ykSPriRbTlk5fUCIzoN/qs2c/M8ZJ9J\
    cLl6+9PfeLt3DQW8ULo/EdMFy7Zk/W1jRtBbakiF/BBqBwGKuXmkerX8rvmzxukFwIJZAVIssUlpS9BGtvfe\
    UmtbmTSgJeoe05W8EgCfN1PZAAAAFQC4jFWq/wT/Mjl4Mtm+vZONXR6nawAAAIA2Ds+ADBcAxMOaDAcm3cLJ\
    L9FSn+2Iu4WagYEHPM315Kf9P5M8oH0poy4hqQ8KokoqjbGoInSfRbHBtjmFiIsXyOOslCd0vMhri5MVKobn\
    MEbkkXRSrCI06R0sYGgJouzIa+wAXZgNdj9umG5wWDfwaAhvxTfnV0jM5Df6iDXqUAAAAIEAvp6p0qseC4xH\
    x/sC+ZmP4qmDbosd7Jn7awg5GRr8cBU7Gf6eDZznlDikaegZ5RDa3M5bWR2rVnPDmRg5GL/dAUa6/CH+nHll\
    VdyiYgLbfZjDJXn/06XP0g/3516XAMaktWRanZefPWkw8tJQxIXfpQgF/E1YKrGYp7QBGWiSKZ0=";

/// What `ssh-keygen -l` says of a line: bits, fingerprint and kind.
type Said = (u32, String, String);

/// Asks for all lines at once. Of a line that holds no key it says nothing.
fn ssh_keygen<'a>(folder: &Path, lines: impl IntoIterator<Item = &'a [u8]>) -> Vec<Said> {
    let file = folder.join("lines");
    // The first line of a file might be taken for a private key's.
    let mut text = b"#\n".to_vec();
    for line in lines {
        text.extend_from_slice(line);
        text.push(b'\n');
    }
    fs::write(&file, text).unwrap();
    let output = Command::new("ssh-keygen").arg("-lf").arg(&file).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines()
        .map(|line| {
            let words: Vec<&str> = line.split(' ').collect();
            let kind = words[words.len() - 1].trim_matches(['(', ')']);
            (words[0].parse().unwrap(), words[1].to_owned(), kind.to_owned())
        })
        .collect()
}

fn kind(key: &PublicKey) -> &'static str {
    match key.algorithm().as_str() {
        "ssh-rsa" => "RSA",
        "ssh-ed25519" => "ED25519",
        "sk-ssh-ed25519@openssh.com" => "ED25519-SK",
        "sk-ecdsa-sha2-nistp256@openssh.com" => "ECDSA-SK",
        "ecdsa-sha2-nistp256" | "ecdsa-sha2-nistp384" | "ecdsa-sha2-nistp521" => "ECDSA",
        other => panic!("a key of type {other} was accepted"),
    }
}

/// A key made just now.
fn generate(folder: &Path, kind: &str, bits: &str) -> String {
    let file = folder.join(format!("{kind}{bits}"));
    let mut command = Command::new("ssh-keygen");
    command.args(["-q", "-N", "", "-C", "a b", "-t", kind]);
    if !bits.is_empty() {
        command.args(["-b", bits]);
    }
    assert!(command.arg("-f").arg(&file).status().unwrap().success());
    let line = fs::read_to_string(file.with_extension("pub")).unwrap();
    line.trim_end().to_owned()
}

fn string(bytes: &[u8]) -> Vec<u8> {
    let length = u32::try_from(bytes.len()).unwrap();
    [&length.to_be_bytes(), bytes].concat()
}

/// The parts of a key's encoding (RFC 4253, section 6.6): each a string with its length before it.
fn parts(line: &str) -> Vec<Vec<u8>> {
    let blob = STANDARD.decode(line.split(' ').nth(1).unwrap()).unwrap();
    let mut rest = blob.as_slice();
    let mut parts = Vec::new();
    while let Some((length, after)) = rest.split_first_chunk::<4>() {
        let (part, after) = after.split_at(u32::from_be_bytes(*length) as usize);
        parts.push(part.to_vec());
        rest = after;
    }
    parts
}

fn encode(parts: &[Vec<u8>], comment: &str) -> String {
    let blob: Vec<u8> = parts.iter().flat_map(|part| string(part)).collect();
    let kind = String::from_utf8(parts[0].clone()).unwrap();
    format!("{kind} {}{comment}", STANDARD.encode(blob))
}

/// The same key as one that a security key holds: the encoding is all that there is to its public part
/// (OpenSSH, PROTOCOL.u2f).
fn on_a_security_key(line: &str) -> String {
    let mut parts = parts(line);
    parts[0] = [b"sk-", parts[0].as_slice(), b"@openssh.com"].concat();
    parts.push(b"ssh:".to_vec());
    encode(&parts, " on a token")
}

/// One of each kind and size.
fn one_of_each(folder: &Path) -> Vec<String> {
    let mut lines: Vec<String> = [
        ("rsa", "2048"),
        ("rsa", "3072"),
        ("rsa", "4096"),
        ("ecdsa", "256"),
        ("ecdsa", "384"),
        ("ecdsa", "521"),
        ("ed25519", ""),
    ]
    .map(|(kind, bits)| generate(folder, kind, bits))
    .into();
    lines.push(on_a_security_key(&lines[3]));
    lines.push(on_a_security_key(&lines[6]));
    lines
}

#[test]
fn each_kind_of_openssh_is_the_same_key_here() {
    let folder = tempfile::tempdir().unwrap();
    let lines = one_of_each(folder.path());
    let said = ssh_keygen(folder.path(), lines.iter().map(String::as_bytes));
    assert_eq!(said.len(), lines.len());
    let kinds: Vec<&str> = said.iter().map(|(_, _, kind)| kind.as_str()).collect();
    assert_eq!(
        kinds,
        [
            "RSA",
            "RSA",
            "RSA",
            "ECDSA",
            "ECDSA",
            "ECDSA",
            "ED25519",
            "ECDSA-SK",
            "ED25519-SK"
        ]
    );
    for (line, (_, fingerprint, expected)) in lines.iter().zip(said) {
        let key: PublicKey = line.parse().unwrap();
        assert_eq!(
            (key.fingerprint(), kind(&key)),
            (fingerprint, expected.as_str()),
            "{line}"
        );
        assert_eq!(&key.to_line(), line);
    }
}

/// What OpenSSH takes, and this project does not.
#[test]
fn keys_that_are_too_weak_are_refused_though_ssh_keygen_knows_them() {
    let folder = tempfile::tempdir().unwrap();
    let small = generate(folder.path(), "rsa", "1024");
    let said = ssh_keygen(folder.path(), [DSA.as_bytes(), small.as_bytes()]);
    assert!(
        said.iter()
            .any(|(bits, _, kind)| (*bits, kind.as_str()) == (1024, "RSA"))
    );
    let refusal = |line: &str| line.parse::<PublicKey>().unwrap_err();
    assert!(refusal(DSA).contains("ssh-dss"), "{}", refusal(DSA));
    assert!(
        refusal(&small).contains("1024 bits is too small"),
        "{}",
        refusal(&small)
    );
}

/// Numbers that look random and are the same each time (SplitMix64).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) as usize
    }

    fn below(&mut self, end: usize) -> usize {
        self.next() % end
    }

    fn one_of<'a, T: ?Sized>(&mut self, all: &[&'a T]) -> &'a T {
        all[self.below(all.len())]
    }
}

const TYPES: [&str; 16] = [
    "ssh-rsa",
    "rsa-sha2-256",
    "rsa-sha2-512",
    "RSA",
    "ssh-dss",
    "ssh-ed25519",
    "ssh-ed448",
    "SSH-ED25519",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
    "sk-ssh-ed25519@openssh.com",
    "sk-ecdsa-sha2-nistp256@openssh.com",
    "ssh-ed25519-cert-v01@openssh.com",
    "webauthn-sk-ecdsa-sha2-nistp256@openssh.com",
    "",
];

const JUNK: [&str; 16] = [
    " ",
    "\t",
    "  ",
    "\r",
    "\0",
    "\n",
    "\u{b}",
    "\u{a0}",
    "\u{feff}",
    "\u{85}",
    "=",
    "#",
    "\"",
    "A",
    "\u{2028}",
    "1024 65537 ",
];

const OPTIONS: [&str; 8] = [
    "command=\"sh\" ",
    "no-pty ",
    "no-pty,",
    "environment=\"A=b c\" ",
    "cert-authority ",
    "expiry-time=\"20300101\" ",
    "x\" y ",
    "* ",
];

/// The line, with one thing or another about it changed.
fn mutate(line: &str, all: &[String], numbers: &mut Numbers) -> String {
    let (kind, rest) = line.split_once(' ').unwrap();
    let (body, comment) = rest.split_once(' ').unwrap_or((rest, ""));
    match numbers.below(10) {
        // Something else in the encoded parts: bytes, lengths, order.
        0..=3 => format!(
            "{kind} {} {comment}",
            STANDARD.encode(mutate_blob(line, all, numbers))
        ),
        4 => format!("{} {body} {comment}", numbers.one_of(&TYPES)),
        5 => {
            let mut text = body.as_bytes().to_vec();
            let at = numbers.below(text.len());
            text[at] =
                *numbers.one_of(&[b"A", b"/", b"=", b"-", b"_", b" ", b"\t", b"b"].map(|b: &[u8; 1]| &b[0]));
            format!("{kind} {} {comment}", String::from_utf8(text).unwrap())
        }
        6 => format!("{kind} {} {comment}", &body[..numbers.below(body.len())]),
        7 => {
            let at = numbers.below(line.len() + 1);
            format!("{}{}{}", &line[..at], numbers.one_of(&JUNK), &line[at..])
        }
        8 => format!("{}{line}", numbers.one_of(&OPTIONS)),
        _ => {
            let length = numbers.one_of(&[&0, &10, &1000, &7000, &9000, &100_000]);
            format!("{kind} {body} {}{}", numbers.one_of(&JUNK), "x".repeat(*length))
        }
    }
}

fn mutate_blob(line: &str, all: &[String], numbers: &mut Numbers) -> Vec<u8> {
    let mut found = parts(line);
    let which = numbers.below(found.len());
    let part = &mut found[which];
    match numbers.below(9) {
        0 if !part.is_empty() => {
            let at = numbers.below(part.len());
            part[at] ^= 1 << numbers.below(8);
        }
        1 => part.insert(0, *numbers.one_of(&[&0, &0x80, &2, &3, &4])),
        2 => part.push(numbers.next() as u8),
        3 => part.truncate(numbers.below(part.len() + 1)),
        4 => *part = vec![*numbers.one_of(&[&0, &1, &0xff]); numbers.below(2200)],
        5 => found.swap(which, 0),
        6 => {
            let other = parts(&all[numbers.below(all.len())]);
            found[which] = other[numbers.below(other.len())].clone();
        }
        7 => {
            found.remove(which);
        }
        _ => found.push(vec![numbers.next() as u8; numbers.below(4)]),
    }
    let mut blob: Vec<u8> = found.iter().flat_map(|part| string(part)).collect();
    if numbers.below(10) == 0 && !blob.is_empty() {
        let at = numbers.below(blob.len());
        blob[at] = numbers.next() as u8;
    }
    blob
}

/// Never accept what ssh-keygen refuses, nor take it for another key.
#[test]
fn whatever_is_accepted_ssh_keygen_accepts_as_the_same_key() {
    let folder = tempfile::tempdir().unwrap();
    let all = one_of_each(folder.path());
    let mut numbers = Numbers(7443);
    let (mut accepted, mut refused) = (Vec::new(), 0);
    for line in &all {
        for _ in 0..MUTATIONS {
            let mutation = mutate(line, &all, &mut numbers);
            match mutation.parse::<PublicKey>() {
                Ok(key) => accepted.push((mutation, key)),
                Err(_) => refused += 1,
            }
        }
    }
    println!("{} accepted, {refused} refused", accepted.len());
    assert!(
        accepted.len() > 1000 && refused > 1000,
        "{} {refused}",
        accepted.len()
    );
    assert_same(folder.path(), &accepted);
}

#[track_caller]
fn assert_same(folder: &Path, accepted: &[(String, PublicKey)]) {
    let ours: Vec<(String, String)> = accepted
        .iter()
        .map(|(_, key)| (key.fingerprint(), kind(key).to_owned()))
        .collect();
    // As they came, and as they are written.
    let came = ssh_keygen(folder, accepted.iter().map(|(line, _)| line.as_bytes()));
    let lines: Vec<String> = accepted.iter().map(|(_, key)| key.to_line()).collect();
    let written = ssh_keygen(folder, lines.iter().map(String::as_bytes));
    assert_eq!(came, written);
    if let Some((bits, ..)) = came.iter().find(|(bits, _, kind)| kind == "RSA" && *bits < 2048) {
        panic!("an RSA key of {bits} bits was accepted");
    }
    let came: Vec<(String, String)> = came
        .into_iter()
        .map(|(_, fingerprint, kind)| (fingerprint, kind))
        .collect();
    if came == ours {
        return;
    }
    // All before the first difference are the same.
    let at = came
        .iter()
        .zip(&ours)
        .take_while(|(came, ours)| came == ours)
        .count();
    let (line, key) = &accepted[at];
    panic!(
        "{} is accepted, and ssh-keygen says {:?} of it: {line:.2000}",
        key.fingerprint(),
        ssh_keygen(folder, [line.as_bytes()])
    );
}
