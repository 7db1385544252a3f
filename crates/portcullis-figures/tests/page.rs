//! docs/benchmarks.md and its plots are those of the figures beside it: nobody writes a number by hand.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use portcullis_figures::Page;

#[test]
fn the_benchmarks_page_is_made_of_the_figures_beside_it() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/benchmarks");
    let page = Page::read(&folder).unwrap();
    let shipped = fs::read_to_string(folder.with_extension("md")).unwrap();
    assert_eq!(shipped, page.markdown("benchmarks"), "run `make figures`");
    let plots = page.plots().unwrap();
    for (name, drawing) in &plots {
        assert!(
            fs::read_to_string(folder.join(name)).unwrap() == *drawing,
            "{name}: run `make figures`"
        );
        assert!(
            shipped.contains(&format!("(benchmarks/{name})")),
            "{name} is shown"
        );
    }
    let files = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
    let svgs: BTreeSet<_> = files
        .filter(|file| file.extension().is_some_and(|kind| kind == "svg"))
        .collect();
    assert_eq!(svgs, plots.iter().map(|(name, _)| folder.join(name)).collect());
}
