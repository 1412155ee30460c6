"""Rungs 1 to 3 for the attention module and the whole model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import liger_deploy as ld
from liger_deploy.errors import CheckpointError, ConfigError, SessionError
from liger_deploy.gates import STRUCTURES
from liger_deploy.model import reference, window
from liger_deploy.model.attention import LigerAttention
from liger_deploy.model.step import PrefillModel, StepModel
from tests.conftest import liger, relative, small_llama
from tests.tolerances import GRADIENT, MODEL, OP, SAME_FUNCTION

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

# Sizes that fit a head of 16 channels, where the defaults do not.
SIZES: dict[str, dict[str, object]] = {"gsa": {"slots": 8}, "lolcats": {"features": 12}}

# Every structure, and the fields that change one. Adding a structure adds its line by itself.
CONFIGS: list[dict[str, object]] = [
    *({"structure": name} | SIZES.get(name, {}) for name in STRUCTURES),
    {"structure": "hgrn2", "lower_bound": 0.3},
    {"structure": "gla", "gate_normalizer": 1.0},
    {"structure": "window", "sinks": 3},
    {"structure": "mlstm", "feature_map": "identity", "recurrent_weight": 0.1, "window_weight": 1.0},
]


# A hybrid whose layers differ in state, past the softmax layer's window.
HYBRID: dict[str, object] = {"structure": "gla", "softmax_layers": (1,), "softmax_window": 20, "sinks": 3}


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("keys", [1, 8, 64])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_layer_is_the_papers_equations(kv_heads: int, keys: int, config: dict[str, object]) -> None:
    model = liger(small_llama(kv_heads), window=keys, **config)
    layer = model.model.layers[0].self_attn
    layer.o_proj = torch.nn.Identity()
    x = torch.randn(1, 37, 64)
    with torch.no_grad():
        ours = layer(x)[0][0].unflatten(-1, (4, 16))
        q, k, v = (p(x)[0].unflatten(-1, (-1, 16)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    frequencies = model.model.rotary_emb.inv_freq
    for head in range(4):
        shared = head // (4 // kv_heads)
        heads = q[:, head], k[:, shared], v[:, shared]
        if layer.liger.structure == "lolcats":
            maps, gamma = (layer.lolcats.map_q[head], layer.lolcats.map_k[head]), layer.lolcats.window_factor[head]
            expected = reference.lolcats(*heads, keys, 0.25, frequencies, maps, gamma.double().sigmoid().item())
        else:
            expected = reference.attention(*heads, layer.liger, frequencies, shared)
        assert relative(ours[:, head], expected) < 5 * OP


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kv_heads": 4},
        {"kv_heads": 1},
        {"head_dim": 32},
        {"tie_word_embeddings": True},
        {"attention_bias": True},
        {"rope_parameters": LLAMA3_ROPE},
    ],
    ids=str,
)
def test_window_alone_is_the_untouched_model(changes: dict[str, object]) -> None:
    model = small_llama(**changes)  # type: ignore[arg-type]
    tokens = torch.randint(0, 97, (2, 150))
    with torch.no_grad():
        expected = model(tokens).logits
        liger = ld.linearize(model, ld.LigerConfig(window=150, recurrent_weight=0, window_weight=1))
        assert relative(liger(tokens).logits, expected) < SAME_FUNCTION
        state = (prefill := PrefillModel(liger)).zeros(2)
        logits, *_ = prefill(tokens, torch.tensor([150, 90]), *state)
    assert relative(logits[0], expected[0, 149]) < SAME_FUNCTION
    assert relative(logits[1], expected[1, 89]) < SAME_FUNCTION


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("keys", [7, 64])
@pytest.mark.parametrize("config", [*CONFIGS, HYBRID], ids=str)
def test_sequence_is_steps_is_prefill_in_any_split(kv_heads: int, keys: int, config: dict[str, object]) -> None:
    model = liger(small_llama(kv_heads), window=keys, **config)
    step, prefill = StepModel(model), PrefillModel(model)
    tokens = torch.randint(0, 97, (2, 140))
    with torch.no_grad():
        whole = model(tokens).logits
        state = step.zeros(2)
        for t in range(140):
            logits, *state = step(tokens[:, t], *state)
            assert relative(logits, whole[:, t]) < MODEL
        for cuts in ([140], [1, 139], [50, 47, 1, 42], [64, 64, 12]):
            other, start = prefill.zeros(2), 0
            for count in cuts:
                part = tokens[:, start : (start := start + count)]
                logits, *other = prefill(part, torch.tensor([count, count]), *other)
            assert relative(logits, whole[:, -1]) < MODEL
            assert all(relative(a.float(), b.float()) < MODEL for a, b in zip(other, state, strict=True))


@pytest.mark.parametrize("config", [*CONFIGS, HYBRID], ids=str)
def test_ragged_rows_are_the_rows_alone(config: dict[str, object]) -> None:
    model = liger(small_llama(), window=8, **config)
    prefill = PrefillModel(model)
    tokens, valid = torch.randint(0, 97, (4, 30)), torch.tensor([30, 1, 0, 17])
    with torch.no_grad():
        first = [torch.randn_like(x) if x.is_floating_point() else x + 5 for x in prefill.zeros(4)]
        logits, *state = prefill(tokens, valid, *first)
        for row, count in enumerate(valid.tolist()):
            before = [x[row : row + 1] for x in first]
            if count == 0:
                assert all(torch.equal(a[row : row + 1], b) for a, b in zip(state, before, strict=True))
                continue
            alone, *after = prefill(tokens[row : row + 1, :count], torch.tensor([count]), *before)
            assert relative(logits[row : row + 1], alone) < MODEL
            assert all(relative(a[row : row + 1], b) < MODEL for a, b in zip(state, after, strict=True))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("config", [*CONFIGS, HYBRID], ids=str)
def test_padding_changes_nothing(side: str, config: dict[str, object]) -> None:
    model = liger(small_llama(), window=8, **config)
    tokens = torch.randint(0, 97, (3, 40))
    mask = torch.ones(3, 40, dtype=torch.long)
    real = {0: slice(0, 40), 1: slice(0, 25), 2: slice(0, 3)}
    if side == "left":
        real = {row: slice(40 - part.stop, 40) for row, part in real.items()}
    with torch.no_grad():
        for row, part in real.items():
            mask[row] = 0
            mask[row, part] = 1
        batch = model(tokens, attention_mask=mask).logits
        for row, part in real.items():
            alone = model(tokens[row : row + 1, part]).logits[0]
            assert relative(batch[row, part], alone) < MODEL


@pytest.mark.parametrize("config", [*CONFIGS, HYBRID], ids=str)
def test_documents_of_one_row_do_not_see_each_other(config: dict[str, object]) -> None:
    """Packed rows: each document as if alone, forward and gradient."""
    model = liger(small_llama(), window=8, **config)
    lengths = [[70, 3, 27], [1, 40, 50]]  # the second row ends in padding
    tokens, segments = torch.randint(0, 97, (2, 100)), torch.zeros(2, 100, dtype=torch.long)
    for row, parts in enumerate(lengths):
        numbers = torch.repeat_interleave(torch.arange(1, 4), torch.tensor(parts))
        segments[row, : len(numbers)] = numbers
    packed = model(tokens, segment_ids=segments).logits
    target = torch.randn_like(packed)
    (packed * target)[segments > 0].sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for row, parts in enumerate(lengths):
        start = 0
        for count in parts:
            piece = slice(start, start := start + count)
            alone = model(tokens[row : row + 1, piece]).logits[0]
            assert relative(packed[row, piece], alone) < MODEL
            (alone * target[row, piece]).sum().backward()
    for ours, parameter in zip(gradients, model.parameters(), strict=True):
        assert float((ours - parameter.grad).norm()) <= GRADIENT * float(parameter.grad.norm())


def test_a_far_token_is_as_exact_as_a_near_one() -> None:
    """The window's scores do not depend on the position: ten million tokens in, they are the same to the bit."""
    model = ld.linearize(small_llama(), ld.LigerConfig(window=8))
    step = StepModel(model)
    with torch.no_grad():
        state = [torch.randn_like(x) if x.is_floating_point() else x + 8 for x in step.zeros(1)]
        near = step(torch.tensor([3]), *state)
        far = step(torch.tensor([3]), *state[:-1], state[-1] + 10_000_000)
    assert torch.equal(near[0], far[0])
    assert int(far[-1]) == 10_000_009


