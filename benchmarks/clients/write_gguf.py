"""Writes the default model as a GGUF file, which the servers of llama.cpp read.

    python benchmarks/clients/write_gguf.py minisrv-default.gguf
    python -m llama_cpp.server --model minisrv-default.gguf --model_alias minisrv-default

Runs in an environment with gguf.

Knows: the files of the default model, and llama.cpp's names for their contents. Knows nothing of
servers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from needs import needs

with needs("pip install gguf"):
    import gguf
    import numpy as np

MODEL = Path(__file__).resolve().parents[2] / "models" / "minisrv-default"
PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTSIDE = {"embed_tokens": "token_embd", "norm": "output_norm"}


def read(name: str) -> Any:
    return json.loads((MODEL / name).read_text(encoding="utf-8"))


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor."""
    words = name.removeprefix("model.").removesuffix(".weight")
    if words in OUTSIDE:
        return f"{OUTSIDE[words]}.weight"
    layers, number, part = words.split(".", 2)
    assert layers == "layers", name
    return f"blk.{number}.{PARTS[part]}.weight"


def tensors_of(file: Path) -> Iterator[tuple[str, Any]]:
    """The tensors of a safetensors file in float32; numpy has no bfloat16, in which they are
    stored."""
    content = file.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    header.pop("__metadata__", None)
    for name, about in header.items():
        assert about["dtype"] == "BF16", name
        first, last = about["data_offsets"]
        halves = np.frombuffer(content[begin + first : begin + last], np.uint16)
        values = (halves.astype(np.uint32) << 16).view(np.float32)
        yield name, values.reshape(about["shape"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the default model as a GGUF file.")
    parser.add_argument("file")
    file = parser.parse_args().file
    config, tokenizer = read("config.json"), read("tokenizer.json")
    writer = gguf.GGUFWriter(file, "qwen3")
    writer.add_name("minisrv-default")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    vocabulary = tokenizer["model"]["vocab"]
    special = {token["content"] for token in tokenizer["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    kinds = gguf.TokenType
    writer.add_token_types([kinds.CONTROL if t in special else kinds.NORMAL for t in tokens])
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_chat_template(read("tokenizer_config.json")["chat_template"])
    for part in sorted(MODEL.glob("*.safetensors")):
        for name, values in tensors_of(part):
            writer.add_tensor(gguf_name(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
