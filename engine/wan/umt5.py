"""UMT5-XXL, the text encoder of Wan 2.1: its published names, its prompt cleaning, and the encoder itself.

The network is the one of transformers, whose import takes seconds: only `load_umt5` imports it, and only the text
process of engine.text_service calls that.

A folder holds config.json (transformers' own), model.safetensors (transformers' names) and tokenizer.json.
"""

from __future__ import annotations

import html
import json
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.wan.checkpoints import LazyTensors, Source, WeightsError, check_shapes

CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE = "config.json", "model.safetensors", "tokenizer.json"
MAX_PIECES = 512
# The published encoder; what config.json of google/umt5-xxl says, as far as an encoder needs it.
UMT5_XXL: dict[str, Any] = {
    "model_type": "umt5",
    "architectures": ["UMT5EncoderModel"],
    "vocab_size": 256384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "feed_forward_proj": "gated-gelu",
    "layer_norm_epsilon": 1e-6,
    "dropout_rate": 0.0,
    "is_encoder_decoder": False,
}
# Transformers' name within a block and the original's.
_BLOCK_NAMES = {
    "layer.0.layer_norm": "norm1",
    "layer.0.SelfAttention.q": "attn.q",
    "layer.0.SelfAttention.k": "attn.k",
    "layer.0.SelfAttention.v": "attn.v",
    "layer.0.SelfAttention.o": "attn.o",
    "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
    "layer.1.layer_norm": "norm2",
    "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
    "layer.1.DenseReluDense.wi_1": "ffn.fc1",
    "layer.1.DenseReluDense.wo": "ffn.fc2",
}
_QUOTES = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"'})


class PromptEncoder(Protocol):
    """What the text process runs."""

    def __call__(self, prompt: str) -> Tensor:
        """States [pieces, K] of a clean prompt, on the CPU."""


def clean_prompt(text: str) -> str:
    """A prompt as the encoder was trained to see it: entities resolved twice, white space single, none at the ends.

    Source: Wan 2.1, which also repairs wrongly decoded text (ftfy). Of that, quotes are straightened and accents
    composed here; the rest mends files, not what people type.
    """
    text = html.unescape(html.unescape(text))
    return re.sub(r"\s+", " ", unicodedata.normalize("NFC", text).translate(_QUOTES)).strip()


def umt5_names(config: Mapping[str, Any]) -> dict[str, Source]:
    """Of each tensor of transformers' UMT5EncoderModel: the name and shape it has in Wan's own checkpoint.

    Args:
        config: as in config.json.
    """
    dim, ffn, heads = config["d_model"], config["d_ff"], config["num_heads"]
    inner = heads * config["d_kv"]
    shapes = {
        "norm1": (dim,),
        "norm2": (dim,),
        "attn.q": (inner, dim),
        "attn.k": (inner, dim),
        "attn.v": (inner, dim),
        "attn.o": (dim, inner),
        "pos_embedding.embedding": (config["relative_attention_num_buckets"], heads),
        "ffn.gate.0": (ffn, dim),
        "ffn.fc1": (ffn, dim),
        "ffn.fc2": (dim, ffn),
    }
    names = {"shared.weight": Source("token_embedding.weight", (config["vocab_size"], dim))}
    for block in range(config["num_layers"]):
        for library, original in _BLOCK_NAMES.items():
            source = Source(f"blocks.{block}.{original}.weight", shapes[original])
            names[f"encoder.block.{block}.{library}.weight"] = source
    names["encoder.final_layer_norm.weight"] = Source("norm.weight", (dim,))
    return names


def umt5_from_any(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Wan's own checkpoint of the encoder, or transformers', under transformers' names; tensors are not copied.

    Raises: WeightsError naming every missing, unexpected and misshapen tensor.
    """
    names = umt5_names(config)
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    if "token_embedding.weight" in found:
        check_shapes({source.key: source.shape for source in names.values()}, found, "Wan's UMT5 checkpoint")
        return {key: tensors[source.key] for key, source in names.items()}
    # Tied to shared.weight, and stored or not as the writer saw fit.
    found.pop("encoder.embed_tokens.weight", None)
    if "shared.weight" not in found and "encoder.embed_tokens.weight" in tensors:
        tensors = {**tensors, "shared.weight": tensors["encoder.embed_tokens.weight"]}
        found["shared.weight"] = tuple(tensors["shared.weight"].shape)
    check_shapes({key: source.shape for key, source in names.items()}, found, "UMT5 checkpoint")
    return {key: tensors[key] for key in names}


def read_umt5_config(folder: Path) -> dict[str, Any]:
    """config.json of a text encoder's folder. Raises: WeightsError."""
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_bytes())
        missing = sorted(UMT5_XXL.keys() - config.keys() - {"architectures", "is_encoder_decoder", "dropout_rate"})
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}; restore the model folder") from error
    except (ValueError, AttributeError) as error:
        raise WeightsError(f"{path} is not valid: {error}") from error
    if missing:
        raise WeightsError(f"{path} is not valid: no {', '.join(missing)}")
    return dict(config)


def load_umt5(folder: Path, device: str = "cpu") -> PromptEncoder:
    """The encoder of a folder, in the dtype of its file. Takes seconds: imports transformers.

    Raises: WeightsError for missing or unfit files; ImportError without transformers.
    """
    from tokenizers import Tokenizer
    from transformers import UMT5Config, UMT5EncoderModel

    config = read_umt5_config(folder)
    lazy = LazyTensors(folder / WEIGHTS_FILE)
    tensors = umt5_from_any(lazy, config)
    try:
        tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    except Exception as error:
        # The library raises plain Exception.
        raise WeightsError(f"cannot read {folder / TOKENIZER_FILE}: {error}; restore the model folder") from error
    tokenizer.enable_truncation(MAX_PIECES)
    tokenizer.no_padding()
    with torch.device("meta"):
        model: Any = UMT5EncoderModel(UMT5Config(**config))
    placed = {key: tensor.to(device) for key, tensor in tensors.items()}
    placed["encoder.embed_tokens.weight"] = placed["shared.weight"]
    model.load_state_dict(placed, assign=True)
    model.eval().requires_grad_(False)

    @torch.inference_mode()
    def encode(prompt: str) -> Tensor:
        # Without padding: what padding there would be is masked and does not change the true pieces.
        ids = torch.tensor([tokenizer.encode(prompt).ids], device=device)
        states: Tensor = model(input_ids=ids).last_hidden_state[0].cpu()
        return states

    return encode
