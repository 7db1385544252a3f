//! Telling the operator what is being done: a spinner on a terminal, lines elsewhere, or nothing.
//!
//! May not live here: results. Those go to standard output; this goes to standard error.

use std::io::IsTerminal as _;
use std::sync::Mutex;
use std::time::Duration;

use indicatif::ProgressBar;

/// Hears what is being done.
pub trait Progress: Sync {
    /// The present step, in a few words. May be called with the same words again.
    fn step(&self, message: &str);
}

/// Says nothing.
pub struct Quiet;

impl Progress for Quiet {
    fn step(&self, _: &str) {}
}

/// Says each new step on standard error.
pub struct Console {
    spinner: Option<ProgressBar>,
    last: Mutex<String>,
}

impl Console {
    /// A spinner if standard error is a terminal, else a line per step.
    pub fn new() -> Self {
        let spinner = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new_spinner();
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        Self {
            spinner,
            last: Mutex::default(),
        }
    }
}

impl Default for Console {
    fn default() -> Self {
        Self::new()
    }
}

impl Progress for Console {
    fn step(&self, message: &str) {
        if let Some(bar) = &self.spinner {
            bar.set_message(message.to_owned());
            return;
        }
        let mut last = self
            .last
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        if *last != message {
            eprintln!("{message}");
            message.clone_into(&mut last);
        }
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        if let Some(bar) = &self.spinner {
            bar.finish_and_clear();
        }
    }
}
