//! Tables as drawings: bars with their spread, and lines over sizes.
//!
//! May not live here: words that are not in the table.

use plotters::coord::Shift;
use plotters::coord::ranged1d::{AsRangedCoord, ValueFormatter};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::chapter::{Cell, Figure, Plot, Row, Side, Table, Unit};

const WIDTH: u32 = 940;
const TITLE: u32 = 30;
const BAR: u32 = 26;
const AXIS: u32 = 34;
/// Room for the names of rows, and for what stands after a bar.
const NAMES: u32 = 330;
const AFTER: u32 = 90;
const LINES_HEIGHT: u32 = 420;
const LEGEND: u32 = 340;
const FONT: &str = "sans-serif";

/// Ours, in turns where rows are lines.
const OURS: [RGBColor; 3] = [
    RGBColor(11, 79, 108),
    RGBColor(63, 131, 160),
    RGBColor(128, 182, 204),
];
const FLOOR: RGBColor = RGBColor(150, 150, 150);
/// Others, in turns; told apart also by those who see red and green alike (Okabe and Ito's palette).
const THEIRS: [RGBColor; 5] = [
    RGBColor(230, 159, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(213, 94, 0),
    RGBColor(86, 180, 233),
];

type Drawn = Result<(), Box<dyn std::error::Error>>;
type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// The table as SVG.
pub fn draw(table: &Table) -> Result<String, Box<dyn std::error::Error>> {
    let mut text = String::new();
    let height = match &table.plot {
        Plot::None => 0,
        Plot::Bars { columns, .. } => columns.len() as u32 * panel_height(table),
        Plot::Lines { .. } => LINES_HEIGHT,
    };
    {
        let area = SVGBackend::with_string(&mut text, (WIDTH, height.max(1))).into_drawing_area();
        // A page may be dark.
        area.fill(&WHITE)?;
        match &table.plot {
            Plot::None => {}
            Plot::Bars { columns, logarithmic } => {
                let panels = area.split_evenly((columns.len(), 1));
                for (panel, column) in panels.iter().zip(columns) {
                    bars(panel, table, *column, *logarithmic)?;
                }
            }
            Plot::Lines { name, at } => lines(&area, table, name, at)?,
        }
        area.present()?;
    }
    Ok(text)
}

fn panel_height(table: &Table) -> u32 {
    TITLE + AXIS + BAR * table.rows.len() as u32 + 12
}

/// Without the marks of Markdown.
fn plain(name: &str) -> String {
    name.replace(['`', '*'], "")
}

/// Each row's colour.
fn colours(rows: &[Row]) -> Vec<RGBColor> {
    let (mut ours, mut theirs) = (OURS.iter().cycle(), THEIRS.iter().cycle());
    let colour = |row: &Row| match row.side {
        Side::Ours => *ours.next().unwrap_or(&FLOOR),
        Side::Floor => FLOOR,
        Side::Theirs => *theirs.next().unwrap_or(&FLOOR),
    };
    rows.iter().map(colour).collect()
}

fn figures(table: &Table, column: usize) -> impl Iterator<Item = &Figure> {
    table
        .rows
        .iter()
        .filter_map(move |row| match row.cells.get(column) {
            Some(Cell::Measured(figure)) if figure.median > 0.0 => Some(figure),
            _ => None,
        })
}

fn bars(area: &Area<'_>, table: &Table, column: usize, logarithmic: bool) -> Drawn {
    let most = figures(table, column)
        .map(|figure| figure.most)
        .fold(f64::MIN_POSITIVE, f64::max);
    let least =
        figures(table, column).map(|figure| figure.median.min(figure.least.max(figure.median / 10.0)));
    let least = least.fold(most, f64::min);
    if logarithmic {
        let low = 10_f64.powf((least / 2.0).log10().floor());
        panel(area, table, column, (low..most * 1.3).log_scale(), [low, most])
    } else {
        panel(area, table, column, 0.0..most * 1.05, [0.0, most])
    }
}

/// Median, least and most of a bar; for good is as long as there is room.
fn extent(cell: &Cell, high: f64) -> Option<(f64, f64, f64)> {
    match cell {
        Cell::Measured(figure) if figure.median > 0.0 => Some((figure.median, figure.least, figure.most)),
        Cell::ForGood(_) => Some((high, high, high)),
        _ => None,
    }
}

/// One column's bars, the first row at the top.
fn panel<X>(area: &Area<'_>, table: &Table, column: usize, scale: X, [low, high]: [f64; 2]) -> Drawn
where
    X: AsRangedCoord<Value = f64>,
    X::CoordDescType: ValueFormatter<f64>,
{
    let unit = table.columns[column].unit;
    let title = format!("{}: {}", plain(&table.title), plain(&table.columns[column].name));
    let count = table.rows.len();
    let mut chart = ChartBuilder::on(area)
        .caption(title, (FONT, 17))
        .margin_right(AFTER)
        .margin_left(6)
        .x_label_area_size(AXIS)
        .y_label_area_size(NAMES)
        .build_cartesian_2d(scale, 0.0..count as f64)?;
    let show = |value: &f64| unit.show(*value);
    chart
        .configure_mesh()
        .disable_y_mesh()
        .disable_y_axis()
        .y_labels(0)
        .x_labels(7)
        .x_label_formatter(&show)
        .x_label_style((FONT, 12))
        .light_line_style(TRANSPARENT)
        .draw()?;
    for (number, (row, colour)) in table.rows.iter().zip(colours(&table.rows)).enumerate() {
        let middle = count as f64 - number as f64 - 0.5;
        let cell = row.cells.get(column).unwrap_or(&Cell::Nothing);
        let said = cell.show(unit);
        let mut end = low;
        if let Some((median, least, most)) = extent(cell, high) {
            let bar = [(low, middle - 0.36), (median.max(low), middle + 0.36)];
            chart.draw_series([Rectangle::new(bar, colour.filled())])?;
            end = most.max(low);
            let spread = vec![(least.max(low), middle), (end, middle)];
            chart.draw_series([PathElement::new(spread, BLACK.stroke_width(1))])?;
        }
        let after = (FONT, 13)
            .into_font()
            .color(&BLACK)
            .pos(Pos::new(HPos::Left, VPos::Center));
        chart.draw_series([EmptyElement::at((end, middle)) + Text::new(said, (5, 0), after)])?;
        let name = (FONT, 13)
            .into_font()
            .color(&BLACK)
            .pos(Pos::new(HPos::Right, VPos::Center));
        chart.draw_series([EmptyElement::at((low, middle)) + Text::new(plain(&row.name), (-8, 0), name)])?;
    }
    Ok(())
}

/// A line for each row that has figures.
fn lines(area: &Area<'_>, table: &Table, name: &str, at: &[f64]) -> Drawn {
    let all: Vec<&Figure> = (0..table.columns.len())
        .flat_map(|column| figures(table, column))
        .collect();
    let most = all
        .iter()
        .map(|figure| figure.most)
        .fold(f64::MIN_POSITIVE, f64::max);
    let least = all.iter().map(|figure| figure.median).fold(most, f64::min);
    let (first, last) = (
        at.first().copied().unwrap_or(1.0),
        at.last().copied().unwrap_or(10.0),
    );
    let unit = table.columns.first().map_or(Unit::Count, |column| column.unit);
    let (left, right) = area.split_horizontally(WIDTH - LEGEND);
    let mut chart = ChartBuilder::on(&left)
        .caption(plain(&table.title), (FONT, 17))
        .margin(8)
        .margin_right(20)
        .x_label_area_size(AXIS + 8)
        .y_label_area_size(80)
        .build_cartesian_2d((first..last).log_scale(), (least / 1.5..most * 1.5).log_scale())?;
    chart
        .configure_mesh()
        .x_desc(name)
        .x_label_formatter(&|value| Unit::Count.show(*value))
        .y_label_formatter(&|value| unit.show(*value))
        .light_line_style(TRANSPARENT)
        .label_style((FONT, 13))
        .draw()?;
    let mut named = 0;
    for (row, colour) in table.rows.iter().zip(colours(&table.rows)) {
        let points: Vec<(f64, f64)> = at
            .iter()
            .zip(&row.cells)
            .filter_map(|(at, cell)| match cell {
                Cell::Measured(figure) => Some((*at, figure.median)),
                _ => None,
            })
            .collect();
        if points.is_empty() {
            continue;
        }
        let width = if row.side == Side::Ours { 3 } else { 2 };
        let style = colour.stroke_width(width);
        chart.draw_series(points.iter().map(|point| Circle::new(*point, 3, colour.filled())))?;
        chart.draw_series(LineSeries::new(points, style))?;
        let at = TITLE as i32 + 24 * named;
        named += 1;
        right.draw(&PathElement::new(vec![(4, at), (24, at)], style))?;
        let name = (FONT, 13)
            .into_font()
            .color(&BLACK)
            .pos(Pos::new(HPos::Left, VPos::Center));
        right.draw(&Text::new(plain(&row.name), (32, at), name))?;
    }
    Ok(())
}
