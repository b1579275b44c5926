"""Golden files: the numbers of PyTorch in float64 that dilt's kernels are compared with.

Run:       /usr/bin/python3 tests/golden/generate.py [FOLDER]     (default: this folder; about three seconds)
Versions:  Debian 12: Python 3.11, python3-torch 1.13.0, python3-torchvision 0.14.1, libopenblas0-pthread 0.3.21; one thread.
Seeds:     every case is seeded by CRC-32 of "<file>/<case>", so adding a case changes no other.
Inputs:    normal, rounded to f32 (stored as F64), so that an f32 engine starts from the same numbers.
Layouts:   PyTorch's: activations NCHW, filters OIHW (here K C R S). README.md lists files, tensors and scalars.

On another CPU the BLAS may sum in another order: expect the last bits (1e-15) of results to differ, inputs not.
"""
import json
import struct
import sys
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import clip_grad_norm_, prune
from torchvision.transforms import functional as vision

torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.int64: "I64", torch.uint8: "U8"}


class Golden:
    """One safetensors file: tensors `<case>/<tensor>`; each case's scalars as "key=value,..." in `__metadata__`."""

    def __init__(self, name):
        self.name, self.tensors, self.metadata = name, {}, {}

    def seed(self, case):
        torch.manual_seed(zlib.crc32(f"{self.name}/{case}".encode()))

    def add(self, case, tensors, **scalars):
        for name, t in tensors.items():
            key = f"{case}/{name}"
            assert key not in self.tensors and (not t.is_floating_point() or t.isfinite().all()), key
            self.tensors[key] = t.detach().clone().contiguous()
        if scalars:
            self.metadata[case] = ",".join(f"{k}={int(v) if isinstance(v, bool) else v}" for k, v in scalars.items())

    def write(self, folder):
        # Header sorted by name; data sorted by (widest type, name) as the official writer does: all tensors aligned.
        header, data = {"__metadata__": self.metadata}, b""
        for name, t in sorted(self.tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
            raw = t.numpy().tobytes()
            header[name] = {"dtype": DTYPES[t.dtype], "shape": list(t.shape), "data_offsets": [len(data), len(data) + len(raw)]}
            data += raw
        text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        path = Path(folder) / f"{self.name}.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)
        print(f"{path.name:<28}{path.stat().st_size:>9} bytes {len(self.tensors):>4} tensors")


def normal(*shape, mean=0.0, std=1.0):
    return (mean + std * torch.randn(*shape)).float().double()


def leaf(t):
    return t.clone().requires_grad_()


def conv():
    """y = w * x (+ bias); mean of x and dy not zero. Bias: its gradient is the sum of dy over N P Q."""
    g = Golden("conv")
    cases = {  #           N   C   H   W   K  R  S stride pad bias
        "aligned":        (16, 8,  8,  4, 16, 3, 3, 1, 1, False),
        "ragged":         (5,  3,  9,  7,  7, 3, 3, 1, 1, True),
        "stride2_even":   (5,  3,  8,  6,  7, 3, 3, 2, 1, False),
        "stride2_odd":    (5,  3,  9,  7,  5, 3, 3, 2, 1, False),
        "stride3":        (3,  3, 10, 10,  4, 3, 3, 3, 1, False),
        "pointwise":      (4,  5,  6,  5,  6, 1, 1, 1, 0, False),
        "pointwise_s2":   (5,  4,  8,  7,  8, 1, 1, 2, 0, False),
        "stem7x7":        (3,  3, 14, 14,  5, 7, 7, 2, 3, False),
        "filter5x5":      (3,  2,  7,  6,  5, 5, 5, 1, 2, True),
        "filter2x2_s2":   (4,  3,  8,  7,  5, 2, 2, 2, 0, False),  # the last column of x is never read
        "unpadded":       (4,  3,  6,  7,  5, 3, 3, 1, 0, False),
        "filter1x3":      (4,  3,  5,  6,  5, 1, 3, 1, 0, False),
        "filter3x1":      (4,  3,  5,  6,  5, 3, 1, 1, 0, False),
        "one":            (1,  1,  1,  1,  1, 1, 1, 1, 0, False),
        "linear":         (11, 37, 1,  1, 10, 1, 1, 1, 0, True),
        "tiles":          (3, 33,  5,  5, 70, 3, 3, 1, 1, False),  # K > 64, C > 32, N P Q > 64, C R S > 256
        "long_reduction": (24, 1, 12, 12,  1, 3, 3, 1, 1, False),  # dw sums N P Q = 3456 products
    }
    for case, (n, c, h, w_, k, r, s, stride, pad, has_bias) in cases.items():
        g.seed(case)
        x = leaf(normal(n, c, h, w_, mean=0.5))
        w = leaf(normal(k, c, r, s, mean=0.05, std=(2 / (c * r * s)) ** 0.5))
        bias = leaf(normal(k, mean=0.3)) if has_bias else None
        y = F.conv2d(x, w, bias, stride, pad)
        dy = normal(*y.shape, mean=0.1)
        y.backward(dy)
        tensors = dict(x=x, w=w, y=y, dy=dy, dx=x.grad, dw=w.grad)
        if has_bias:
            tensors.update(bias=bias, dbias=bias.grad)
        g.add(case, tensors, stride=stride, pad=pad)
    return g


def norm():
    """y = [relu](batch_norm(x) [+ residual]); mean and invstd are those that normalise: of the batch, in eval the running ones."""
    g, eps, momentum = Golden("norm"), 1e-5, 0.1
    shapes = {"ragged": (5, 3, 7, 5), "aligned": (16, 8, 4, 4), "pixel": (11, 6, 1, 1), "offset": (5, 3, 6, 4)}
    every = [(train, relu, res) for train in (True, False) for relu in (False, True) for res in (False, True)]
    chosen = {"ragged": every, "pixel": every, "aligned": [(True, True, True)],
              "offset": [(True, False, False), (True, True, True), (False, True, True)]}
    for shape_name, combinations in chosen.items():
        n, c, h, w = shape = shapes[shape_name]
        center, spread = (50.0, 0.5) if shape_name == "offset" else (0.7, 1.5)
        for train, relu, has_residual in combinations:
            case = "_".join([shape_name, "train" if train else "eval"] + ["relu"] * relu + ["residual"] * has_residual)
            g.seed(case)
            gamma, beta = leaf(normal(c, mean=1.0, std=0.3)), leaf(normal(c, mean=0.2, std=0.5))
            running_mean = normal(c, mean=center, std=spread)
            running_var = (normal(c, mean=1.0, std=0.3).abs() * spread**2).float().double()
            new_mean, new_var = running_mean.clone(), running_var.clone()
            channel = normal(c, std=spread)[:, None, None]  # channels differ in their means too
            while True:  # until no pre-activation is so near 0 that rounding could flip its relu
                x = leaf((normal(*shape, mean=center, std=spread) + channel).float().double())
                residual = leaf(normal(*shape, mean=0.4)) if has_residual else None
                new_mean.copy_(running_mean), new_var.copy_(running_var)
                before = F.batch_norm(x, new_mean, new_var, gamma, beta, train, momentum, eps)
                before = before + residual if has_residual else before
                if not relu or before.abs().min() > 1e-3:
                    break
            y = F.relu(before) if relu else before
            dy = normal(*shape, mean=0.1)
            y.backward(dy)
            mean = x.mean((0, 2, 3)) if train else running_mean
            invstd = ((x.var((0, 2, 3), unbiased=False) if train else running_var) + eps).rsqrt()
            tensors = dict(x=x, gamma=gamma, beta=beta, running_mean=running_mean, running_var=running_var,
                           y=y, dy=dy, dx=x.grad, dgamma=gamma.grad, dbeta=beta.grad, mean=mean, invstd=invstd,
                           new_running_mean=new_mean, new_running_var=new_var)
            if has_residual:
                tensors.update(residual=residual, dresidual=residual.grad)
            g.add(case, tensors, eps=eps, momentum=momentum, relu=relu, train=train, residual=has_residual)
    return g


def pool():
    """Max pool (mean -1: padding with 0 instead of -inf would show) and global average pool (kernel=0: the whole image)."""
    g = Golden("pool")
    cases = {  #              N  C  H   W   kernel stride pad; kernel 0: average
        "max3x3_s2_odd":     (5, 3, 11, 11, 3, 2, 1),
        "max3x3_s2_even":    (5, 3,  8,  8, 3, 2, 1),
        "max2x2_s2":         (4, 3,  8,  6, 2, 2, 0),
        "max2x2_s2_ragged":  (4, 3,  7,  5, 2, 2, 0),  # the last row and column of x are never read
        "avg8x8":            (3, 3,  8,  8, 0, 0, 0),
        "avg7x5":            (5, 3,  7,  5, 0, 0, 0),
        "avg1x1":            (5, 7,  1,  1, 0, 0, 0),
    }
    for case, (n, c, h, w, kernel, stride, pad) in cases.items():
        g.seed(case)
        x = leaf(normal(n, c, h, w, mean=-1.0))
        if kernel:
            windows = F.pad(x.detach(), [pad] * 4, value=-torch.inf).unfold(2, kernel, stride).unfold(3, kernel, stride)
            top2 = windows.flatten(4).topk(2).values
            assert (top2[..., 0] > top2[..., 1]).all(), f"{case}: tie in a window"
            y = F.max_pool2d(x, kernel, stride, pad)
        else:
            y = F.adaptive_avg_pool2d(x, 1)
        dy = normal(*y.shape, mean=0.1)
        y.backward(dy)
        g.add(case, dict(x=x, y=y, dy=dy, dx=x.grad), kind="max" if kernel else "avg", kernel=kernel, stride=stride, pad=pad)
    return g


def shortcut():
    """ResNet shortcut without parameters (option A): every second pixel, new channels zero, half before and half after."""
    g = Golden("shortcut")
    for case, (n, c, h, w) in {"even": (5, 4, 8, 8), "odd": (2, 16, 7, 7)}.items():
        g.seed(case)
        x, p = leaf(normal(n, c, h, w, mean=0.5)), c // 2
        y = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, p, p))
        dy = normal(*y.shape, mean=0.1)
        y.backward(dy)
        g.add(case, dict(x=x, y=y, dy=dy, dx=x.grad), stride=2, pad_before=p, pad_after=p)
    return g


