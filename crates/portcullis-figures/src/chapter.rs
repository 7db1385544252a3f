//! What one benchmark found: the machine, and tables whose cells are figures with their spread.
//!
//! May not live here: how it is shown (`page`, `plot`), and who did better (`verdict`).

use std::path::{Path, PathBuf};
use std::{env, fs, io};

use serde::{Deserialize, Serialize};

use crate::samples::{Samples, digits, time, times};

/// All that one benchmark found in one run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Chapter {
    /// Name of the benchmark, and of its file.
    pub name: String,
    /// Its place on the page.
    pub place: u32,
    /// Heading.
    pub title: String,
    /// How it is measured, in Markdown.
    pub method: String,
    /// Where it was measured.
    pub machine: Machine,
    /// What it was compared with, each with its version.
    pub beside: Vec<String>,
    /// How long the run took, in seconds.
    pub seconds: u64,
    /// What was found.
    pub tables: Vec<Table>,
}

/// Where it was measured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Version of portcullis.
    pub portcullis: String,
    /// Name and version of the system.
    pub system: String,
    /// Version of the kernel.
    pub kernel: String,
    /// Model of the processor.
    pub processor: String,
    /// How many of them.
    pub processors: usize,
    /// Memory in MiB.
    pub memory: u64,
}

/// Rows of contenders, columns of what was measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Table {
    /// Heading.
    pub title: String,
    /// How it is measured, in Markdown; the numbers are in the cells and nowhere else.
    pub method: String,
    /// What was measured.
    pub columns: Vec<Column>,
    /// Who was measured.
    pub rows: Vec<Row>,
    /// How it is drawn.
    pub plot: Plot,
}

/// How a table is drawn.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Plot {
    /// Not at all.
    None,
    /// A panel for each of these columns, a bar for each row, on a logarithmic scale or on one from zero.
    Bars {
        /// Numbers of the columns.
        columns: Vec<usize>,
        /// Whether each step is ten times as long.
        logarithmic: bool,
    },
    /// A line for each row over all columns, on logarithmic scales.
    Lines {
        /// What the columns differ in.
        name: String,
        /// Its value for each column.
        at: Vec<f64>,
    },
}

/// What was measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Column {
    /// Heading.
    pub name: String,
    /// What its numbers are.
    pub unit: Unit,
    /// Who does better.
    pub better: Better,
}

impl Column {
    /// A time, which is better short.
    pub fn time(name: impl Into<String>) -> Self {
        Self::of(name, Unit::Seconds, Better::Less)
    }

    /// Any other.
    pub fn of(name: impl Into<String>, unit: Unit, better: Better) -> Self {
        Self {
            name: name.into(),
            unit,
            better,
        }
    }
}

/// What a number is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Unit {
    /// Seconds.
    Seconds,
    /// Bytes, shown as MiB or KiB.
    Bytes,
    /// So often in a second.
    PerSecond,
    /// Bits in a second, shown as Gbit/s.
    BitsPerSecond,
    /// A number of things.
    Count,
}

impl Unit {
    /// Three digits and the unit.
    pub fn show(self, number: f64) -> String {
        match self {
            _ if number == 0.0 => "0".to_owned(),
            Self::Seconds => time(std::time::Duration::from_secs_f64(number.max(0.0))),
            Self::Bytes if number >= 1024.0 * 1024.0 => format!("{} MiB", digits(number / 1024.0 / 1024.0)),
            Self::Bytes => format!("{} KiB", digits(number / 1024.0)),
            Self::PerSecond if number >= 100.0 => format!("{}/s", digits(number.round())),
            Self::PerSecond => format!("{}/s", digits(number)),
            Self::BitsPerSecond => format!("{} Gbit/s", digits(number / 1e9)),
            Self::Count if number.fract() == 0.0 => digits(number)
                .trim_end_matches(".00")
                .trim_end_matches(".0")
                .to_owned(),
            Self::Count => digits(number),
        }
    }
}

/// Who does better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Better {
    /// Who has less.
    Less,
    /// Who has more.
    More,
    /// Nobody: it tells how something was measured.
    Neither,
}

/// Who was measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Row {
    /// Its name, in Markdown.
    pub name: String,
    /// Whose it is.
    pub side: Side,
    /// The row of ours that it is compared with, by name; the first of ours when `None`.
    pub beside: Option<String>,
    /// One for each column.
    pub cells: Vec<Cell>,
}

