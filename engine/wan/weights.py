"""A model on disk, read strictly: config.json, styles.json, README.md and the weights, in one of two forms.

The embedded model is one file, model.safetensors, whose keys carry a prefix: `transformer.`, `vae.` or `text.`.
Floating point weights are stored in float16 and loaded in the dtype asked for; latent statistics stay float32. It is
small, so its hash is checked each time.

A Wan model is several: transformer.safetensors (our names), vae.safetensors and taehv.safetensors (published names)
and the folder text_encoder. They are mapped, not read, and go to the device tensor by tensor: the model is never in
memory twice. Loading checks their sizes and every key; `verify_model` (`livebrush models verify`) also their hashes.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, TypeAdapter, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from engine.api import EngineError
from engine.config import CacheConfig, LoraFile, SamplingConfig, ServingProfile, SteadyConfig
from engine.text_service import TEXT_ENCODER_DIR, TextService
from engine.wan.checkpoints import (
    FileRecord,
    LazyTensors,
    Progress,
    WeightsError,
    check_shapes,
    file_record,
    shapes_of,
    silent,
)
from engine.wan.lora import read_loras
from engine.wan.presets import TransformerConfig
from engine.wan.prompt_reader import READER_KEYS
from engine.wan.taehv import TAEHV
from engine.wan.text_encoder import (
    SCALE_KEY,
    TABLE_KEY,
    VOCABULARY_KEY,
    StaticTextEncoder,
    Style,
    StyleIndex,
    TextEncoder,
)
from engine.wan.transformer import CausalTransformer
from engine.wan.umt5 import WEIGHTS_FILE as TEXT_WEIGHTS_FILE
from engine.wan.umt5 import read_umt5_config, umt5_names
from engine.wan.vae import TinyVAE, TinyVAEConfig
from engine.wan.vae_config import TAEHVConfig, WanVAEConfig
from engine.wan.wan_vae import WanVAE

__all__ = [
    "Model",
    "ModelConfig",
    "WeightsError",
    "load_model",
    "quantise",
    "read_config",
    "verify_model",
]
CONFIG_FILE, WEIGHTS_FILE, STYLES_FILE, CARD_FILE = "config.json", "model.safetensors", "styles.json", "README.md"
TRANSFORMER_FILE, VAE_FILE, LIGHT_VAE_FILE = "transformer.safetensors", "vae.safetensors", "taehv.safetensors"
T = TypeVar("T")
VAE = TinyVAE | WanVAE | TAEHV
WhichVAE = Literal["auto", "full", "light", "both"]
_STYLES = TypeAdapter(tuple[Style, ...])


def _kind_of_vae(value: object) -> str:
    if isinstance(value, Mapping):
        return "wan" if "z_dim" in value else "tiny"
    return "wan" if isinstance(value, WanVAEConfig) else "tiny"


class ModelConfig(BaseModel):
    """config.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = Field(default=1, description="version of this layout")
    name: str = Field(min_length=1)
    transformer: TransformerConfig
    vae: Annotated[
        Annotated[TinyVAEConfig, Tag("tiny")] | Annotated[WanVAEConfig, Tag("wan")], Discriminator(_kind_of_vae)
    ] = Field(description="the autoencoder: Wan's, which has `z_dim`, or the embedded model's")
    light_vae: TAEHVConfig | None = Field(default=None, description="Wan: what taehv.safetensors holds, if it is there")
    text: Literal["table", "umt5"] = Field(default="table", description="how a prompt becomes states")
    sampling: SamplingConfig = Field(default=SamplingConfig(), description="how chunks are noised and denoised")
    cache: CacheConfig = Field(default=CacheConfig(), description="positions and sinks of the KV cache")
    steady: SteadyConfig | None = Field(default=None, description="how far pictures are steadied; None: not at all")
    serving: ServingProfile = Field(default=ServingProfile(), description="rate, sizes and steps it is good at")
    sha256: str = Field(default="", pattern=r"^([0-9a-f]{64})?$", description="of model.safetensors, where it is all")
    files: dict[str, FileRecord] = Field(default={}, description="the weights files else, by path in the folder")
    source: dict[str, str] = Field(default={}, description="where each part came from, for people")

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        channels = self.vae.z_dim if isinstance(self.vae, WanVAEConfig) else self.vae.latent_channels
        if channels != self.transformer.latent_channels:
            raise ValueError(
                f"the VAE has {channels} latent channels, the transformer {self.transformer.latent_channels}: "
                "they must be equal"
            )
        if bool(self.sha256) == bool(self.files):
            raise ValueError("give either sha256, for a model in one file, or files")
        return self


@dataclass(frozen=True)
class Model:
    """Everything that is shared between streams, on one device; weights only, no stream state.

    light_vae: the one that streams can change to and back, where both were loaded. Close `text` when done: it may be a
    process.
    """

    config: ModelConfig
    transformer: CausalTransformer
    vae: VAE
    text: TextEncoder
    styles: StyleIndex
    device: torch.device
    dtype: torch.dtype
    light_vae: TAEHV | None = None