def loss():
    """Softmax cross entropy, mean over samples, with label smoothing; how many labels are among the 1 and 5 largest logits."""
    g = Golden("loss")
    cases = {  #               N   C    smoothing scale
        "small":             (5,  10,   0.0, 1.0),
        "small_smooth":      (5,  10,   0.1, 1.0),
        "batch":             (64, 10,   0.0, 2.0),
        "batch_smooth":      (64, 10,   0.1, 2.0),
        "classes3":          (7,  3,    0.0, 1.0),
        "classes3_smooth":   (7,  3,    0.1, 1.0),
        "classes1000_smooth": (9, 1000, 0.1, 3.0),
        "large":             (13, 10,   0.0, 50.0),  # exp overflows f32 unless the maximum is subtracted
        "large_smooth":      (13, 10,   0.1, 50.0),
    }
    for case, (n, c, smoothing, scale) in cases.items():
        g.seed(case)
        labels = torch.randint(c, (n,))
        logits = leaf((normal(n, c, mean=3.0, std=scale) + scale * F.one_hot(labels, c)).float().double())
        per_sample = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
        value = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        value.backward()
        top5 = logits.detach().topk(min(5, c)).indices == labels[:, None]
        g.add(case, dict(logits=logits, labels=labels, loss=value[None], dlogits=logits.grad, per_sample=per_sample,
                         top1=top5[:, 0].sum()[None], top5=top5.sum()[None]), label_smoothing=smoothing)
    return g


