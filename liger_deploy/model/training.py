"""What makes training quick on a GPU: each layer's mixing as compiled kernels instead of one at a time."""

from __future__ import annotations

import torch
from torch import nn

from liger_deploy.model.attention import LigerAttention
from liger_deploy.model.mixer import Mixer


def compile_layers(model: nn.Module) -> None:
    """Let torch.compile make the kernels of every layer's `Mixer.sequence`, forward and backward.

    All layers share one compilation; rows of another length or number make another one.
    """
    compiled = torch.compile(Mixer.sequence, dynamic=False)
    for layer in model.modules():
        if isinstance(layer, LigerAttention):
            layer.sequence = compiled
