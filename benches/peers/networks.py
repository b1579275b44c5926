"""The networks of PyTorch's side, by dilt's names: the same layers and parameters, the same optimizers, and gradients clipped
to the same norm.

ResNet-20 is that of akamaster/pytorch_resnet_cifar10: 3x3 stem, shortcuts that subsample and pad channels. ResNet-18 on small
images is torchvision's with a 3x3 stem of stride 1 and no max pool. ResNet-50 and the vision transformers are torchvision's.
SGD has momentum 0.9 and weight decay 1e-4.
"""

import dataclasses

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


def resnet50():
    from torchvision.models import resnet50

    return resnet50(weights=None)


def vision_transformer(dim, heads, depth=12):
    from torchvision.models.vision_transformer import VisionTransformer

    return VisionTransformer(image_size=224, patch_size=16, num_layers=depth, num_heads=heads, hidden_dim=dim, mlp_dim=4 * dim)


def sgd(model, **settings):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, **settings)


def adamw(model, **settings):
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, **settings)


@dataclasses.dataclass(frozen=True)
class Network:
    make: object
    optimizer: object
    image: int
    classes: int
    clip_norm: float | None = None


NETWORKS = {
    "resnet20": Network(ResNet20, sgd, 32, 10),
    "resnet18_cifar": Network(ResNet18Cifar, sgd, 32, 10),
    "resnet50": Network(resnet50, sgd, 224, 1000),
    "deit_tiny_patch16_224": Network(lambda: vision_transformer(192, 3), adamw, 224, 1000),
    "vit_small_patch16_224": Network(lambda: vision_transformer(384, 6), adamw, 224, 1000, clip_norm=1.0),
    "vit_base_patch16_224": Network(lambda: vision_transformer(768, 12), adamw, 224, 1000, clip_norm=1.0),
}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
