"""Matrices rounded to 4 bits as text asks for: GPTQ (arXiv 2210.17323, Algorithm 1).

Rounding a column of W moves W x. The columns that are not rounded yet take up what they can of that, as far as the
layer's inputs over a text, of which X^T X is kept, say that they can. The result is a float matrix whose groups lie on
grids of 16 values; `quantize.py` finds those grids again and keeps the numbers as they are.

Shape legend: N rows, D columns, G columns of a group, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from liger_deploy.data import load_tokenizer, pack, read_corpus
from liger_deploy.errors import UserError

BLOCK, BLOCKS = 512, 64  # tokens of a block, and blocks that are read
DAMPING = 0.05  # of the mean of X^T X's diagonal
AT_ONCE = 1 << 31  # bytes of X^T X that are gathered in one pass over the text


def calibrate(model: PreTrainedModel, checkpoint: Path, text: str, group_size: int) -> None:
    """Round every linear layer but the head, in place. `text` is a file or folder, as `finetune` takes it.

    Raises:
        UserError: no tokenizer, no text, or activations that are not finite.
    """
    blocks = pack(read_corpus(text, load_tokenizer(checkpoint), train_on_prompt=True).documents, BLOCK)[:BLOCKS]
    layers = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and module.out_features != model.config.vocab_size
    ]
    with tqdm(total=len(layers), desc="calibrate", unit="layer", disable=None) as progress, torch.no_grad():
        for some in _passes(layers):
            for layer, moment_DD in _moments(model, some, blocks).items():
                if bool(moment_DD.any()):  # else no token reached it: rounded as without a text
                    layer.weight.copy_(gptq(layer.weight, moment_DD, group_size))
                progress.update()


def _passes(layers: list[nn.Linear]) -> Iterator[list[nn.Linear]]:
    """Layers whose X^T X fit into memory together, in the model's order: later passes see earlier layers rounded."""
    some: list[nn.Linear] = []
    for layer in layers:
        if some and sum(4 * x.in_features**2 for x in [*some, layer]) > AT_ONCE:
            yield some
            some = []
        some.append(layer)
    yield some


def _moments(
    model: PreTrainedModel,
    layers: list[nn.Linear],
    blocks: Iterable[dict[str, np.ndarray]],  # type: ignore[type-arg]
) -> dict[nn.Linear, Tensor]:
    """X^T X [D,D] of each layer's inputs over the blocks' tokens, padding left out."""
    found = {layer: torch.zeros(layer.in_features, layer.in_features) for layer in layers}
    segments_BT = torch.zeros(0)

    def add(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x_TD = inputs[0].flatten(0, -2).float()
        if len(x_TD) == segments_BT.numel():
            x_TD = x_TD[segments_BT.flatten() > 0]
        found[layer] += x_TD.T @ x_TD  # type: ignore[index]

    hooks = [layer.register_forward_pre_hook(add) for layer in layers]
    try:
        for block in blocks:
            ids_BT, segments_BT = (torch.from_numpy(block[key])[None] for key in ("input_ids", "segment_ids"))
            model(input_ids=ids_BT, segment_ids=segments_BT)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def gptq(weight_ND: Tensor, moment_DD: Tensor, group_size: int) -> Tensor:
    """The matrix [N,D] with each group on a grid of 16 values, and the least change of W x for inputs of this X^T X.

    Raises:
        UserError: X^T X is not finite.
    """
    left_ND, moment_DD = weight_ND.double().clone(), moment_DD.double()
    unseen_D = moment_DD.diagonal() == 0
    moment_DD = moment_DD + torch.diag(DAMPING * moment_DD.diagonal().mean() + unseen_D.double())
    factor_DD, failed = torch.linalg.cholesky_ex(moment_DD)
    if int(failed) or not bool(factor_DD.isfinite().all()):
        raise UserError("the model's activations over the calibration text are not finite: check the checkpoint")
    upper_DD = torch.linalg.cholesky(torch.cholesky_inverse(factor_DD), upper=True)
    done_ND = torch.zeros_like(left_ND)
    for start in range(0, left_ND.shape[1], group_size):
        end = min(start + group_size, left_ND.shape[1])
        step_N, zero_N = grid(left_ND[:, start:end])
        errors_NG = torch.zeros_like(left_ND[:, start:end])
        for d in range(start, end):
            numbers_N = ((left_ND[:, d] / step_N).round() + zero_N).clamp(0, 15)
            done_ND[:, d] = (numbers_N - zero_N) * step_N
            errors_NG[:, d - start] = (left_ND[:, d] - done_ND[:, d]) / upper_DD[d, d]
            left_ND[:, d:end] -= errors_NG[:, d - start, None] * upper_DD[d, d:end]
        left_ND[:, end:] -= errors_NG @ upper_DD[start:end, end:]
    return done_ND.to(weight_ND.dtype)


def grid(group_NG: Tensor) -> tuple[Tensor, Tensor]:
    """Step, as float16 keeps it, and zero point (0 to 15) of each row's grid, which spans its values and 0."""
    least_N, largest_N = group_NG.amin(1).clamp(max=0), group_NG.amax(1).clamp(min=0)
    half = torch.finfo(torch.float16)
    step_N = ((largest_N - least_N) / 15).clamp(half.smallest_normal, half.max).half().double()
    return step_N, (-least_N / step_N).round().clamp(0, 15)
