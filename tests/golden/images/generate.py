"""Small image files of every kind that dilt reads, and their pixels as Pillow and torchvision see them.

Run:       /usr/bin/python3 tests/golden/images/generate.py     (writes into this folder, and ../images.safetensors)
Versions:  Debian 12: python3-pil 9.4.0 (libjpeg-turbo 2.1.5), python3-torchvision 0.14.1.
Seed:      1; smooth colours with a little noise, so that JPEG has something to do. Nobody's photographs.

`<file>/rgb` [3, 24, 20] and `<file>/grey` [1, 24, 20] U8 are the file's pixels as `convert("RGB")`, and then `convert("L")`;
`<file>/rgb_small` [3, 12, 12] and `<file>/rgb_wide` [3, 15, 40] are resized to the smallest size that covers it (bilinear,
antialiased, the longer side rounded down) and cropped at the centre.
"""
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import functional as F

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from generate import Golden  # noqa: E402

HEIGHT, WIDTH = 24, 20
random = np.random.RandomState(1)


def pixels(channels):
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    waves = [np.sin(x / (3 + c) + c) * np.cos(y / (4 + c)) * 100 + 128 for c in range(channels)]
    image = np.stack(waves, -1) + random.normal(0, 4, (HEIGHT, WIDTH, channels))
    return image.clip(0, 255).round().astype(np.uint8)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(depth, colour, interlaced, rows, more=b""):
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, depth, colour, 0, 0, int(interlaced))
    data = chunk(b"IDAT", zlib.compress(rows, 9))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + more + data + chunk(b"IEND", b"")


def interlaced(image):
    rows = b""
    for y, x, dy, dx in [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]:
        rows += b"".join(b"\0" + row.tobytes() for row in image[y::dy, x::dx])
    return png(8, 2, True, rows)


def lines(image):
    return b"".join(b"\0" + row.tobytes() for row in image)


def main():
    rgb = Image.fromarray(pixels(3))
    grey = Image.fromarray(pixels(1)[..., 0])
    rgb.save(HERE / "rgb.jpg", quality=90)  # 4:2:0
    rgb.save(HERE / "full.jpg", quality=90, subsampling=0)
    rgb.save(HERE / "half.jpg", quality=90, subsampling=1)
    rgb.save(HERE / "progressive.jpg", quality=90, progressive=True)
    grey.save(HERE / "grey.jpg", quality=90)
    Image.fromarray(pixels(4), "CMYK").save(HERE / "cmyk.jpg", quality=90)
    rgb.save(HERE / "rgb.png")
    grey.save(HERE / "grey.png")
    rgb.quantize(16).save(HERE / "palette.png")
    rgb.quantize(16).save(HERE / "transparent.png", transparency=3)
    Image.fromarray(pixels(4), "RGBA").save(HERE / "rgba.png")
    Image.fromarray(pixels(2), "LA").save(HERE / "la.png")
    grey.convert("1").save(HERE / "bits.png")
    (HERE / "interlaced.png").write_bytes(interlaced(pixels(3)))
    deep = random.randint(0, 1 << 16, (HEIGHT, WIDTH, 3)).astype(">u2")
    (HERE / "rgb16.png").write_bytes(png(16, 2, False, lines(deep)))

    golden = Golden("images")
    tensor = lambda image: torch.from_numpy(np.atleast_3d(np.asarray(image)).transpose(2, 0, 1).copy())
    for path in sorted([*HERE.glob("*.jpg"), *HERE.glob("*.png")]):
        rgb = Image.open(path).convert("RGB")
        small = F.center_crop(F.resize(rgb, 12), [12, 12])
        wide = F.center_crop(F.resize(rgb, [40 * HEIGHT // WIDTH, 40]), [15, 40])
        tensors = {"rgb": rgb, "grey": rgb.convert("L"), "rgb_small": small, "rgb_wide": wide}
        golden.add(path.name, {name: tensor(image) for name, image in tensors.items()})
    golden.write(HERE.parent)


main()
