"""Golden files of layer similarity: what POT, SciPy and scikit-learn say of distances between probes.

Run:       similarity.py --data DIR     (about a minute)
           DIR as agreement.py's: weights/resnet20_cifar10.safetensors and cifar10/test_batch.bin, which may be .bin.xz
Versions:  Python 3.11, POT 0.9.7, scikit-learn 1.9.1, SciPy 1.17.1, NumPy 2.4.6, safetensors 0.8.0; one thread.
Seeds:     every case is seeded by CRC-32 of "similarity/<case>", so adding a case changes no other.
Inputs:    F32. From features both sides make distances in float64: Euclidean, divided by the largest.
"""
import argparse
import json
import lzma
import os
import struct
import zlib
from itertools import combinations
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
import numpy as np
import ot
from safetensors.numpy import load_file
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from sklearn.cluster import SpectralClustering

PROBES = 96
DTYPES = {"float64": "F64", "float32": "F32", "int64": "I64"}
tensors, metadata = {}, {}


def add(case, arrays, **scalars):
    for name, array in arrays.items():
        assert np.isfinite(array).all(), f"{case}/{name}"
        tensors[f"{case}/{name}"] = np.ascontiguousarray(array)
    if scalars:
        metadata[case] = ",".join(f"{key}={value}" for key, value in scalars.items())


def write(path):
    """As generate.py does: the widest type first, then by name, so that all tensors are aligned."""
    header, data = {"__metadata__": metadata}, b""
    for name, array in sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])):
        raw = array.tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": DTYPES[array.dtype.name], "shape": list(array.shape), "data_offsets": offsets}
        data += raw
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    print(f"{path.name:<28}{path.stat().st_size:>9} bytes {len(tensors):>4} tensors")


def seeded(case):
    return np.random.default_rng(zlib.crc32(f"similarity/{case}".encode()))


def f32(x):
    return np.asarray(x, dtype=np.float32)


def distances(features):
    c = cdist(features.astype(np.float64), features.astype(np.float64))
    return c / c.max()


def gromov_wasserstein(c1, c2, start=None):
    _, log = ot.gromov.gromov_wasserstein(c1, c2, ot.unif(len(c1)), ot.unif(len(c2)), "square_loss", symmetric=True, log=True,
                                          G0=start, max_iter=1000, tol_rel=1e-12, tol_abs=1e-12)
    return max(float(log["gw_dist"]), 0.0)


def best_of_starts(c1, c2):
    product, identity = np.full(c1.shape, 1 / c1.size), np.eye(len(c1)) / len(c1)
    return min(gromov_wasserstein(c1, c2, start) for start in (product, identity, (product + identity) / 2))


def linear_cka(x, y):
    x, y = (z - z.mean(0) for z in (x.astype(np.float64), y.astype(np.float64)))
    return np.linalg.norm(y.T @ x) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))


def spectral(values, k):
    """Labels of k modules."""
    affinity = np.exp(-values / np.median(values[np.triu_indices(len(values), 1)]))
    return SpectralClustering(k, affinity="precomputed", n_init=32, random_state=0).fit_predict(affinity).astype(np.int64)


def family(case, layers):
    """All pairs of layers of the same probes."""
    layers = [f32(layer) for layer in layers]
    c = [distances(layer) for layer in layers]
    best, identity, cka = np.zeros((3, len(layers), len(layers)))
    for i, layer in enumerate(layers):
        cka[i, i] = linear_cka(layer, layer)
    for i, j in combinations(range(len(layers)), 2):
        best[i, j] = best[j, i] = best_of_starts(c[i], c[j])
        identity[i, j] = identity[j, i] = np.mean((c[i] - c[j]) ** 2)
        cka[i, j] = cka[j, i] = linear_cka(layers[i], layers[j])
    add(case, {f"features{i}": layer for i, layer in enumerate(layers)} | dict(best=best, identity=identity, cka=cka))
    return best


def relu_layers(rng, x, depth):
    """x and the layers of a random network behind it."""
    layers = [x]
    for _ in range(depth):
        d = layers[-1].shape[1]
        layers.append(np.maximum(layers[-1] @ rng.normal(0, np.sqrt(2 / d), (d, d)), 0))
    return layers


def relu():
    rng = seeded("relu")
    family("relu", relu_layers(rng, rng.normal(size=(PROBES, 32)), 6))


def clusters():
    """Ten noisy classes, whose noise shrinks from layer to layer while classes move about."""
    rng = seeded("clusters")
    labels, noise = np.arange(PROBES) % 10, rng.normal(size=(PROBES, 16))
    layers = []
    for layer in range(7):
        centres = rng.normal(size=(10, 16))
        layers.append(centres[labels] + (1.2 - 0.18 * layer) * (noise + 0.3 * rng.normal(size=noise.shape)))
    family("clusters", layers)


def sphere():
    """Points on a sphere, turned, stretched along axes and shaken."""
    rng = seeded("sphere")
    points = rng.normal(size=(PROBES, 3))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    layers = []
    for layer in range(7):
        turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        layers.append(points @ turn * [1, 1 - 0.12 * layer, 1 + 0.1 * layer] + 0.03 * layer * rng.normal(size=points.shape))
    family("sphere", layers)