impl Row {
    /// A row of portcullis.
    pub fn ours(name: impl Into<String>, cells: Vec<Cell>) -> Self {
        Self::of(name, Side::Ours, cells)
    }

    /// A row of what users would take instead.
    pub fn theirs(name: impl Into<String>, cells: Vec<Cell>) -> Self {
        Self::of(name, Side::Theirs, cells)
    }

    /// A row that nobody can beat, or that does nothing.
    pub fn floor(name: impl Into<String>, cells: Vec<Cell>) -> Self {
        Self::of(name, Side::Floor, cells)
    }

    fn of(name: impl Into<String>, side: Side, cells: Vec<Cell>) -> Self {
        Self {
            name: name.into(),
            side,
            beside: None,
            cells,
        }
    }

    /// Compared with that row of ours.
    #[must_use]
    pub fn beside(mut self, ours: &str) -> Self {
        self.beside = Some(ours.to_owned());
        self
    }
}

/// Whose row it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Side {
    /// portcullis, or a part of it.
    Ours,
    /// What users would take instead.
    Theirs,
    /// What nobody can beat: the kernel alone, or no firewall at all.
    Floor,
}

/// What was found for one row and column.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Cell {
    /// It took so much.
    Measured(Figure),
    /// It never was so, in so many tries.
    Never(u64),
    /// It did not end while it was watched, for so many seconds.
    ForGood(f64),
    /// What there is to say instead of a figure: why there is none, or a property.
    Said(String),
    /// There is nothing to measure.
    Nothing,
}

impl Cell {
    /// One number, of one measurement.
    pub fn one(number: f64) -> Self {
        Self::Measured(Figure::new(vec![number]))
    }

    /// So many numbers, in the column's unit.
    ///
    /// # Panics
    /// When there is none.
    pub fn many(numbers: impl IntoIterator<Item = f64>) -> Self {
        Self::Measured(Figure::new(numbers.into_iter().collect()))
    }

    /// How long something was so in each of some tries: never, if it was in none.
    pub fn lasted(times: &Samples, tries: u64) -> Self {
        if times.max().is_zero() {
            Self::Never(tries)
        } else {
            times.into()
        }
    }

    /// What is compared: nothing for never, everything for good.
    pub fn value(&self) -> Option<f64> {
        match self {
            // It was so in a few tries: that is not never.
            Self::Measured(figure) if figure.median == 0.0 => Some(figure.most),
            Self::Measured(figure) => Some(figure.median),
            Self::Never(_) => Some(0.0),
            Self::ForGood(_) => Some(f64::INFINITY),
            Self::Said(_) | Self::Nothing => None,
        }
    }

    /// As it stands in a table: the median, or words.
    pub fn show(&self, unit: Unit) -> String {
        match self {
            Self::Measured(figure) if figure.median == 0.0 && figure.most > 0.0 => {
                format!("0, at most {}", unit.show(figure.most))
            }
            Self::Measured(figure) => unit.show(figure.median),
            Self::Never(_) => "never".to_owned(),
            Self::ForGood(_) => "for good".to_owned(),
            Self::Said(why) => why.clone(),
            Self::Nothing => String::new(),
        }
    }

    /// With the spread and how many there are.
    pub fn show_all(&self, unit: Unit) -> String {
        match self {
            Self::Measured(figure) if figure.number > 1 => format!(
                "{} ({} to {}, n={})",
                unit.show(figure.median),
                unit.show(figure.least),
                unit.show(figure.most),
                digits(figure.number as f64)
                    .trim_end_matches(".00")
                    .trim_end_matches(".0")
            ),
            Self::Never(tries) => format!("never in {tries}"),
            Self::ForGood(seconds) => format!("for good (watched for {seconds:.0} s)"),
            other => other.show(unit),
        }
    }
}

impl From<&Samples> for Cell {
    fn from(samples: &Samples) -> Self {
        Self::Measured(Figure {
            median: samples.median().as_secs_f64(),
            least: samples.quantile(0.0).as_secs_f64(),
            most: samples.max().as_secs_f64(),
            number: samples.len(),
        })
    }
}

impl From<Samples> for Cell {
    fn from(samples: Samples) -> Self {
        (&samples).into()
    }
}

impl<T: Into<Cell>> From<Result<T, String>> for Cell {
    fn from(measured: Result<T, String>) -> Self {
        measured.map_or_else(Self::Said, Into::into)
    }
}

