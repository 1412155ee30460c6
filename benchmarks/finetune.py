"""LoRA on one GPU: tokens a second and peak memory of Liger-GLA against the softmax model it came from.

    python -m benchmarks.finetune

Llama-3.2-1B's shape with random weights, bfloat16, rank 8 on q, k and v, 8,192 tokens a step as 8 x 1,024 or 1 x 8,192.
Steps of the variants are interleaved; the loss of both recurrences is compared before anything is timed.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.report import write
from liger_deploy.config import LigerConfig
from liger_deploy.model import fast, recurrence
from liger_deploy.model.linearize import linearize

SHAPE = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
    "max_position_embeddings": 131072, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}  # fmt: skip
STEPS = 12


def build(variant: str) -> Any:
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16)
    if variant != "softmax, SDPA":
        linearize(model, LigerConfig())
        if "kernels" in variant:
            assert fast.use_fast_recurrence(model)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj"]))
    model.config.use_cache = False
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)


def step(model: Any, optimizer: Any, ids: torch.Tensor) -> float:
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss)


def compare_recurrences() -> dict[str, float]:
    """The kernels against `gated_chunked`, relative: outputs, state, gradients; boundaries inside the sequence."""
    torch.manual_seed(0)
    shapes = [(2, 300, 4, 3, 64), (2, 300, 4, 64), (2, 300, 4, 64)]
    found = {}
    for channels in (64, 1):
        q, k, v = (torch.randn(*s, device="cuda") for s in shapes)
        q, k, g = q.softmax(-1), k.softmax(-1), -0.1 * torch.rand(2, 300, 4, channels, device="cuda")
        g[:, 131] = recurrence.FORGET
        state = torch.randn(2, 4, 64, 64, device="cuda")
        results = []
        for form in (recurrence.gated_chunked, fast.fla_chunked):
            inputs = [x.clone().requires_grad_() for x in (q, k, v, g)]
            out, after = form(*inputs, state)
            (out * torch.linspace(0, 1, out.numel(), device="cuda").view_as(out)).sum().backward()
            results.append([out, after, *(x.grad for x in inputs[:3])])
        worst = max(float((a - b).norm() / a.norm()) for a, b in zip(*results, strict=True))
        found["per channel" if channels > 1 else "scalar"] = worst
    return found


def main() -> int:
    if not fast.available():
        print("this benchmark needs a GPU, triton and fla-core", file=sys.stderr)
        return 2
    agreement = compare_recurrences()
    print(agreement, flush=True)
    assert max(agreement.values()) < 1e-2, agreement  # bfloat16 products
    variants = ["softmax, SDPA", "Liger-GLA, PyTorch", "Liger-GLA, kernels"]
    rows = []
    for batch, length in ((8, 1024), (1, 8192)):
        ids = torch.randint(0, SHAPE["vocab_size"], (batch, length), device="cuda")
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        memory: dict[str, float] = {}
        losses: dict[str, float] = {}
        models = {name: build(name) for name in variants}
        weights = torch.cuda.memory_allocated() / len(models)
        for turn in range(STEPS + 3):
            for name, (model, optimizer) in models.items():
                torch.cuda.synchronize()
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                start = time.perf_counter()
                loss = step(model, optimizer, ids)
                torch.cuda.synchronize()
                if turn >= 3:
                    seconds[name].append(time.perf_counter() - start)
                    memory[name] = (torch.cuda.max_memory_allocated() - before + weights) / 1e9
                losses.setdefault(name, loss)
        base = statistics.median(seconds[variants[0]])
        for name in variants:
            median = statistics.median(seconds[name])
            row = {
                "variant": name,
                "length": length,
                "batch": batch,
                "tokens_per_second": batch * length / median,
                "speed_to_softmax": base / median,
                "peak_gb": memory[name],
                "memory_to_softmax": memory[name] / memory[variants[0]],
                "first_loss": losses[name],
                "seconds": seconds[name],
            }
            rows.append(row)
            print({key: value for key, value in row.items() if key != "seconds"}, flush=True)
        models.clear()
        torch.cuda.empty_cache()
    write("finetune", "python -m benchmarks.finetune", {"agreement": agreement, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
