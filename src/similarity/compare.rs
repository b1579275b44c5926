//! Layers compared pair by pair: Gromov-Wasserstein, and beside it linear CKA and the value of the identity coupling; then
//! the modules that layers form.

use std::collections::BTreeMap;

use ndarray::{Array2, ArrayView2};
use serde::{Deserialize, Serialize};

use super::cka::{identity_value, linear_cka};
use super::gw::{self, Options, Pair};
use super::modules::{Clustering, cluster};
use super::representations::{MeasuredLayer, Measuring};
use super::store::{Finished, PairStore, layer_hash, pair_key};
use crate::device::Device;
use crate::error::Result;
use crate::report::progress::Progress;

/// Regularisation of proximal steps where nothing else is asked for.
pub const EPSILON: f64 = 0.01;
/// Most proximal steps, likewise.
pub const STEPS: usize = 40;
/// Most Sinkhorn iterations of a step, likewise.
pub const ITERATIONS: usize = 100;
/// Most probes of pairs that are refined exactly, likewise.
pub const REFINE_UP_TO: usize = 512;

/// The layers of a network or file.
#[derive(Clone, Debug)]
pub struct MeasuredNetwork {
    /// What it is called.
    pub name: String,
    /// Its layers, in the order in which they are computed.
    pub layers: Vec<MeasuredLayer>,
}

/// How layers are compared.
#[derive(Clone, Copy, Debug)]
pub struct Comparing {
    /// How layers were measured.
    pub measuring: Measuring,
    /// How pairs are solved.
    pub solver: Options,
    /// Number of modules; by the eigengap if none.
    pub clusters: Option<usize>,
    /// Scale of the affinity exp(-GW / σ); the median if none.
    pub sigma: Option<f64>,
    /// Of the starts of k-means.
    pub seed: u64,
}

/// How similar layers are. Matrices are symmetric, in the order of `layers`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Similarity {
    /// Names: with the network's before it and a slash, where there are several.
    pub layers: Vec<String>,
    /// Gromov-Wasserstein values <L(T), T>; zeros on the diagonal.
    pub gw: Vec<Vec<f64>>,
    /// Linear CKA; none where a layer is constant, or two see different numbers of probes.
    pub cka: Vec<Vec<Option<f64>>>,
    /// Mean squared differences of distances; none where two layers see different numbers of probes.
    pub identity: Vec<Vec<Option<f64>>>,
    /// The module of each layer, from 0, in the order of their first layers.
    pub clusters: Vec<usize>,
    /// Scale of the affinity that modules come from.
    pub sigma: f64,
    /// Which distances: euclidean or cosine.
    pub distance: String,
    /// Whether networks' outputs were averaged over pixels or tokens.
    pub pooled: bool,
    /// The networks, with their layers' own names.
    pub networks: Vec<NetworkLayers>,
    /// Probes that each layer sees.
    pub probes: Vec<usize>,
    /// Layers to which all probes look alike.
    pub constant: Vec<String>,
    /// How many pairs have their value from which start, or from refinement.
    pub found_by: BTreeMap<String, usize>,
    /// Layers of one name in two networks, the least similar first.
    pub differences: Vec<Difference>,
}

/// A network and the names of its layers.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct NetworkLayers {
    /// What it is called.
    pub name: String,
    /// Its layers.
    pub layers: Vec<String>,
}

/// How much two networks differ at a layer.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Difference {
    /// The layer.
    pub layer: String,
    /// The networks.
    pub networks: [String; 2],
    /// Gromov-Wasserstein value.
    pub gw: f64,
    /// Value of the identity coupling.
    pub identity: Option<f64>,
    /// Linear CKA.
    pub cka: Option<f64>,
}

/// Bytes that a comparison needs.
#[derive(Clone, Copy, Debug)]
pub struct Need {
    /// While layers are measured: the largest network and its probes.
    pub measuring: usize,
    /// For the distances of all layers.
    pub distances: usize,
    /// For pairs, at least.
    pub pairs: usize,
}

