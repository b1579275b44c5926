#!/usr/bin/env python3
"""PyTorch's side of the jobs of jobs.py on a GPU, in f32, TF32 and bf16; `dilt_jobs.py` is dilt's.

    python3 benches/peers/torch_gpu.py [--steps] [--compiled] [--layers] [--attention] [--optimizer] [--prune] [--device cpu]

All but --compiled if none is named. Prints a line of JSON for each time: job, op, precision, how, ms; for what fails one with
`error` in place of `ms`. The rest goes on, and the exit code is 1 at the end.

- Steps: forward pass, loss, backward pass, gradients clipped to the job's norm where it has one, and optimizer (fused); and the
  evaluated batch; both memory formats, whose faster one counts; eager, and captured in one CUDA graph. In bf16 under autocast
  with f32 weights, as dilt's do. Masked weights would be zeros in a dense layer. Medians of 20 runs.
- Compiled: the same steps, forward pass and loss by torch.compile, in bf16 and channels-last alone, for it takes a minute or
  more each; by max-autotune, which captures both passes by itself, and by max-autotune-no-cudagraphs with the whole step
  captured in one graph, clipping and optimizer included.
- Layers: cuDNN and cuBLAS, each pass captured; both memory formats, whose faster one counts.
- Attention: scaled_dot_product_attention, in bf16 by the flash backend or by cuDNN's, whichever is faster, in f32 by the
  memory-efficient one; forward pass and backward pass are captured and timed each by itself.
- Optimizer: fused SGD and AdamW over all parameters, captured.
- Prune: exactly a fifth of all weights, which are uniform between -1 and 1, by topk or by a stable sort of their magnitudes; by
  kthvalue, which finds the threshold and removes what equals it too. Eager.

Of single operations `ms` is the median of 30 runs with 256 MiB written before each, as `dilt bench --op` measures, and
`warm_ms` the least of runs in a row. --device cpu is for trying this without a GPU: nothing is captured or fused there.
"""

import argparse
import contextlib
import functools
import json
import statistics
import time
import traceback

import torch
from torch import nn
from torch.nn import functional as F

from jobs import checked, network
from networks import FORMATS, NETWORKS, adamw, sgd

PRECISIONS = ["f32", "tf32", "bf16"]
FLUSHED_BYTES = 256 << 20
# Ways to compile, the strongest first: how the line calls it, mode, whether the whole step is captured around it.
COMPILED = [("compiled graph", "max-autotune-no-cudagraphs", True), ("compiled", "max-autotune", False)]
# Compiled first, for a limit of time stops the rest.
COMPILED_FIRST = ["vit_small_patch16_224", "resnet18_cifar", "resnet50"]
# Of torch.nn.attention.SDPBackend.
ATTENTION_BACKENDS = {"f32": ["EFFICIENT_ATTENTION"], "bf16": ["FLASH_ATTENTION", "CUDNN_ATTENTION"]}


def precise(precision):
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


