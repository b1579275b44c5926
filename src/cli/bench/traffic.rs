//! `dilt bench --bytes`: what a training step has to compute and to move.

use dilt::device::Device;
use dilt::nn::model::Model;
use dilt::nn::traffic::{LayerWork, Work};
use dilt::report::table::table;
use serde::Serialize;

use crate::cli::Common;

#[derive(Serialize)]
struct Counted {
    /// The whole step first, then its layers, the loss and the optimizer.
    rows: Vec<Row>,
    model: String,
    /// Trained weights, pruned ones included.
    parameters: usize,
    batch: usize,
    device: String,
}

/// Of an image: the batch's share.
#[derive(Serialize)]
struct Row {
    name: String,
    gflop: f64,
    forward_mb: f64,
    backward_mb: f64,
    update_mb: f64,
    mb: f64,
}

/// Shows the work of a step of a batch.
pub(super) fn show(
    step: &[LayerWork],
    model: &Model,
    batch: usize,
    device: &Device,
    common: &Common,
) -> anyhow::Result<()> {
    let sum = |of: fn(&LayerWork) -> Work| step.iter().map(of).sum();
    let whole = LayerWork {
        name: "training step".into(),
        forward: sum(|layer| layer.forward),
        backward: sum(|layer| layer.backward),
        update: sum(|layer| layer.update),
    };
    let mb = |work: Work| work.bytes() as f64 / batch as f64 / 1e6;
    let row = |layer: &LayerWork| Row {
        name: layer.name.clone(),
        gflop: layer.total().flop as f64 / batch as f64 / 1e9,
        forward_mb: mb(layer.forward),
        backward_mb: mb(layer.backward),
        update_mb: mb(layer.update),
        mb: mb(layer.total()),
    };
    let rows = std::iter::once(&whole).chain(step).map(row).collect();
    common.print(
        &Counted {
            rows,
            model: model.name.clone(),
            parameters: model.parameter_count(),
            batch,
            device: device.description(),
        },
        to_table,
    )
}

fn to_table(result: &Counted) -> String {
    let cells = |row: &Row| {
        let megabytes = [row.forward_mb, row.backward_mb, row.update_mb, row.mb].map(|mb| format!("{mb:.3}"));
        [row.name.clone(), format!("{:.4}", row.gflop)].into_iter().chain(megabytes).collect()
    };
    let (whole, layers) = result.rows.split_first().expect("the step");
    let columns = ["", "GFLOP", "forward MB", "backward MB", "update MB", "MB"];
    format!(
        "{}\n\n{}: {:.2} MB and {:.3} GFLOP per image of a training step, batch {}, counted from shapes as the kernels \
         of {} do it",
        table(&columns, layers.iter().map(cells)),
        result.model,
        whole.mb,
        whole.gflop,
        result.batch,
        result.device
    )
}