def sgd():
    """Four steps of torch.optim.SGD. Names of the second tensor, which only the clip cases have, begin with b_."""
    g = Golden("sgd")
    cases = {  #        lr   momentum nesterov weight_decay clip mask
        "plain":          (0.1,  0.0, False, 0.0,  0.0, False),
        "momentum":       (0.1,  0.9, False, 0.0,  0.0, False),
        "nesterov":       (0.1,  0.9, True,  0.0,  0.0, False),
        "decay":          (0.1,  0.9, False, 0.05, 0.0, False),
        "plain_mask":     (0.1,  0.0, False, 0.05, 0.0, True),
        "all_mask":       (0.05, 0.9, True,  0.05, 0.0, True),
        "clip":           (0.1,  0.9, False, 0.05, 1.0, False),
        "clip_mask":      (0.1,  0.9, True,  0.05, 1.0, True),
    }
    for case, (lr, momentum, nesterov, decay, clip, has_mask) in cases.items():
        g.seed(case)
        mask = (torch.rand(77) < 0.4).double() if has_mask else torch.ones(77)
        masks = {"": mask, "b_": torch.ones(33)} if clip else {"": mask}  # the second tensor, like a bias, has no mask
        params = {b: nn.Parameter(normal(len(m), mean=0.2) * m) for b, m in masks.items()}
        tensors = {f"{b}w0": p.detach().clone() for b, p in params.items()} | ({"mask": mask.byte()} if has_mask else {})
        optimizer = torch.optim.SGD(params.values(), lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=decay)
        norms = []
        for step in range(4):
            for b, p in params.items():
                p.grad = normal(p.numel(), mean=0.1) * (1 if step != 2 else 2**-5)  # step 2 is below the clip norm
                tensors[f"{b}grad{step}"] = p.grad.clone()
                if clip:
                    p.grad *= masks[b]
            if clip:  # torch: gradient *= min(1, clip / (norm + 1e-6))
                norms.append(clip_grad_norm_(params.values(), clip))
            optimizer.step()
            with torch.no_grad():
                for b, p in params.items():
                    p *= masks[b]
                    if momentum:
                        optimizer.state[p]["momentum_buffer"] *= masks[b]
                    tensors[f"{b}w{step + 1}"] = p.detach().clone()
        if momentum:
            tensors |= {f"{b}buf4": optimizer.state[p]["momentum_buffer"] for b, p in params.items()}
        if clip:
            assert [bool(n > clip) for n in norms] == [True, True, False, True]
            tensors["norms"] = torch.stack(norms)
        g.add(case, tensors, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=decay, clip=clip)
    return g


