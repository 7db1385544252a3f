//! The page of all chapters: Markdown, and the plots that it shows.
//!
//! May not live here: drawing (`plot`). No number is written by hand: a sentence with one would be wrong
//! after the next run.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::{fmt, fs, io};

use crate::chapter::{Better, Chapter, Machine, Plot, Side, Table};
use crate::plot;
use crate::samples::times;
use crate::verdict::{best_of_others, verdicts};

/// Chapters, in their order.
pub struct Page {
    chapters: Vec<Chapter>,
}

/// Why there is no page.
#[derive(Debug)]
pub enum PageError {
    /// A file can't be read or written.
    File(PathBuf, io::Error),
    /// There is no chapter in the folder.
    Empty(PathBuf),
    /// A table can't be drawn.
    Plot(String),
}

impl std::error::Error for PageError {}

impl fmt::Display for PageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path, error) => write!(f, "{}: {error}", path.display()),
            Self::Empty(path) => write!(f, "{}: no chapter is there: run `make bench`", path.display()),
            Self::Plot(why) => write!(f, "can't draw {why}"),
        }
    }
}

const INTRODUCTION: &str = "\
Written by `make bench` (as root; a quarter of an hour, and the builds before it), which measures all of it in one run: in network namespaces and on \
instances that it makes; this machine's own rules and users are not touched. Nothing here is written by hand, and \
what was found stands beside it as JSON.

How to read it: a figure is a median. `3.2×` after it means 3.2 times ours. Compare rows, not machines. In plots ours \
are dark, and a line goes from the least to the most of all samples.
";

const AGAIN: &str = "\
## Again
`sudo -E make bench` measures everything and writes this page. `sudo -E make bench BENCH=gate` is one chapter, and \
`cargo bench --bench gate -- peers` one table of it, which is only printed. Plots and page alone: `make figures`.
";

impl Page {
    /// Reads the chapters in a folder.
    ///
    /// # Errors
    /// When one can't be read, or there is none.
    pub fn read(folder: &Path) -> Result<Self, PageError> {
        let in_folder = |error| PageError::File(folder.to_owned(), error);
        let mut chapters = Vec::new();
        for entry in fs::read_dir(folder).map_err(in_folder)? {
            let file = entry.map_err(in_folder)?.path();
            if file.extension().is_some_and(|kind| kind == "json") {
                let chapter = Chapter::read(&file).map_err(|error| PageError::File(file.clone(), error))?;
                chapters.push(chapter);
            }
        }
        if chapters.is_empty() {
            return Err(PageError::Empty(folder.to_owned()));
        }
        chapters.sort_by_key(|chapter| chapter.place);
        Ok(Self { chapters })
    }

    /// Writes `NAME.md` beside the folder NAME of the chapters, and the plots into it, without those of an
    /// earlier run.
    ///
    /// # Errors
    /// When something can't be drawn or written.
    pub fn write(&self, folder: &Path) -> Result<(), PageError> {
        let plots = self.plots()?;
        let old = fs::read_dir(folder).map_err(|error| PageError::File(folder.to_owned(), error))?;
        for file in old.flatten().map(|entry| entry.path()) {
            if file.extension().is_some_and(|kind| kind == "svg") {
                fs::remove_file(&file).map_err(|error| PageError::File(file, error))?;
            }
        }
        for (name, drawing) in plots {
            let file = folder.join(name);
            fs::write(&file, drawing).map_err(|error| PageError::File(file, error))?;
        }
        let page = folder.with_extension("md");
        let name = folder.file_name().unwrap_or_default().to_string_lossy();
        fs::write(&page, self.markdown(&name)).map_err(|error| PageError::File(page, error))
    }

    /// Name and content of each plot.
    ///
    /// # Errors
    /// When one can't be drawn.
    pub fn plots(&self) -> Result<Vec<(String, String)>, PageError> {
        let tables = self.chapters.iter().flat_map(numbered);
        let drawn = tables.filter(|(_, table)| table.plot != Plot::None);
        drawn
            .map(|(name, table)| {
                let drawing =
                    plot::draw(table).map_err(|e| PageError::Plot(format!("{}: {e}", table.title)))?;
                Ok((format!("{name}.svg"), drawing))
            })
            .collect()
    }

