//! Where a mask begins to pay: the passes of single layers with 50 to 99.5 % of their weights pruned, in each way that
//! a layer can be multiplied, beside the dense one. Masks are random, or those of groups of 32 rows that keep the same
//! columns, as `dilt structure --method regroup` makes them.
//!
//! `cargo bench --bench crossover [-- --out FOLDER] [--precision f32|bf16] [--only TEXT] [--quick]`, on the device that
//! `DILT_BENCH_DEVICE` names (auto, host, cuda; auto if not set), writes FOLDER/crossover.csv, of bf16 crossover-bf16.csv (for each layer, mask, sparsity and way: milliseconds of
//! the three passes, least of several runs in turn with the others) and a figure, .svg (the speed of all three, as
//! a multiple of the dense way's: what lies below 1 loses). FOLDER is target/crossover if it is not given. `--only`
//! takes the layers whose names contain TEXT; `--quick` two layers, three sparsities and one run.

mod layers;

use std::fmt::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use dilt::device::{Device, Precision};
use dilt::mask::Mask;
use dilt::nn::ways::{MaskedLayer, Trial, Way};
use dilt::ops::conv::ConvShape;
use dilt::ops::kept::{Pass, group_rows};
use layers::layers;
use plotters::prelude::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const SPARSITIES: [f64; 10] = [0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995];
const MASKS: [&str; 2] = ["random", "regrouped"];
/// Rows that keep the same columns, at least.
const REGROUPED: usize = 32;
const RUNS: usize = 7;
/// A cell that has taken so long has two runs at least, and no more.
const LONG: Duration = Duration::from_secs(1);

/// Regrouped for groups of `rows` rows.
fn mask(kind: &str, shape: &ConvShape, sparsity: f64, rows: usize) -> Mask {
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let columns = shape.weight_len() / shape.filters();
    let groups = shape.filters().div_ceil(REGROUPED.max(rows));
    let kept: Vec<Vec<bool>> =
        (0..groups).map(|_| (0..columns).map(|_| !rng.random_bool(sparsity)).collect()).collect();
    Mask::from_fn(&[shape.filters(), columns], |place| match kind {
        "random" => !rng.random_bool(sparsity),
        // Rows of a group do not stand side by side.
        _ => kept[place / columns % groups][place % columns],
    })
}

/// What one layer takes under one mask in one way.
struct Cell {
    layer: String,
    mask: &'static str,
    sparsity: f64,
    way: Way,
    multiplied: [usize; 3],
    /// Forward, input gradient, weight gradient.
    seconds: Vec<f64>,
}

fn measure(
    device: &Device,
    name: &str,
    trial: &mut Trial,
    layer: &MaskedLayer,
    runs: usize,
) -> dilt::Result<Vec<(Way, Vec<f64>)>> {
    let lists = Way::ALL.map(|way| layer.lists(device, way, &Pass::ALL, false));
    let mut ways = Vec::new();
    for (way, lists) in Way::ALL.into_iter().zip(lists) {
        ways.push((way, lists?, vec![f64::INFINITY; 3]));
    }
    let start = Instant::now();
    for run in 0..=runs {
        if run > 1 && start.elapsed() > LONG {
            break;
        }
        for (_, lists, least) in &mut ways {
            let seconds = trial.time(lists.as_mut(), &Pass::ALL)?;
            least.iter_mut().zip(seconds).for_each(|(least, seconds)| *least = least.min(seconds));
        }
    }
    eprint!("\r{name:<60}");
    Ok(ways.into_iter().map(|(way, _, seconds)| (way, seconds)).collect())
}

fn main() -> anyhow::Result<()> {
    // As the program does.
    rayon::ThreadPoolBuilder::new().use_current_thread().build_global().expect("nothing has run yet");
    let arguments: Vec<String> = std::env::args().collect();
    let quick = arguments.iter().any(|argument| argument == "--quick");
    let value = |name: &str| {
        let at = arguments.iter().position(|argument| argument == name);
        at.and_then(|at| arguments.get(at + 1)).map(String::as_str)
    };
    let (out, only) = (value("--out").unwrap_or("target/crossover"), value("--only").unwrap_or(""));
    let precision = match value("--precision").unwrap_or("f32") {
        "f32" => Precision::F32,
        "bf16" => Precision::Bf16,
        other => anyhow::bail!("--precision: expected f32 or bf16, got {other}"),
    };
    let device = Device::open(&std::env::var("DILT_BENCH_DEVICE").unwrap_or_else(|_| "auto".into()))?;
    let mut cells = Vec::new();
    let layers = layers()?.into_iter().filter(|(name, _)| name.contains(only));
    for (name, shape) in layers.take(if quick { 2 } else { usize::MAX }) {
        let mut trial = Trial::new(&device, &shape, precision)?;
        for sparsity in SPARSITIES.into_iter().step_by(if quick { 4 } else { 1 }) {
            for kind in MASKS {
                let rows = group_rows(&device, &shape, precision);
                let layer = MaskedLayer::new(&shape, precision, &mask(kind, &shape, sparsity, rows), rows);
                let what = format!("{name}, {kind}, {:.1} % pruned", 100.0 * sparsity);
                for (way, seconds) in measure(&device, &what, &mut trial, &layer, if quick { 1 } else { RUNS })? {
                    let multiplied = layer.multiplied(way);
                    cells.push(Cell { layer: name.clone(), mask: kind, sparsity, way, multiplied, seconds });
                }
            }
        }
    }
    eprintln!();
    std::fs::create_dir_all(out).with_context(|| out.to_owned())?;
    let [table, figure] = ["csv", "svg"].map(|kind| {
        let precision = if precision.is_f32() { "" } else { "-bf16" };
        let name = format!("crossover{precision}{}", if device.wgmma() { "-wgmma" } else { "" });
        Path::new(out).join(format!("{name}.{kind}"))
    });
    std::fs::write(&table, csv(&cells)).with_context(|| table.display().to_string())?;
    draw(&figure, &format!("{}, {}", device.description(), precision.name()), &cells)
        .with_context(|| figure.display().to_string())?;
    println!("{}\n{}", table.display(), figure.display());
    Ok(())
}