def magnitude_mask(weights, masks, fraction):
    """Prunes round_half_even(fraction * survivors) of the survivors: smallest |w| first, ties in file order. Returns masks, threshold."""
    magnitude = torch.cat([w.abs().flatten() for w in weights])
    alive = torch.cat([m.flatten() for m in masks]).bool()
    survivors = alive.nonzero().flatten()
    order = survivors[magnitude[survivors].sort(stable=True).indices]
    pruned = order[: round(fraction * len(survivors))]
    alive[pruned] = False
    parts = alive.byte().split([m.numel() for m in masks])
    threshold = magnitude[pruned].max().item() if len(pruned) else float("nan")
    return [p.reshape(m.shape) for p, m in zip(parts, masks)], threshold


def torch_masks(weights, masks, fraction, scope):
    """The same by torch.nn.utils.prune, whose choice among equal magnitudes is unspecified."""
    modules = [nn.ParameterDict({"w": nn.Parameter(w.clone())}) for w in weights]
    for module, mask in zip(modules, masks):
        prune.custom_from_mask(module, "w", mask.float())
    if scope == "global":
        prune.global_unstructured([(m, "w") for m in modules], prune.L1Unstructured, amount=fraction)
    else:
        for module in modules:
            prune.l1_unstructured(module, "w", fraction)
    return [m.w_mask.byte() for m in modules]


