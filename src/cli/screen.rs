//! Standard output: how wide it is, and drawing on it again.
//!
//! May not live here: what is drawn.

use std::io::{self, ErrorKind, IsTerminal, Write};

use terminal_size::{Height, Width, terminal_size_of};

/// No terminal is narrower for us: text would be a column of words.
const NARROWEST: usize = 40;

/// Columns of the terminal; without one, lines are as long as they are, for whoever searches them.
pub fn width() -> usize {
    size().map_or(usize::MAX, |(width, _)| width.max(NARROWEST))
}

fn size() -> Option<(usize, usize)> {
    let (Width(width), Height(height)) = terminal_size_of(io::stdout())?;
    Some((width.into(), height.into()))
}

/// Whether what was drawn can be drawn over.
pub fn is_terminal() -> bool {
    io::stdout().is_terminal() && std::env::var_os("TERM").is_some_and(|term| term != "dumb")
}

/// Draws over what was there before. What does not fit is left out from the bottom, for what matters is on
/// top. Whether anybody still looks.
///
/// # Errors
/// As write(2).
pub fn redraw(text: &str) -> io::Result<bool> {
    let height = size().map_or(usize::MAX, |(_, height)| height.max(3));
    let count = text.lines().count();
    let mut shown = text.to_owned();
    if count >= height {
        let kept = height - 2;
        let lines: Vec<&str> = text.lines().take(kept).collect();
        shown = format!("{}\n… {} more lines", lines.join("\n"), count - kept);
    }
    // Straight to the terminal: what leaves colours out would leave this out too.
    let mut raw = io::stdout().lock();
    looked_at(raw.write_all(b"\x1b[H\x1b[2J"))?;
    drop(raw);
    put(&shown)
}

/// Prints one more text. Whether anybody still looks.
///
/// # Errors
/// As write(2).
pub fn put(text: &str) -> io::Result<bool> {
    let mut out = anstream::stdout().lock();
    looked_at(writeln!(out, "{text}").and_then(|()| out.flush()))
}

fn looked_at(written: io::Result<()>) -> io::Result<bool> {
    match written {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(error),
    }
}
