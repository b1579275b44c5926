#!/usr/bin/env python3
"""The jobs that dilt and PyTorch are measured at side by side: shapes, operations and parameters, counted by PyTorch.

    python3 benches/peers/jobs.py [--jobs FILE]     writes a line of JSON for each, to jobs.jsonl beside this file if not given

Nothing is computed: modules and tensors lie on the device meta, forward hooks see what goes through each convolution, linear
layer and attention. An operation is half a multiply-add; a backward pass has two products for each of the forward pass, the
first layer's one, since nobody asks for the gradient of images; that of attention five, as FlashAttention's authors count.
Before a job is timed, `checked` counts it again and refuses it if the committed file says something else; a test of dilt
(tests/it/peers.rs) counts all of them with dilt's own shapes. Works with PyTorch 1.13 or newer.

A job's `op` are operations of `dilt bench --op`, one for each of `flop`, its `shape` is theirs; a step's are forward pass and
backward pass of `dilt bench --model MODEL --batch BATCH`, whose optimizer has no products, and the norm that gradients are
clipped to before it, where they are. Similarity is that of pot_gw.py.
"""

import argparse
import collections
import functools
import json
import pathlib

import torch
from torch import nn

from networks import NETWORKS

FILE = pathlib.Path(__file__).with_name("jobs.jsonl")

STEPS = [
    ("resnet20", 128), ("resnet18_cifar", 128), ("resnet50", 128), ("vit_small_patch16_224", 64), ("deit_tiny_patch16_224", 16),
]
# Channels, image, filters, stride of 3x3 convolutions at batch 128; inputs, outputs and samples of linear layers, of 197
# tokens each; heads, their features, tokens and samples of attention.
CONVOLUTIONS = [
    (16, 32, 16, 1), (32, 16, 32, 1), (64, 8, 64, 1), (64, 32, 64, 1), (128, 16, 128, 1), (256, 8, 256, 1),
    (512, 4, 512, 1), (64, 32, 128, 2),
]
LINEAR = [(192, 576, 8), (192, 768, 8), (768, 192, 8), (384, 1152, 64), (384, 1536, 64), (1536, 384, 64)]
TOKENS = 197
ATTENTION = [(6, 64, TOKENS, 64), (12, 64, TOKENS, 64), (3, 64, TOKENS, 16), (4, 32, 65, 128)]
OPTIMIZERS = [("sgd", "resnet50"), ("adamw", "resnet50"), ("sgd", "vit_base_patch16_224"), ("adamw", "vit_base_patch16_224")]
# Of the parameters of these, a fifth is removed.
PRUNED = [("resnet50",), ("vit_base_patch16_224",)]


def meta(*shape):
    return torch.empty(shape, device="meta")


@functools.lru_cache(maxsize=None)
def network(model):
    return NETWORKS[model].make().to("meta")


class Counter:
    """What goes through the products of a module."""

    def __init__(self, module):
        self.flop = {"forward": 0, "backward": 0}
        self.products = collections.Counter()
        self.hooks = [part.register_forward_hook(hook) for part in module.modules() if (hook := self.hook(part))]

    def hook(self, part):
        kinds = {nn.Conv2d: self.convolution, nn.Linear: self.linear, nn.MultiheadAttention: self.attention}
        return kinds.get(type(part))

    def add(self, name, forward, gradients):
        self.products[name] += 1
        self.flop["forward"] += forward
        self.flop["backward"] += gradients * forward

    def product(self, name, multiply_adds, x):
        self.add(name, 2 * multiply_adds, 1 + x.requires_grad)

    def convolution(self, layer, inputs, y):
        x, (filters, channels, *kernel) = inputs[0], layer.weight.shape
        multiply_adds = y.numel() * layer.weight[0].numel()
        if kernel == list(layer.stride) != [1, 1] and layer.padding == (0, 0):
            # Of patches.
            name = f"linear {layer.weight[0].numel()} to {filters}, {y[0, 0].numel()} tokens"
        else:
            (_, _, height, width), stride, pad = x.shape, layer.stride[0], layer.padding[0]
            name = f"conv {channels}x{height}x{width} to {filters}, {kernel[0]}x{kernel[1]}, stride {stride}, pad {pad}"
        self.product(name, multiply_adds, x)

    def linear(self, layer, inputs, y):
        (outputs, features), tokens = layer.weight.shape, y[0].numel() // layer.weight.shape[0]
        self.product(f"linear {features} to {outputs}, {tokens} tokens", y.numel() * features, inputs[0])

    def attention(self, layer, _, outputs):
        """Its inputs are the same tensor, of the shape of its output, and come from layers with parameters."""
        y, heads = outputs[0], layer.num_heads
        n, tokens, features = y.shape
        for weight in (layer.in_proj_weight, layer.out_proj.weight):
            rows, columns = weight.shape
            self.product(f"linear {columns} to {rows}, {tokens} tokens", n * tokens * weight.numel(), y)
        product = 2 * n * tokens * tokens * features
        self.add(f"attention {heads} heads of {features // heads}, {tokens} tokens", 2 * product, 5 / 2)


