"""Golden files of vision transformers: what timm in float64 says of weights that both sides make from a formula.

Run:       PYTHONPATH=TIMM /usr/bin/python3 tests/golden/transformer.py [--out FOLDER]      (about twenty seconds)
Versions:  those of agreement.py, and timm 0.9.16, whose sources lie in TIMM; one thread.
Formula:   `bits`, `unit` and `images` of agreement.py, and `weights` below; tests/it/transformer.rs has the same.
           README.md lists tensors.
"""
import argparse
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer

from agreement import bits, images, unit
from generate import Golden

assert timm.__version__ == "0.9.16"

SMALL = dict(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, mlp_ratio=1.5, num_classes=7)
VARIANTS = {
    "class_token": dict(),
    "no_class_token": dict(class_token=False, global_pool="avg"),
    "class_token_mean": dict(global_pool="avg"),
    "mean_before_norm": dict(class_token=False, global_pool="avg", fc_norm=False),
    "pre_norm": dict(pre_norm=True),
    "layer_scale": dict(init_values=0.1),
    "no_qkv_bias": dict(qkv_bias=False),
}
SAMPLES = 3
STEPS, BATCH, LR, DECAY = 20, 20, 1e-3, 0.05
PRUNED = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")
GRIDS = [((4, 4), (6, 6), 3), ((4, 4), (3, 3), 3), ((4, 4), (8, 4), 3), ((14, 14), (24, 24), 2)]
TABLES = ["vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224"]
TABLES += ["deit_tiny_patch16_224", "deit_small_patch16_224"]


def weights(shapes):
    """Linear weights of variance 1 / fan-in, tokens and positions to 0.5, scales near 1, the rest near 0; rounded to f32."""
    made = {}
    for name, shape in shapes.items():
        u = unit(name, int(np.prod(shape)))
        if name in ("cls_token", "pos_embed"):
            u *= 0.5
        elif len(shape) > 1:
            u *= np.sqrt(3 / np.prod(shape[1:]))
        elif name.endswith((".weight", ".gamma")):
            u = 1 + 0.3 * u
        else:
            u *= 0.1
        made[name] = torch.tensor(u.astype(np.float32).reshape(shape))
    return made


def fill(model, dtype):
    model.load_state_dict(weights({name: tuple(t.shape) for name, t in model.state_dict().items()}))
    return model.to(dtype)


def labels(name, n):
    return torch.tensor((bits(name, n) % SMALL["num_classes"]).astype(np.int64))


def gradients(g, dtype):
    """Logits, loss and all gradients of small networks of every kind."""
    x = images("small x", SAMPLES, 3, 16, 16).to(dtype)
    for case, variant in VARIANTS.items():
        model = fill(VisionTransformer(**SMALL, **variant), dtype).train()
        logits = model(x)
        loss = F.cross_entropy(logits, labels("small labels", SAMPLES))
        loss.backward()
        g.add(case, dict(logits=logits, loss=loss.reshape(1)))
        g.add(case, {f"grad/{name}": p.grad.float() for name, p in model.named_parameters()})


def logits(g, dtype):
    """Logits of networks of their true size."""
    cifar = dict(img_size=32, patch_size=4, embed_dim=192, depth=12, num_heads=3, num_classes=10)
    models = {"vit_tiny_cifar": VisionTransformer(**cifar)}
    models["deit_tiny_patch16_224"] = timm.create_model("deit_tiny_patch16_224")
    for name, model in models.items():
        size = model.patch_embed.img_size[0]
        with torch.no_grad():
            g.add(name, dict(logits=fill(model, dtype).eval()(images(f"{name} x", 2, 3, size, size).to(dtype))))


def descend(model, masks, x, labels):
    """AdamW over consecutive batches, weights and moments masked; yields the loss of each before its update."""
    params = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(params.values(), lr=LR, weight_decay=DECAY)

    def apply_masks():
        with torch.no_grad():
            for name, mask in masks.items():
                state = optimizer.state[params[name]]
                for t in [params[name]] + [state[key] for key in ("exp_avg", "exp_avg_sq") if key in state]:
                    t *= mask

    apply_masks()
    for first in range(0, len(x), BATCH):
        part = slice(first, first + BATCH)
        loss = F.cross_entropy(model(x[part]), labels[part])
        optimizer.zero_grad()
        loss.backward()
        yield loss.detach()
        optimizer.step()
        apply_masks()


def steps(g, dtype):
    """Twenty steps of the small network with a class token, all of it and a quarter of its blocks' weights."""
    x, targets = images("steps x", STEPS * BATCH, 3, 16, 16).to(dtype), labels("steps labels", STEPS * BATCH)
    for case, masked in (("steps_dense", False), ("steps_masked", True)):
        model, masks = fill(VisionTransformer(**SMALL), dtype).train(), {}
        for name, w in model.named_parameters() if masked else ():
            if name.endswith(PRUNED):
                masks[name] = torch.tensor((bits(f"{name} mask", w.numel()) % 4 == 0).reshape(tuple(w.shape)))
        losses = torch.stack(list(descend(model, masks, x, targets)))
        g.add(case, dict(losses=losses), batch=BATCH, lr=LR, weight_decay=DECAY)


def positions(g):
    """Positions of one grid of patches resampled to another, with and without a class token; timm computes in f32."""
    for old, new, features in GRIDS:
        for prefix in (0, 1):
            case = f"positions_{old[0]}x{old[1]}_{new[0]}x{new[1]}_{prefix}"
            shape = (1, prefix + old[0] * old[1], features)
            before = torch.tensor(unit(case, int(np.prod(shape))).astype(np.float32).reshape(shape))
            after = resample_abs_pos_embed(before, list(new), list(old), num_prefix_tokens=prefix)
            g.add(case, dict(before=before, after=after), prefix=prefix, old=f"{old[0]}x{old[1]}", new=f"{new[0]}x{new[1]}")


def tables(g):
    """Names and shapes of all parameters, in order."""
    for name in TABLES:
        parameters = timm.create_model(name).named_parameters()
        table = ";".join(f"{n}:{'x'.join(str(size) for size in p.shape)}" for n, p in parameters)
        g.metadata[f"{name} parameters"] = f"table={table}"


def transformer(dtype=torch.float64):
    """`dtype` is for measuring tolerances."""
    g = Golden("transformer")
    for add in (gradients, logits, steps):
        add(g, dtype)
    positions(g)
    tables(g)
    return g


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to")
    transformer().write(parser.parse_args().out)
