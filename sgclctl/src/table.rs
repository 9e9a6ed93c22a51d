//! Tables on the terminal: readable without colour, cut at no width.

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};

/// A table with a line below its header; columns but the first are aligned right where they hold figures.
pub(crate) fn text<const N: usize>(header: &[&str; N], rows: Vec<[String; N]>) -> String {
    wide(header, rows.into_iter().map(Vec::from).collect())
}

/// The same of as many columns as the header has.
pub(crate) fn wide(header: &[&str], rows: Vec<Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY).set_content_arrangement(ContentArrangement::Dynamic);
    table.set_header(header.to_vec());
    let figures: Vec<bool> = (0..header.len())
        .map(|at| {
            at > 0 && rows.iter().filter_map(|row| row.get(at)).all(|cell| !cell.starts_with(char::is_alphabetic))
        })
        .collect();
    for row in rows {
        table.add_row(row);
    }
    for (at, _) in figures.iter().enumerate().filter(|(_, figures)| **figures) {
        if let Some(column) = table.column_mut(at) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.to_string()
}
