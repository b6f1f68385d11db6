"""A model on disk: config.json, model.safetensors, styles.json and README.md in one folder, read strictly.

Keys in the weights file carry a prefix: `transformer.`, `vae.` or `text.`. Floating point weights are stored in
float16 and loaded in the dtype asked for; latent statistics stay float32.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.api import EngineError
from engine.wan.presets import TransformerConfig
from engine.wan.text_encoder import (
    SCALE_KEY,
    TABLE_KEY,
    VOCABULARY_KEY,
    StaticTextEncoder,
    Style,
    StyleIndex,
)
from engine.wan.transformer import CausalTransformer
from engine.wan.vae import TinyVAE, TinyVAEConfig

CONFIG_FILE, WEIGHTS_FILE, STYLES_FILE, CARD_FILE = "config.json", "model.safetensors", "styles.json", "README.md"
T = TypeVar("T")
_STYLES = TypeAdapter(tuple[Style, ...])
# Saved as they are: float16 would round what every pixel passes through.
_EXACT = ("vae.latent_mean", "vae.latent_std")


class WeightsError(EngineError):
    """A model folder that cannot be used; the text names the file and what is wrong with it."""


class ModelConfig(BaseModel):
    """config.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = Field(default=1, description="version of this layout")
    name: str = Field(min_length=1)
    transformer: TransformerConfig
    vae: TinyVAEConfig
    shift: float = Field(default=1.0, gt=0, description="of the noise levels, see engine.flow_match.sigma_table")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="of model.safetensors")


@dataclass(frozen=True)
class Model:
    """Everything that is shared between streams, on one device; weights only, no stream state."""

    config: ModelConfig
    transformer: CausalTransformer
    vae: TinyVAE
    text: StaticTextEncoder
    styles: StyleIndex
    device: torch.device
    dtype: torch.dtype


def load_model(folder: Path, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Model:
    """Read and check a model folder.

    Raises: WeightsError for a missing or damaged file, a wrong hash, or keys that are missing, unexpected or of
        a wrong shape (all of them are named).
    """
    config = _read(folder / CONFIG_FILE, TypeAdapter(ModelConfig))
    styles = _read(folder / STYLES_FILE, _STYLES)
    tensors = _read_weights(folder / WEIGHTS_FILE, config.sha256)
    # Built without memory or random numbers, then given the file's tensors.
    with torch.device("meta"):
        transformer, vae = CausalTransformer(config.transformer), TinyVAE(config.vae)
    _check_keys(folder / WEIGHTS_FILE, tensors, _expected(transformer, vae), config.transformer.text_dim)
    for prefix, module in (("transformer.", transformer), ("vae.", vae)):
        own = {key: tensors[prefix + key].to(device, dtype) for key in module.state_dict()}
        module.load_state_dict(own, assign=True)
        module.eval().requires_grad_(False)
    try:
        text = StaticTextEncoder.from_tensors(_below("text.", tensors), config.transformer.text_len)
    except ValueError as error:
        raise WeightsError(f"{folder / WEIGHTS_FILE}: {error}; restore the model folder") from error
    return Model(config, transformer, vae, text, StyleIndex(text, styles), torch.device(device), dtype)


def save_model(
    folder: Path,
    *,
    name: str,
    transformer: CausalTransformer,
    vae: TinyVAE,
    text: StaticTextEncoder,
    styles: Sequence[Style],
    card: str,
    shift: float = 1.0,
) -> ModelConfig:
    """Write a model folder that `load_model` reads; config.json last, so that an interrupted save does not load.

    Args:
        card: the model card, Markdown, written to README.md.
    """
    folder.mkdir(parents=True, exist_ok=True)
    modules = {"transformer.": transformer.state_dict(), "vae.": vae.state_dict()}
    tensors = {
        prefix + key: _stored(prefix + key, tensor) for prefix, own in modules.items() for key, tensor in own.items()
    }
    tensors |= {f"text.{key}": tensor.cpu().contiguous() for key, tensor in text.to_tensors().items()}
    save_file(tensors, folder / WEIGHTS_FILE)
    (folder / STYLES_FILE).write_text(
        json.dumps([style.model_dump(mode="json") for style in styles], indent=2) + "\n", encoding="utf-8"
    )
    (folder / CARD_FILE).write_text(card, encoding="utf-8")
    config = ModelConfig(
        name=name,
        transformer=transformer.config,
        vae=vae.config,
        shift=shift,
        sha256=_sha256(folder / WEIGHTS_FILE),
    )
    (folder / CONFIG_FILE).write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return config


def _stored(key: str, tensor: Tensor) -> Tensor:
    exact = key in _EXACT or not tensor.is_floating_point()
    return tensor.detach().cpu().to(tensor.dtype if exact else torch.float16).contiguous()


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _expected(transformer: nn.Module, vae: nn.Module) -> dict[str, tuple[int, ...]]:
    modules = {"transformer.": transformer, "vae.": vae}
    return {
        prefix + key: tuple(tensor.shape)
        for prefix, module in modules.items()
        for key, tensor in module.state_dict().items()
    }


def _check_keys(
    path: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], text_dim: int
) -> None:
    """Refuse a file whose keys or shapes differ from the configuration, naming every one."""
    text = {f"text.{key}" for key in (TABLE_KEY, SCALE_KEY, VOCABULARY_KEY)}
    wanted = expected.keys() | text
    faults = [f"missing {key}" for key in sorted(wanted - tensors.keys())]
    faults += [f"unexpected {key}" for key in sorted(tensors.keys() - wanted)]
    faults += [
        f"{key} is {tuple(tensors[key].shape)}, must be {shape}"
        for key, shape in expected.items()
        if key in tensors and tuple(tensors[key].shape) != shape
    ]
    table = tensors.get(f"text.{TABLE_KEY}")
    if table is not None and (table.dtype != torch.int8 or table.ndim != 2 or table.shape[1] != text_dim):
        faults.append(f"text.{TABLE_KEY} is {table.dtype} {tuple(table.shape)}, must be int8 (V, {text_dim})")
    if faults:
        raise WeightsError(f"{path} does not fit its {CONFIG_FILE}: {'; '.join(faults)}")


def _read(path: Path, schema: TypeAdapter[T]) -> T:
    try:
        return schema.validate_json(path.read_bytes())
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}; restore the model folder") from error
    except ValidationError as error:
        raise WeightsError(f"{path} is not valid: {error}") from error


def _read_weights(path: Path, sha256: str) -> dict[str, Tensor]:
    try:
        found = _sha256(path)
        if found != sha256:
            raise WeightsError(f"{path} has SHA-256 {found}, {CONFIG_FILE} says {sha256}; restore the file")
        return load_file(path)
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}; restore the model folder") from error
    except SafetensorError as error:
        raise WeightsError(f"{path} is no safetensors file: {error}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
