"""Writes a model's folder, which `engine.wan.weights` reads; config.json last, so an interrupted save does not load."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.config import WAN_SAMPLING, WAN_SERVING, CacheConfig, SamplingConfig, ServingProfile, SteadyConfig
from engine.text_service import TEXT_ENCODER_DIR
from engine.wan.checkpoints import (
    Progress,
    check_shapes,
    file_record,
    shapes_of,
    silent,
    transformer_rules,
    write_tensors,
)
from engine.wan.presets import TransformerConfig
from engine.wan.taehv import TAEHV
from engine.wan.text_encoder import StaticTextEncoder, Style, TextEncoder
from engine.wan.transformer import CausalTransformer
from engine.wan.umt5 import TOKENIZER_FILE, umt5_names
from engine.wan.umt5 import WEIGHTS_FILE as TEXT_WEIGHTS_FILE
from engine.wan.vae import TinyVAE
from engine.wan.vae_config import TAEHVConfig, WanVAEConfig
from engine.wan.wan_vae import WanVAE
from engine.wan.weights import (
    CARD_FILE,
    CONFIG_FILE,
    LIGHT_VAE_FILE,
    STYLES_FILE,
    TRANSFORMER_FILE,
    VAE,
    VAE_FILE,
    WEIGHTS_FILE,
    ModelConfig,
)

_Specs = dict[str, tuple[torch.dtype, tuple[int, ...]]]
# One file to be written: what it will hold, and where each tensor comes from.
_Part = tuple[_Specs, Callable[[str], Tensor]]
# Saved as they are: float16 would round what every pixel passes through.
_EXACT = ("vae.latent_mean", "vae.latent_std")


def save_model(
    folder: Path,
    *,
    name: str,
    transformer: CausalTransformer,
    vae: VAE,
    text: TextEncoder,
    styles: Sequence[Style],
    card: str,
    sampling: SamplingConfig | None = None,
    serving: ServingProfile | None = None,
    steady: SteadyConfig | None = None,
) -> ModelConfig:
    """Write the folder of a model in one file.

    Args:
        card: the model card, Markdown, written to README.md.

    Raises: TypeError for the parts of a Wan model, which `save_wan_model` takes.
    """
    if not isinstance(vae, TinyVAE) or not isinstance(text, StaticTextEncoder):
        raise TypeError("one file holds a TinyVAE and a text table; a Wan model is saved by save_wan_model")
    folder.mkdir(parents=True, exist_ok=True)
    modules = {"transformer.": transformer.state_dict(), "vae.": vae.state_dict()}
    tensors = {
        prefix + key: _stored(prefix + key, tensor) for prefix, own in modules.items() for key, tensor in own.items()
    }
    tensors |= {f"text.{key}": tensor.cpu().contiguous() for key, tensor in text.to_tensors().items()}
    save_file(tensors, folder / WEIGHTS_FILE)
    _write_texts(folder, styles, card)
    config = ModelConfig(
        name=name,
        transformer=transformer.config,
        vae=vae.config,
        sampling=sampling or SamplingConfig(),
        serving=serving or ServingProfile(),
        steady=steady,
        sha256=file_record(folder / WEIGHTS_FILE).sha256,
    )
    _write_config(folder, config)
    return config


@dataclass(frozen=True)
class TextParts:
    """A text encoder to be saved: its tensors under transformers' names, its config.json and its tokenizer.json."""

    tensors: Mapping[str, Tensor]
    config: Mapping[str, object]
    tokenizer: bytes