fn csv(cells: &[Cell]) -> String {
    let mut text = String::from(
        "layer,mask,sparsity,way,multiplied_forward,multiplied_input_gradient,forward_ms,input_gradient_ms,weight_gradient_ms\n",
    );
    for Cell { layer, mask, sparsity, way, multiplied, seconds } in cells {
        let [forward, input, weight] = [0, 1, 2].map(|pass| 1e3 * seconds[pass]);
        let [own, transposed, _] = multiplied;
        let way = way.name();
        writeln!(text, "{layer},{mask},{sparsity},{way},{own},{transposed},{forward:.4},{input:.4},{weight:.4}")
            .expect("memory is written");
    }
    text
}

/// The lines of a panel, in colours that a colour-blind reader tells apart.
const LINES: [(Way, &str, RGBColor); 4] = [
    (Way::Direct, "random", RGBColor(213, 94, 0)),
    (Way::Direct, "regrouped", RGBColor(230, 159, 0)),
    (Way::Groups, "random", RGBColor(0, 114, 178)),
    (Way::Groups, "regrouped", RGBColor(0, 158, 115)),
];

/// Where a sparsity stands on the axis: one step further, half the weights.
fn place(sparsity: f64) -> f64 {
    -(1.0 - sparsity).log2()
}

/// A panel for each layer, losing cells marked; lines for each mask and way, over the logarithm of what is left.
fn draw(path: &Path, device: &str, cells: &[Cell]) -> anyhow::Result<()> {
    const COLUMNS: usize = 3;
    let mut layers: Vec<&str> = cells.iter().map(|cell| &cell.layer[..]).collect();
    layers.dedup();
    let rows = layers.len().div_ceil(COLUMNS);
    let area = SVGBackend::new(path, (1200, 330 * rows as u32 + 40)).into_drawing_area();
    area.fill(&WHITE)?;
    let title = format!("All three passes, times as fast as dense: {device}");
    let panels = area.titled(&title, ("sans-serif", 20))?.split_evenly((rows, COLUMNS));
    for (panel, layer) in panels.iter().zip(&layers) {
        let own: Vec<&Cell> = cells.iter().filter(|cell| cell.layer == *layer).collect();
        let total = |cell: &Cell| cell.seconds.iter().sum::<f64>();
        let gain = |cell: &Cell| {
            let dense = own
                .iter()
                .find(|dense| (dense.way, dense.mask, dense.sparsity) == (Way::Dense, cell.mask, cell.sparsity));
            total(dense.expect("each mask has a dense cell")) / total(cell)
        };
        let least = 0.8 * own.iter().map(|cell| gain(cell)).fold(1.0, f64::min);
        let most = 1.5 * own.iter().map(|cell| gain(cell)).fold(1.0, f64::max);
        let mut chart = ChartBuilder::on(panel)
            .caption(layer, ("sans-serif", 15))
            .margin(8)
            .x_label_area_size(36)
            .y_label_area_size(36)
            .build_cartesian_2d(
                place(SPARSITIES[0])..place(SPARSITIES[SPARSITIES.len() - 1]),
                (least..most).log_scale(),
            )?;
        chart
            .configure_mesh()
            .x_labels(6)
            .x_label_formatter(&|x| {
                format!("{:.3}", 100.0 * (1.0 - 0.5f64.powf(*x))).trim_end_matches(['0', '.']).into()
            })
            .y_label_formatter(&|y| format!("{y}"))
            .x_desc("% of weights pruned")
            .light_line_style(TRANSPARENT)
            .draw()?;
        let even = [place(SPARSITIES[0]), place(SPARSITIES[SPARSITIES.len() - 1])].map(|x| (x, 1.0));
        chart.draw_series(LineSeries::new(even, &BLACK))?;
        for (way, mask, style) in LINES {
            let points: Vec<(f64, f64)> = own
                .iter()
                .filter(|cell| (cell.way, cell.mask) == (way, mask))
                .map(|cell| (place(cell.sparsity), gain(cell)))
                .collect();
            let losing: Vec<(f64, f64)> = points.iter().copied().filter(|(_, gain)| *gain < 1.0).collect();
            chart
                .draw_series(LineSeries::new(points, style.stroke_width(2)))?
                .label(format!("{} under a {mask} mask", way.name()))
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], style.stroke_width(2)));
            chart.draw_series(losing.into_iter().map(|at| Circle::new(at, 3, style.filled())))?;
        }
        chart.configure_series_labels().position(SeriesLabelPosition::UpperLeft).border_style(BLACK.mix(0.2)).draw()?;
    }
    area.present()?;
    Ok(())
}