    /// The text; `folder` is where plots are, seen from the page.
    pub fn markdown(&self, folder: &str) -> String {
        let mut text = format!("# Benchmarks\n{INTRODUCTION}\n");
        let machine = &self.chapters[0].machine;
        text += &format!("{}\n\n", described(machine));
        text += &self.glance();
        text += &self.concessions();
        for chapter in &self.chapters {
            text += &format!("\n## {}\n{}\n\n", chapter.title, chapter.method);
            if chapter.machine != *machine {
                text += &format!("{}\n\n", described(&chapter.machine));
            }
            text += &format!(
                "Beside {}. The run took {} s.\n",
                chapter.beside.join("; "),
                chapter.seconds
            );
            for (name, table) in numbered(chapter) {
                text += &format!("\n### {}\n", table.title);
                if !table.method.is_empty() {
                    text += &format!("{}\n\n", table.method);
                }
                text += &cells(table);
                if table.plot != Plot::None {
                    text += &format!("\n![{}]({folder}/{name}.svg)\n", table.title);
                }
            }
        }
        text + "\n" + AGAIN
    }

    /// One line for each table.
    fn glance(&self) -> String {
        let mut text =
            "## At a glance\n| | portcullis | the best of the others | |\n|---|---|---|---|\n".to_owned();
        for table in self.chapters.iter().flat_map(|chapter| &chapter.tables) {
            let Some(column) = table
                .columns
                .iter()
                .position(|column| column.better != Better::Neither)
            else {
                continue;
            };
            let ours = table.rows.iter().find(|row| row.side == Side::Ours);
            let (Some(ours), Some(theirs)) = (ours, best_of_others(table, column)) else {
                continue;
            };
            let unit = table.columns[column].unit;
            let ratio = table.ratio(theirs, column).map_or(String::new(), times);
            let _ = writeln!(
                text,
                "| {}: {} | {} | {}: {} | {ratio} |",
                table.title,
                table.columns[column].name,
                ours.cells[column].show(unit),
                theirs.name,
                theirs.cells[column].show(unit),
            );
        }
        text
    }

    /// Where others do as well, or better.
    fn concessions(&self) -> String {
        let mut text = "\n## Where others are as good, or better\nFound from the figures: better is more than a tenth \
                        better, as good is within a tenth. A program that does not check, read back or persist does less for its time; the chapters say which.\n\n"
            .to_owned();
        for table in self.chapters.iter().flat_map(|chapter| &chapter.tables) {
            for verdict in verdicts(table) {
                let column = &table.columns[verdict.column];
                let show = |row: &crate::Row| row.cells[verdict.column].show(column.unit);
                let ours = table.counterpart(verdict.row).map(show).unwrap_or_default();
                let how = if verdict.better { "**better**" } else { "as good" };
                let _ = writeln!(
                    text,
                    "- {}, {}: {} is {how}, {} to {ours}.",
                    table.title,
                    column.name,
                    verdict.row.name,
                    show(verdict.row)
                );
            }
        }
        text
    }
}

/// Each table of a chapter with the name of its plot.
fn numbered(chapter: &Chapter) -> impl Iterator<Item = (String, &Table)> {
    let named = chapter.tables.iter().enumerate();
    named.map(|(number, table)| (format!("{}-{}", chapter.name, number + 1), table))
}

fn described(machine: &Machine) -> String {
    format!(
        "portcullis {}, {}, Linux {}, {} × {}, {} MiB of memory.",
        machine.portcullis,
        machine.system,
        machine.kernel,
        machine.processors,
        machine.processor,
        machine.memory
    )
}

