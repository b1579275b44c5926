#!/usr/bin/python3
"""PyTorch's side of benches/step.rs: one training step of ResNet-20 or DeiT-Ti, on the CPU, f32, eager.

    /usr/bin/python3 benches/peers/torch_cpu.py [--model resnet20|deit_tiny] --threads 2 --steps 10 [--layers]

The networks are those of networks.py; --layers also times the 3x3 convolutions of ResNet-20 and of ResNet-18 on images of that
size. What jobs.py counts otherwise than its file is not timed. Both memory formats are measured, alternating; the faster one
counts. Prints JSON.
"""

import argparse
import json
import os
import pathlib
import platform
import resource
import statistics
import time

# OpenBLAS takes the kernels of a Prescott where it does not know the CPU, such as a virtual machine's newer one: a third of
# the speed. It reads this when torch loads it.
if "avx512f" in pathlib.Path("/proc/cpuinfo").read_text():
    os.environ.setdefault("OPENBLAS_CORETYPE", "SkylakeX")
    os.environ.setdefault("ATEN_CPU_CAPABILITY", "avx512")

import torch
from torch import nn
from torch.nn import functional as F

from jobs import checked
from networks import FORMATS, NETWORKS


def milliseconds(work):
    """Wall clock and CPU time of the whole process."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return (time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3


# Each as dilt names it, and its job's batch.
MODELS = {"resnet20": ("resnet20", 128), "deit_tiny": ("deit_tiny_patch16_224", 16)}


def training_step(name, batch, memory_format):
    network = NETWORKS[MODELS[name][0]]
    torch.manual_seed(0)
    model = network.make()
    optimizer = network.optimizer(model)
    model = model.to(memory_format=memory_format)
    x = torch.randn(batch, 3, network.image, network.image).contiguous(memory_format=memory_format)
    labels = torch.randint(0, network.classes, (batch,))

    def step():
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()

    return step


def layer(batch, channels, size, memory_format):
    x = torch.randn(batch, channels, size, size).contiguous(memory_format=memory_format).requires_grad_()
    conv = nn.Conv2d(channels, channels, 3, 1, 1, bias=False).to(memory_format=memory_format)
    y = conv(x)
    dy = torch.randn_like(y)

    def backward():
        torch.autograd.grad(y, (x, conv.weight), dy, retain_graph=True)

    return (lambda: conv(x)), backward


def fastest(make, repeats):
    """Of both formats, alternating after two warm-ups: the one whose median wall time is smaller."""
    works = {name: make(memory_format) for name, memory_format in FORMATS.items()}
    for work in list(works.values()) * 2:
        work()
    samples = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            samples[name].append(milliseconds(work))
    medians = {name: statistics.median(wall for wall, _ in taken) for name, taken in samples.items()}
    best = min(medians, key=medians.get)
    return {
        "format": best,
        "median_ms": round(medians[best], 3),
        "min_ms": round(min(wall for wall, _ in samples[best]), 3),
        "min_cpu_ms": round(min(cpu for _, cpu in samples[best]), 3),
        "other_median_ms": round(max(medians.values()), 3),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", choices=MODELS, default="resnet20")
    parser.add_argument("--batch", type=int, help="128 of ResNet-20, 16 of DeiT-Ti, if not given")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each memory format")
    parser.add_argument("--layers", action="store_true", help="also time the 3x3 convolutions of ResNet-20 and ResNet-18")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    layers = [job["shape"] for job in checked("conv") if job["shape"]["stride"] == 1]
    batch = options.batch or MODELS[options.model][1]
    step = fastest(lambda memory_format: training_step(options.model, batch, memory_format), options.steps)
    result = {
        "what": f"{options.model}_batch{batch}",
        "batch": batch,
        "threads": options.threads,
        **step,
        "images_per_s": round(batch / step["median_ms"] * 1e3, 1),
        "torch": torch.__version__,
        "openblas": os.environ.get("OPENBLAS_CORETYPE"),
        "python": platform.python_version(),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    if options.layers:
        result["layers"] = {}
        for channels, size in ((shape["c"], shape["h"]) for shape in layers):
            forward = fastest(lambda f, c=channels, s=size: layer(batch, c, s, f)[0], options.steps)
            backward = fastest(lambda f, c=channels, s=size: layer(batch, c, s, f)[1], options.steps)
            flop = 2 * batch * channels * channels * 9 * size * size
            result["layers"][f"{channels}x{size}x{size}"] = {
                "forward": {**forward, "gflop_per_s": round(flop / forward["min_ms"] / 1e6, 1)},
                "backward": {**backward, "gflop_per_s": round(2 * flop / backward["min_ms"] / 1e6, 1)},
            }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
