//! `portcullis status`: what an operator looks at. With `--watch`, each change of it.
//!
//! Nothing is asked twice: the daemon tells what changed, and while there is none, the kernel tells when its
//! socket comes back.
//! May not live here: how it looks (`report`, `absent`).

use std::path::Path;
use std::time::Duration;

use clap::Args;
use jiff::Timestamp;
use portcullis_protocol::control::{Answer, Refusal, Request};
use portcullis_protocol::{Report, Situation};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{sleep, timeout};

use super::absent::Absent;
use super::{Failure, Format, Global, SettingsChoice, print, print_json, report, runtime, screen};
use crate::agent::control::{self, Follower};
use crate::config::Settings;
use crate::system::watch::{Topic, Watch};

/// How long the daemon may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often a unit is looked at that systemd is starting or ending.
const SETTLING: Duration = Duration::from_millis(500);
/// How often a terminal is drawn again, so that what it says of ages is not far off.
const AGES: Duration = Duration::from_secs(60);

#[derive(Args, Debug)]
pub struct StatusArguments {
    /// Show each change when it happens, until interrupted; with `--format json` a line each.
    #[arg(long)]
    watch: bool,
    #[command(flatten)]
    choice: SettingsChoice,
}

pub fn run(global: &Global, arguments: &StatusArguments) -> Result<(), Failure> {
    let settings = global.chosen(&arguments.choice)?;
    runtime()?.block_on(async {
        if arguments.watch {
            Watcher::new(&settings, global.format)?.run().await
        } else {
            once(&settings, global.format).await
        }
    })
}

/// The daemon, or why it can't be asked.
enum Daemon {
    There(Follower, Box<Situation>),
    Silent(String),
}

async fn once(settings: &Settings, format: Format) -> Result<(), Failure> {
    let ready = match ask_daemon(&settings.socket).await? {
        Daemon::There(_, situation) => {
            match format {
                Format::Json => print_json(&situation.report)?,
                Format::Table => print(&report::situation_text(
                    &situation,
                    Timestamp::now(),
                    screen::width(),
                ))?,
            }
            situation.report.ready
        }
        Daemon::Silent(why) => {
            let absent = Absent::look(settings, why).await;
            match format {
                Format::Json => print_json(&absent)?,
                Format::Table => print(&absent.text(Timestamp::now(), screen::width()))?,
            }
            false
        }
    };
    if ready { Ok(()) } else { Err(Failure::NotReady) }
}

async fn ask_daemon(socket: &Path) -> Result<Daemon, Failure> {
    let asked = timeout(PATIENCE, async {
        let mut follower = Follower::connect(socket).await?;
        let answer = follower.next().await?;
        Ok::<_, std::io::Error>((follower, answer))
    });
    let place = socket.display();
    match asked.await {
        Ok(Ok((follower, Some(answer)))) => match taken(answer)? {
            Answer::Situation { situation } => Ok(Daemon::There(follower, situation)),
            other => Err(unexpected(&other)),
        },
        Ok(Ok((_, None))) => Ok(Daemon::Silent(format!("{place}: it hung up"))),
        Ok(Err(error)) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            Err(only_root(socket, &error))
        }
        Ok(Err(error)) => Ok(Daemon::Silent(format!("{place}: {error}"))),
        Err(_) => Ok(Daemon::Silent(format!(
            "{place}: no answer within {} s",
            PATIENCE.as_secs()
        ))),
    }
}

/// Whoever looks has gone away; that is an end like any other.
struct Gone;

/// What is shown, and how.
struct Watcher<'a> {
    settings: &'a Settings,
    format: Format,
    terminal: bool,
    resized: Signal,
    /// What was shown last, if that was without a daemon.
    absent: Option<Absent>,
}

impl<'a> Watcher<'a> {
    fn new(settings: &'a Settings, format: Format) -> Result<Self, Failure> {
        let resized = signal(SignalKind::window_change()).map_err(|e| Failure::Failed(e.to_string()))?;
        Ok(Self {
            settings,
            format,
            terminal: format == Format::Table && screen::is_terminal(),
            resized,
            absent: None,
        })
    }

    async fn run(mut self) -> Result<(), Failure> {
        loop {
            // Before the daemon is asked, so that its coming is not missed in between.
            let mut coming = watch_socket(&self.settings.socket)?;
            let seen = match ask_daemon(&self.settings.socket).await? {
                Daemon::There(follower, situation) => self.follow(follower, *situation).await?,
                Daemon::Silent(why) => self.wait(why, &mut coming).await?,
            };
            if let Err(Gone) = seen {
                return Ok(());
            }
        }
    }

    /// Shows what the daemon tells, as long as there is one.
    async fn follow(
        &mut self,
        mut follower: Follower,
        mut now: Situation,
    ) -> Result<Result<(), Gone>, Failure> {
        self.absent = None;
        if !self.show_situation(&now)? {
            return Ok(Err(Gone));
        }
        loop {
            let next = tokio::select! {
                next = follower.next() => next,
                () = self.redraw_due() => {
                    self.show_situation(&now)?;
                    continue;
                }
            };
            let Ok(Some(answer)) = next else { return Ok(Ok(())) };
            let Answer::Situation { situation } = taken(answer)? else {
                return Ok(Ok(()));
            };
            if situation.is_news_after(&now) && !self.show_situation(&situation)? {
                return Ok(Err(Gone));
            }
            now = *situation;
        }
    }