def read_config(folder: Path) -> ModelConfig:
    """config.json of a model folder. Raises: WeightsError, naming the file."""
    return _read(folder / CONFIG_FILE, TypeAdapter(ModelConfig))


def load_model(
    folder: Path,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    *,
    vae: WhichVAE = "auto",
    loras: Sequence[LoraFile] = (),
    fp8: bool = False,
    text_device: str = "cpu",
    progress: Progress | None = None,
) -> Model:
    """Read and check a model folder.

    Args:
        vae: of Wan: its own, or the light one; auto: light where the folder has it; both: its own, and the light one
            beside it.
        loras: merged into the transformer's weights.
        fp8: turn the linear layers of the blocks to float8, see `quantise`.
        text_device: where Wan's text encoder goes; its process is started here and loads on its own.
        progress: told the share of the weights loaded, 0 to 1, and what comes next.

    Raises: WeightsError for a missing or damaged file, a wrong size or hash, or keys that are missing, unexpected or
        of a wrong shape (all of them are named); EngineError for fp8 without what it needs.
    """
    config = read_config(folder)
    styles = _read(folder / STYLES_FILE, _STYLES)
    target = _Target(torch.device(device), dtype, progress or silent)
    if fp8:
        _check_float8(target.device)
    table: StaticTextEncoder | None = None
    autoencoder: VAE
    light: TAEHV | None = None
    if isinstance(config.vae, WanVAEConfig):
        transformer, autoencoder, light = _load_wan(folder, config, target, vae, loras)
    elif loras:
        raise EngineError(f"LoRA files are for Wan transformers; {config.name} is none: leave loras out")
    else:
        transformer, autoencoder, table = _load_single(folder, config, config.vae, target, styles)
    for module in (transformer, autoencoder, *(() if light is None else (light,))):
        module.to(target.device).eval().requires_grad_(False)
    if fp8:
        target.progress(1.0, "quantising to float8")
        quantise(transformer)
    text = table or TextService(folder, config.transformer.text_len, config.transformer.text_dim, device=text_device)
    index = StyleIndex(table, styles)
    return Model(config, transformer, autoencoder, text, index, target.device, dtype, light)


@dataclass(frozen=True)
class _Target:
    device: torch.device
    dtype: torch.dtype
    progress: Progress


def _load_single(
    folder: Path, config: ModelConfig, vae_config: TinyVAEConfig, target: _Target, styles: Sequence[Style]
) -> tuple[CausalTransformer, TinyVAE, StaticTextEncoder]:
    path = folder / WEIGHTS_FILE
    tensors = _read_weights(path, config.sha256)
    # Built without memory or random numbers, then given the file's tensors.
    with torch.device("meta"):
        transformer, vae = CausalTransformer(config.transformer), TinyVAE(vae_config)
    _check_keys(path, tensors, _expected(transformer, vae), config.transformer.text_dim)
    for prefix, module in (("transformer.", transformer), ("vae.", vae)):
        own = {key: tensors[prefix + key].to(target.device, target.dtype) for key in module.state_dict()}
        module.load_state_dict(own, assign=True)
    if target.device.type == "cpu" and target.dtype is torch.bfloat16:
        # A tenth of a chunk's time on a CPU with AMX; in float32 the other order is the faster one.
        for layer in (*transformer.modules(), *vae.modules()):
            if isinstance(layer, nn.Conv2d):
                layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
    try:
        text = StaticTextEncoder.from_tensors(
            _below("text.", tensors), config.transformer.text_len, [style.id for style in styles]
        )
    except ValueError as error:
        raise WeightsError(f"{path}: {error}; restore the model folder") from error
    return transformer, vae, text


def _load_wan(
    folder: Path,
    config: ModelConfig,
    target: _Target,
    which: WhichVAE,
    loras: Sequence[LoraFile],
) -> tuple[CausalTransformer, VAE, TAEHV | None]:
    light = which == "light" or (which == "auto" and config.light_vae is not None)
    if (light or which == "both") and config.light_vae is None:
        raise WeightsError(
            f"{folder} has no {LIGHT_VAE_FILE}: choose vae full, or add it by `livebrush models convert`"
        )
    with torch.device("meta"):
        transformer, vae = CausalTransformer(config.transformer), _autoencoder(config, light=light)
    files = [
        (_open(folder, TRANSFORMER_FILE, config), transformer, read_loras(loras, config.transformer)),
        (_open(folder, LIGHT_VAE_FILE if light else VAE_FILE, config), vae, None),
    ]
    for file, module, _ in files:
        check_shapes(shapes_of(module.state_dict()), file.shapes(), f"{file.path}")
    second = None
    if which == "both":
        assert config.light_vae is not None
        with torch.device("meta"):
            second = TAEHV(config.light_vae)
        files.append((_open(folder, LIGHT_VAE_FILE, config), second, None))
    total = sum(file.path.stat().st_size for file, _, _ in files)
    done = 0
    for file, module, deltas in files:
        placed = {}
        for key in file:
            target.progress(done / total, f"loading {file.path.name}")
            tensor = file[key]
            done += tensor.numel() * tensor.element_size()
            tensor = tensor.to(target.device)
            placed[key] = (tensor if deltas is None else deltas.apply(key, tensor)).to(target.dtype)
        module.load_state_dict(placed, assign=True)
    return transformer, vae, second


