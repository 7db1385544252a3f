//! The command line: raw arguments to checked ones, one file a subcommand, errors to exit codes.
//!
//! May not live here: anything that a subcommand does beyond asking and printing.

mod absent;
mod access;
mod apply;
mod audit;
mod bug_report;
mod check;
mod denied;
mod explain;
mod exposure;
mod firewall;
mod front;
mod keys;
mod lockdown;
mod plan;
mod report;
mod run;
mod screen;
mod status;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use comfy_table::presets::NOTHING;
use comfy_table::{ContentArrangement, Table};
use portcullis_protocol::Spec;
use portcullis_protocol::spec::MAX_SPEC_BYTES;
use serde::Serialize;

use crate::config::{ConfigError, Settings};
use crate::system::memory;

/// Shut a cloud instance, let in exactly what was named, and prove it.
#[derive(Debug, Parser)]
#[command(
    name = "portcullis",
    version,
    arg_required_else_help = true,
    propagate_version = true
)]
#[command(
    after_help = "Exit codes: 0 done, or all required checks pass; 1 a required check fails, or it \
    failed; 2 bad usage or input; 3 not permitted.\n\nSee also: portcullis.toml(5), SECURITY.md"
)]
struct Arguments {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Args, Debug)]
struct Global {
    /// Settings file; conf.d beside it is read too.
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Control socket of the daemon.
    #[arg(long, global = true, value_name = "FILE")]
    socket: Option<PathBuf>,
    /// How results are printed.
    #[arg(long, global = true, value_enum, default_value_t = Format::Table)]
    format: Format,
    /// Log more.
    #[arg(long, short, global = true)]
    verbose: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// For people.
    Table,
    /// One JSON document on standard output.
    Json,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the daemon: take the spec, enforce it, prove it, keep it so.
    #[command(after_help = "Example:\n  portcullis run --daemonize --pid-file /run/portcullis.pid")]
    Run(run::RunArguments),
    /// Speak to the network for the daemon, without its rights: the HTTPS endpoint and the pushed reports.
    Front(front::FrontArguments),
    /// Shut the instance before its network comes up: the accepted spec, or nothing in at all.
    Lockdown,
    /// Look at everything now and say whether the instance is ready; changes nothing.
    #[command(after_help = "Example:\n  portcullis check --format json | jq .ready")]
    Check(SettingsChoice),
    /// Show what a spec would change, without changing it.
    #[command(after_help = "Example:\n  portcullis plan --spec new.json")]
    Plan(SpecArgument),
    /// Make a spec the accepted one; it is durable and enforced when this returns.
    #[command(
        after_help = "Examples:\n  portcullis apply --spec new.json\n  portcullis apply --spec new.json --confirm 60s"
    )]
    Apply(apply::ApplyArguments),
    /// Keep a change that was applied with --confirm; ask it in a session that is newer than the change.
    #[command(after_help = "Example:\n  ssh gpu-0 sudo portcullis confirm 7")]
    Confirm(apply::ConfirmArguments),
    /// Say what the kernel does with a packet, by which rule, and where that comes from.
    #[command(
        after_help = "Examples:\n  portcullis explain --from 203.0.113.7 --protocol tcp --port 22\n  \
        portcullis explain --from 2001:db8::1 --protocol icmp --interface eth0"
    )]
    Explain(explain::ExplainArguments),
    /// Show and change what is let in.
    #[command(subcommand)]
    Firewall(firewall::FirewallCommand),
    /// Show and change whose keys are let in, and by which host keys this instance is known.
    #[command(subcommand)]
    Keys(keys::KeysCommand),
    /// Show and change who may do what over the HTTPS API.
    #[command(subcommand)]
    Access(access::AccessCommand),
    /// Show who changed what and who was refused, and check that the log of it is whole.
    #[command(
        after_help = "Examples:\n  portcullis audit --since 1h\n  portcullis audit --format json | jq '.records[]'\n  \
        portcullis audit verify"
    )]
    Audit(audit::AuditArguments),
    /// Pack what somebody needs who helps from afar into one file, without secrets.
    #[command(
        after_help = "It works without the daemon, changes nothing, and says what is in it. Look at it before you send it.\n\n\
        Examples:\n  portcullis bug-report\n  portcullis bug-report -o - | ssh laptop 'cat > report.tar.gz'"
    )]
    BugReport(bug_report::BugReportArguments),
    /// Show what fails, since when, why and what to do, and who is let in.
    #[command(
        after_help = "Examples:\n  portcullis status --watch\n  portcullis status --watch --format json | jq -c .ready"
    )]
    Status(status::StatusArguments),
}

#[derive(Args, Debug)]
struct SpecArgument {
    /// The spec, as JSON; `-` reads standard input.
    #[arg(long, value_name = "FILE|-")]
    spec: PathBuf,
}