def save_wan_model(
    folder: Path,
    *,
    name: str,
    transformer: tuple[TransformerConfig, Mapping[str, Tensor]],
    vae: tuple[WanVAEConfig, Mapping[str, Tensor]],
    light_vae: tuple[TAEHVConfig, Mapping[str, Tensor]] | None = None,
    text: TextParts | None = None,
    sampling: SamplingConfig = WAN_SAMPLING,
    cache: CacheConfig | None = None,
    serving: ServingProfile = WAN_SERVING,
    styles: Sequence[Style] = (),
    card: str = "",
    source: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    progress: Progress | None = None,
) -> ModelConfig:
    """Write the folder of a Wan model, one tensor at a time.

    Args:
        transformer, vae, light_vae: configuration, and tensors under original or published names, which may be
            mapped files.
        text: left out, the model only knows prompts whose states it is given.
        dtype: of the transformer; the other parts keep their tensors' own.
        progress: told the share of the bytes written, 0 to 1, and the file.

    Raises: WeightsError naming what a part misses, has too much or in a wrong shape; OSError.
    """
    report = progress or silent
    parts = {TRANSFORMER_FILE: _transformer_part(*transformer, dtype)} | _vae_parts(vae, light_vae)
    folder.mkdir(parents=True, exist_ok=True)
    if text is not None:
        parts[f"{TEXT_ENCODER_DIR}/{TEXT_WEIGHTS_FILE}"] = _text_part(folder / TEXT_ENCODER_DIR, text)
    total = sum(_spec_bytes(specs) for specs, _ in parts.values())
    done, files = 0, {}
    for file, (specs, tensor_of) in parts.items():
        files[file] = write_tensors(
            folder / file,
            specs,
            tensor_of,
            lambda written, file=file, before=done: report((before + written) / total, f"writing {file}"),  # type: ignore[misc]
        )
        done += _spec_bytes(specs)
    if text is not None:
        for file in (CONFIG_FILE, TOKENIZER_FILE):
            files[f"{TEXT_ENCODER_DIR}/{file}"] = file_record(folder / TEXT_ENCODER_DIR / file)
    _write_texts(folder, styles, card)
    config = ModelConfig(
        name=name,
        transformer=transformer[0],
        vae=vae[0],
        light_vae=light_vae and light_vae[0],
        text="umt5",
        sampling=sampling,
        cache=cache or CacheConfig(),
        serving=serving,
        files=files,
        source=dict(source or {}),
    )
    _write_config(folder, config)
    return config


def _transformer_part(config: TransformerConfig, original: Mapping[str, Tensor], dtype: torch.dtype) -> _Part:
    rules = {rule.key: rule for rule in transformer_rules(config)}
    sources = {source.key: source.shape for rule in rules.values() for source in rule.sources}
    check_shapes(sources, shapes_of(original), "the transformer")
    return {key: (dtype, rule.shape) for key, rule in rules.items()}, lambda key: rules[key].build(original)


def _vae_parts(
    vae: tuple[WanVAEConfig, Mapping[str, Tensor]], light_vae: tuple[TAEHVConfig, Mapping[str, Tensor]] | None
) -> dict[str, _Part]:
    with torch.device("meta"):
        wanted = {VAE_FILE: (WanVAE(vae[0]).state_dict(), vae[1])}
        if light_vae is not None:
            wanted[LIGHT_VAE_FILE] = (TAEHV(light_vae[0]).state_dict(), light_vae[1])
    parts: dict[str, _Part] = {}
    for file, (expected, tensors) in wanted.items():
        check_shapes(shapes_of(expected), shapes_of(tensors), f"the VAE for {file}")
        parts[file] = ({key: (tensors[key].dtype, tuple(tensors[key].shape)) for key in expected}, tensors.__getitem__)
    return parts


def _text_part(folder: Path, text: TextParts) -> _Part:
    """Writes all but the weights."""
    names = umt5_names(text.config)
    check_shapes({key: source.shape for key, source in names.items()}, shapes_of(text.tensors), "the text encoder")
    folder.mkdir(exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps(dict(text.config), indent=2) + "\n")
    (folder / TOKENIZER_FILE).write_bytes(text.tokenizer)
    specs = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in text.tensors.items()}
    return specs, text.tensors.__getitem__


def _spec_bytes(specs: _Specs) -> int:
    return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in specs.values())


def _write_texts(folder: Path, styles: Sequence[Style], card: str) -> None:
    listed = json.dumps([style.model_dump(mode="json") for style in styles], indent=2)
    (folder / STYLES_FILE).write_text(listed + "\n", encoding="utf-8")
    (folder / CARD_FILE).write_text(card, encoding="utf-8")


def _write_config(folder: Path, config: ModelConfig) -> None:
    without = {"files", "light_vae", "source"} if config.sha256 else {"sha256"}
    (folder / CONFIG_FILE).write_text(config.model_dump_json(indent=2, exclude=without) + "\n", encoding="utf-8")


def _stored(key: str, tensor: Tensor) -> Tensor:
    exact = key in _EXACT or not tensor.is_floating_point()
    return tensor.detach().cpu().to(tensor.dtype if exact else torch.float16).contiguous()