def convolve(x, w, stride):
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))[:, :, ::stride, ::stride]
    return np.moveaxis(np.tensordot(windows, w, ((1, 4, 5), (1, 2, 3))), 3, 1)


def resnet20_layers(data):
    """Stem and blocks of the published ResNet-20 on test images, each pooled over space."""
    weights = load_file(data / "weights/resnet20_cifar10.safetensors")
    packed = data / "cifar10/test_batch.bin.xz"
    raw = lzma.open(packed).read() if packed.exists() else packed.with_suffix("").read_bytes()
    images = np.frombuffer(raw, np.uint8).reshape(-1, 3073)[:PROBES, 1:].reshape(-1, 3, 32, 32) / 255
    per_channel = lambda v: np.asarray(v, dtype=np.float64)[:, None, None]
    x = (images - per_channel([0.485, 0.456, 0.406])) / per_channel([0.229, 0.224, 0.225])

    def normalised(x, name):
        gamma, beta, mean, variance = (per_channel(weights[f"{name}.{part}"])
                                       for part in ("weight", "bias", "running_mean", "running_var"))
        return (x - mean) / np.sqrt(variance + 1e-5) * gamma + beta

    x = np.maximum(normalised(convolve(x, weights["conv1.weight"], 1), "bn1"), 0)
    layers = [x.mean((2, 3))]
    for stage in (1, 2, 3):
        for block in (0, 1, 2):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = np.maximum(normalised(convolve(x, weights[f"{name}.conv1.weight"], stride), f"{name}.bn1"), 0)
            y = normalised(convolve(y, weights[f"{name}.conv2.weight"], 1), f"{name}.bn2")
            extra = (y.shape[1] - x.shape[1]) // 2
            x = np.maximum(y + np.pad(x[:, :, ::stride, ::stride], ((0, 0), (extra, extra), (0, 0), (0, 0))), 0)
            layers.append(x.mean((2, 3)))
    return layers


def resnet20(data):
    best = family("resnet20", resnet20_layers(data))
    add("resnet20", {f"labels{k}": spectral(best, k) for k in (2, 3, 4)})


def rectangular():
    """Layers of different probes."""
    for n1, n2 in (96, 80), (64, 97), (50, 75), (30, 7):
        case = f"rectangular_{n1}x{n2}"
        rng = seeded(case)
        first = f32(relu_layers(rng, rng.normal(size=(n1, 16)), 2)[-1])
        second = f32(rng.normal(size=(10, 8))[np.arange(n2) % 10] + 0.5 * rng.normal(size=(n2, 8)))
        add(case, dict(features0=first, features1=second), value=gromov_wasserstein(distances(first), distances(second)))


def permutation():
    """The same probes in another order."""
    rng = seeded("permutation")
    features, order = f32(relu_layers(rng, rng.normal(size=(PROBES, 16)), 2)[-1]), rng.permutation(PROBES)
    c = distances(features)
    add("permutation", dict(features0=features, order=order), best=best_of_starts(c, c[np.ix_(order, order)]))


def linear_problems():
    """Costs of assignments (n x n) and transports: normal; ties; those of Gromov-Wasserstein, with many near ties."""
    for n1, n2 in (64, 64), (96, 96), (128, 128), (64, 48), (97, 64), (128, 96), (30, 7), (1, 5):
        for kind in ("normal", "ties", "gromov"):
            case = f"linear_{kind}_{n1}x{n2}"
            rng = seeded(case)
            if kind == "normal":
                costs = rng.normal(size=(n1, n2))
            elif kind == "ties":
                costs = rng.integers(0, 5, (n1, n2))
            elif n1 > 1:
                plan = ot.emd(ot.unif(n1), ot.unif(n2), rng.normal(size=(n1, n2)))
                costs = -distances(rng.normal(size=(n1, 8))) @ plan @ distances(rng.normal(size=(n2, 8)))
            else:
                continue
            costs = f32(costs)
            wide = costs.astype(np.float64)
            if n1 == n2:
                optimum = wide[linear_sum_assignment(wide)].sum() / n1
            else:
                optimum = ot.emd2(ot.unif(n1), ot.unif(n2), wide, numItermax=1_000_000)
            add(case, dict(costs=costs), optimum=float(optimum))


def modules():
    """Values between layers of planted modules: close within, far between, both noisy."""
    for name, sizes, noise in ("even", (4, 4, 4), 0.1), ("uneven", (3, 6, 9), 0.2), ("pair", (7, 5), 0.3):
        case = f"modules_{name}"
        rng = seeded(case)
        planted = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
        values = np.where(planted[:, None] == planted, 0.02, 0.2) * np.exp(noise * rng.normal(size=(len(planted),) * 2))
        values = np.triu(values, 1) + np.triu(values, 1).T
        add(case, dict(values=values, labels=spectral(values, len(sizes)), planted=planted), k=len(sizes))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    data = parser.parse_args().data
    for make in relu, clusters, sphere, rectangular, permutation, linear_problems, modules:
        make()
    resnet20(data)
    write(Path(__file__).with_name("similarity.safetensors"))
