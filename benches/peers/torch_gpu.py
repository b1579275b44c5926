#!/usr/bin/env python3
"""PyTorch's side of benches/crossover.rs and `dilt bench` on a GPU: single layers and whole steps in f32, in TF32 and in bf16.

    python3 benches/peers/torch_gpu.py [--layers] [--steps]

Layers: forward pass, input gradient and weight gradient of the layers of benches/crossover.rs, both memory formats, least of
several runs of the better one, each pass captured in a CUDA graph. Steps: forward pass, loss, backward pass and optimizer of
ResNet-20 and ResNet-18 on 32x32 images (SGD with momentum 0.9, weight decay 1e-4) and ViT-S/16 at 224x224 (AdamW), masked
weights being zeros in a dense layer; eager, the whole step captured in one CUDA graph, and compiled (torch.compile,
max-autotune, which captures graphs itself). In bf16 layers are bf16, steps run under autocast with f32 weights, as dilt's
do. Prints a line of JSON each.
"""

import argparse
import functools
import json
import pathlib
import statistics
import sys

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from torch_cpu import Block, ResNet20  # the same network on both devices

# Channels, image, filters, stride of 3x3 convolutions at batch 128; inputs, outputs and samples of linear layers, of 197
# tokens each.
CONVOLUTIONS = [
    (16, 32, 16, 1), (32, 16, 32, 1), (64, 8, 64, 1), (64, 32, 64, 1), (128, 16, 128, 1), (256, 8, 256, 1),
    (512, 4, 512, 1), (64, 32, 128, 2),
]
LINEAR = [(192, 576, 8), (192, 768, 8), (768, 192, 8), (384, 1152, 64), (384, 1536, 64), (1536, 384, 64)]
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class ProjectedBlock(Block):
    """torchvision's: where the shape changes, the shortcut is a convolution."""

    def __init__(self, inputs, outputs, stride):
        super().__init__(inputs, outputs, stride)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet18Cifar(nn.Module):
    """torchvision's ResNet-18 with a 3x3 stem of stride 1 and no max pool."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        widths = [64, 64, 128, 256, 512]
        self.blocks = nn.Sequential(*[
            ProjectedBlock(widths[s if b == 0 else s + 1], widths[s + 1], 2 if b == 0 and s > 0 else 1)
            for s in range(4) for b in range(2)
        ])
        self.fc = nn.Linear(512, 10)

    def forward(self, x):
        y = self.blocks(F.relu(self.bn1(self.conv1(x))))
        return self.fc(y.mean((2, 3)))


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, fused=True)


def resnet20():
    model = ResNet20().cuda()
    return model, sgd(model)


def resnet18():
    model = ResNet18Cifar().cuda()
    return model, sgd(model)


def vit_small():
    from torchvision.models.vision_transformer import VisionTransformer

    model = VisionTransformer(image_size=224, patch_size=16, num_layers=12, num_heads=6, hidden_dim=384, mlp_dim=1536)
    model = model.cuda()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True, capturable=True)


# Network and optimizer, batch, size of an image, classes; as dilt names them.
MODELS = {
    "resnet20": (resnet20, 128, 32, 10),
    "resnet18_cifar": (resnet18, 128, 32, 10),
    "vit_small_patch16_224": (vit_small, 64, 224, 1000),
}


def captured(work):
    """The work as a graph, after some runs on a stream of its own that choose algorithms and allocate."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def milliseconds(work, runs, repeats=1):
    """Times of single runs, each the mean of some in a row, after one that is not counted."""
    work()
    times = []
    for _ in range(runs):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / repeats)
    return times


def passes(x, w, y, arguments):
    """Forward pass, input gradient and weight gradient of a convolution."""
    def backward(mask):
        return torch.ops.aten.convolution_backward(y, x, w, None, *arguments, mask)

    return {
        "forward": lambda: torch.ops.aten.convolution(x, w, None, *arguments),
        "input_gradient": lambda: backward([True, False, False]),
        "weight_gradient": lambda: backward([False, True, False]),
    }


