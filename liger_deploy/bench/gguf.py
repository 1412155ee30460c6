"""A Llama checkpoint as a GGUF file, quantized by llama.cpp itself: `python -m liger_deploy.bench.gguf BASE OUT Q4_0`.

For speed and memory only: the file has no vocabulary. Needs llama-cpp-python, gguf and safetensors.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def write(base: Path, out: Path, bits: str) -> None:
    """Write `out` from the checkpoint in `base`."""
    import gguf
    import llama_cpp

    config = json.loads((base / "config.json").read_text())
    if config["model_type"] != "llama":
        raise SystemExit(f"llama.cpp's file is written for Llama checkpoints, not for {config['model_type']}")
    heads, groups = config["num_attention_heads"], config.get("num_key_value_heads", config["num_attention_heads"])
    dim = config.get("head_dim") or config["hidden_size"] // heads
    full = out.with_suffix(".full.gguf")
    writer = gguf.GGUFWriter(full, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_key_length(dim)
    writer.add_value_length(dim)
    writer.add_rope_dimension_count(dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, array in _weights(base):
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # rotated pairs stand side by side there
            rows = heads if "q_proj" in name else groups
            array = array.reshape(rows, 2, dim // 2, -1).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{bits}")
    failed = llama_cpp.llama_model_quantize(str(full).encode(), str(out).encode(), parameters)
    full.unlink()
    if failed:
        raise SystemExit("llama.cpp did not quantize the model")


def _weights(base: Path) -> Any:
    from safetensors.numpy import load_file

    for path in sorted(base.glob("*.safetensors")):
        yield from load_file(path).items()


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
