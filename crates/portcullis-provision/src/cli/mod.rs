//! The command line of `portcullisctl`: what it accepts, and which exit code follows.
//!
//! May not live here: what a command does. Each has a file, and the library does the work.

mod ca;
mod changes;
mod demo;
mod health;
mod known_hosts;
mod launch;
mod output;
mod outside;
mod userdata;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser, Subcommand, ValueEnum};

use crate::Result;
use crate::local::{DEFAULT_STATE, LocalProvider};
use crate::progress::{Console, Progress, Quiet};

/// Launches instances, waits until they are proven ready, and changes them afterwards
#[derive(Parser)]
#[command(
    name = "portcullisctl",
    version,
    arg_required_else_help = true,
    after_help = "\
Exit codes: 0 done, 1 failed or not ready, 2 bad usage or input, 3 not permitted.

Examples:
  portcullisctl launch gpu-0 --cluster c-1 --key ~/.ssh/id_ed25519.pub --allow 22/tcp --wait
  portcullisctl health gpu-0 --watch
  portcullisctl terminate --all"
)]
struct Cli {
    /// How results are printed on standard output
    #[arg(long, global = true, value_enum, default_value = "table")]
    format: Format,
    /// Where local instances and images are kept
    #[arg(long, global = true, value_name = "DIR", default_value = DEFAULT_STATE)]
    state_dir: PathBuf,
    #[command(subcommand)]
    command: Command,
}

/// How results are printed.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// For people.
    Table,
    /// One JSON document.
    Json,
}

#[derive(Subcommand)]
enum Command {
    /// Print the cloud-init user-data for a spec (its secrets are in it)
    Userdata(userdata::Arguments),
    /// Launch instances; members of a cluster are told of each other
    Launch(launch::Launch),
    /// List instances
    List,
    /// Wait until an instance is proven ready
    Wait(health::Wait),
    /// Show health reports, fetched over mutual TLS
    Health(health::Health),
    /// Show and change what an instance's firewall lets in
    #[command(subcommand)]
    Firewall(changes::Firewall),
    /// Show and change the keys that log in to an instance
    #[command(subcommand)]
    Keys(changes::Keys),
    /// Show and change who belongs to a cluster
    #[command(subcommand)]
    Cluster(changes::Cluster),
    /// Print verified lines for known_hosts
    KnownHosts(known_hosts::Arguments),
    /// Log in to an instance with ssh, which trusts its verified host keys and no others
    Ssh(known_hosts::SshArguments),
    /// Run a program in the network of local instances, outside of all of them
    Outside(outside::Arguments),
    /// Reboot an instance and wait until it is up
    Reboot(launch::Reboot),
    /// End instances and remove all there is of them
    Terminate(launch::Terminate),
    /// The authority that signs the control plane's client certificates
    Ca(ca::Arguments),
    /// Show on real local instances who reaches what, and take all down again
    Demo(demo::Demo),
}

/// What all commands get.
struct Context {
    format: Format,
    state_dir: PathBuf,
}

impl Context {
    fn provider(&self) -> Result<LocalProvider> {
        LocalProvider::open(&self.state_dir)
    }

    fn json(&self) -> bool {
        self.format == Format::Json
    }

    /// Progress for people; none beside JSON.
    fn progress(&self) -> Box<dyn Progress> {
        if self.json() {
            Box::new(Quiet)
        } else {
            Box::new(Console::new())
        }
    }
}

/// The definition of the command line, for man pages and completions.
pub fn command() -> clap::Command {
    Cli::command()
}

/// Runs the command that the process was called with.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let context = Context {
        format: cli.format,
        state_dir: cli.state_dir,
    };
    let result = match cli.command {
        Command::Userdata(arguments) => arguments.run(),
        Command::Launch(launch) => launch.run(&context),
        Command::List => health::list(&context),
        Command::Wait(wait) => wait.run(&context),
        Command::Health(health) => health.run(&context),
        Command::Firewall(firewall) => firewall.run(&context),
        Command::Keys(keys) => keys.run(&context),
        Command::Cluster(cluster) => cluster.run(&context),
        Command::KnownHosts(arguments) => arguments.run(&context),
        Command::Ssh(arguments) => arguments.run(&context),
        Command::Outside(arguments) => arguments.run(&context),
        Command::Reboot(reboot) => reboot.run(&context),
        Command::Terminate(terminate) => terminate.run(&context),
        Command::Ca(arguments) => arguments.run(&context),
        Command::Demo(demo) => demo.run(&context),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("portcullisctl: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

/// A time on the command line: `90`, `90s`, `5m`, `1h`, `7d`.
fn duration(text: &str) -> Result<std::time::Duration, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "" | "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86_400,
        other => return Err(format!("{other:?} is not a unit of time: use s, m, h or d")),
    };
    let number: u64 = digits
        .parse()
        .map_err(|_| format!("{text:?} is not a time: write it like 90s or 5m"))?;
    let seconds = number
        .checked_mul(unit)
        .ok_or_else(|| format!("{text:?} is too long"))?;
    Ok(std::time::Duration::from_secs(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_is_sound() {
        command().debug_assert();
    }

    #[test]
    fn times() {
        for (text, seconds) in [
            ("90", 90),
            ("90s", 90),
            ("5m", 300),
            ("1h", 3600),
            ("7d", 604_800),
        ] {
            assert_eq!(duration(text).unwrap().as_secs(), seconds);
        }
        for bad in [
            "",
            "s",
            "-1s",
            "1y",
            "99999999999999999999s",
            "18446744073709551615d",
        ] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }
}
