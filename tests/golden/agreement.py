"""Golden files of whole networks: what PyTorch in float64 says of weights that both sides make from a formula.

Run:       /usr/bin/python3 tests/golden/agreement.py              (about half a minute)
           /usr/bin/python3 tests/golden/agreement.py --data DIR   also real_resnet20, from the real files in DIR:
           weights/resnet20_cifar10.safetensors and cifar10/data_batch_1.bin (CIFAR-10, binary version)
Versions:  Debian 12: Python 3.11, python3-torch 1.13.0, python3-torchvision 0.14.1, python3-numpy 1.24.2; one thread.
Formula:   `unit` below, in 64-bit integers; tests/it/agreement.rs has the same. README.md lists files and tensors.
"""
import argparse
import json
import struct
from pathlib import Path

import numpy as np
import torch
import torchvision

from generate import Golden, ResNet, descend, magnitude_mask

STEPS, LR, MOMENTUM, DECAY = 10, 0.002, 0.9, 0.1


def bits(name, n):
    """24 bits for each element of a tensor: the top of SplitMix64 (Steele et al. 2014), begun at FNV-1a of the name."""
    key = 0xCBF29CE484222325
    for byte in name.encode():
        key = (key ^ byte) * 0x100000001B3 % 2**64
    z = np.uint64(key) + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) >> np.uint64(40)


def unit(name, n):
    """Numbers from -1 to below 1, exact in f32."""
    return bits(name, n).astype(np.float64) / 2**23 - 1


def images(name, *shape):
    return torch.tensor((1.75 * unit(name, int(np.prod(shape)))).astype(np.float32).reshape(shape))


def weights(shapes):
    """Weights of variance 2 / fan-in, scales and variances near 1, shifts and means near 0; rounded to f32."""
    made = {}
    for name, shape in shapes.items():
        u = unit(name, int(np.prod(shape)))
        if len(shape) > 1:
            u *= np.sqrt(6 / np.prod(shape[1:]))
        elif name.endswith("running_var"):
            u = 1 + 0.5 * u
        elif name.endswith(".weight"):
            u = 1 + 0.1 * u
        else:
            u *= 0.1
        made[name] = torch.tensor(u.astype(np.float32).reshape(shape))
    return made


def fill(model):
    """Gives a model weights by the formula, in float64."""
    state = {name: t for name, t in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    made = weights({name: tuple(t.shape) for name, t in state.items()})
    assert not model.load_state_dict(made, strict=False).unexpected_keys
    return model.double()


def agreement(dtype=torch.float64):
    """Logits of torchvision's networks at 224; ten steps of ResNet-20. `dtype` is for measuring tolerances."""
    g, batch = Golden("agreement"), 16
    for name in ("resnet18", "resnet50"):
        model = fill(getattr(torchvision.models, name)(weights=None)).to(dtype).eval()
        with torch.no_grad():
            g.add(name, dict(logits=model(images(f"{name} x", 2, 3, 224, 224).to(dtype))))
    x = images("resnet20 x", STEPS * batch, 3, 32, 32)
    labels = torch.tensor((bits("resnet20 labels", STEPS * batch) % 10).astype(np.int64))
    for case, masked in (("resnet20_dense", False), ("resnet20_masked", True)):
        model = fill(ResNet(3, 3)).to(dtype).train()
        masks = {}
        for name, w in model.named_parameters() if masked else ():
            if w.ndim > 1:
                masks[name] = torch.tensor((bits(f"{name} mask", w.numel()) % 10 == 0).reshape(tuple(w.shape)))
        losses = [value for _, value in descend(model, masks, x.to(dtype), labels, batch, LR, MOMENTUM, DECAY)]
        g.add(case, dict(losses=torch.stack(losses)), batch=batch, lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
    return g


def read_safetensors(path):
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    header.pop("__metadata__", None)
    assert {entry["dtype"] for entry in header.values()} == {"F32"}
    at = lambda begin, end: np.frombuffer(raw[8 + size + begin : 8 + size + end], "<f4").copy()
    return {name: torch.tensor(at(*e["data_offsets"])).reshape(e["shape"]) for name, e in header.items()}


def real_resnet20(data, dtype=torch.float64):
    """Ten steps from published weights on the first 640 images of CIFAR-10, dense and with 90 % pruned by magnitude."""
    g, batch = Golden("real_resnet20"), 64
    published = read_safetensors(data / "weights/resnet20_cifar10.safetensors")
    records = np.fromfile(data / "cifar10/data_batch_1.bin", np.uint8, count=STEPS * batch * 3073).reshape(-1, 3073)
    labels = torch.tensor(records[:, 0].astype(np.int64))
    mean, std = (torch.tensor(v, dtype=dtype)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    x = (torch.tensor(records[:, 1:].reshape(-1, 3, 32, 32).astype(np.float64)).to(dtype) / 255 - mean) / std
    names = sorted(name for name, w in published.items() if w.ndim > 1)
    kept, _ = magnitude_mask([published[n] for n in names], [torch.ones(published[n].shape) for n in names], 0.9)
    for case, masks in (("dense", {}), ("masked", dict(zip(names, kept)))):
        model = ResNet(3, 3)
        assert not model.load_state_dict(published, strict=False).unexpected_keys
        model.to(dtype).train()
        losses = [value for _, value in descend(model, masks, x, labels, batch, LR, MOMENTUM, DECAY)]
        g.add(case, dict(losses=torch.stack(losses)), batch=batch, lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
    return g


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the real files")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to")
    options = parser.parse_args()
    agreement().write(options.out)
    if options.data:
        real_resnet20(options.data).write(options.out)
