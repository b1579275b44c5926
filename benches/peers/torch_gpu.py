#!/usr/bin/env python3
"""PyTorch's side of the jobs of jobs.py on a GPU, in f32, TF32 and bf16; `dilt_jobs.py` and `dilt bench` are dilt's.

    python3 benches/peers/torch_gpu.py [--steps] [--compiled] [--layers] [--attention] [--optimizer] [--prune] [--device cpu]

All but --compiled if none is named. Prints a line of JSON for each time: job, op, precision, how, ms.

- Steps: forward pass, loss, backward pass and optimizer (fused), and the evaluated batch; both memory formats, whose faster one
  counts; eager, and captured in one CUDA graph. In bf16 under autocast with f32 weights, as dilt's do. Masked weights would be
  zeros in a dense layer. Medians of 20 runs.
- Compiled: the same steps by torch.compile, max-autotune, in bf16 and channels-last alone, for it takes a minute or more each.
- Layers: cuDNN and cuBLAS, each pass captured; both memory formats, whose faster one counts.
- Attention: scaled_dot_product_attention, by the flash backend in bf16, by the memory-efficient one in f32; forward pass and both
  passes are captured, `attention_backward` is the difference of their medians.
- Optimizer: fused SGD and AdamW over all parameters, captured.
- Prune: exactly a fifth of all weights by topk or by a stable sort of their magnitudes; by kthvalue, which finds the threshold
  and removes what equals it too. Eager.

Of single operations `ms` is the median of 30 runs with 256 MiB written before each, as `dilt bench --op` measures, and
`warm_ms` the least of runs in a row. --device cpu is for trying this without a GPU: nothing is captured, compiled or fused
there.
"""

import argparse
import functools
import json
import statistics
import time

import torch
from torch import nn
from torch.nn import functional as F

from jobs import checked
from networks import FORMATS, NETWORKS, adamw, sgd

PRECISIONS = ["f32", "tf32", "bf16"]
FLUSHED_BYTES = 256 << 20


def precise(precision):
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


class Gpu:
    name = "cuda"
    fused = {"fused": True}

    @staticmethod
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


