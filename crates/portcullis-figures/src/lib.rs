//! What benchmarks found: [`Samples`] become [`Table`]s of a [`Chapter`], chapters become a page with plots.
//!
//! Data goes one way: samples → figures → chapter → page. A chapter is kept as JSON between the two, so that
//! the page can be made anew without measuring.
//! May not live here: measuring, and anything that an instance needs.

#![forbid(unsafe_code)]

mod chapter;
mod page;
mod plot;
mod samples;
mod verdict;

pub use chapter::{Better, Cell, Chapter, Column, Figure, Machine, Plot, Row, Side, Table, Unit};
pub use page::{Page, PageError};
pub use samples::{Samples, time, timed, times};