/// Why a command failed, by exit code; the text is for the operator.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// Exit code 1.
    #[error("{0}")]
    Failed(String),
    /// Exit code 1, with the reason printed already.
    #[error("")]
    NotReady,
    /// Exit code 2.
    #[error("{0}")]
    BadInput(String),
    /// Exit code 3.
    #[error("{0}")]
    NotPermitted(String),
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        Self::BadInput(error.to_string())
    }
}

impl Failure {
    fn exit_code(&self) -> ExitCode {
        ExitCode::from(match self {
            Self::Failed(_) | Self::NotReady => 1,
            Self::BadInput(_) => 2,
            Self::NotPermitted(_) => 3,
        })
    }
}

/// The command line's definition, for man pages and completions.
pub fn command() -> clap::Command {
    Arguments::command()
}

/// Parses the arguments of the process, does what they say, and gives the exit code.
pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // Before anything that is secret is read.
    if let Err(reason) = memory::keep_out_of_cores() {
        eprintln!("portcullis: warning: a crash could write secrets to a disk: {reason}");
    }
    match dispatch(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            let text = failure.to_string();
            if !text.is_empty() {
                eprintln!("portcullis: {text}");
            }
            failure.exit_code()
        }
    }
}

fn dispatch(arguments: Arguments) -> Result<(), Failure> {
    let global = arguments.global;
    crate::identity::install_tls_provider();
    match arguments.command {
        Command::Run(run) => run::run(&global, &run),
        Command::Front(front) => front::run(&global, &front),
        Command::Lockdown => lockdown::run(&global),
        Command::Check(choice) => check::run(&global, &choice),
        Command::Plan(argument) => plan::run(&global, &argument.spec),
        Command::Apply(arguments) => apply::run(&global, &arguments),
        Command::Confirm(arguments) => apply::confirm(&global, &arguments),
        Command::Firewall(command) => firewall::run(&global, &command),
        Command::Keys(command) => keys::run(&global, &command),
        Command::Access(command) => access::run(&global, &command),
        Command::Audit(arguments) => audit::run(&global, &arguments),
        Command::BugReport(arguments) => bug_report::run(&global, &arguments),
        Command::Explain(arguments) => explain::run(&global, &arguments),
        Command::Status(status) => status::run(&global, &status),
    }
}

// Which settings a look at the instance goes by. No doc comment: clap would take it for the command's.
#[derive(Args, Debug)]
struct SettingsChoice {
    /// Go by the default settings, whatever the files say; for when those can't be used.
    #[arg(long, conflicts_with = "config")]
    default_settings: bool,
}

impl Global {
    /// The settings that were chosen, with the socket that was named.
    fn chosen(&self, choice: &SettingsChoice) -> Result<Settings, Failure> {
        match choice.default_settings {
            true => Ok(self.with_socket(Settings::default())),
            false => self.settings(),
        }
    }

    fn settings(&self) -> Result<Settings, Failure> {
        Ok(self.with_socket(Settings::load(self.config.as_deref())?))
    }

    fn with_socket(&self, mut settings: Settings) -> Settings {
        if let Some(socket) = &self.socket {
            settings.socket.clone_from(socket);
        }
        settings
    }
}

fn require_root(what: &str) -> Result<(), Failure> {
    if nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    Err(Failure::NotPermitted(format!("{what} needs root")))
}

/// One thread: the daemon and its commands wait more than they work.
fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|e| Failure::Failed(format!("the runtime can't start: {e}")))
}

fn read_spec(path: &Path) -> Result<Spec, Failure> {
    let (name, bytes) = read_input(path, MAX_SPEC_BYTES as u64 + 1)?;
    Spec::from_json(&bytes).map_err(|e| Failure::BadInput(format!("{name}: {e}")))
}

/// Up to `limit` bytes of a file, or of standard input for `-`, and what to call it.
fn read_input(path: &Path, limit: u64) -> Result<(String, Vec<u8>), Failure> {
    use std::io::Read;
    let mut bytes = Vec::new();
    let (name, read) = if path == Path::new("-") {
        let read = std::io::stdin().lock().take(limit).read_to_end(&mut bytes);
        ("standard input".to_owned(), read)
    } else {
        let read = std::fs::File::open(path).and_then(|file| file.take(limit).read_to_end(&mut bytes));
        (path.display().to_string(), read)
    };
    match read {
        Ok(_) => Ok((name, bytes)),
        Err(error) => Err(Failure::BadInput(format!("{name}: {error}"))),
    }
}

/// A table without lines, as wide as its content.
fn plain_table<const N: usize>(header: [&str; N]) -> Table {
    let mut table = Table::new();
    table
        .load_style(NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled)
        .set_header(header);
    table
}

/// Prints a result as the one JSON document of standard output.
fn print_json(value: &impl Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value).map_err(|e| Failure::Failed(e.to_string()))?;
    print(&text)
}

/// Prints to standard output; a reader that has seen enough is no failure.
fn print(text: &str) -> Result<(), Failure> {
    use std::io::{ErrorKind, Write};
    match writeln!(anstream::stdout().lock(), "{text}") {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(Failure::Failed(error.to_string())),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_definition_is_sound() {
        super::command().debug_assert();
    }
}
