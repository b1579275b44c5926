//! The ways to multiply with a layer's weights under a mask, and what each of them takes.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::device::{Buffer, Device, Precision, RealBuffer, Slice};
use crate::error::Result;
use crate::mask::Mask;
use crate::mask::groups::group_rows;
use crate::ops::conv::{ConvShape, conv_forward, conv_input_gradient, conv_weight_gradient};
use crate::ops::conv_sparse::{conv_sparse_forward, conv_sparse_input_gradient, conv_sparse_weight_gradient};
use crate::ops::epilogue::{Dx, Epilogue};
use crate::ops::kept::{Kept, KeptWeights, Pass, RowGroups};

/// A way to multiply with the weights of a layer under a mask.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Way {
    /// With all weights; pruned ones are zeros.
    Dense,
    /// With the columns that groups of rows keep.
    Groups,
    /// With the kept weights alone.
    Direct,
}

impl Way {
    /// All of them.
    pub const ALL: [Way; 3] = [Way::Dense, Way::Groups, Way::Direct];

    /// As tables name it.
    pub fn name(self) -> &'static str {
        match self {
            Way::Dense => "dense",
            Way::Groups => "groups",
            Way::Direct => "direct",
        }
    }
}

/// Steps that finding groups may take, about a second; layers beyond group neighbours.
const MOST_COMPARED: usize = 1 << 29;

/// A layer under a mask.
pub struct MaskedLayer {
    shape: ConvShape,
    precision: Precision,
    kept: Vec<u32>,
    groups: RowGroups,
    /// Weights that groups multiply: forward, for the input gradient.
    grouped: [usize; 2],
}

impl MaskedLayer {
    /// A layer of this shape, its activations of this precision, whose weights `[k, c, r, s]` have this mask; groups are of
    /// `size` rows ([`group_rows`](crate::ops::kept::group_rows)).
    pub fn new(shape: &ConvShape, precision: Precision, mask: &Mask, size: usize) -> Self {
        let kept: Vec<u32> = (0u32..).zip(mask.iter()).filter(|&(_, kept)| kept).map(|(place, _)| place).collect();
        let [outputs, inputs] = [shape.filters(), shape.channels()];
        let taps = shape.weight_len() / outputs / inputs;
        let (mut by_output, mut by_input) = (vec![Vec::new(); outputs], vec![Vec::new(); inputs]);
        for &place in &kept {
            let place = place as usize;
            let [output, input, tap] = [place / (inputs * taps), place / taps % inputs, place % taps];
            by_output[output].push((input * taps + tap) as u32);
            by_input[input].push((output * taps + tap) as u32);
        }
        // Each row is compared with those left, and joined with those that keep one of its columns.
        let compared = |rows: usize, columns: usize| rows * rows + kept.len() / columns * kept.len();
        let group = |rows: &[Vec<u32>], columns: usize| match compared(rows.len(), columns) <= MOST_COMPARED {
            true => group_rows(rows, columns, size),
            false => {
                let order: Vec<usize> = (0..rows.len()).collect();
                order.chunks(size).map(<[usize]>::to_vec).collect()
            }
        };
        let (by_outputs, by_inputs) = (group(&by_output, inputs * taps), group(&by_input, outputs * taps));
        let grouped = [multiplied(&by_output, &by_outputs, size), multiplied(&by_input, &by_inputs, size)];
        let groups = RowGroups { outputs: by_outputs, inputs: by_inputs };
        MaskedLayer { shape: *shape, precision, kept, groups, grouped }
    }

    /// The layer.
    pub fn shape(&self) -> &ConvShape {
        &self.shape
    }

    /// What its activations are stored as.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// The places of kept weights.
    pub fn places(&self) -> &[u32] {
        &self.kept
    }

    /// Groups of output channels.
    pub fn output_groups(&self) -> usize {
        self.groups.outputs.len()
    }

    /// Groups of input channels.
    pub fn input_groups(&self) -> usize {
        self.groups.inputs.len()
    }

    /// Number of weights that each pass multiplies in a way, in the order of [`Pass::ALL`].
    pub fn multiplied(&self, way: Way) -> [usize; 3] {
        match way {
            Way::Dense => [self.shape.weight_len(); 3],
            Way::Groups => [self.grouped[0], self.grouped[1], self.grouped[0]],
            Way::Direct => [self.kept.len(); 3],
        }
    }

    /// The lists that a way needs on a device for some passes; none where all weights are multiplied. Memory holds the
    /// kept weights alone (`packed`) or all of them.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when memory runs out.
    pub fn lists(&self, device: &Device, way: Way, passes: &[Pass], packed: bool) -> Result<Option<KeptWeights>> {
        let groups = match way {
            Way::Dense => return Ok(None),
            Way::Groups => Some(&self.groups),
            Way::Direct => None,
        };
        let kept = Kept { places: &self.kept, packed };
        KeptWeights::new(device, &self.shape, self.precision, &kept, groups, passes).map(Some)
    }
}

/// The lists of a layer whose passes may each take another way.
pub struct Lists {
    ways: Vec<Way>,
    groups: Option<KeptWeights>,
    direct: Option<KeptWeights>,
}

impl Lists {
    /// The lists for a way of each pass, in the order of [`Pass::ALL`]; of evaluation, one way. Memory holds the kept
    /// weights alone (`packed`) or all of them.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when memory runs out.
    pub fn new(device: &Device, layer: &MaskedLayer, ways: &[Way], packed: bool) -> Result<Self> {
        let lists = |way: Way| {
            let own = Pass::ALL.into_iter().zip(ways).filter(|(_, own)| **own == way);
            let passes: Vec<Pass> = own.map(|(pass, _)| pass).collect();
            if passes.is_empty() { Ok(None) } else { layer.lists(device, way, &passes, packed) }
        };
        Ok(Lists { ways: ways.to_vec(), groups: lists(Way::Groups)?, direct: lists(Way::Direct)? })
    }

