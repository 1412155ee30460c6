"""What is timed, one class a runtime: load a model, feed tokens, take a step. Each runs in a process of its own.

`cache_bytes(depth)` is what a conversation of that depth keeps: the State of a bundle, the KV cache of a peer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from liger_deploy.errors import UserError


class Subject(Protocol):
    """One model on one runtime, with one conversation."""

    def prefill(self, tokens: list[int]) -> None:
        """Feed tokens; the last one's logits are in this process's memory when it returns."""

    def step(self, token: int) -> None:
        """Feed one token; likewise."""

    def reset(self) -> None:
        """Forget the conversation."""

    def cache_bytes(self, depth: int) -> int:
        """Bytes that a conversation of `depth` tokens keeps."""


class OurBundle:
    """A bundle of any target."""

    def __init__(self, path: Path, threads: int, device: str, most: int) -> None:
        from liger_deploy.bundle import Bundle
        from liger_deploy.runtimes import load_session

        self.session = load_session(Bundle.open(path, checksums=False), threads=threads)

    def prefill(self, tokens: list[int]) -> None:
        self.session.prefill([tokens])

    def step(self, token: int) -> None:
        self.session.step([token])

    def reset(self) -> None:
        self.session.reset()

    def cache_bytes(self, depth: int) -> int:
        return self.session.spec.nbytes()


class LlamaCpp:
    """llama.cpp through llama-cpp-python, without flash attention: faster so at depth on the CPUs it was tried on."""

    def __init__(self, path: Path, threads: int, device: str, most: int) -> None:
        from llama_cpp import Llama

        self.cell = kv_bytes_a_token(path.parent, 2)
        self.model = Llama(
            str(path), n_ctx=most, n_threads=threads, n_threads_batch=threads, n_batch=512, flash_attn=False,
            verbose=False,
        )  # fmt: skip

    def prefill(self, tokens: list[int]) -> None:
        self.model.eval(tokens)

    def step(self, token: int) -> None:
        self.model.eval([token])

    def reset(self) -> None:
        self.model.reset()

    def cache_bytes(self, depth: int) -> int:
        return self.cell * depth


class Genai:
    """onnxruntime-genai's own int4 export of the softmax model."""

    def __init__(self, path: Path, threads: int, device: str, most: int) -> None:
        import onnxruntime_genai as og

        config = path / "genai_config.json"
        values = json.loads(config.read_text())
        values["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
        config.write_text(json.dumps(values))
        self.cell, self.og, self.most = kv_bytes_a_token(path.parent, 4), og, most
        self.model = og.Model(str(path))
        self.reset()

    def prefill(self, tokens: list[int]) -> None:
        import numpy as np

        for start in range(0, len(tokens), 512):
            self.generator.append_tokens(np.array(tokens[start : start + 512], np.int32))

    def step(self, token: int) -> None:
        self.generator.append_tokens([token])

    def reset(self) -> None:
        parameters = self.og.GeneratorParams(self.model)
        parameters.set_search_options(max_length=self.most, do_sample=False)
        self.generator: Any = self.og.Generator(self.model, parameters)

    def cache_bytes(self, depth: int) -> int:
        return self.cell * depth


class Transformers:
    """Hugging Face's model with its growing cache, eager."""

    def __init__(self, path: Path, threads: int, device: str, most: int, dtype: str = "float32") -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each length of the cache
        self.torch, self.device, self.most, self.dtype = torch, device, most, getattr(torch, dtype)
        self.cell = kv_bytes_a_token(path, self.dtype.itemsize)
        self.cache: Any = None
        self.seen = 0
        self.model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=self.dtype).to(device).eval()
        self.reset()

    def _forward(self, tokens: list[int]) -> Any:
        ids = self.torch.tensor([tokens], device=self.device)
        with self.torch.inference_mode():
            return self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    def prefill(self, tokens: list[int]) -> None:
        for start in range(0, len(tokens), 512):
            out = self._forward(tokens[start : start + 512])
            self.cache = out.past_key_values
        out.logits.cpu()  # on a GPU the call above returns before the work is done
        self.seen += len(tokens)

    def step(self, token: int) -> None:
        out = self._forward([token])
        self.cache = out.past_key_values
        out.logits.cpu()
        self.seen += 1

    def reset(self) -> None:
        self.cache = None
        self.seen = 0

    def cache_bytes(self, depth: int) -> int:
        return self.cell * depth


class TransformersCompiled(Transformers):
    """The same with a static cache, the step compiled by torch.compile (on CUDA replayed as a graph)."""

    def __init__(self, path: Path, threads: int, device: str, most: int, dtype: str = "float32") -> None:
        super().__init__(path, threads, device, most, dtype)
        mode = "reduce-overhead" if device == "cuda" else "default"
        self.compiled = self.torch.compile(self.model.forward, mode=mode)

    def reset(self) -> None:
        from transformers import StaticCache

        self.cache = StaticCache(config=self.model.config, max_cache_len=self.most)
        self.seen = 0

    def step(self, token: int) -> None:
        ids = self.torch.tensor([[token]], device=self.device)
        position = self.torch.tensor([[self.seen]], device=self.device)
        with self.torch.inference_mode():
            out = self.compiled(
                input_ids=ids, past_key_values=self.cache, position_ids=position, use_cache=True, logits_to_keep=1
            )
        out.logits.cpu()
        self.seen += 1

    def cache_bytes(self, depth: int) -> int:
        return self.cell * self.most


def kv_bytes_a_token(folder: Path, itemsize: int) -> int:
    """Bytes of keys and values that a softmax model keeps for each token; its config.json is in `folder`."""
    config = json.loads((folder / "config.json").read_text())
    heads = config.get("num_key_value_heads", config["num_attention_heads"])
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return int(2 * config["num_hidden_layers"] * heads * dim * itemsize)


def load(kind: str, path: Path, threads: int, device: str, most: int) -> Subject:
    """A subject by kind: "bundle", or one of `peers.PEERS`."""
    if kind == "bundle":
        return OurBundle(path, threads, device, most)
    if kind.startswith("llama.cpp"):
        return LlamaCpp(path, threads, device, most)
    if kind == "onnxruntime-genai":
        return Genai(path, threads, device, most)
    if kind.startswith("transformers"):
        form = TransformersCompiled if "compiled" in kind else Transformers
        return form(path, threads, device, most, "bfloat16" if kind.endswith("bf16") else "float32")
    raise UserError(f"unknown subject {kind!r}")
