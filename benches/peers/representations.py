"""Eight layers that see the same probes: a random ReLU network of four, noisy classes and their projection, points on a sphere
and their projection. Needs numpy alone.
"""

import numpy as np


def layers(n):
    """Representations [n, features] of one set of probes."""
    rng = np.random.default_rng(7)
    made = {}
    x = rng.normal(size=(n, 20))
    x[: n // 3] += 2.5
    for number, width in enumerate((48, 64, 40, 80)):
        drawn = rng.normal(size=(x.shape[1], width)) / np.sqrt(x.shape[1]) * 1.3
        x = np.maximum(x @ drawn + 0.3 * rng.normal(size=width), 0)
        made[f"relu{number}"] = x
    classes = np.eye(10)[rng.integers(0, 10, n)]
    made["classes"] = 3 * classes + 0.15 * rng.normal(size=(n, 10))
    made["classes_projected"] = 3 * classes @ rng.normal(size=(10, 64)) + 0.3 * rng.normal(size=(n, 64))
    x = rng.normal(size=(n, 8))
    made["sphere"] = x / np.linalg.norm(x, axis=1, keepdims=True)
    made["sphere_projected"] = np.maximum(made["sphere"] @ rng.normal(size=(8, 30)), 0)
    return {name: value.astype(np.float32) for name, value in sorted(made.items())}


def job(n):
    """All pairs of them, as jobs.jsonl has it. How many operations that takes depends on how soon each pair's iterations end."""
    made = layers(n)
    features = {name: value.shape[1] for name, value in made.items()}
    pairs = len(made) * (len(made) - 1) // 2
    return {
        "name": f"similarity of {len(made)} layers, {n} probes", "kind": "similarity",
        "shape": {"probes": n, "features": features, "pairs": pairs}, "parameters": 0, "op": [], "flop": [],
    }