def convolution(channels, image, filters, stride, memory_format, dtype):
    def random(*shape):
        return torch.randn(*shape, device="cuda", dtype=dtype).contiguous(memory_format=memory_format)

    x, w = random(128, channels, image, image), random(filters, channels, 3, 3)
    arguments = ([stride] * 2, [1, 1], [1, 1], False, [0, 0], 1)
    y = torch.randn_like(torch.ops.aten.convolution(x, w, None, *arguments))
    return passes(x, w, y, arguments)


def linear(inputs, outputs, samples, _, dtype):
    def random(*shape):
        return torch.randn(*shape, device="cuda", dtype=dtype)

    x, w, y = random(samples * 197, inputs), random(outputs, inputs), random(samples * 197, outputs)
    return {"forward": lambda: x @ w.T, "input_gradient": lambda: y @ w, "weight_gradient": lambda: y.T @ x}


def layers():
    for channels, image, filters, stride in CONVOLUTIONS:
        by = "" if stride == 1 else f" by {stride}"
        yield (f"conv 3x3 {channels}x{image}x{image} to {filters}{by}",
               lambda f, t, a=(channels, image, filters, stride): convolution(*a, f, t))
    for inputs, outputs, samples in LINEAR:
        yield f"linear {inputs} to {outputs} ({samples} samples)", lambda f, t, a=(inputs, outputs, samples): linear(*a, f, t)


PRECISIONS = ["f32", "tf32", "bf16"]


def precise(precision):
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def measure_layers():
    for name, make in layers():
        for precision in PRECISIONS:
            dtype = precise(precision)
            best = {}
            for memory_format in FORMATS.values():
                for which, work in make(memory_format, dtype).items():
                    least = min(milliseconds(captured(work), 7, 10))
                    best[which] = min(best.get(which, least), least)
            row = {"layer": name, "precision": precision}
            print(json.dumps(row | {f"{which}_ms": round(ms, 5) for which, ms in best.items()}), flush=True)


def measure_steps():
    for name, (make, batch, size, classes) in MODELS.items():
        for precision in PRECISIONS:
            dtype = precise(precision)
            best = {}
            for memory_format in FORMATS.values():
                torch.manual_seed(0)
                model, optimizer = make()
                model = model.to(memory_format=memory_format)
                x = torch.randn(batch, 3, size, size, device="cuda").contiguous(memory_format=memory_format)
                labels = torch.randint(0, classes, (batch,), device="cuda")

                def step(model=model, optimizer=optimizer, x=x, labels=labels, dtype=dtype):
                    optimizer.zero_grad(set_to_none=False)
                    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32, cache_enabled=False):
                        loss = F.cross_entropy(model(x), labels)
                    loss.backward()
                    optimizer.step()

                def forward(model=model, x=x, dtype=dtype):
                    with torch.no_grad(), torch.autocast("cuda", dtype, enabled=dtype != torch.float32, cache_enabled=False):
                        return model(x)

                for what, work in (("eager", step), ("graph", None), ("compiled", None), ("evaluation_graph", None)):
                    if what == "graph":
                        work = captured(step)
                    if what == "compiled":
                        compiled = torch.compile(model, mode="max-autotune")
                        work = functools.partial(step, model=compiled)
                    if what == "evaluation_graph":
                        model.eval()
                        work = captured(forward)
                    ms = statistics.median(milliseconds(work, 20, 2))
                    best[what] = min(best.get(what, ms), ms)
            row = {"step": name, "batch": batch, "precision": precision}
            print(json.dumps(row | {f"{what}_ms": round(ms, 4) for what, ms in best.items()}), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", action="store_true")
    parser.add_argument("--steps", action="store_true")
    options = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    print(json.dumps({"torch": torch.__version__, "gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda,
                      "cudnn": torch.backends.cudnn.version()}), flush=True)
    if options.layers or not options.steps:
        measure_layers()
    if options.steps or not options.layers:
        measure_steps()


if __name__ == "__main__":
    main()