def counted(module, x):
    counter = Counter(module)
    y = module(x)
    for hook in counter.hooks:
        hook.remove()
    return counter, y


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def step(model, batch):
    entry, module = NETWORKS[model], network(model)
    x = meta(batch, 3, entry.image, entry.image)
    counter, y = counted(module, x)
    return {
        "name": f"step {model}, batch {batch}", "kind": "step", "model": model, "batch": batch,
        "shape": {"input": list(x.shape), "output": list(y.shape)}, "products": dict(sorted(counter.products.items())),
        "optimizer": type(entry.optimizer(module)).__name__.lower(), "clip_norm": entry.clip_norm, "parameters": parameters(module),
        "op": ["forward", "backward"], "flop": [int(flop) for flop in counter.flop.values()],
    }


PASSES = ["forward", "input_gradient", "weight_gradient"]


def layer(kind, module, x, name, shape):
    counter, y = counted(module, x)
    forward = counter.flop["forward"]
    assert counter.flop["backward"] == 2 * forward
    return {
        "name": name, "kind": kind, "shape": shape(y), "parameters": parameters(module),
        "op": [f"{kind}_{which}" for which in PASSES], "flop": [forward] * 3,
    }


def convolution(channels, image, filters, stride):
    module = nn.Conv2d(channels, filters, 3, stride, 1, bias=False).to("meta")
    x = meta(128, channels, image, image).requires_grad_()
    by = "" if stride == 1 else f" by {stride}"
    (n, c, h, w), (k, _, r, s) = x.shape, module.weight.shape
    sizes = {"c": c, "h": h, "w": w, "k": k, "r": r, "s": s, "stride": module.stride[0], "pad": module.padding[0], "n": n}
    return layer("conv", module, x, f"conv 3x3 {channels}x{image}x{image} to {filters}{by}", lambda y: sizes)


def linear(inputs, outputs, samples):
    module = nn.Linear(inputs, outputs, bias=False).to("meta")
    x = meta(samples, TOKENS, inputs).requires_grad_()
    def shape(y):
        return {"c": x.shape[2], "k": y.shape[2], "t": y.shape[1], "n": y.shape[0]}
    return layer("linear", module, x, f"linear {inputs} to {outputs} ({samples} samples)", shape)


def attention(heads, head_dim, tokens, samples):
    q, k, v = (meta(samples, heads, tokens, head_dim) for _ in range(3))
    scores = q @ k.transpose(2, 3)
    y = scores @ v
    # Each element of a product has as many multiply-adds as rows were multiplied with columns.
    flop = 2 * scores.numel() * q.shape[3] + 2 * y.numel() * scores.shape[3]
    n, heads, t, head_dim = y.shape
    return {
        "name": f"attention {heads} heads of {head_dim}, {t} tokens, {n} samples", "kind": "attention",
        "shape": {"heads": heads, "head_dim": head_dim, "t": t, "n": n}, "parameters": 0,
        "op": ["attention_forward", "attention_backward"], "flop": [flop, flop * 5 // 2],
    }


def optimizer(kind, model):
    elements = parameters(network(model))
    return {
        "name": f"{kind} {model}", "kind": "optimizer", "model": model, "shape": {"elements": elements},
        "parameters": elements, "op": [f"{kind}_step"], "flop": [0],
    }


def prune(model):
    elements = parameters(network(model))
    return {
        "name": f"prune {model}", "kind": "prune", "model": model, "shape": {"elements": elements, "remove": elements // 5},
        "parameters": elements, "op": ["prune"], "flop": [0],
    }


def similarity(probes):
    from representations import job

    return job(probes)


MAKERS = {
    "step": (step, STEPS), "conv": (convolution, CONVOLUTIONS), "linear": (linear, LINEAR), "attention": (attention, ATTENTION),
    "optimizer": (optimizer, OPTIMIZERS), "prune": (prune, PRUNED), "similarity": (similarity, [(256,)]),
}


def jobs(kinds):
    for make, each in (MAKERS[kind] for kind in kinds):
        yield from (make(*sizes) for sizes in each)


def checked(*kinds):
    """The jobs of some kinds; an error if the committed file has other ones, or counts them otherwise."""
    lines = map(json.loads, FILE.read_text().splitlines())
    committed = {job["name"]: job for job in lines if job["kind"] in kinds}
    own = {job["name"]: job for job in jobs(kinds)}
    for name in own.keys() | committed.keys():
        if own.get(name) != committed.get(name):
            raise SystemExit(f"{FILE.name}: {name}: counted {own.get(name)}, committed {committed.get(name)}; not timed")
    return list(own.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=pathlib.Path, default=FILE, metavar="FILE")
    options = parser.parse_args()
    options.jobs.write_text("".join(json.dumps(job) + "\n" for job in jobs(MAKERS)))


if __name__ == "__main__":
    main()
