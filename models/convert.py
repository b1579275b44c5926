#!/usr/bin/python3
"""Converts a PyTorch checkpoint (.pth, .pt, .th) to safetensors, which dilt reads.

Takes a state_dict, or a dictionary that has one under "state_dict" or "model"; "module." of DataParallel is removed.
Tensors keep their names and types, also <param>_orig and <param>_mask of torch.nn.utils.prune. What is no tensor is left
out. Needs PyTorch 1.13 or newer alone.

A checkpoint is a pickle, and a pickle can run any code when it is read. It is read with weights_only=True, which
refuses what is not needed for tensors, but that is no guarantee: convert only files from a source you trust.
PyTorch 1.13 also refuses harmless content, such as a number beside the state_dict: --trust reads that, and anything.
"""
import argparse
import json
import pickle
import struct
import sys
from pathlib import Path

import torch

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
          torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}


def state_dict(path, trust):
    """Name to tensor."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        reason = str(error).rpartition("WeightsUnpickler error: ")[2]
        raise ValueError(f"not read with weights_only ({reason}); --trust reads it, and runs whatever code it holds")
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    tensors = {}
    if isinstance(content, dict):
        tensors = {name: t.detach() for name, t in content.items() if isinstance(name, str) and torch.is_tensor(t)}
    if not tensors:
        raise ValueError('expected a state_dict, or a dictionary with one under "state_dict" or "model"')
    if all(name.startswith("module.") for name in tensors):
        tensors = {name[len("module."):]: t for name, t in tensors.items()}
    return tensors


def raw(tensor):
    """The tensor's bytes, little endian, in row-major order."""
    tensor = tensor.contiguous()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy().tobytes()


def write_safetensors(path, tensors):
    """The container of dilt's src/nn/container.rs; tensors with wide elements first, so that all are aligned."""
    header, parts, end = {}, [], 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        if tensor.dtype not in DTYPES:
            raise ValueError(f"tensor {name!r}: {tensor.dtype} cannot be stored; expected a float or integer type")
        parts.append(raw(tensor))
        begin, end = end, end + len(parts[-1])
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(b"".join([struct.pack("<Q", len(text)), text, *parts]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="the .pth file")
    parser.add_argument("out", type=Path, help="the .safetensors file to write")
    parser.add_argument("--trust", action="store_true", help="read any pickle: it may run code of its author's choice")
    options = parser.parse_args()
    try:
        tensors = state_dict(options.checkpoint, options.trust)
        write_safetensors(options.out, tensors)
    except Exception as error:  # torch.load raises many kinds
        sys.exit(f"{options.checkpoint}: {error}")
    print(f"{options.out}: {len(tensors)} tensors, {sum(t.numel() for t in tensors.values())} elements")