    /// Shows what can be said without a daemon, until something happens where its socket is.
    async fn wait(&mut self, why: String, coming: &mut Watch) -> Result<Result<(), Gone>, Failure> {
        loop {
            let absent = Absent::look(self.settings, why.clone()).await;
            let is_news = self
                .absent
                .as_ref()
                .is_none_or(|before| absent.is_news_after(before));
            if (is_news || self.terminal) && !self.show_absent(&absent)? {
                return Ok(Err(Gone));
            }
            let settling = absent.is_settling();
            self.absent = Some(absent);
            tokio::select! {
                changed = coming.changed() => {
                    changed.map_err(|e| Failure::Failed(format!("inotify: {e}")))?;
                    return Ok(Ok(()));
                }
                () = sleep(SETTLING), if settling => return Ok(Ok(())),
                () = self.redraw_due() => {}
            }
        }
    }

    fn show_situation(&self, situation: &Situation) -> Result<bool, Failure> {
        let text = match self.format {
            Format::Json => line(&situation.report)?,
            Format::Table => report::situation_text(situation, Timestamp::now(), screen::width()),
        };
        self.show(&text)
    }

    fn show_absent(&self, absent: &Absent) -> Result<bool, Failure> {
        let text = match self.format {
            Format::Json => line(absent)?,
            Format::Table => absent.text(Timestamp::now(), screen::width()),
        };
        self.show(&text)
    }

    /// Whether anybody still looks.
    fn show(&self, text: &str) -> Result<bool, Failure> {
        let shown = match (self.terminal, self.format) {
            (true, _) => screen::redraw(text),
            (false, Format::Json) => screen::put(text),
            (false, Format::Table) => screen::put(&format!("{text}\n")),
        };
        shown.map_err(|e| Failure::Failed(e.to_string()))
    }

    /// A terminal is drawn again when it has another size, and before its ages are wrong.
    async fn redraw_due(&mut self) {
        if !self.terminal {
            return std::future::pending().await;
        }
        tokio::select! {
            _ = self.resized.recv() => {}
            () = sleep(AGES) => {}
        }
    }
}

fn line(value: &impl serde::Serialize) -> Result<String, Failure> {
    serde_json::to_string(value).map_err(|e| Failure::Failed(e.to_string()))
}

/// Watches the place of the socket; where its folder is not there, the nearest one above it.
fn watch_socket(socket: &Path) -> Result<Watch, Failure> {
    let failed = |e: std::io::Error| Failure::Failed(format!("{}: {e}", socket.display()));
    let mut watch = Watch::new().map_err(failed)?;
    let mut place = socket;
    loop {
        match (watch.file_and_folder(Topic::Control, place), place.parent()) {
            (Ok(()), _) => return Ok(watch),
            (Err(_), Some(parent)) => place = parent,
            (Err(error), None) => return Err(failed(error)),
        }
    }
}

pub async fn ask_report(socket: &Path) -> Result<Report, Failure> {
    match ask(socket, &Request::Status).await? {
        Answer::Report { report } => Ok(*report),
        other => Err(unexpected(&other)),
    }
}

/// Asks the daemon; a refusal becomes the failure that its kind says.
pub async fn ask(socket: &Path, request: &Request) -> Result<Answer, Failure> {
    let answer = control::call(socket, request)
        .await
        .map_err(|error| match error.kind() {
            std::io::ErrorKind::PermissionDenied => only_root(socket, &error),
            _ => Failure::Failed(format!(
                "{}: {error} (is the daemon running? `portcullis status`)",
                socket.display()
            )),
        })?;
    taken(answer)
}

fn only_root(socket: &Path, error: &std::io::Error) -> Failure {
    Failure::NotPermitted(format!("{}: {error} (only root may ask)", socket.display()))
}

/// The answer, if it is no refusal.
fn taken(answer: Answer) -> Result<Answer, Failure> {
    match answer {
        Answer::Refused {
            kind: Refusal::BadInput | Refusal::NotFound | Refusal::Conflict | Refusal::Dangerous,
            message,
        } => Err(Failure::BadInput(message)),
        Answer::Refused {
            kind: Refusal::NotPermitted,
            message,
        } => Err(Failure::NotPermitted(message)),
        Answer::Refused {
            kind: Refusal::Failed | Refusal::Superseded | Refusal::OtherGeneration | Refusal::StorageFull,
            message,
        } => Err(Failure::Failed(message)),
        answer => Ok(answer),
    }
}

/// A daemon of another version may answer what was not asked.
pub fn unexpected(answer: &Answer) -> Failure {
    let text = format!("{answer:?}");
    Failure::Failed(format!(
        "the daemon answered something else: {}",
        text.chars().take(80).collect::<String>()
    ))
}