class Bench:
    def __init__(self, machine, runs, only):
        self.machine, self.runs, self.only = machine, runs, only
        self.on_gpu = machine.name == "cuda"
        self.precisions = PRECISIONS if self.on_gpu else ["f32", "bf16"]

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

    def operation(self, job, op, precision, works):
        """The fastest of some forms of an operation: how it is done, what does it."""
        best = None
        for how, work in works:
            ms = statistics.median(self.machine.milliseconds(work, self.runs, self.flush))
            warm = min(self.machine.milliseconds(work, self.runs))
            if best is None or ms < best[1]:
                best = (how, ms, warm)
        how, ms, warm = best
        self.tell(job, op, precision, how, ms, warm_ms=round(warm, 5))

    # -------------------------------------------------------------------------------------------------- whole steps

    def step(self, job, dtype, memory_format):
        """Training step and forward pass of a network, as functions of the model, and the model."""
        entry = NETWORKS[job["model"]]
        torch.manual_seed(0)
        model = entry.make().to(self.machine.name).to(memory_format=memory_format)
        capturable = {"capturable": True} if self.on_gpu and entry.optimizer is adamw else {}
        optimizer = entry.optimizer(model, **self.machine.fused, **capturable)
        x = self.random(*job["shape"]["input"]).contiguous(memory_format=memory_format)
        labels = torch.randint(0, entry.classes, (job["batch"],), device=self.machine.name)
        autocast = functools.partial(
            torch.autocast, self.machine.name, torch.bfloat16, enabled=dtype != torch.float32, cache_enabled=False)

        def train(model):
            optimizer.zero_grad(set_to_none=False)
            with autocast():
                loss = F.cross_entropy(model(x), labels)
            loss.backward()
            optimizer.step()

        def forward(model):
            with torch.no_grad(), autocast():
                return model(x)

        return model, train, forward

    def steps(self):
        for job in self.jobs("step"):
            for precision in self.precisions:
                dtype, best = precise(precision), {}
                for name, memory_format in FORMATS.items():
                    model, train, forward = self.step(job, dtype, memory_format)
                    for op, work in (("training step", train), ("evaluation", forward)):
                        model.train(op == "training step")
                        work = functools.partial(work, model)
                        hows = {"eager": lambda work=work: work, "graph": lambda work=work: self.machine.captured(work)}
                        for how, prepare in hows.items():
                            if how == "graph" and not self.on_gpu:
                                continue
                            ms = statistics.median(self.machine.milliseconds(prepare(), min(self.runs, 20)))
                            if ms < best.get((op, how), (float("inf"),))[0]:
                                best[op, how] = (ms, name)
                for (op, how), (ms, name) in best.items():
                    self.tell(job, op, precision, how, ms, format=name, images_per_second=round(1e3 * job["batch"] / ms, 1))

    def compiled(self):
        # The longest to train first: a limit of time stops the rest.
        for job in sorted(self.jobs("step"), key=lambda job: -job["flop"][0]):
            model, train, _ = self.step(job, precise("bf16"), FORMATS["channels_last"])
            compiled = torch.compile(model, mode="max-autotune")
            ms = statistics.median(self.machine.milliseconds(lambda: train(compiled), min(self.runs, 20)))
            self.tell(job, "training step", "bf16", "compiled", ms, format="channels_last",
                      images_per_second=round(1e3 * job["batch"] / ms, 1))

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
                forms = {name: make(job["shape"], dtype, memory_format) for name, memory_format in formats.items()}
                for which, op in enumerate(job["op"]):
                    works = ((name, self.machine.captured(passes[which])) for name, passes in forms.items())
                    self.operation(job, op, precision, works)

    # ---------------------------------------------------------------------------------------------------- attention

    def attention(self):
        for job in self.jobs("attention"):
            for precision in ("f32", "bf16"):
                dtype, how, backend = precise(precision), "math", None
                if self.on_gpu:
                    from torch.nn.attention import SDPBackend, sdpa_kernel

                    how = "flash" if precision == "bf16" else "efficient"
                    kind = SDPBackend.FLASH_ATTENTION if precision == "bf16" else SDPBackend.EFFICIENT_ATTENTION
                    backend = functools.partial(sdpa_kernel, kind)
                shape = job["shape"]
                sizes = [shape[key] for key in ("n", "heads", "t", "head_dim")]
                q, k, v = (self.random(*sizes, dtype=dtype).requires_grad_() for _ in range(3))
                dy = self.random(*sizes, dtype=dtype)

                def attend(q=q, k=k, v=v):
                    if hasattr(F, "scaled_dot_product_attention"):
                        return F.scaled_dot_product_attention(q, k, v)
                    return torch.softmax(q @ k.transpose(2, 3) / q.shape[3] ** 0.5, 3) @ v

                def forward():
                    with torch.no_grad():
                        return attend()

                def both(q=q, k=k, v=v, dy=dy):
                    return torch.autograd.grad(attend(), (q, k, v), dy)

                def medians(work):
                    work = self.machine.captured(work)
                    cold = statistics.median(self.machine.milliseconds(work, self.runs, self.flush))
                    return cold, statistics.median(self.machine.milliseconds(work, self.runs))

                def measure():
                    (cold, warm), (cold_both, warm_both) = medians(forward), medians(both)
                    self.tell(job, "attention_forward", precision, how, cold, warm_ms=round(warm, 5))
                    self.tell(job, "attention_backward", precision, how, cold_both - cold, warm_ms=round(warm_both - warm, 5))

                if backend is None:
                    measure()
                else:
                    with backend():
                        measure()

    # ------------------------------------------------------------------------------------------ optimizer, selection

    def optimizer(self):
        for job in self.jobs("optimizer"):
            shapes = [parameter.shape for parameter in NETWORKS[job["model"]].make().parameters()]
            tensors = nn.ParameterList([nn.Parameter(self.random(*shape)) for shape in shapes])
            for parameter in tensors:
                parameter.grad = self.random(*parameter.shape)
            make = sgd if job["op"] == ["sgd_step"] else adamw
            capturable = {"capturable": True} if self.on_gpu and make is adamw else {}
            step = make(tensors, **self.machine.fused, **capturable).step
            self.operation(job, job["op"][0], "f32", [("fused" if self.on_gpu else "eager", self.machine.captured(step))])

    def prune(self):
        for job in self.jobs("prune"):
            elements, remove = job["shape"]["elements"], job["shape"]["remove"]
            weights = self.random(elements)

            def topk(w=weights, remove=remove):
                index = torch.topk(w.abs(), remove, largest=False, sorted=False).indices
                return torch.ones_like(w, dtype=torch.bool).index_fill_(0, index, False)

            def sort(w=weights, remove=remove):
                index = torch.sort(w.abs(), stable=True).indices[:remove]
                return torch.ones_like(w, dtype=torch.bool).index_fill_(0, index, False)

            def kthvalue(w=weights, remove=remove):
                magnitudes = w.abs()
                return magnitudes > torch.kthvalue(magnitudes, remove).values

            for how, work in (("topk", topk), ("sort", sort), ("kthvalue", kthvalue)):
                removed = elements - int(work().sum())
                if removed < remove or (removed > remove and how != "kthvalue"):
                    raise SystemExit(f"{job['name']}: {how} removed {removed} instead of {remove}")
                self.operation(job, "prune", "f32", [(how, work)])


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
        getattr(bench, part)()


if __name__ == "__main__":
    main()