impl Need {
    /// Of layers that see so many probes each, `per_layer` matrices each, beside what measuring takes.
    pub fn new(sizes: &[usize], per_layer: usize, measuring: usize) -> Self {
        let matrix = |n: usize| n * n * size_of::<f32>();
        let largest = sizes.iter().copied().max().unwrap_or(0);
        // Beside them, two layers in f64, and four more matrices while CKA is computed.
        let distances = sizes.iter().map(|&n| per_layer * matrix(n)).sum::<usize>() + 12 * matrix(largest);
        Need { measuring, distances, pairs: gw::least_memory(sizes) }
    }

    /// At the most at a time.
    pub fn total(&self) -> usize {
        self.distances + self.measuring.max(self.pairs)
    }
}

/// Compares all layers. Pairs that the store knows are not solved again; it is given each that is.
///
/// # Errors
/// [`crate::Error::Device`] when memory runs out; [`crate::Error::File`] if a pair cannot be kept.
pub fn compare(
    device: &Device,
    networks: &[MeasuredNetwork],
    comparing: &Comparing,
    store: Option<&mut PairStore>,
    progress: &Progress,
    title: &str,
) -> Result<Similarity> {
    let layers: Vec<&MeasuredLayer> = networks.iter().flat_map(|network| &network.layers).collect();
    let (gw, found_by) = solve(device, &layers, &comparing.solver, store, progress, title)?;
    let (cka, identity) = beside(&layers)?;
    let &Comparing { clusters, sigma, seed, .. } = comparing;
    let modules = cluster(gw.view(), Clustering { modules: clusters, sigma, seed })?;
    let names = |network: &MeasuredNetwork| -> Vec<String> { network.layers.iter().map(|l| l.name.clone()).collect() };
    let named = |network: &MeasuredNetwork| NetworkLayers { name: network.name.clone(), layers: names(network) };
    let networks: Vec<NetworkLayers> = networks.iter().map(named).collect();
    let names = full_names(&networks);
    let constant = layers.iter().zip(&names).filter(|(layer, _)| layer.is_constant()).map(|(_, name)| name.clone());
    let mut similarity = Similarity {
        constant: constant.collect(),
        layers: names,
        gw: gw.outer_iter().map(|row| row.to_vec()).collect(),
        cka,
        identity,
        clusters: modules.labels,
        sigma: modules.sigma,
        distance: comparing.measuring.metric_name().into(),
        pooled: comparing.measuring.pooled,
        networks,
        probes: layers.iter().map(|layer| layer.n()).collect(),
        found_by,
        differences: Vec::new(),
    };
    similarity.differences = similarity.find_differences();
    Ok(similarity)
}

/// The names of all layers: with their network's before them where there are several.
fn full_names(networks: &[NetworkLayers]) -> Vec<String> {
    let name = |network: &NetworkLayers, layer: &String| match networks.len() {
        1 => layer.clone(),
        _ => format!("{}/{layer}", network.name),
    };
    networks.iter().flat_map(|network| network.layers.iter().map(move |layer| name(network, layer))).collect()
}

