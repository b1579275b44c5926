#!/usr/bin/python3
"""PyTorch's side of benches/step.rs: one training step of ResNet-20 or DeiT-Ti, on the CPU, f32, eager.

    /usr/bin/python3 benches/peers/torch_cpu.py [--model resnet20|deit_tiny] --threads 2 --steps 10 [--layers]

ResNet-20 is that of akamaster/pytorch_resnet_cifar10: 3x3 stem, shortcuts that subsample and pad channels, SGD with momentum
0.9 and weight decay 1e-4; --layers also times its 3x3 convolutions and those of ResNet-18 on images of that size. DeiT-Ti is
torchvision's VisionTransformer of that size with AdamW. Both memory formats are measured, alternating; the faster one counts. Prints JSON.
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


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.pad = (outputs - inputs) // 2
        self.stride = stride

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + x)


class ResNet20(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths = [16, 16, 32, 64]
        blocks = [Block(widths[s if b == 0 else s + 1], widths[s + 1], 2 if b == 0 and s > 0 else 1)
                  for s in range(3) for b in range(3)]
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(64, 10)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x):
        y = self.blocks(F.relu(self.bn1(self.conv1(x))))
        return self.linear(F.avg_pool2d(y, 8).flatten(1))


def milliseconds(work):
    """Wall clock and CPU time of the whole process."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return (time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3


def resnet20():
    model = ResNet20()
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)


def deit_tiny():
    from torchvision.models.vision_transformer import VisionTransformer

    model = VisionTransformer(image_size=224, patch_size=16, num_layers=12, num_heads=3, hidden_dim=192, mlp_dim=768)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)


# Network and optimizer, batch, size of an image, classes.
MODELS = {"resnet20": (resnet20, 128, 32, 10), "deit_tiny": (deit_tiny, 16, 224, 1000)}


def training_step(name, batch, memory_format):
    make, _, size, classes = MODELS[name]
    torch.manual_seed(0)
    model, optimizer = make()
    model = model.to(memory_format=memory_format)
    x = torch.randn(batch, 3, size, size).contiguous(memory_format=memory_format)
    labels = torch.randint(0, classes, (batch,))

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


FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


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
        for channels, size in [(16, 32), (32, 16), (64, 8), (64, 32), (128, 16), (256, 8), (512, 4)]:
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