class Gpu:
    name = "cuda"
    fused = {"fused": True}
    foreach = {"foreach": True}

    @staticmethod
    def captured(work):
        """The work as a graph, after some runs on the stream that it is captured on, which choose algorithms and allocate."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            work()
        # With the work, for the graph reads its tensors.
        return lambda graph=graph, work=work: graph.replay()

    @staticmethod
    def milliseconds(work, runs, before=lambda: None):
        """Times of single runs, after one that is not counted; `before` comes before each and is not counted either."""
        work()
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
        for begin, end in events:
            before()
            begin.record()
            work()
            end.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in events]


class Cpu:
    name = "cpu"
    fused = {}
    foreach = {}

    @staticmethod
    def captured(work):
        return work

    @staticmethod
    def milliseconds(work, runs, before=lambda: None):
        work()
        times = []
        for _ in range(runs):
            before()
            begin = time.perf_counter()
            work()
            times.append((time.perf_counter() - begin) * 1e3)
        return times


def attention_by(backend):
    """In it scaled_dot_product_attention takes one backend; PyTorch before 2.3 leaves no choice."""
    try:
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError:
        return contextlib.nullcontext()
    return sdpa_kernel(getattr(SDPBackend, backend))


class Bench:
    def __init__(self, machine, runs, only):
        self.machine, self.runs, self.only = machine, runs, only
        self.on_gpu = machine.name == "cuda"
        self.precisions = PRECISIONS if self.on_gpu else ["f32", "bf16"]
        self.failed = False

    def jobs(self, *kinds):
        return [job for job in checked(*kinds) if self.only in job["name"]]

    def random(self, *shape, dtype=torch.float32):
        return torch.randn(*shape, device=self.machine.name).to(dtype)

    @functools.cached_property
    def flush(self):
        return torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=self.machine.name).zero_

    def tell(self, job, op, precision, how, ms, **more):
        row = {"job": job["name"], "op": op, "precision": precision, "how": how, "ms": round(ms, 5), **more}
        print(json.dumps(row), flush=True)

    @contextlib.contextmanager
    def recorded(self, job=None, **what):
        """What fails inside is a line of its own, and ends nothing else."""
        try:
            yield
        except (Exception, SystemExit) as error:
            self.failed = True
            traceback.print_exc()
            message = f"{type(error).__name__}: {error}".splitlines()[0]
            print(json.dumps({**({"job": job["name"]} if job else {}), **what, "error": message}), flush=True)

    def operation(self, job, op, precision, hows):
        """The fastest of some forms of an operation; of each, what makes the work that is timed."""
        best = None
        for how, prepare in hows.items():
            with self.recorded(job, op=op, precision=precision, how=how):
                work = prepare()
                ms = statistics.median(self.machine.milliseconds(work, self.runs, self.flush))
                warm = min(self.machine.milliseconds(work, self.runs))
                if best is None or ms < best[1]:
                    best = (how, ms, warm)
        if best:
            how, ms, warm = best
            self.tell(job, op, precision, how, ms, warm_ms=round(warm, 5))

    # -------------------------------------------------------------------------------------------------- whole steps

    def step(self, job, dtype, memory_format, compiled=lambda function: function):
        """A network, its training step and its forward pass."""
        entry = NETWORKS[job["model"]]
        torch.manual_seed(0)
        model = entry.make().to(self.machine.name).to(memory_format=memory_format)
        capturable = {"capturable": True} if self.on_gpu and entry.optimizer is adamw else {}
        optimizer = entry.optimizer(model, **self.machine.fused, **capturable)
        x = self.random(*job["shape"]["input"]).contiguous(memory_format=memory_format)
        labels = torch.randint(0, entry.classes, (job["batch"],), device=self.machine.name)
        autocast = functools.partial(
            torch.autocast, self.machine.name, torch.bfloat16, enabled=dtype != torch.float32, cache_enabled=False)

        @compiled
        def loss():
            return F.cross_entropy(model(x), labels)

        def train():
            # Not zeros that the backward pass would add to; and of a graph, gradients belong to its own memory.
            optimizer.zero_grad(set_to_none=True)
            with autocast():
                value = loss()
            value.backward()
            if entry.clip_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), entry.clip_norm, **self.machine.foreach)
            optimizer.step()

        def forward():
            with torch.no_grad(), autocast():
                return model(x)

        return model, train, forward

    def steps(self):
        for job in self.jobs("step"):
            for precision in self.precisions:
                best = {}
                for name, memory_format in FORMATS.items():
                    with self.recorded(job, precision=precision, format=name):
                        self.formatted_steps(job, precision, name, memory_format, best)
                for (op, how), (ms, name) in best.items():
                    self.tell_step(job, op, precision, how, ms, name)

    def formatted_steps(self, job, precision, name, memory_format, best):
        """Puts the times that are the least so far, and their format, into `best`."""
        model, train, forward = self.step(job, precise(precision), memory_format)
        prepares = {"eager": lambda work: work} | ({"graph": self.machine.captured} if self.on_gpu else {})
        for op, work in (("training step", train), ("evaluation", forward)):
            model.train(op == "training step")
            for how, prepare in prepares.items():
                with self.recorded(job, op=op, precision=precision, how=how, format=name):
                    ms = self.step_ms(prepare(work))
                    best[op, how] = min(best.get((op, how), (ms, name)), (ms, name))

    def step_ms(self, work):
        return statistics.median(self.machine.milliseconds(work, min(self.runs, 20)))

    def tell_step(self, job, op, precision, how, ms, name):
        self.tell(job, op, precision, how, ms, format=name, images_per_second=round(1e3 * job["batch"] / ms, 1))

    def compiled(self):
        def turn(job):
            return COMPILED_FIRST.index(job["model"]) if job["model"] in COMPILED_FIRST else len(COMPILED_FIRST)

        for job in sorted(self.jobs("step"), key=turn):
            for how, mode, whole in COMPILED:
                op = "training step"
                with self.recorded(job, op=op, precision="bf16", how=how):
                    # Else the next network counts as the same function again, of which few versions are compiled.
                    torch.compiler.reset()
                    name, compiled = "channels_last", functools.partial(torch.compile, mode=mode)
                    _, train, _ = self.step(job, precise("bf16"), FORMATS[name], compiled)
                    # The first compiles, and where it captures by itself the second does that.
                    train()
                    train()
                    self.tell_step(job, op, "bf16", how, self.step_ms(self.machine.captured(train) if whole else train), name)

    # ------------------------------------------------------------------------------------------------ single layers

    def convolution(self, shape, dtype, memory_format):
        def random(*sizes):
            return self.random(*sizes, dtype=dtype).contiguous(memory_format=memory_format)

        x = random(shape["n"], shape["c"], shape["h"], shape["w"])
        w = random(shape["k"], shape["c"], shape["r"], shape["s"])
        arguments = ([shape["stride"]] * 2, [shape["pad"]] * 2, [1, 1], False, [0, 0], 1)
        y = torch.randn_like(torch.ops.aten.convolution(x, w, None, *arguments))

        def backward(mask):
            return torch.ops.aten.convolution_backward(y, x, w, None, *arguments, mask)

        return [
            lambda: torch.ops.aten.convolution(x, w, None, *arguments),
            lambda: backward([True, False, False]),
            lambda: backward([False, True, False]),
        ]

    def linear(self, shape, dtype, _):
        rows = shape["t"] * shape["n"]
        x, w, y = (self.random(*sizes, dtype=dtype) for sizes in
                   ((rows, shape["c"]), (shape["k"], shape["c"]), (rows, shape["k"])))
        return [lambda: x @ w.T, lambda: y @ w, lambda: y.T @ x]

    def layers(self):
        for job in self.jobs("conv", "linear"):
            make = self.convolution if job["kind"] == "conv" else self.linear
            formats = FORMATS if job["kind"] == "conv" else {"contiguous": None}
            for precision in self.precisions:
                dtype = precise(precision)
                with self.recorded(job, precision=precision):
                    forms = {name: make(job["shape"], dtype, memory_format) for name, memory_format in formats.items()}
                    for which, op in enumerate(job["op"]):
                        hows = {name: functools.partial(self.machine.captured, passes[which]) for name, passes in forms.items()}
                        self.operation(job, op, precision, hows)

    # ---------------------------------------------------------------------------------------------------- attention

    def attention(self):
        for job in self.jobs("attention"):
            for precision in ("f32", "bf16"):
                with self.recorded(job, precision=precision):
                    self.attention_passes(job, precision)

    def attention_passes(self, job, precision):
        dtype, sizes = precise(precision), [job["shape"][key] for key in ("n", "heads", "t", "head_dim")]
        qkv = [self.random(*sizes, dtype=dtype) for _ in range(3)]
        dy = self.random(*sizes, dtype=dtype)

        def attend(q, k, v):
            if hasattr(F, "scaled_dot_product_attention"):
                return F.scaled_dot_product_attention(q, k, v)
            return torch.softmax(q @ k.transpose(2, 3) / q.shape[3] ** 0.5, 3) @ v

        def forward():
            return lambda: attend(*qkv)

        def backward():
            # Attended once, by the first run, on the stream of the capture, for autograd goes back on the stream it came; by
            # leaves of its own, for those of another capture belong to the stream of that.
            leaves = [tensor.detach().requires_grad_() for tensor in qkv]
            attended = functools.lru_cache(maxsize=None)(lambda: attend(*leaves))
            return lambda: torch.autograd.grad(attended(), leaves, dy, retain_graph=True)

        def prepared(make, backend):
            with attention_by(backend):
                return self.machine.captured(make())

        backends = ATTENTION_BACKENDS[precision] if self.on_gpu else ["MATH"]
        for op, make in zip(job["op"], (forward, backward)):
            hows = {name.removesuffix("_ATTENTION").lower(): functools.partial(prepared, make, name) for name in backends}
            self.operation(job, op, precision, hows)

    # ------------------------------------------------------------------------------------------ optimizer, selection

    def optimizer(self):
        for job in self.jobs("optimizer"):
            shapes = [parameter.shape for parameter in network(job["model"]).parameters()]
            tensors = nn.ParameterList([nn.Parameter(self.random(*shape)) for shape in shapes])
            for parameter in tensors:
                parameter.grad = self.random(*parameter.shape)
            make = sgd if job["op"] == ["sgd_step"] else adamw
            capturable = {"capturable": True} if self.on_gpu and make is adamw else {}
            step = make(tensors, **self.machine.fused, **capturable).step
            how, prepare = "fused" if self.on_gpu else "eager", functools.partial(self.machine.captured, step)
            self.operation(job, job["op"][0], "f32", {how: prepare})

    def prune(self):
        for job in self.jobs("prune"):
            elements, remove = job["shape"]["elements"], job["shape"]["remove"]
            # As dilt's are.
            weights = 2 * torch.rand(elements, device=self.machine.name) - 1

            def topk(w=weights, remove=remove):
                index = torch.topk(w.abs(), remove, largest=False, sorted=False).indices
                return torch.ones_like(w, dtype=torch.bool).index_fill_(0, index, False)

            def sort(w=weights, remove=remove):
                index = torch.sort(w.abs(), stable=True).indices[:remove]
                return torch.ones_like(w, dtype=torch.bool).index_fill_(0, index, False)

            def kthvalue(w=weights, remove=remove):
                magnitudes = w.abs()
                return magnitudes > torch.kthvalue(magnitudes, remove).values

            def prepared(how, work, elements=elements, remove=remove):
                removed = elements - int(work().sum())
                if removed < remove or (removed > remove and how != "kthvalue"):
                    raise ValueError(f"removed {removed} instead of {remove}")
                return work

            for how, work in (("topk", topk), ("sort", sort), ("kthvalue", kthvalue)):
                self.operation(job, "prune", "f32", {how: functools.partial(prepared, how, work)})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["steps", "compiled", "layers", "attention", "optimizer", "prune"]
    for part in parts:
        parser.add_argument(f"--{part}", action="store_true")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--only", default="", metavar="TEXT", help="jobs whose names contain it")
    options = parser.parse_args()
    chosen = [part for part in parts if getattr(options, part)] or [part for part in parts if part != "compiled"]
    machine = Gpu if options.device == "cuda" else Cpu
    torch.backends.cudnn.benchmark = True
    versions = {"torch": torch.__version__, "device": options.device}
    if options.device == "cuda":
        versions |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    print(json.dumps(versions), flush=True)
    bench = Bench(machine, options.runs, options.only)
    for part in chosen:
        with bench.recorded(part=part):
            getattr(bench, part)()
    raise SystemExit(bench.failed)


if __name__ == "__main__":
    main()