/// Gromov-Wasserstein values, and how many were found in which way.
fn solve(
    device: &Device,
    layers: &[&MeasuredLayer],
    options: &Options,
    mut store: Option<&mut PairStore>,
    progress: &Progress,
    title: &str,
) -> Result<(Array2<f64>, BTreeMap<String, usize>)> {
    let hashes: Vec<String> = layers.iter().map(|layer| layer_hash(layer.distances.matrix.view())).collect();
    let key = |[i, j]: [usize; 2]| pair_key([&hashes[i], &hashes[j]], options);
    let mut values = Array2::zeros((layers.len(), layers.len()));
    let mut found_by = BTreeMap::new();
    let mut take = |[i, j]: [usize; 2], finished: &Finished| {
        (values[[i, j]], values[[j, i]]) = (finished.value, finished.value);
        *found_by.entry(finished.found_by.clone()).or_default() += 1;
    };
    let all = (0..layers.len()).flat_map(|i| (i + 1..layers.len()).map(move |j| [i, j]));
    let (mut pairs, mut total) = (Vec::new(), 0);
    for pair in all {
        total += 1;
        let known = store.as_ref().and_then(|store| store.get(&key(pair)));
        match known {
            Some(finished) => take(pair, finished),
            // No distance between equal distances, and nothing to solve.
            None if hashes[pair[0]] == hashes[pair[1]] => {
                take(pair, &Finished { value: 0.0, found_by: "identity".into() });
            }
            None => pairs.push(pair),
        }
    }
    if pairs.is_empty() {
        return Ok((values, found_by));
    }
    if pairs.len() < total {
        progress.say(&format!("{title}: {} of {total} pairs are known already", total - pairs.len()));
    }
    let stage = progress.pairs(title, pairs.len());
    let views: Vec<ArrayView2<f32>> = layers.iter().map(|layer| layer.distances.matrix.view()).collect();
    let mut done = 0;
    let mut finished = |pair: &Pair| {
        let finished = Finished { value: pair.value, found_by: pair.found_by.into() };
        take(pair.layers, &finished);
        if let Some(store) = store.as_mut() {
            store.put(&key(pair.layers), finished)?;
        }
        done += 1;
        stage.show_count(done);
        Ok(())
    };
    gw::solve(device, &views, &pairs, options, &mut finished)?;
    Ok((values, found_by))
}

/// A matrix over layers with holes.
type Partial = Vec<Vec<Option<f64>>>;

/// Linear CKA, and the value of the identity coupling.
fn beside(layers: &[&MeasuredLayer]) -> Result<(Partial, Partial)> {
    let (mut cka, mut identity) =
        (vec![vec![None; layers.len()]; layers.len()], vec![vec![None; layers.len()]; layers.len()]);
    let wide = |matrix: &Array2<f32>| matrix.mapv(f64::from);
    for (i, first) in layers.iter().enumerate() {
        let (c1, d1) = (wide(&first.distances.matrix), wide(first.euclidean()));
        for (j, second) in layers.iter().enumerate().skip(i).filter(|(_, second)| second.n() == first.n()) {
            let value = identity_value(c1.view(), wide(&second.distances.matrix).view())?;
            (identity[i][j], identity[j][i]) = (Some(value), Some(value));
            let value = linear_cka(d1.view(), wide(second.euclidean()).view())?;
            (cka[i][j], cka[j][i]) = (value, value);
        }
    }
    Ok((cka, identity))
}

impl Similarity {
    /// Where each network's layers lie in the order of all.
    pub fn ranges(&self) -> Vec<std::ops::Range<usize>> {
        let mut end = 0;
        let mut next = |network: &NetworkLayers| {
            end += network.layers.len();
            end - network.layers.len()..end
        };
        self.networks.iter().map(&mut next).collect()
    }

    fn find_differences(&self) -> Vec<Difference> {
        let ranges = self.ranges();
        let mut found = Vec::new();
        for (a, first) in self.networks.iter().enumerate() {
            for (b, second) in self.networks.iter().enumerate().skip(a + 1) {
                for (i, layer) in first.layers.iter().enumerate() {
                    let Some(j) = second.layers.iter().position(|other| other == layer) else { continue };
                    let (i, j) = (ranges[a].start + i, ranges[b].start + j);
                    let (gw, identity, cka) = (self.gw[i][j], self.identity[i][j], self.cka[i][j]);
                    let networks = [first.name.clone(), second.name.clone()];
                    found.push(Difference { layer: layer.clone(), networks, gw, identity, cka });
                }
            }
        }
        found.sort_by(|a, b| b.gw.total_cmp(&a.gw));
        found
    }
}
