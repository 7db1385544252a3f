//! Makes what ships beside the programs: man pages and shell completions, from the same definitions
//! that parse the command lines, the bill of materials, and Debian's changelog; measures what dependencies
//! cost, and makes the page of figures. `make deb` runs it; by hand: `cargo run -p xtask -- assets OUTDIR`.
//!
//! May not live here: anything that an instance needs at run time.

#![forbid(unsafe_code)]

mod cargo;
mod changelog;
mod costs;
mod manual;
mod sbom;

use std::path::{Path, PathBuf};
use std::{fs, io};

use clap::{Command, Parser};
use clap_complete::Shell;
use portcullis_figures::Page;

#[derive(Parser)]
#[command(about = "Makes what ships beside the programs")]
enum Task {
    /// Writes man pages to OUTDIR/man and shell completions to OUTDIR/completions.
    Assets {
        /// An existing folder's content is made anew.
        outdir: PathBuf,
    },
    /// Writes the CycloneDX bill of materials of `portcullis`, without a time unless SOURCE_DATE_EPOCH is set.
    Sbom {
        /// The file.
        file: PathBuf,
    },
    /// Writes Debian's changelog, which leads to ours. SOURCE_DATE_EPOCH is its time.
    Changelog {
        /// The file.
        file: PathBuf,
    },
    /// Writes into docs/dependencies.md what each direct dependency costs in a program that has its symbols.
    Costs {
        /// The program, built as it ships but for `strip`.
        program: PathBuf,
        /// The page with the table.
        page: PathBuf,
    },
    /// Makes a page and plots of what benchmarks kept in FOLDER: FOLDER.md beside it, plots in it.
    Figures {
        /// The folder.
        folder: PathBuf,
    },
}

fn main() -> io::Result<()> {
    match Task::parse() {
        Task::Assets { outdir } => {
            write_assets(
                &outdir,
                [portcullis::cli::command(), portcullis_provision::cli::command()],
            )?;
            let page = manual::man_page(
                "portcullis-operations",
                include_str!("../../../docs/operations.md"),
            )?;
            fs::write(outdir.join("man/portcullis-operations.7"), page)
        }
        Task::Sbom { file } => fs::write(file, sbom::document()?),
        Task::Changelog { file } => fs::write(file, changelog::text()?),
        Task::Costs { program, page } => costs::write(&program, &page),
        Task::Figures { folder } => {
            let page = Page::read(&folder).and_then(|page| page.write(&folder));
            page.map_err(io::Error::other)
        }
    }
}

fn write_assets(outdir: &Path, programs: impl IntoIterator<Item = Command>) -> io::Result<()> {
    let man = empty_folder(outdir.join("man"))?;
    let completions = empty_folder(outdir.join("completions"))?;
    for program in programs {
        // One page per subcommand, recursively: portcullis.1, portcullis-firewall.1, portcullis-firewall-add.1.
        clap_mangen::generate_to(program.clone().disable_help_subcommand(true), &man)?;
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let name = program.get_name().to_owned();
            clap_complete::generate_to(shell, &mut program.clone(), name, &completions)?;
        }
    }
    Ok(())
}

/// Without what an earlier run left: a page of a command that is gone must not ship.
fn empty_folder(path: PathBuf) -> io::Result<PathBuf> {
    match fs::remove_dir_all(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => fs::create_dir_all(&path)?,
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_subcommand_has_a_page_and_old_pages_go() {
        let out = std::env::temp_dir().join(format!("xtask-assets-{}", std::process::id()));
        let gate = |sub| Command::new("gate").subcommand(Command::new("rule").subcommand(Command::new(sub)));
        let names = |folder: &str| {
            let mut names: Vec<_> = fs::read_dir(out.join(folder))
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            names.sort();
            names
        };

        write_assets(&out, [gate("old")]).unwrap();
        assert_eq!(names("man"), ["gate-rule-old.1", "gate-rule.1", "gate.1"]);
        write_assets(&out, [gate("new")]).unwrap();
        assert_eq!(names("man"), ["gate-rule-new.1", "gate-rule.1", "gate.1"]);
        assert_eq!(names("completions"), ["_gate", "gate.bash", "gate.fish"]);
        fs::remove_dir_all(&out).unwrap();
    }
}
