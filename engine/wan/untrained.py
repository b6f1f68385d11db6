"""Models with random weights: what tests and benchmarks use where no trained file is needed, or none can be had."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.config import WAN_SAMPLING, ServingProfile
from engine.wan.checkpoints import transformer_to_original
from engine.wan.presets import LIVEBRUSH_TINY, TransformerConfig
from engine.wan.save import TextParts, save_wan_model
from engine.wan.taehv import TAEHV
from engine.wan.text_encoder import StaticTextEncoder, Style, StyleIndex
from engine.wan.transformer import CausalTransformer
from engine.wan.umt5 import UMT5_XXL, umt5_names
from engine.wan.vae import TinyVAE, TinyVAEConfig
from engine.wan.vae_config import TAEHVConfig, WanVAEConfig
from engine.wan.wan_vae import WanVAE
from engine.wan.weights import Model, ModelConfig

VOCABULARY = ("[UNK]", "water", "##color", "watercolor", "color", "ink", "neon", "gray", "pencil", "a", "painting")
STYLES = (
    Style(id="watercolor", name="Watercolour", prompt="watercolor painting", phrases=("water color",)),
    Style(id="neon", name="Neon", prompt="neon"),
)
# Wan in small: everything there is of it, 0.2 million parameters.
SMALL_WAN = TransformerConfig(dim=48, ffn_dim=96, heads=4, layers=2, text_dim=32, text_len=32, freq_dim=32)
SMALL_WAN_VAE = WanVAEConfig(dim=8)
SMALL_TAEHV = TAEHVConfig(encoder_dim=8, decoder_dims=(16, 8, 8, 8))
SMALL_SERVING = ServingProfile(fps=16, sizes=((64, 64), (96, 64)), first_chunk_frames=5, steps=2)
_CARD = "# {name}\n\nRandom weights in the shape of Wan 2.1: for tests, no pictures.\n"


def randomise(module: nn.Module, random: torch.Generator) -> None:
    """Give every parameter random values of a size that keeps activations near 1, also where training starts at 0."""
    for name, parameter in module.named_parameters():
        parameter.data = random_weight(name, tuple(parameter.shape), random)


def random_weight(name: str, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    """One float32 parameter; see `randomise`."""
    noise = torch.randn(shape, generator=random)
    if len(shape) > 1 and not name.endswith("gamma"):
        scaled: Tensor = noise / noise[0].numel() ** 0.5
        return scaled
    # Of one dimension are biases, about 0, and the weights of norms, about 1.
    return 0.1 * noise + float(name.endswith(("weight", "gamma")))


def untrained_model(
    transformer: TransformerConfig = LIVEBRUSH_TINY,
    vae: TinyVAEConfig | None = None,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Model:
    """The embedded model's kind, with random weights."""
    vae = vae or TinyVAEConfig(latent_channels=transformer.latent_channels)
    config = ModelConfig(name="untrained", transformer=transformer, vae=vae, sha256="0" * 64)
    return _model(config, TinyVAE(vae), seed, device, dtype)


def untrained_wan_model(
    transformer: TransformerConfig = SMALL_WAN,
    vae: WanVAEConfig = SMALL_WAN_VAE,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Model:
    """Wan's kind with random weights, sampled as the published V2V checkpoints are.

    Its prompts come from a table, so that it needs no process; `write_untrained_wan` has a real text encoder.
    """
    config = ModelConfig(
        name="untrained-wan",
        transformer=transformer,
        vae=vae,
        sampling=WAN_SAMPLING,
        serving=SMALL_SERVING,
        sha256="0" * 64,
    )
    return _model(config, WanVAE(vae), seed, device, dtype)


def _model(
    config: ModelConfig, vae: TinyVAE | WanVAE, seed: int, device: torch.device | str, dtype: torch.dtype
) -> Model:
    transformer = CausalTransformer(config.transformer)
    random = torch.Generator().manual_seed(seed)
    for module in (transformer, vae):
        randomise(module, random)
        module.to(device, dtype).eval().requires_grad_(False)
    width = config.transformer.text_dim
    table = torch.randint(-127, 128, (len(VOCABULARY), width), generator=random).to(torch.int8)
    scale = torch.full((len(VOCABULARY), 1), 1 / 64, dtype=torch.float16)
    text = StaticTextEncoder(table, scale, VOCABULARY, config.transformer.text_len)
    return Model(config, transformer, vae, text, StyleIndex(text, STYLES), torch.device(device), dtype)


def write_untrained_wan(
    folder: Path,
    *,
    name: str = "untrained-wan",
    transformer: TransformerConfig = SMALL_WAN,
    vae: WanVAEConfig = SMALL_WAN_VAE,
    light_vae: TAEHVConfig | None = None,
    serving: ServingProfile = SMALL_SERVING,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> ModelConfig:
    """Write a whole Wan model folder with random weights, a tiny UMT5 with its tokenizer included: 2 MB, a second.

    `livebrush serve --model FOLDER` takes it. Its weights are float32 by default, so that it loads as it was made.
    """
    random = torch.Generator().manual_seed(seed)
    network, autoencoder = CausalTransformer(transformer), WanVAE(vae)
    randomise(network, random)
    randomise(autoencoder, random)
    light = None
    if light_vae is not None:
        small = TAEHV(light_vae)
        randomise(small, random)
        light = (light_vae, small.state_dict())
    return save_wan_model(
        folder,
        name=name,
        transformer=(transformer, transformer_to_original(network.state_dict(), transformer)),
        vae=(vae, autoencoder.state_dict()),
        light_vae=light,
        text=untrained_text(transformer.text_dim, random),
        serving=serving,
        styles=STYLES,
        card=_CARD.format(name=name),
        source={"weights": "random"},
        dtype=dtype,
    )


def untrained_text(width: int, random: torch.Generator) -> TextParts:
    """A UMT5 encoder of two layers with random weights and a tokenizer that knows every printable ASCII character."""
    tokenizer = character_tokenizer()
    config = UMT5_XXL | {
        "vocab_size": len(json.loads(tokenizer)["model"]["vocab"]),
        "d_model": width,
        "d_kv": 8,
        "d_ff": 2 * width,
        "num_layers": 2,
        "num_heads": 4,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 16,
    }
    tensors: Mapping[str, Tensor] = {
        key: random_weight(key, source.shape, random) for key, source in umt5_names(config).items()
    }
    return TextParts(tensors, config, tokenizer)


def character_tokenizer() -> bytes:
    """A tokenizer.json that cuts lower-case text into characters and ends it with </s>, as UMT5's does."""
    special = ("<pad>", "</s>", "<unk>")
    characters = [chr(code) for code in range(ord("!"), ord("~") + 1) if not chr(code).isupper()]
    vocabulary = {piece: index for index, piece in enumerate((*special, *characters))}
    whole = {"Sequence": {"id": "A", "type_id": 0}}
    end = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    content: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": index,
                "content": piece,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for index, piece in enumerate(special)
        ],
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [whole, end],
            "pair": [whole, end, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
        },
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocabulary,
            "merges": [],
        },
    }
    return json.dumps(content, indent=1).encode()
