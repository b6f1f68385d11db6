"""Published Wan 2.1 checkpoints and their names: from any of the known layouts to ours, and back.

Four layouts occur: the original names, bare (`blocks.0.self_attn.q.weight`); the same below `generator`,
`generator_ema` or `state_dict` of a pickle and with a `model.` prefix (CausVid, Self-Forcing, StreamDiffusionV2);
with what FSDP or torch.compile put in between (`_fsdp_wrapped_module.`, `_orig_mod.`); and the names of diffusers.
All become original names first, then ours by one table of rules that is read in both directions.

Ours fuse q, k and v (and the prompt's k and v), flatten the patch convolution to a matrix, and turn rotation pairs
from neighbours into halves (engine.wan.rope) by the order of the rows of q, k and their norms.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.api import EngineError
from engine.wan.presets import TransformerConfig
from engine.wan.rope import half_split_order

# Told the share that is done, 0 to 1, and of what.
Progress = Callable[[float, str], None]

Part = Literal["transformer", "vae"]
# Looked for in this order, as the public loaders do.
CONTAINERS = ("generator", "generator_ema", "state_dict")
_INFIXES = ("_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module.")
_PREFIXES = ("module.", "generator.", "model.diffusion_model.", "diffusion_model.", "model.", "vae.", "transformer.")
# A name that every checkpoint of the kind has and no other.
_MARKS: dict[str, tuple[Part, Literal["original", "diffusers"]]] = {
    "text_embedding.0.weight": ("transformer", "original"),
    "condition_embedder.text_embedder.linear_1.weight": ("transformer", "diffusers"),
    "encoder.conv1.weight": ("vae", "original"),
    "encoder.conv_in.weight": ("vae", "diffusers"),
}


class WeightsError(EngineError):
    """A model file or folder that cannot be used; the text names the file and what is wrong with it."""


class FileRecord(BaseModel):
    """What config.json says of a weights file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size_bytes: PositiveInt
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


@dataclass(frozen=True)
class Layout:
    """What a checkpoint holds and how it names it.

    prefix: in front of every name; wrapped: FSDP or torch.compile left their names in between.
    """

    part: Part
    naming: Literal["original", "diffusers"]
    prefix: str = ""
    wrapped: bool = False


@dataclass(frozen=True)
class Source:
    """One original tensor; `order`: its rows in our order, None where they stay."""

    key: str
    shape: tuple[int, ...]
    order: Tensor | None = None