def pruning():
    """Magnitude pruning. Masks U8, weights F32; fraction is of the survivors of mask_in; threshold is the largest pruned |w|."""
    g = Golden("prune")
    shapes = [(4, 3, 3, 3), (7, 4), (5,)]  # 108 + 28 + 5 = 141
    plus2 = [(4, 3, 3, 3), (7, 4), (7,)]   # 143
    halves = [(3, 3, 1, 1), (5,), (7,)]    # one half of 9, 5, 7 is 4.5 -> 4, 2.5 -> 2, 3.5 -> 4
    fifty = [(5, 2, 2, 2), (2, 3), (4,)]   # 50
    cases = {  #                     shapes, scope, fraction, values, mask_in
        "global_20":                 (shapes, "global", 0.2, "normal", None),
        "global_90":                 (shapes, "global", 0.9, "normal", None),
        "global_half_down":          (shapes, "global", 0.5, "normal", None),   # 70.5 -> 70
        "global_half_up":            (plus2, "global", 0.5, "normal", None),    # 71.5 -> 72
        "global_half_inexact":       (fifty, "global", 0.29, "normal", None),   # f64: 14.499999999999998 -> 14; f32: 14.5
        "global_none":               (shapes, "global", 0.0, "normal", None),
        "global_all":                (shapes, "global", 1.0, "normal", None),
        "global_second_round":       (shapes, "global", 0.2, "normal", "zeroed"),
        "global_second_round_orig":  (shapes, "global", 0.5, "normal", "kept"),  # pruned entries hold weights, to be ignored
        "global_ties":               (shapes, "global", 0.5, "ties", None),
        "global_ties_zeros":         (shapes, "global", 0.1, "ties", None),      # fewer than the zeros
        "global_ties_second_round":  (shapes, "global", 0.1, "ties", "zeroed"),  # 8 of 14 zeros alive beside zeros pruned
        "global_extremes":           (shapes, "global", 0.5, "extremes", None),
        "global_subnormals":         (shapes, "global", 0.03, "extremes", None), # the threshold is subnormal
        "layer_20":                  (shapes, "layer", 0.2, "normal", None),
        "layer_halves":              (halves, "layer", 0.5, "normal", None),
        "layer_90_second_round":     (shapes, "layer", 0.9, "normal", "zeroed"),
        "layer_ties":                (shapes, "layer", 0.5, "ties", None),
        "layer_extremes":            (shapes, "layer", 0.5, "extremes", None),
    }
    for case, (shape_list, scope, fraction, values, mask_in) in cases.items():
        g.seed(case)
        sizes = [torch.Size(s).numel() for s in shape_list]
        n = sum(sizes)
        flat = normal(n)
        if values == "ties":  # five magnitudes, both signs, both zeros
            flat = torch.randint(0, 5, (n,)) / 4 * torch.where(torch.rand(n) < 0.5, -1.0, 1.0)
        if values == "extremes":  # from the smallest subnormal to the largest f32
            flat *= 10.0 ** (torch.rand(n) * 82 - 44.5)
            flat[0], flat[-1] = torch.finfo(torch.float32).max, -(2.0**-149)
        weights = [p.reshape(s).float() for p, s in zip(flat.split(sizes), shape_list)]
        masks = [torch.ones(s, dtype=torch.uint8) for s in shape_list]
        if mask_in:  # the first round's survivors; weights of the second round are new
            masks, _ = magnitude_mask([torch.randn(s) for s in shape_list], masks, 0.4)
        if mask_in == "zeroed":
            weights = [w * m for w, m in zip(weights, masks)]
        if scope == "global":
            out, threshold = magnitude_mask(weights, masks, fraction)
            scalars = dict(threshold=threshold)
        else:
            rounds = [magnitude_mask([w], [m], fraction) for w, m in zip(weights, masks)]
            out = [m[0] for m, _ in rounds]
            scalars = {f"threshold{i}": t for i, (_, t) in enumerate(rounds)}
        theirs = torch_masks(weights, masks, fraction, scope)
        if values == "ties":  # equal counts only, per scope
            count = lambda ms: sum(int(m.sum()) for m in ms) if scope == "global" else [int(m.sum()) for m in ms]
            assert count(out) == count(theirs), case
            assert any((w == 0).any() and torch.signbit(w[w == 0]).any() for w in weights), case
        else:
            assert all(torch.equal(a, b) for a, b in zip(out, theirs)), case
        tensors = {f"{name}{i}": t for name, ts in (("w", weights), ("mask_in", masks), ("mask_out", out)) for i, t in enumerate(ts)}
        g.add(case, tensors, scope=scope, fraction=fraction, **scalars)
    return g