impl<T: Into<Cell>> From<Option<T>> for Cell {
    fn from(measured: Option<T>) -> Self {
        measured.map_or(Self::Nothing, Into::into)
    }
}

/// A median and what it is the median of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// The one in the middle.
    pub median: f64,
    /// The least.
    pub least: f64,
    /// The most.
    pub most: f64,
    /// How many there were.
    pub number: usize,
}

impl Figure {
    /// # Panics
    /// When nothing was measured.
    fn new(mut numbers: Vec<f64>) -> Self {
        assert!(!numbers.is_empty(), "nothing was measured");
        numbers.sort_by(f64::total_cmp);
        Self {
            median: numbers[numbers.len() / 2],
            least: numbers[0],
            most: numbers[numbers.len() - 1],
            number: numbers.len(),
        }
    }
}

impl Table {
    /// The row of ours that another is compared with.
    pub fn counterpart(&self, row: &Row) -> Option<&Row> {
        let mut ours = self.rows.iter().filter(|row| row.side == Side::Ours);
        match &row.beside {
            Some(name) => ours.find(|ours| ours.name == *name),
            None => ours.next(),
        }
    }

    /// How many times ours it is, when both are numbers.
    pub fn ratio(&self, row: &Row, column: usize) -> Option<f64> {
        let ours = self.counterpart(row)?.cells.get(column)?.value()?;
        let theirs = row.cells.get(column)?.value()?;
        (ours > 0.0 && theirs > 0.0 && theirs.is_finite() && ours.is_finite()).then(|| theirs / ours)
    }

    /// For a terminal: medians, spread, numbers, and ratios to ours.
    pub fn to_text(&self) -> String {
        let mut table = comfy_table::Table::new();
        table.load_style(comfy_table::presets::ASCII_MARKDOWN);
        table.set_header(std::iter::once("").chain(self.columns.iter().map(|column| column.name.as_str())));
        for row in &self.rows {
            let cells = row.cells.iter().zip(&self.columns).enumerate();
            let cells = cells.map(|(at, (cell, column))| {
                let compared = row.side != Side::Ours && column.better != Better::Neither;
                let ratio = compared.then(|| self.ratio(row, at)).flatten();
                let ratio = ratio.map_or(String::new(), |ratio| format!(", {}", times(ratio)));
                format!("{}{ratio}", cell.show_all(column.unit))
            });
            table.add_row(std::iter::once(row.name.clone()).chain(cells));
        }
        format!("### {}\n{table}", self.title)
    }
}

impl Chapter {
    /// The file of a benchmark's chapter in a folder.
    pub fn file(folder: &Path, name: &str) -> PathBuf {
        folder.join(format!("{name}.json"))
    }

    /// Keeps it in a folder, which is made if it is not there.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn save(&self, folder: &Path) -> io::Result<PathBuf> {
        fs::create_dir_all(folder)?;
        let file = Self::file(folder, &self.name);
        let mut text = serde_json::to_string_pretty(self)?;
        text.push('\n');
        fs::write(&file, text)?;
        Ok(file)
    }

    /// Reads what was kept.
    ///
    /// # Errors
    /// When the file can't be read, or is not a chapter.
    pub fn read(file: &Path) -> io::Result<Self> {
        let text = fs::read(file)?;
        serde_json::from_slice(&text).map_err(|error| {
            io::Error::new(io::ErrorKind::InvalidData, format!("{}: {error}", file.display()))
        })
    }
}

impl Machine {
    /// This one.
    ///
    /// # Errors
    /// When `/proc` can't be read.
    pub fn this(portcullis: &str) -> io::Result<Self> {
        let value = |text: &str, name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap_or_default()
                .trim_matches([':', '=', '"', ' ', '\t'])
                .to_owned()
        };
        let processors = fs::read_to_string("/proc/cpuinfo")?;
        let memory = value(&fs::read_to_string("/proc/meminfo")?, "MemTotal");
        let kib: u64 = memory
            .split(' ')
            .next()
            .unwrap_or_default()
            .parse()
            .unwrap_or_default();
        let system = fs::read_to_string("/etc/os-release").unwrap_or_default();
        let model = value(&processors, "model name");
        Ok(Self {
            portcullis: portcullis.to_owned(),
            system: value(&system, "PRETTY_NAME"),
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?
                .trim()
                .to_owned(),
            processor: if model.is_empty() {
                env::consts::ARCH.to_owned()
            } else {
                model
            },
            processors: std::thread::available_parallelism()?.get(),
            memory: kib / 1024,
        })
    }
}
