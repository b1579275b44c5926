"""Golden file of attention: the explicit softmax formula in float64, forward and gradients.

Run:       /usr/bin/python3 tests/golden/attention.py [FOLDER]     (default: this folder; about a second)
Versions:  as generate.py, whose Golden and seeds it shares.
Inputs:    normal, rounded to f32; everything is stored as F32, which rounds results by 6e-8 of their size.
Layouts:   PyTorch's: qkv [3, heads, head_dim, N, T] as timm's fused projection has its rows, y [heads, head_dim, N, T].
"""
import sys
from pathlib import Path

import torch

from generate import Golden, leaf, normal


def attention():
    """y = softmax(q k / sqrt(head_dim)) v, lse = logsumexp(q k / sqrt(head_dim)), gradients of sum(y dy)."""
    g = Golden("attention")
    cases = {  #         heads dim  T   N  spread of q and k
        "one_token":      (2, 32,   1,  3, 1.0),
        "five_tokens":    (3, 64,   5,  2, 1.0),
        "one_feature":    (2,  1,   9,  2, 1.0),
        "narrow":         (3,  8,  13,  3, 1.0),
        "odd":            (2, 20,  24,  2, 1.0),
        "middle":         (2, 24,  33,  1, 1.0),
        "wide":           (1, 40,  64,  1, 1.0),
        "widest":         (1, 128, 35,  1, 1.0),
        "tile":           (1, 32,  64,  1, 1.0),
        "tile_and_one":   (1, 64,  65,  1, 1.0),
        "image":          (1, 64, 197,  1, 1.0),
        "two_tiles":      (1, 32, 257,  1, 1.0),
        "large_scores":   (2, 32,  17,  2, 6.0),  # up to 50 and more before softmax
    }
    for case, (heads, dim, t, n, spread) in cases.items():
        g.seed(case)
        qkv = normal(3, heads, dim, n, t)
        qkv[:2] *= spread
        qkv = leaf(qkv.float().double())
        q, k, v = qkv
        s = torch.einsum("hdni,hdnj->hnij", q, k) * dim**-0.5
        if spread > 1:
            assert s.abs().max() > 50, s.abs().max()
        y = torch.einsum("hnij,hdnj->hdni", s.softmax(-1), v)
        dy = normal(*y.shape)
        y.backward(dy)
        tensors = dict(qkv=qkv, y=y, lse=s.logsumexp(-1), dy=dy, dqkv=qkv.grad)
        g.add(case, {name: x.float() for name, x in tensors.items()})
    return g


if __name__ == "__main__":
    attention().write(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent)