    /// The lists that a pass multiplies with; none where it takes all weights.
    pub fn of(&mut self, pass: Pass) -> Option<&mut KeptWeights> {
        match self.ways[pass as usize] {
            Way::Dense => None,
            Way::Groups => self.groups.as_mut(),
            Way::Direct => self.direct.as_mut(),
        }
    }

    /// Takes the values of the kept weights from w, for the passes that follow.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] if w is of another size.
    pub fn gather(&mut self, device: &Device, w: Slice<f32>) -> Result<()> {
        [&mut self.groups, &mut self.direct].into_iter().flatten().try_for_each(|lists| lists.gather(device, w))
    }

    /// Bytes that the lists take.
    pub fn bytes(&self) -> usize {
        [&self.groups, &self.direct].into_iter().flatten().map(KeptWeights::bytes).sum()
    }
}

/// Weights that groups of rows multiply: for each group, each column that a row keeps, for all rows of a full group.
fn multiplied(rows: &[Vec<u32>], groups: &[Vec<usize>], size: usize) -> usize {
    let columns = |group: &Vec<usize>| {
        let mut columns: Vec<u32> = group.iter().flat_map(|&row| rows[row].iter().copied()).collect();
        columns.sort_unstable();
        columns.dedup();
        columns.len() * size
    };
    groups.iter().map(columns).sum()
}

/// Memory on a device to time the passes of a layer with.
pub struct Trial {
    device: Device,
    x: RealBuffer,
    dy: RealBuffer,
    w: Buffer<f32>,
    /// All weights, as products read them.
    read_w: RealBuffer,
    y: RealBuffer,
    dx: RealBuffer,
    dw: Buffer<f32>,
    scratch: Buffer<f32>,
    shape: ConvShape,
}

impl Trial {
    /// Random tensors for a layer, activations of this precision.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when memory runs out.
    pub fn new(device: &Device, shape: &ConvShape, precision: Precision) -> Result<Self> {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let mut random = |len: usize| (0..len).map(|_| rng.random_range(-1.0..1.0)).collect::<Vec<f32>>();
        Ok(Trial {
            x: device.upload_reals(&random(shape.input_len()), precision)?,
            dy: device.upload_reals(&random(shape.output_len()), precision)?,
            w: device.upload(&random(shape.weight_len()))?,
            read_w: device.upload_reals(&random(shape.read_weight_len(precision)), precision)?,
            y: device.alloc_reals(shape.output_len(), precision)?,
            dx: device.alloc_reals(shape.input_len(), precision)?,
            dw: device.alloc(shape.weight_len())?,
            scratch: device.alloc(shape.gradient_scratch_len(device, precision))?,
            device: device.clone(),
            shape: *shape,
        })
    }

    /// Seconds that passes take with these lists, or with all weights. A pass that takes less than a millisecond is done
    /// several times in a row, captured as in a training's step: what one launch costs is then not part of it.
    ///
    /// # Errors
    /// [`crate::Error::Launch`] if the device fails.
    pub fn time(&mut self, mut lists: Option<&mut KeptWeights>, passes: &[Pass]) -> Result<Vec<f64>> {
        const LONG_MS: f64 = 1.0;
        const MOST_REPEATS: f64 = 20.0;
        let device = self.device.clone();
        let mut seconds = Vec::new();
        for &pass in passes {
            let begin = device.event()?;
            self.run(pass, lists.as_deref_mut())?;
            let mut ms = device.event()?.elapsed_ms(&begin)?;
            let repeats = (LONG_MS / ms).min(MOST_REPEATS) as usize;
            if repeats > 1 {
                let graph = device.capture(|| (0..repeats).try_for_each(|_| self.run(pass, lists.as_deref_mut())))?;
                let begin = device.event()?;
                graph.replay()?;
                ms = device.event()?.elapsed_ms(&begin)? / repeats as f64;
            }
            seconds.push(1e-3 * ms);
        }
        Ok(seconds)
    }

    fn run(&mut self, pass: Pass, lists: Option<&mut KeptWeights>) -> Result<()> {
        let Trial { device, x, dy, w, read_w, y, dx, dw, scratch, shape } = self;
        match (pass, lists) {
            (Pass::Forward, None) => {
                conv_forward(device, shape, x.view(), read_w.view(), Epilogue::default(), y.view_mut())
            }
            (Pass::InputGradient, None) => {
                conv_input_gradient(device, shape, dy.view(), read_w.view(), Dx::Set, dx.view_mut())
            }
            (Pass::WeightGradient, None) => {
                conv_weight_gradient(device, shape, x.view(), dy.view(), scratch.view_mut(), dw.view_mut(), None)
            }
            (Pass::Forward, Some(lists)) => {
                lists.gather(device, w.view())?;
                conv_sparse_forward(device, lists, x.view(), Epilogue::default(), y.view_mut())
            }
            (Pass::InputGradient, Some(lists)) => {
                conv_sparse_input_gradient(device, lists, dy.view(), Dx::Set, dx.view_mut())
            }
            (Pass::WeightGradient, Some(lists)) => {
                conv_sparse_weight_gradient(device, lists, x.view(), dy.view(), dw.view_mut(), None)
            }
        }
    }
}
