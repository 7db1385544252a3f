//! The page for incidents as a man page: an instance has no browser, and often no network.
//!
//! It knows the Markdown of that page (headings, paragraphs, one level of lists, blocks of commands, links, code
//! in backquotes) and refuses what it does not know. May not live here: any other page.

use std::io;

use roff::{Inline, Roff, bold, roman};

/// The man page, section 7, of a Markdown text.
///
/// # Errors
/// When a line is of a kind that is not known here.
pub fn man_page(name: &str, text: &str) -> io::Result<String> {
    let mut page = Roff::new();
    page.control("TH", [&name.to_uppercase(), "7", "", "portcullis", ""]);
    let mut paragraph: Vec<String> = Vec::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        let starts_new = line.is_empty() || line.starts_with(['#', '`', '|']) || line.starts_with("- ");
        let continues =
            !paragraph.is_empty() && (!starts_new || (line.starts_with('`') && !line.starts_with("```")));
        if continues {
            paragraph.push(line.trim().to_owned());
            continue;
        }
        end(&mut page, &mut paragraph);
        if let Some(heading) = line.strip_prefix("# ") {
            page.control("SH", ["NAME"]);
            page.text([roman(
                format!("{name} \\- {}", plain(heading)).replace("\\-", "-"),
            )]);
        } else if let Some(heading) = line.strip_prefix("## ") {
            page.control("SH", [plain(heading).as_str()]);
        } else if let Some(heading) = line.strip_prefix("### ") {
            page.control("SS", [plain(heading).as_str()]);
        } else if line.starts_with("```") {
            page.control("PP", [] as [&str; 0]);
            page.control("nf", [] as [&str; 0]);
            for line in lines.by_ref().take_while(|line| !line.starts_with("```")) {
                page.text([bold(format!("    {line}"))]);
            }
            page.control("fi", [] as [&str; 0]);
        } else if line.starts_with(['|', '>', '*']) || line.starts_with("  ") {
            return Err(io::Error::other(format!("{name}: not known here: {line:?}")));
        } else if !line.is_empty() {
            paragraph.push(line.to_owned());
        }
    }
    end(&mut page, &mut paragraph);
    Ok(page.to_roff())
}

/// Puts out what was gathered of a paragraph or of an entry of a list.
fn end(page: &mut Roff, paragraph: &mut Vec<String>) {
    let text = paragraph.join(" ");
    paragraph.clear();
    match text.strip_prefix("- ") {
        Some(entry) => {
            page.control("IP", ["-", "2"]);
            page.text(inlines(entry));
        }
        None if text.is_empty() => {}
        None => {
            page.control("PP", [] as [&str; 0]);
            page.text(inlines(&text));
        }
    }
}

/// Code in bold, links as their text.
fn inlines(text: &str) -> Vec<Inline> {
    let parts = text.split('`').enumerate();
    parts
        .map(|(index, part)| match index % 2 {
            0 => roman(without_links(part)),
            _ => bold(part),
        })
        .collect()
}

fn without_links(text: &str) -> String {
    let (mut out, mut rest) = (String::new(), text);
    while let Some((before, behind)) = rest.split_once("](") {
        let Some((_, after)) = behind.split_once(')') else {
            break;
        };
        out.push_str(&before.replacen('[', "", 1));
        rest = after;
    }
    out + rest
}

fn plain(heading: &str) -> String {
    heading.replace('`', "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_for_incidents_becomes_a_man_page() {
        let text = include_str!("../../../docs/operations.md");
        let page = man_page("portcullis-operations", text).unwrap();
        for words in [
            ".TH PORTCULLIS-OPERATIONS 7",
            ".SS firewall.default-deny",
            "nft delete table inet portcullis",
            ".IP - 2",
        ] {
            assert!(page.contains(words), "{words}: {page}");
        }
        assert!(!page.contains("](#") && !page.contains("```"), "{page}");
        for section in text.lines().filter_map(|line| line.strip_prefix("## ")) {
            let shown = [format!(".SH \"{section}\""), format!(".SH {section}")];
            assert!(shown.iter().any(|shown| page.contains(shown)), "{section}");
        }
    }

    #[test]
    fn paragraphs_lists_and_links() {
        let page = man_page("x", "# X\n\none\n`two` [three](u.md) four\n\n- a\n  `b`\n- c\n").unwrap();
        assert!(page.contains("one \\fBtwo\\fR three four"), "{page}");
        assert!(page.contains("a \\fBb\\fR"), "{page}");
        assert!(man_page("x", "| a | b |").is_err());
    }
}
