"""Golden files of what transformers do to rows of tokens: layer norm, GELU, residual sums with layer scale.

Run:       /usr/bin/python3 tests/golden/transformer_rows.py [FOLDER]     (default: this folder; about two seconds)

Versions, seeds, inputs and the format of the files: generate.py. Layouts are PyTorch's: [N, T, D].
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from generate import Golden, leaf, normal


def layer_norm():
    """y = layer_norm(x) over D, gradients for x, gamma, beta."""
    g, eps = Golden("layer_norm"), 1e-6
    cases = {  #        N  T   D   mean  std
        "one":         (1, 1,   1,  0.7, 1.5),
        "ragged":      (5, 5,   5,  0.7, 1.5),
        "ragged_wide": (3, 17, 13,  0.7, 1.5),
        "tokens5":     (2, 5,  64,  0.7, 1.5),
        "tokens17":    (1, 17, 64,  0.2, 1.0),
        "tokens65":    (1, 65, 12,  0.2, 1.0),
        "tiny":        (1, 5, 192,  0.2, 1.0),
        "small":       (2, 1, 384,  0.2, 1.0),
        "offset":      (2, 5,  40, 50.0, 0.5),
        "massive":     (2, 5,  24,  0.0, 1.0),  # feature 0 is 1000 times larger than the others
    }
    for case, (n, t, d, mean, std) in cases.items():
        g.seed(case)
        x = normal(n, t, d, mean=mean, std=std)
        if case == "massive":
            x[..., 0] *= 1000
        x, gamma, beta = leaf(x), leaf(normal(d, mean=1.0, std=0.3)), leaf(normal(d, mean=0.2, std=0.5))
        y = F.layer_norm(x, (d,), gamma, beta, eps)
        dy = normal(n, t, d, mean=0.1)
        y.backward(dy)
        g.add(case, dict(x=x, gamma=gamma, beta=beta, y=y, dy=dy, dx=x.grad, dgamma=gamma.grad, dbeta=beta.grad,
                         mean=x.mean(2, True), invstd=(x.var(2, False, True) + eps).rsqrt()), eps=eps)
    return g


def gelu():
    """Exact GELU on a wide range; the gradient for dy = 1."""
    g = Golden("gelu")
    marks = torch.tensor([0.0, 0.1, 8.0, 20.0, 1e-30, 1e-6, 0.7517916, 13.0, 13.5, 50.0, 1e30])
    x = torch.cat([marks, -marks, torch.linspace(-14, 14, 1601), torch.linspace(-1, 1, 401)])
    x = leaf(x[: len(x) // 8 * 8].float().double())
    # erfc keeps the digits of the lower tail, which 1 + erf in F.gelu loses.
    y = 0.5 * x * torch.erfc(-x / 2**0.5)
    assert torch.allclose(y, F.gelu(x), rtol=0, atol=1e-14)
    y.sum().backward()
    g.add("wide", dict(x=x, y=y, dx=x.grad))
    return g


def residual():
    """y = x + gamma branch, without gamma too."""
    g = Golden("residual")
    cases = {  #        N  T   D  gamma
        "one":         (1, 1,  1, True),
        "ragged":      (5, 5,  3, True),
        "tokens17":    (3, 17, 8, True),
        "tokens65":    (2, 65, 9, True),
        "plain":       (3, 17, 8, False),
    }
    for case, (n, t, d, has_gamma) in cases.items():
        g.seed(case)
        x, branch = leaf(normal(n, t, d, mean=0.5)), leaf(normal(n, t, d, mean=0.2))
        gamma = leaf(normal(d, mean=0.1, std=0.3)) if has_gamma else None
        y = x + (branch * gamma if has_gamma else branch)
        dy = normal(n, t, d, mean=0.1)
        y.backward(dy)
        tensors = dict(x=x, branch=branch, y=y, dy=dy, dbranch=branch.grad)
        if has_gamma:
            tensors.update(gamma=gamma, dgamma=gamma.grad)
        g.add(case, tensors)
    return g


if __name__ == "__main__":
    folder = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent
    for golden in (layer_norm, gelu, residual):
        golden().write(folder)