def _autoencoder(config: ModelConfig, *, light: bool) -> VAE:
    assert isinstance(config.vae, WanVAEConfig)
    if light:
        assert config.light_vae is not None
        return TAEHV(config.light_vae)
    return WanVAE(config.vae)


def _open(folder: Path, name: str, config: ModelConfig) -> LazyTensors:
    """A weights file of the size config.json says. Raises: WeightsError."""
    path, record = folder / name, config.files.get(name)
    if record is None:
        raise WeightsError(f"{folder / CONFIG_FILE} lists no {name}: convert the model again")
    try:
        found = path.stat().st_size
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}; restore the model folder") from error
    if found != record.size_bytes:
        raise WeightsError(
            f"{path} has {found} bytes, {CONFIG_FILE} says {record.size_bytes}: copy or convert it again"
        )
    return LazyTensors(path)


def verify_model(folder: Path, progress: Progress | None = None) -> ModelConfig:
    """Check a model folder wholly: configuration, size, hash and every key of each weights file.

    Raises: WeightsError naming every fault of the first kind found: configuration, missing files, hashes, keys.
    """
    report = progress or silent
    config = read_config(folder)
    _read(folder / STYLES_FILE, _STYLES)
    if isinstance(config.vae, TinyVAEConfig):
        report(0.0, WEIGHTS_FILE)
        load_model(folder, "cpu")
        return config
    expected = _wan_shapes(folder, config)
    opened = {name: _open(folder, name, config) for name in expected}
    faults = []
    for done, (name, record) in enumerate(config.files.items()):
        report(done / len(config.files), name)
        try:
            found = file_record(folder / name)
        except OSError as error:
            raise WeightsError(f"cannot read {folder / name}: {error.strerror}; restore the model folder") from error
        if found != record:
            faults.append(
                f"{name} has {found.size_bytes} bytes and SHA-256 {found.sha256}, {CONFIG_FILE} says "
                f"{record.size_bytes} and {record.sha256}"
            )
    if faults:
        raise WeightsError(f"{folder}: {'; '.join(faults)}; download or convert the model again")
    for name, file in opened.items():
        check_shapes(expected[name], file.shapes(), f"{folder / name}")
    return config


def _wan_shapes(folder: Path, config: ModelConfig) -> dict[str, dict[str, tuple[int, ...]]]:
    """What each weights file of a Wan folder must hold."""
    with torch.device("meta"):
        modules: dict[str, nn.Module] = {
            TRANSFORMER_FILE: CausalTransformer(config.transformer),
            VAE_FILE: _autoencoder(config, light=False),
        }
        if config.light_vae is not None:
            modules[LIGHT_VAE_FILE] = _autoencoder(config, light=True)
    expected = {name: shapes_of(module.state_dict()) for name, module in modules.items()}
    text = f"{TEXT_ENCODER_DIR}/{TEXT_WEIGHTS_FILE}"
    if text in config.files:
        names = umt5_names(read_umt5_config(folder / TEXT_ENCODER_DIR))
        expected[text] = {key: source.shape for key, source in names.items()}
    return expected


def _check_float8(device: torch.device) -> None:
    if device.type != "cuda":
        raise EngineError(f"fp8 needs an NVIDIA GPU; the device is {device}: leave fp8 out")
    if torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device)
        raise EngineError(f"fp8 needs a GPU from Ada (compute capability 8.9) on; {name} is older: leave fp8 out")
    if importlib.util.find_spec("torchao") is None:
        raise EngineError(
            "fp8 needs torchao, which Livebrush does not install: `pip install torchao`, or leave fp8 out"
        )


def quantise(transformer: CausalTransformer) -> None:
    """Turn the linear layers of the blocks to float8: weights by row, activations by row as they come.

    Halves the blocks' weights. Embeddings and the head, which see the widest values, stay. Imports torchao, which is
    no dependency. Never run by us on a GPU.
    """
    quantization = importlib.import_module("torchao.quantization")
    settings = quantization.Float8DynamicActivationFloat8WeightConfig(granularity=quantization.PerRow())
    quantization.quantize_(
        transformer,
        settings,
        filter_fn=lambda module, name: isinstance(module, nn.Linear) and name.startswith("blocks."),
    )


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
    if f"text.{READER_KEYS[0]}" in tensors:
        text |= {f"text.{key}" for key in READER_KEYS}
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
        found = file_record(path).sha256
        if found != sha256:
            raise WeightsError(f"{path} has SHA-256 {found}, {CONFIG_FILE} says {sha256}; restore the file")
        return load_file(path)
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}; restore the model folder") from error
    except SafetensorError as error:
        raise WeightsError(f"{path} is no safetensors file: {error}") from error
