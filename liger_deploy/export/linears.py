"""Linear layers as the inductor target has them on a CPU: of one row as sums of products, of many rows as products of
oneDNN's, and with 8-bit weights.

Shape legend: N rows of a matrix, D columns.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from liger_deploy.errors import UserError
from liger_deploy.model.packed import round_rows


class Int8Table(nn.Module):
    """A matrix in 8 bits, each row with a scale: 1 byte a weight. The weight of linear layers, and an embedding, whose
    rows some models multiply by `factor`."""

    def __init__(self, weight_ND: Tensor) -> None:
        super().__init__()
        rounded_ND, scale_N = round_rows(weight_ND)
        self.dtype, self.factor = weight_ND.dtype, 1.0
        self.rounded: Tensor
        self.scale: Tensor
        self.register_buffer("rounded", rounded_ND)  # buffers, so that a model's parameters keep its dtype
        self.register_buffer("scale", scale_N[:, None])

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of the embedding, [..., D]."""
        return (self.rounded[ids].float() * (self.scale[ids] * self.factor)).to(self.dtype)


class Int8Linear(nn.Module):
    """x W^T + bias with W in 8 bits."""

    def __init__(self, table: Int8Table, bias_N: Tensor | None) -> None:
        super().__init__()
        self.table, self.bias = table, None if bias_N is None else nn.Parameter(bias_N, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """For many rows: the matrix as it was, up to rounding."""
        weight_ND = (self.table.rounded.float() * self.table.scale).to(x.dtype)
        return F.linear(x, weight_ND, self.bias)


def check_reach(model: PreTrainedModel) -> None:
    """Every matrix is a linear layer's or an embedding's, LoLCATs' small maps aside.

    Raises:
        UserError: one that is not (the experts of a mixture).
    """
    reached = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding)}
    for name, weight in model.named_parameters():
        if weight.dim() > 1 and ".lolcats." not in name and id(weight) not in reached:
            raise UserError(f"--quant does not reach weight {name!r} {list(weight.shape)}: export with --quant none")


def in_8_bits(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model with its linear layers and embedding in 8 bits; a tied head still shares the embedding's."""
    tables: dict[int, Int8Table] = {}
    swapped = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)}
    for module in swapped.values():
        if module.weight.data_ptr() not in tables:
            tables[module.weight.data_ptr()] = Int8Table(module.weight)
    left = {id(module.weight): None for module in swapped.values()}
    copied: PreTrainedModel = copy.deepcopy(model, left)  # without the matrices
    for name, module in swapped.items():
        table = tables[module.weight.data_ptr()]
        if isinstance(module, nn.Embedding):
            table.factor = _factor(module)
        parent, _, own = name.rpartition(".")
        new = table if isinstance(module, nn.Embedding) else Int8Linear(table, module.bias)
        setattr(copied.get_submodule(parent), own, new)
    return copied.eval()


def _factor(embedding: nn.Embedding) -> float:
    """What a model's own embedding multiplies its rows by (Gemma)."""
    rows_ND = embedding.weight.detach()[:64].float()
    ids = torch.arange(len(rows_ND), device=rows_ND.device)
    with torch.no_grad():
        found_ND = embedding(ids).float()
    factor = float((found_ND * rows_ND).sum() / rows_ND.square().sum().clamp(min=1e-30))
    if (found_ND - factor * rows_ND).abs().max() > 0.01 * found_ND.abs().max():
        raise UserError("--quant int8 does not know this model's embedding: export with --quant none")
    return factor


@contextlib.contextmanager
def as_products(model: nn.Module) -> Iterator[None]:
    """While it lasts, linear layers are traced in the form that suits their number of rows."""
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.Linear | Int8Linear):
                stack.callback(module.__dict__.pop, "forward")
                module.__dict__["forward"] = partial(_product, module)
        yield


def _product(linear: nn.Linear | Int8Linear, x: Tensor) -> Tensor:
    if all(isinstance(size, int) and size == 1 for size in x.shape[:-1]):  # a size still open is not one
        return _of_one_row(linear, x)
    product: Tensor
    if type(linear) is nn.Linear and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        # oneDNN, as torch calls it in 16 bits; MKL, which it calls in 32, is slower on AMD processors
        product = torch.ops.mkldnn._linear_pointwise(x, linear.weight, linear.bias, "none", [], "")
    else:
        product = type(linear).forward(linear, x)  # type: ignore[arg-type]
    return product


def _of_one_row(linear: nn.Linear | Int8Linear, x: Tensor) -> Tensor:
    """Sums of products: Inductor makes of them one pass over the weights in the order of memory, where the matrix
    products that it would call reach half of the memory's speed."""
    row_D = x.float().flatten()
    if isinstance(linear, Int8Linear):
        y_N = (linear.table.rounded.float() * row_D).sum(-1) * linear.table.scale[:, 0]
    else:
        y_N = (linear.weight.float() * row_D).sum(-1)
    if linear.bias is not None:
        y_N = y_N + linear.bias
    return y_N.to(x.dtype).view(*x.shape[:-1], -1)
