//! Who did as well as ours, or better: the page has to say it, so it is found from the figures.
//!
//! May not live here: how it is written (`page`).

use crate::chapter::{Better, Row, Side, Table};

/// Medians that differ by less than this share are as good as each other: runs differ by as much.
const AS_GOOD: f64 = 0.1;

/// Another's figure that is as good as ours, or better.
#[derive(Debug, PartialEq)]
pub struct Verdict<'a> {
    /// Whose.
    pub row: &'a Row,
    /// Number of the column.
    pub column: usize,
    /// Better, not only as good.
    pub better: bool,
}

impl PartialEq for Row {
    fn eq(&self, other: &Self) -> bool {
        (&self.name, &self.cells) == (&other.name, &other.cells)
    }
}

/// All of them, row by row.
pub fn verdicts(table: &Table) -> Vec<Verdict<'_>> {
    let theirs = table.rows.iter().filter(|row| row.side == Side::Theirs);
    let each = theirs.flat_map(|row| (0..table.columns.len()).map(move |column| (row, column)));
    each.filter_map(|(row, column)| {
        let theirs = row.cells.get(column)?.value()?;
        let ours = table.counterpart(row)?.cells.get(column)?.value()?;
        let better = is_better(table.columns[column].better, theirs, ours)?;
        Some(Verdict { row, column, better })
    })
    .collect()
}

/// Whether theirs is better than ours; `None` if it is worse.
fn is_better(better: Better, theirs: f64, ours: f64) -> Option<bool> {
    let (theirs, ours) = match better {
        Better::Less => (theirs, ours),
        Better::More => (-theirs, -ours),
        Better::Neither => return None,
    };
    let margin = AS_GOOD * ours.abs();
    if theirs == ours {
        // For good is as bad as for good.
        return (theirs != f64::INFINITY).then_some(false);
    }
    if theirs < ours - margin {
        Some(true)
    } else {
        (theirs <= ours + margin).then_some(false)
    }
}

/// The best of the others in a column, as a row.
pub fn best_of_others(table: &Table, column: usize) -> Option<&Row> {
    let better = table.columns.get(column)?.better;
    let theirs = table.rows.iter().filter(|row| row.side == Side::Theirs);
    let comparable = theirs.filter(|row| {
        let first = table.rows.iter().find(|row| row.side == Side::Ours);
        table.counterpart(row).map(|row| &row.name) == first.map(|row| &row.name)
    });
    let valued = comparable.filter_map(|row| Some((row, row.cells.get(column)?.value()?)));
    let key = |value: f64| if better == Better::More { -value } else { value };
    valued
        .min_by(|(_, a), (_, b)| key(*a).total_cmp(&key(*b)))
        .map(|(row, _)| row)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::chapter::{Cell, Column, Plot, Unit};

    fn table(better: Better, ours: Cell, theirs: Cell) -> Table {
        Table {
            title: "t".to_owned(),
            method: String::new(),
            columns: vec![Column::of("c", Unit::Seconds, better)],
            rows: vec![Row::ours("ours", vec![ours]), Row::theirs("theirs", vec![theirs])],
            plot: Plot::None,
        }
    }

    fn said(better: Better, ours: Cell, theirs: Cell) -> Option<bool> {
        verdicts(&table(better, ours, theirs))
            .first()
            .map(|verdict| verdict.better)
    }

    #[test]
    fn better_as_good_and_worse_are_told_apart() {
        use Better::{Less, More, Neither};
        let one = Cell::one;
        assert_eq!(said(Less, one(1.0), one(0.8)), Some(true));
        assert_eq!(said(Less, one(1.0), one(0.95)), Some(false));
        assert_eq!(said(Less, one(1.0), one(1.05)), Some(false));
        assert_eq!(said(Less, one(1.0), one(1.2)), None);
        assert_eq!(said(More, one(1.0), one(1.2)), Some(true));
        assert_eq!(said(More, one(1.0), one(0.8)), None);
        assert_eq!(said(Neither, one(1.0), one(0.1)), None);
        assert_eq!(said(Less, Cell::Never(9), Cell::Never(9)), Some(false));
        assert_eq!(said(Less, Cell::Never(9), one(0.001)), None);
        assert_eq!(said(Less, one(0.001), Cell::Never(9)), Some(true));
        assert_eq!(said(Less, Cell::Never(9), Cell::ForGood(3.0)), None);
        assert_eq!(said(Less, Cell::ForGood(3.0), Cell::ForGood(3.0)), None);
        assert_eq!(
            said(Less, one(1.0), Cell::Said("it did not answer".to_owned())),
            None
        );
    }

    #[test]
    fn a_row_that_names_its_counterpart_is_compared_with_it() {
        let mut table = table(Better::Less, Cell::one(1.0), Cell::one(2.0));
        table.rows.push(Row::ours("larger", vec![Cell::one(4.0)]));
        assert!(verdicts(&table).is_empty());
        table.rows[1].beside = Some("larger".to_owned());
        assert!(verdicts(&table)[0].better);
        assert!(
            best_of_others(&table, 0).is_none(),
            "not beside the first of ours"
        );
    }
}