/// The table in Markdown: medians, and ratios to ours.
fn cells(table: &Table) -> String {
    let mut text = "| |".to_owned();
    for column in &table.columns {
        text += &format!(" {} |", column.name);
    }
    text += &format!("\n|---|{}\n", "---|".repeat(table.columns.len()));
    for row in &table.rows {
        let name = if row.side == Side::Ours {
            format!("**{}**", row.name)
        } else {
            row.name.clone()
        };
        text += &format!("| {name} |");
        for (at, (cell, column)) in row.cells.iter().zip(&table.columns).enumerate() {
            let compared = row.side != Side::Ours && column.better != Better::Neither;
            let ratio = compared.then(|| table.ratio(row, at)).flatten();
            let ratio = ratio.map_or(String::new(), |ratio| format!(", {}", times(ratio)));
            text += &format!(" {}{ratio} |", cell.show(column.unit).replace('|', "/"));
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::chapter::{Cell, Column, Row, Unit};

    fn chapter() -> Chapter {
        let one = Cell::one;
        let bars = Table {
            title: "Shutting".to_owned(),
            method: "Three ports.".to_owned(),
            columns: vec![
                Column::time("from nothing"),
                Column::of("processes", Unit::Count, Better::Less),
                Column::time("open"),
            ],
            rows: vec![
                Row::ours(
                    "`portcullis`",
                    vec![Cell::many([0.012, 0.010, 0.011]), one(1.0), Cell::Never(858)],
                ),
                Row::theirs("`ufw`", vec![one(0.97), one(506.0), one(6.6)]),
                Row::theirs("`nft -f`", vec![one(0.004), one(1.0), Cell::ForGood(3.0)]),
            ],
            plot: Plot::Bars {
                columns: vec![0, 2],
                logarithmic: true,
            },
        };
        let lines = Table {
            title: "Peers".to_owned(),
            method: String::new(),
            columns: vec![Column::time("100"), Column::time("1,000")],
            rows: vec![
                Row::ours("`portcullis`", vec![one(0.001), one(0.002)]),
                Row::theirs(
                    "`nft`",
                    vec![one(0.002), Cell::Said("it did not answer".to_owned())],
                ),
                Row::floor("the kernel & nothing <else>", vec![one(0.0005), one(0.001)]),
            ],
            plot: Plot::Lines {
                name: "peers".to_owned(),
                at: vec![100.0, 1000.0],
            },
        };
        Chapter {
            name: "gate".to_owned(),
            place: 1,
            title: "The gate".to_owned(),
            method: "In namespaces.".to_owned(),
            machine: Machine::this("1.2.3").unwrap(),
            beside: vec!["ufw 1".to_owned()],
            seconds: 7,
            tables: vec![bars, lines],
        }
    }

    #[test]
    fn the_page_has_medians_ratios_and_what_others_do_better() {
        let page = Page {
            chapters: vec![chapter()],
        };
        let text = page.markdown("benchmarks");
        for line in [
            "| **`portcullis`** | 11.0 ms | 1 | never |",
            "| `ufw` | 970 ms, 88.2× | 506, 506× | 6.60 s |",
            "| `nft -f` | 4.00 ms, 0.36× | 1, 1.00× | for good |",
            "| `nft` | 2.00 ms, 2.00× | it did not answer |",
            "- Shutting, from nothing: `nft -f` is **better**, 4.00 ms to 11.0 ms.",
            "- Shutting, processes: `nft -f` is as good, 1 to 1.",
            "| Shutting: from nothing | 11.0 ms | `nft -f`: 4.00 ms | 0.36× |",
            "![Shutting](benchmarks/gate-1.svg)",
            "portcullis 1.2.3,",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
        assert_eq!(text.matches("is **better**").count(), 1, "{text}");
    }

    #[test]
    fn plots_are_well_formed_and_say_what_the_cells_say() {
        let page = Page {
            chapters: vec![chapter()],
        };
        let plots = page.plots().unwrap();
        assert_eq!(plots.len(), 2);
        let said: Vec<String> = plots
            .iter()
            .map(|(_, svg)| {
                let document = roxmltree::Document::parse(svg).unwrap();
                let texts = document.descendants().filter_map(|node| node.text());
                texts
                    .map(str::trim)
                    .filter(|text| !text.is_empty())
                    .collect::<Vec<_>>()
                    .join("|")
            })
            .collect();
        for word in ["11.0 ms", "970 ms", "never", "for good", "nft -f"] {
            assert!(said[0].contains(word), "{word}: {}", said[0]);
        }
        for word in ["the kernel & nothing <else>", "portcullis", "peers"] {
            assert!(said[1].contains(word), "{word}: {}", said[1]);
        }
    }

    #[test]
    fn what_was_saved_makes_the_same_page_and_old_plots_go() {
        let folder = std::env::temp_dir()
            .join(format!("figures-{}", std::process::id()))
            .join("benchmarks");
        chapter().save(&folder).unwrap();
        fs::write(folder.join("old-1.svg"), "").unwrap();
        let page = Page::read(&folder).unwrap();
        page.write(&folder).unwrap();
        let text = fs::read_to_string(folder.with_extension("md")).unwrap();
        assert_eq!(
            text,
            Page {
                chapters: vec![chapter()]
            }
            .markdown("benchmarks")
        );
        assert!(!folder.join("old-1.svg").exists());
        assert!(folder.join("gate-2.svg").exists());
        fs::remove_dir_all(folder.parent().unwrap()).unwrap();
    }

    #[test]
    fn an_empty_folder_says_what_to_do() {
        let folder = std::env::temp_dir().join(format!("figures-empty-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let Err(error) = Page::read(&folder) else {
            panic!("no chapter, no page")
        };
        assert!(error.to_string().contains("make bench"), "{error}");
        fs::remove_dir(&folder).unwrap();
    }
}
