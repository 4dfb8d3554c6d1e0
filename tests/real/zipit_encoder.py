"""The encoders of cifar5 as ZipIt's graphs take them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cifar import Block, ResNet20


class BasicBlock(Block):
    """The name by which ZipIt's graphs know a block."""


class Encoder(ResNet20):
    """With average pooling as a module, which they hook."""

    def __init__(self) -> None:
        super().__init__("fc")
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        for module in self.modules():
            if isinstance(module, Block):
                module.__class__ = BasicBlock

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.avgpool(x).flatten(1))


def encoder(state: Mapping[str, Tensor]) -> Encoder:
    model = Encoder()
    model.load_state_dict(dict(state))
    return model.eval()
