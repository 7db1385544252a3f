//! Whether a file of sshd's can tell users apart: only a `Match` block does (sshd_config(5)).
//!
//! May not live here: reading files, asking sshd.

/// Bytes that a plain path does not have: of glob(7), of quotes, of tokens.
const NOT_PLAIN: &[char] = &['?', '[', ']', '{', '}', '\\', '"', '\'', '~', '%', '$'];

/// What else such a file has sshd read: the arguments of its `Include` lines. None if it may tell users apart,
/// or names files in a way that is not understood here. In doubt it may.
pub fn includes(content: &[u8]) -> Option<Vec<String>> {
    let mut all = Vec::new();
    for line in content.split(|byte| *byte == b'\n') {
        let line = String::from_utf8_lossy(line);
        let line = line.trim_matches([' ', '\t', '\r']);
        let lower = line.to_ascii_lowercase();
        if line.starts_with('#') {
            continue;
        }
        if lower.contains("match") {
            return None;
        }
        if lower.contains("include") {
            let mut words = line.split_ascii_whitespace();
            let is_include = words.next()?.eq_ignore_ascii_case("include");
            let paths: Vec<String> = words.map(str::to_owned).collect();
            if !is_include || paths.iter().any(|path| path.contains(NOT_PLAIN)) {
                return None;
            }
            all.extend(paths);
        }
    }
    Some(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_includes_is_told() {
        let text = b"# Match me\r\n  #Include x\nPort 22\n\tinclude /etc/a.conf b.d/*.conf\r\nInclude c";
        assert_eq!(includes(text).unwrap(), ["/etc/a.conf", "b.d/*.conf", "c"]);
        assert_eq!(includes(b"").unwrap(), [""; 0]);
    }

    #[test]
    fn in_doubt_users_are_told_apart() {
        for text in [
            "Match User al",
            "Port 22\n \tmAtCh all\n",
            "\"Match\" Group x",
            "match=user al",
            "Include \"/etc/a b\"",
            "Include=/etc/a",
            "\"Include\" /etc/a",
            "Include /etc/[ab]",
            "Include ~/a",
            "x\0 Match user al",
        ] {
            assert_eq!(includes(text.as_bytes()), None, "{text:?}");
        }
    }
}
