"""Golden files of token columns and their optimizer: linear, tokens and adamw, as PyTorch in float64 computes them.

Run:       /usr/bin/python3 tests/golden/transformer_tokens.py [FOLDER]     (default: this folder; about three seconds)
Versions, seeds, inputs: as generate.py. Activations of tokens are [N, T, D], as in PyTorch and timm.
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import clip_grad_norm_

from generate import Golden, leaf, normal


def linear():
    """y = x w^T + bias over the last axis."""
    g = Golden("linear")
    cases = {  #     N   T   C   K  bias
        "ragged":   (5,  9, 37, 10, True),
        "straddle": (3, 17, 20, 65, True),  # 24 tokens in memory: a vector of 16 holds two samples; K > 64
        "aligned":  (8, 16, 33, 40, False),
        "one":      (1,  1,  1,  1, True),
    }
    for case, (n, t, c, k, has_bias) in cases.items():
        g.seed(case)
        x, w = leaf(normal(n, t, c, mean=0.5)), leaf(normal(k, c, mean=0.05, std=(2 / c) ** 0.5))
        bias = leaf(normal(k, mean=0.3)) if has_bias else None
        y = F.linear(x, w, bias)
        dy = normal(*y.shape, mean=0.1)
        y.backward(dy)
        tensors = dict(x=x, w=w, y=y, dy=dy, dx=x.grad, dw=w.grad)
        if has_bias:
            tensors.update(bias=bias, dbias=bias.grad)
        g.add(case, tensors)
    return g


def tokens():
    """From images to tokens as timm's PatchEmbed and _pos_embed (no_embed_class false) do, and back to one vector.

    patches are unfold's columns after `prefix` rows of zeros; embedded is what the patch convolution, without its bias,
    gives of them; y adds bias, token and positions; first and mean are the two ways to pool y.
    """
    g = Golden("tokens")
    cases = {  #        N   C   H   W  p   D  token bias
        "ragged":      (5,  3, 12, 20, 4, 11, True,  True),   # 15 patches and the token fill a row of 16
        "no_token":    (9,  3,  6,  9, 3,  8, False, True),   # 6 of 8 columns are true
        "no_bias":     (11, 2, 14,  6, 2,  5, True,  False),  # 22 of 24
        "full":        (8,  1,  8, 16, 4,  3, False, True),
        "one":         (1,  1,  1,  1, 1,  1, False, True),
        "one_patch":   (3,  3,  8,  8, 8,  4, True,  True),
    }
    for case, (n, c, h, w_, p, d, has_token, has_bias) in cases.items():
        g.seed(case)
        prefix, count = int(has_token), (h // p) * (w_ // p) + has_token
        x, w = normal(n, c, h, w_, mean=0.5), leaf(normal(d, c, p, p, mean=0.05, std=(2 / (c * p * p)) ** 0.5))
        bias = leaf(normal(d, mean=0.3)) if has_bias else None
        token, positions = leaf(normal(d, mean=-0.4)), leaf(normal(count, d, mean=0.2))
        y = F.conv2d(x, w, bias, stride=p).flatten(2).transpose(1, 2)
        if has_token:
            y = torch.cat((token.expand(n, 1, d), y), dim=1)
        y = y + positions
        dy = normal(n, count, d, mean=0.1)
        y.backward(dy)
        zeros = torch.zeros(n, prefix, c * p * p)
        patches = torch.cat((zeros, F.unfold(x, p, stride=p).transpose(1, 2)), dim=1)
        tensors = dict(x=x, patches=patches, embedded=patches @ w.detach().flatten(1).T, positions=positions, y=y, dy=dy,
                       w=w, dw=w.grad, dpositions=positions.grad)
        if has_token:
            tensors.update(token=token, dtoken=token.grad)
        if has_bias:
            tensors.update(bias=bias, dbias=bias.grad)
        pooled = normal(n, d, mean=0.1)
        for name, pool in {"first": lambda y: y[:, 0], "mean": lambda y: y[:, prefix:].mean(1)}.items():
            of = leaf(y.detach())
            pool(of).backward(pooled)
            tensors.update({name: pool(of), f"d{name}": of.grad})
        g.add(case, tensors | {"dpooled": pooled}, patch=p, prefix=prefix)
    return g


def adamw():
    """Five steps of torch.optim.AdamW. The second tensor, b_..., does not decay and has no mask."""
    g = Golden("adamw")
    cases = {  #        lr    beta1 beta2  eps   decay clip mask
        "plain":      (0.01, 0.9,  0.999, 1e-8, 0.0,  0.0, False),
        "decay":      (0.01, 0.9,  0.999, 1e-8, 0.05, 0.0, False),
        "betas":      (0.02, 0.85, 0.95,  1e-3, 0.1,  0.0, False),
        "mask":       (0.01, 0.9,  0.999, 1e-8, 0.05, 0.0, True),
        "clip":       (0.01, 0.9,  0.95,  1e-6, 0.05, 1.0, False),
        "clip_mask":  (0.01, 0.9,  0.999, 1e-8, 0.05, 1.0, True),
    }
    for case, (lr, beta1, beta2, eps, decay, clip, has_mask) in cases.items():
        g.seed(case)
        mask = (torch.rand(77) < 0.4).double() if has_mask else torch.ones(77)
        masks = {"": mask, "b_": torch.ones(33)}
        params = {b: nn.Parameter(normal(len(m), mean=0.2) * m) for b, m in masks.items()}
        tensors = {f"{b}w0": p.detach().clone() for b, p in params.items()} | {"mask": mask.byte()}
        groups = [{"params": [params[""]], "weight_decay": decay}, {"params": [params["b_"]], "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=lr, betas=(beta1, beta2), eps=eps)
        norms = []
        for step in range(5):
            for b, p in params.items():
                p.grad = normal(p.numel(), mean=0.1) * (1 if step != 2 else 2**-5)  # step 2 is below the clip norm
                tensors[f"{b}grad{step}"] = p.grad.clone()
                p.grad *= masks[b]
            if clip:
                norms.append(clip_grad_norm_(params.values(), clip))
            optimizer.step()
            with torch.no_grad():
                for b, p in params.items():
                    assert bool((p[masks[b] == 0] == 0).all())
                    tensors[f"{b}w{step + 1}"] = p.detach().clone()
        for b, p in params.items():
            tensors |= {f"{b}first": optimizer.state[p]["exp_avg"], f"{b}second": optimizer.state[p]["exp_avg_sq"]}
        if clip:
            assert [bool(n > clip) for n in norms] == [True, True, False, True, True]
        g.add(case, tensors, lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=decay, clip=clip)
    return g


if __name__ == "__main__":
    folder = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent
    for golden in (linear, tokens, adamw):
        golden().write(folder)