@dataclass(frozen=True)
class Rule:
    """One tensor of ours: its sources, each in our row order, one below the other, in our shape."""

    key: str
    shape: tuple[int, ...]
    sources: tuple[Source, ...]

    def build(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Our tensor from the original ones; a view where nothing moves."""
        parts = [
            tensors[source.key] if source.order is None else tensors[source.key][source.order]
            for source in self.sources
        ]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(self.shape)

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """The original tensors from ours."""
        several = len(self.sources) > 1
        rows = torch.split(tensor, [source.shape[0] for source in self.sources]) if several else (tensor,)
        return {
            source.key: (part if source.order is None else part[source.order.argsort()]).reshape(source.shape)
            for source, part in zip(self.sources, rows, strict=True)
        }


def transformer_rules(config: TransformerConfig) -> tuple[Rule, ...]:
    """How each tensor of `CausalTransformer(config)` comes from original Wan 2.1 names.

    Raises: WeightsError for a configuration with parts that Wan has no names for.
    """
    if config.condition_channels or config.pooled_text or config.refine_channels or config.prediction != "flow":
        raise WeightsError(
            "only plain Wan transformers have original names: set condition_channels 0, pooled_text false, "
            "refine_channels 0 and prediction flow"
        )
    dim, ffn, area = config.dim, config.ffn_dim, config.patch[1] * config.patch[2]
    halves = half_split_order(config.heads, config.head_dim)
    rules = [
        Rule(
            "patch_embed.weight",
            (dim, config.latent_channels * area),
            (Source("patch_embedding.weight", (dim, config.latent_channels, *config.patch)),),
        ),
        _same("patch_embed.bias", "patch_embedding.bias", dim),
        *_linear("text_embed.0", "text_embedding.0", dim, config.text_dim),
        *_linear("text_embed.2", "text_embedding.2", dim, dim),
        *_linear("time_embed.0", "time_embedding.0", dim, config.freq_dim),
        *_linear("time_embed.2", "time_embedding.2", dim, dim),
        *_linear("time_project.1", "time_projection.1", 6 * dim, dim),
        Rule("head_modulation", (2, dim), (Source("head.modulation", (1, 2, dim)),)),
        *_linear("head", "head.head", config.latent_channels * area, dim),
    ]
    for layer in range(config.layers):
        block = f"blocks.{layer}"
        rules += [
            Rule(f"{block}.modulation", (6, dim), (Source(f"{block}.modulation", (1, 6, dim)),)),
            *_fused(f"{block}.self_attn.qkv", (("q", halves), ("k", halves), ("v", None)), dim),
            *_fused(f"{block}.cross_attn.kv", (("k", None), ("v", None)), dim),
            *_linear(f"{block}.cross_attn.q", f"{block}.cross_attn.q", dim, dim),
            *_linear(f"{block}.self_attn.out", f"{block}.self_attn.o", dim, dim),
            *_linear(f"{block}.cross_attn.out", f"{block}.cross_attn.o", dim, dim),
            *_linear(f"{block}.ffn.0", f"{block}.ffn.0", ffn, dim),
            *_linear(f"{block}.ffn.2", f"{block}.ffn.2", dim, ffn),
            _same(f"{block}.cross_norm.weight", f"{block}.norm3.weight", dim),
            _same(f"{block}.cross_norm.bias", f"{block}.norm3.bias", dim),
        ]
        for attention, order in (("self_attn", halves), ("cross_attn", None)):
            for norm in ("norm_q", "norm_k"):
                key = f"{block}.{attention}.{norm}.weight"
                rules.append(Rule(key, (dim,), (Source(key, (dim,), order),)))
    return tuple(rules)


def _same(own: str, original: str, *shape: int) -> Rule:
    return Rule(own, shape, (Source(original, shape),))


def _linear(own: str, original: str, rows: int, columns: int) -> tuple[Rule, Rule]:
    return (
        _same(f"{own}.weight", f"{original}.weight", rows, columns),
        _same(f"{own}.bias", f"{original}.bias", rows),
    )


def _fused(own: str, parts: tuple[tuple[str, Tensor | None], ...], dim: int) -> Iterator[Rule]:
    stem = own.rpartition(".")[0]
    for kind, shape in (("weight", (dim, dim)), ("bias", (dim,))):
        sources = tuple(Source(f"{stem}.{name}.{kind}", shape, order) for name, order in parts)
        yield Rule(f"{own}.{kind}", (len(parts) * dim, *shape[1:]), sources)


def transformer_from_original(tensors: Mapping[str, Tensor], config: TransformerConfig) -> dict[str, Tensor]:
    """Original Wan 2.1 names to the state dict of `CausalTransformer(config)`, dtypes as they are.

    Raises: WeightsError naming every missing, unexpected and misshapen tensor.
    """
    rules = transformer_rules(config)
    check_shapes(
        {source.key: source.shape for rule in rules for source in rule.sources},
        {key: tuple(tensor.shape) for key, tensor in tensors.items()},
        "original Wan transformer",
    )
    return {rule.key: rule.build(tensors) for rule in rules}


def transformer_to_original(tensors: Mapping[str, Tensor], config: TransformerConfig) -> dict[str, Tensor]:
    """The inverse of `transformer_from_original`, as strict."""
    rules = transformer_rules(config)
    check_shapes(
        {rule.key: rule.shape for rule in rules},
        {key: tuple(tensor.shape) for key, tensor in tensors.items()},
        "transformer",
    )
    return {key: tensor for rule in rules for key, tensor in rule.split(tensors[rule.key]).items()}


def silent(share: float, what: str) -> None:
    """A `Progress` that tells nobody."""


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """By key."""
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def check_shapes(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Refuse a checkpoint that differs from what is expected.

    Raises: WeightsError naming every missing, unexpected and misshapen tensor.
    """
    faults = [f"missing {key}" for key in sorted(expected.keys() - found.keys())]
    faults += [f"unexpected {key}" for key in sorted(found.keys() - expected.keys())]
    faults += [
        f"{key} is {found[key]}, must be {shape}"
        for key, shape in expected.items()
        if key in found and found[key] != shape
    ]
    if faults:
        raise WeightsError(f"{what} does not fit its configuration: {'; '.join(faults)}")


def detect_layout(keys: Iterable[str]) -> Layout:
    """What the names of a checkpoint tell of it.

    Raises: WeightsError naming some of the keys, if it is neither a Wan transformer nor a Wan VAE.
    """
    names = list(keys)
    renamed, prefix, wrapped = _bare(names)
    bare = set(renamed)
    for mark, (part, naming) in _MARKS.items():
        if mark in bare:
            return Layout(part, naming, prefix, wrapped)
    raise WeightsError(
        f"{len(names)} tensors of unknown layout, such as {', '.join(sorted(names)[:4]) or 'none'}: neither a Wan 2.1 "
        "transformer nor its VAE, in original or diffusers names"
    )


def _bare(names: list[str]) -> tuple[list[str], str, bool]:
    """Names without infixes and common prefixes, what was in front, and whether there were infixes."""
    bare = list(names)
    for infix in _INFIXES:
        bare = [name.replace(infix, "") for name in bare]
    wrapped = bare != names
    prefix = ""
    while found := next((p for p in _PREFIXES if bare and all(name.startswith(p) for name in bare)), ""):
        prefix += found
        bare = [name.removeprefix(found) for name in bare]
    return bare, prefix, wrapped


def unwrap(nested: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The tensors of a checkpoint, which may lie below `generator`, `generator_ema` or `state_dict`.

    Raises: WeightsError for entries that are no tensors, by name.
    """
    for container in CONTAINERS:
        if isinstance(inner := nested.get(container), Mapping):
            return unwrap(inner)
    strangers = [key for key, value in nested.items() if not isinstance(value, Tensor)]
    if strangers:
        raise WeightsError(
            f"entries that are no tensors: {', '.join(map(str, strangers[:8]))}; expected tensors, or one of "
            f"{', '.join(CONTAINERS)} with tensors below it"
        )
    return nested


def original_from_any(nested: Mapping[str, Any]) -> tuple[Layout, dict[str, Tensor]]:
    """What a checkpoint of any known layout holds, under original Wan names; the tensors are not copied.

    Raises: WeightsError for an unknown layout, for entries that are no tensors, and for two names that become one.
    """
    tensors = unwrap(nested)
    layout = detect_layout(tensors)
    names = list(tensors)
    bare = _bare(names)[0]
    if layout.naming == "diffusers":
        rename = transformer_name_from_diffusers if layout.part == "transformer" else _vae_renamer(bare)
        bare = [rename(name) for name in bare]
    out: dict[str, Tensor] = {}
    for name, original in zip(names, bare, strict=True):
        if original in out:
            raise WeightsError(f"{name} and another tensor are both {original}; keep one of them")
        out[original] = tensors[name]
    return layout, out


# Diffusers' word and the original's.
_TRANSFORMER_WORDS = (
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("proj_out", "head.head"),
    ("attn1", "self_attn"),
    ("attn2", "cross_attn"),
    ("to_out.0", "o"),
    ("to_q", "q"),
    ("to_k", "k"),
    ("to_v", "v"),
    ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"),
    ("norm2", "norm3"),
    ("scale_shift_table", "modulation"),
)


def transformer_name_from_diffusers(name: str) -> str:
    """The original name of a tensor of diffusers' WanTransformer3DModel; an unknown name stays."""
    if name == "scale_shift_table":
        return "head.modulation"
    return _reworded(name, _TRANSFORMER_WORDS)


def transformer_name_to_diffusers(name: str) -> str:
    """The inverse of `transformer_name_from_diffusers`."""
    if name == "head.modulation":
        return "scale_shift_table"
    return _reworded(name, [(original, diffusers) for diffusers, original in _TRANSFORMER_WORDS])


def _reworded(name: str, words: Iterable[tuple[str, str]]) -> str:
    """Replace each word where it stands between dots."""
    for old, new in words:
        name = re.sub(rf"(?<![^.]){re.escape(old)}(?![^.])", new, name)
    return name


_RESIDUAL = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}
_VAE_ENDS = {
    "quant_conv": "conv1",
    "post_quant_conv": "conv2",
    "encoder.conv_in": "encoder.conv1",
    "decoder.conv_in": "decoder.conv1",
    "encoder.norm_out": "encoder.head.0",
    "decoder.norm_out": "decoder.head.0",
    "encoder.conv_out": "encoder.head.2",
    "decoder.conv_out": "decoder.head.2",
}


def _vae_renamer(names: list[str]) -> Callable[[str], str]:
    """Diffusers counts residual blocks per level, the original through: how many there are, the names tell."""
    found = [int(match[1]) for name in names if (match := re.match(r"decoder\.up_blocks\.0\.resnets\.(\d+)\.", name))]
    return partial(vae_name_from_diffusers, blocks_per_level=max(found, default=2) + 1)


def vae_name_from_diffusers(name: str, *, blocks_per_level: int = 3) -> str:
    """The original name of a tensor of diffusers' AutoencoderKLWan; an unknown name stays.

    Args:
        blocks_per_level: residual blocks of one level of the decoder, its up-sampler not counted.
    """
    stem, _, kind = name.rpartition(".")
    if stem in _VAE_ENDS:
        return f"{_VAE_ENDS[stem]}.{kind}"
    if match := re.fullmatch(r"(\w+)\.mid_block\.resnets\.(\d+)\.(\w+)", stem):
        return f"{match[1]}.middle.{2 * int(match[2])}.{_RESIDUAL.get(match[3], match[3])}.{kind}"
    if match := re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(\w+)", stem):
        return f"{match[1]}.middle.1.{match[2]}.{kind}"
    if match := re.fullmatch(r"encoder\.down_blocks\.(\d+)\.(.+)", stem):
        return f"encoder.downsamples.{match[1]}.{_inner(match[2])}.{kind}"
    if match := re.fullmatch(r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.(.+)", stem):
        place = int(match[3]) if match[2] == "resnets" else blocks_per_level
        return f"decoder.upsamples.{int(match[1]) * (blocks_per_level + 1) + place}.{_inner(match[4])}.{kind}"
    return name


def _inner(name: str) -> str:
    return "shortcut" if name == "conv_shortcut" else _RESIDUAL.get(name, name)


class LazyTensors(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read when asked for."""

    def __init__(self, path: Path) -> None:
        """Open the file. Raises: WeightsError, naming it."""
        try:
            self.path = path
            self._file = cast("Any", safe_open(path, framework="pt"))
            self._names: tuple[str, ...] = tuple(self._file.keys())
        except OSError as error:
            raise WeightsError(f"cannot read {path}: {error.strerror or error}") from error
        except SafetensorError as error:
            raise WeightsError(f"{path} is no safetensors file: {error}") from error

    def __getitem__(self, key: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(key)
        return tensor

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor, without reading any."""
        return {key: tuple(self._file.get_slice(key).get_shape()) for key in self._names}

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint file, memory-mapped where its format allows: safetensors, or a pickle by the safe loader alone.

    Raises: WeightsError, naming the file: missing, damaged, or a pickle that asks for more than tensors.
    """
    if path.suffix == ".safetensors":
        lazy = LazyTensors(path)
        return {key: lazy[key] for key in lazy}
    try:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            # The format of before torch 1.6 cannot be mapped.
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} is refused by the safe loader: {str(error).splitlines()[0]} Livebrush never runs code from a "
            "checkpoint; get one that holds tensors only, best as safetensors"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise WeightsError(f"{path} is damaged or no PyTorch file: {error}; download it again") from error
    if not isinstance(loaded, Mapping):
        raise WeightsError(f"{path} holds a {type(loaded).__name__}, must be a mapping of names to tensors")
    return dict(loaded)


_DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write_tensors(
    path: Path,
    specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensor_of: Callable[[str], Tensor],
    progress: Callable[[int], None] | None = None,
) -> FileRecord:
    """Write a safetensors file tensor by tensor, so that what is written need never be in memory as a whole.

    The library's own writer wants all tensors at once: 28 GB for the 14B transformer.

    Args:
        specs: dtype and shape of each tensor, in the order they are written.
        tensor_of: gives a tensor by name; it is cast to its dtype.
        progress: told the bytes written, after each tensor.

    Raises: OSError; ValueError for a tensor of another shape.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, (dtype, shape) in specs.items():
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[key] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    # The data starts at a multiple of 8 bytes.
    encoded += b" " * (-len(encoded) % 8)
    digest, written = hashlib.sha256(), 0
    with path.open("wb") as file:
        for part in (len(encoded).to_bytes(8, "little"), encoded):
            file.write(part)
            digest.update(part)
        for key, (dtype, shape) in specs.items():
            tensor = tensor_of(key)
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{key} is {tuple(tensor.shape)}, must be {shape}")
            content = tensor.detach().to("cpu", dtype).contiguous().view(-1).view(torch.uint8).numpy().data
            file.write(content)
            digest.update(content)
            written += len(content)
            if progress is not None:
                progress(written)
    return FileRecord(size_bytes=path.stat().st_size, sha256=digest.hexdigest())


def file_record(path: Path) -> FileRecord:
    """Size and hash of a file, read through. Raises: OSError."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(size_bytes=path.stat().st_size, sha256=digest)