class Block(nn.Module):
    def __init__(self, c, k, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c, k, 3, stride, 1, bias=False), nn.BatchNorm2d(k)
        self.conv2, self.bn2 = nn.Conv2d(k, k, 3, 1, 1, bias=False), nn.BatchNorm2d(k)
        self.stride, self.pad = stride, (k - c) // 2

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + x)


class ResNet(nn.Module):
    def __init__(self, blocks, channels, width=16, classes=10):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)

        def stage(c, k, stride):
            return nn.Sequential(Block(c, k, stride), *[Block(k, k, 1) for _ in range(blocks - 1)])

        self.layer1 = stage(width, width, 1)
        self.layer2 = stage(width, 2 * width, 2)
        self.layer3 = stage(2 * width, 4 * width, 2)
        self.linear = nn.Linear(4 * width, classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def descend(model, masks, x, labels, batch, lr, momentum, decay):
    """SGD over consecutive batches, weights and velocity masked; yields logits and loss of each before its update."""
    params = dict(model.named_parameters())
    optimizer = torch.optim.SGD(params.values(), lr=lr, momentum=momentum, weight_decay=decay)

    def apply_masks():
        with torch.no_grad():
            for name, mask in masks.items():
                params[name] *= mask
                if params[name] in optimizer.state:
                    optimizer.state[params[name]]["momentum_buffer"] *= mask

    apply_masks()
    for first in range(0, len(x), batch):
        part = slice(first, first + batch)
        logits = model(x[part])
        value = F.cross_entropy(logits, labels[part])
        optimizer.zero_grad()
        value.backward()
        yield logits.detach(), value.detach()
        optimizer.step()
        apply_masks()


def train(dtype=torch.float64):
    """Ten SGD steps of ResNet-8, dense and with a 90 % sparse mask. grad0 is not masked. `dtype` is for measuring tolerances."""
    g, steps, batch = Golden("train_resnet8"), 10, 20
    lr, momentum, decay = 0.05, 0.9, 5e-4
    g.seed("init")
    model = ResNet(1, 1)
    init = {name: p.detach().float() for name, p in model.named_parameters()}
    x, labels = torch.randn(steps * batch, 1, 8, 8).float(), torch.randint(10, (steps * batch,))
    masks = {}
    for name, w in init.items():
        if w.ndim == 4:
            keep = torch.randperm(w.numel())[: round(0.1 * w.numel())]
            masks[name] = torch.zeros(w.numel(), dtype=torch.uint8).index_fill(0, keep, 1).reshape(w.shape)
    g.tensors.update(x=x, labels=labels)
    g.add("init", init)
    g.add("mask", masks)
    shown = ["conv1.weight", "layer2.0.conv1.weight", "layer3.0.bn2.weight", "linear.weight", "linear.bias"]
    for case, case_masks in (("dense", {}), ("masked", masks)):
        model = ResNet(1, 1)
        model.load_state_dict(init, strict=False)
        model.to(dtype).train()
        params = dict(model.named_parameters())
        losses, tensors = [], {}
        for logits, value in descend(model, case_masks, x.to(dtype), labels, batch, lr, momentum, decay):
            if not losses:
                tensors |= {"logits0": logits} | {f"grad0/{name}": params[name].grad.clone() for name in shown}
            losses.append(value)
        tensors["losses"] = torch.stack(losses)
        for name, t in model.state_dict().items():
            if t.is_floating_point():
                small = "bn" in name or name in ("conv1.weight", "linear.weight", "linear.bias")
                tensors[f"final/{name}" if small else f"final_norm/{name}"] = t if small else t.norm()[None]
        g.add(case, tensors, lr=lr, momentum=momentum, nesterov=False, weight_decay=decay, label_smoothing=0.0, batch=batch, steps=steps)
    return g


def augment():
    """Boxes of stored images, scaled, flipped, their colours changed by given factors, normalised. Without factors: as they are."""
    g = Golden("augment")
    cases = {  #         N  C  stored    input   flip   factors
        "centre":       (3, 3, (9, 12), (6, 7), False, False),  # torchvision's centre crop
        "larger":       (5, 3, (9, 11), (8, 10), True, False),   # boxes smaller than the input: interpolated
        "smaller":      (5, 3, (23, 19), (6, 5), True, False),   # boxes larger than the input: not antialiased
        "padded":       (5, 3, (8, 8), (8, 8), True, False),     # boxes that lie partly outside
        "one_pixel":    (2, 1, (4, 5), (1, 1), False, True),
        "grey":         (5, 1, (10, 9), (7, 8), True, True),
        "colour":       (9, 3, (13, 17), (9, 7), True, True),
        "padded_colour": (5, 3, (8, 8), (8, 8), True, True),
        "large":        (1, 3, (40, 50), (37, 41), True, True),  # more pixels than a block has threads
    }
    for case, (n, c, (sh, sw), (h, w), may_flip, has_factors) in cases.items():
        g.seed(case)
        images = torch.randint(256, (n, c, sh, sw), dtype=torch.uint8)
        mean, std = normal(c, mean=0.5, std=0.1), normal(c, mean=0.3, std=0.02)
        boxes, factors, grey, y = [], [], [], []
        for i, image in enumerate(images.double() / 255):
            if case == "centre":
                box = [round((sh - h) / 2), round((sw - w) / 2), h, w]
                assert torch.equal(vision.center_crop(image, [h, w]), vision.crop(image, *box))
            elif case.startswith("padded"):
                box = [int(torch.randint(-3, 4, ())), int(torch.randint(-3, 4, ())), h, w]
            else:  # the first one is the whole image, the second one pixel
                height, width = (sh, sw) if i == 0 else (1, 1) if i == 1 else (int(torch.randint(1, m + 1, ())) for m in (sh, sw))
                box = [int(torch.randint(sh - height + 1, ())), int(torch.randint(sw - width + 1, ())), height, width]
            flip = may_flip and i % 2 == 0
            factor = torch.rand(3).float().double() * 2 if has_factors else torch.ones(3)
            out = vision.resized_crop(image, *box, [h, w], antialias=False)
            out = vision.hflip(out) if flip else out
            if has_factors:
                out = vision.adjust_brightness(out, factor[0])
                grey.append(vision.rgb_to_grayscale(out).mean())
                out = vision.adjust_saturation(vision.adjust_contrast(out, factor[1]), factor[2])
            assert out.dtype == torch.float64
            boxes.append(box + [int(flip)])
            factors.append(factor)
            y.append(vision.normalize(out, mean, std))
        tensors = dict(images=images, boxes=torch.tensor(boxes), mean=mean, std=std, y=torch.stack(y))
        if has_factors:
            tensors.update(factors=torch.stack(factors), grey=torch.stack(grey))
        g.add(case, tensors, input=f"{h}x{w}")
    return g


if __name__ == "__main__":
    folder = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent
    for golden in (conv, norm, pool, shortcut, loss, sgd, pruning, train, augment):
        golden().write(folder)