def test_keep_last_takes_what_ends_at_the_last_valid_token() -> None:
    kept = torch.arange(7.0).view(1, 1, 7, 1).expand(2, 1, 7, 1)  # window 4, three new tokens
    assert window.keep_last(kept, None, 4)[0, 0, :, 0].tolist() == [3, 4, 5, 6]
    assert window.keep_last(kept, torch.tensor([0, 2]), 4)[:, 0, :, 0].tolist() == [[0, 1, 2, 3], [2, 3, 4, 5]]


def test_parameter_names_and_values_stay() -> None:
    base = small_llama()
    before = copy.deepcopy(base.state_dict())
    after = ld.linearize(base).state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_gradients_reach_every_projection() -> None:
    model = ld.linearize(small_llama())
    model(torch.randint(0, 97, (2, 100))).logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().sum()) > 0, name


def test_a_foreign_cache_is_refused() -> None:
    model = ld.linearize(small_llama())
    with pytest.raises(SessionError, match="Session"):
        model(torch.zeros(1, 3, dtype=torch.long), use_cache=True)


def test_twice_linearized_is_refused() -> None:
    model = ld.linearize(small_llama())
    with pytest.raises(ConfigError, match="already"):
        ld.linearize(model)


def test_unsupported_architecture_is_named() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    with pytest.raises(CheckpointError, match=r"'gpt2' is not supported; supported are .*llama"):
        ld.linearize(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9)))


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_the_state_arrives_under_either_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers renamed it in 5.24. Under a third name a step would answer from no state: it raises instead."""
    model = liger(small_llama())
    step = StepModel(model).eval()
    inputs = (torch.tensor([5]), *(torch.randn_like(x) if x.is_floating_point() else x + 9 for x in step.zeros(1)))
    with torch.no_grad():
        expected = step(*inputs)
    forward = LigerAttention.forward

    def renamed(self: LigerAttention, *arguments: Any, **named: Any) -> Any:
        state = named.pop("past_key_values", None) or named.pop("cache", None)
        return forward(self, *arguments, **{name: state}, **named)

    def lost(self: LigerAttention, *arguments: Any, **named: Any) -> Any:
        return forward(self, *arguments, **{k: v for k, v in named.items() if k not in ("past_key_values", "cache")})

    with torch.no_grad():
        monkeypatch.setattr(LigerAttention, "forward", renamed)
        for ours, theirs in zip(step(*inputs), expected, strict=True):
            assert torch.equal(ours, theirs)
        monkeypatch.setattr(LigerAttention, "forward", lost)
        with pytest.raises(ld.UserError, match="hands no state to attention layers"):
            step(*inputs)
