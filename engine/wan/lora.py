"""Low-rank adaptations (LoRA) of a Wan transformer, merged into its weights as these are loaded.

A merged adaptation costs nothing per frame. What files of this kind look like:

* by name: original Wan (`diffusion_model.blocks.0.self_attn.q`), diffusers (`transformer.blocks.0.attn1.to_q`), or
  either with its dots turned to underscores (`lora_unet_blocks_0_self_attn_q`, kohya);
* by part: `lora_A`, `lora_B` (peft) or `lora_down`, `lora_up`, with a scalar `alpha` or without; whole differences
  `diff` (of a weight) and `diff_b` (of a bias) occur beside them.

The change of an original weight is scale * alpha / rank * up @ down, alpha being the rank where it is not given.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from engine.config import LoraFile
from engine.wan.checkpoints import LazyTensors, Rule, WeightsError, transformer_name_from_diffusers, transformer_rules
from engine.wan.presets import TransformerConfig

_PARTS = re.compile(
    r"\.(?:(?P<down>lora_A|lora_down|lora\.down)|(?P<up>lora_B|lora_up|lora\.up))(?:\.default)?\.weight$"
    r"|\.(?P<alpha>alpha)$|\.(?P<diff>diff)$|\.(?P<diff_b>diff_b)$"
)
_PREFIX = re.compile(r"^(?:base_model\.model\.|model\.|diffusion_model\.|transformer\.|lora_unet_|lora_transformer_)+")


@dataclass
class _Change:
    """What one file says of one module."""

    parts: dict[str, Tensor] = field(default_factory=dict)

    def weight(self, shape: tuple[int, ...], scale: float) -> Tensor | None:
        """The change of the weight in float32, None if there is none."""
        if "diff" in self.parts:
            return self.parts["diff"].float() * scale
        if "up" not in self.parts:
            return None
        up, down = self.parts["up"].float().flatten(1), self.parts["down"].float().flatten(1)
        rank = len(down)
        alpha = float(self.parts["alpha"]) if "alpha" in self.parts else rank
        return (up @ down).view(shape) * (scale * alpha / rank)

    def faults(self, name: str, shape: tuple[int, ...]) -> list[str]:
        """What does not fit a module with a weight of this shape."""
        parts = self.parts
        rows, columns = shape[0], torch.Size(shape[1:]).numel()
        if ("up" in parts) != ("down" in parts):
            return [f"{name} has only its {'up' if 'up' in parts else 'down'} half"]
        if "up" in parts:
            up, down = (tuple(parts[key].flatten(1).shape) for key in ("up", "down"))
            if up[0] != rows or down[1] != columns or up[1] != down[0]:
                return [f"{name} has factors {up} and {down}, must be ({rows}, rank) and (rank, {columns})"]
        elif not parts.keys() & {"diff", "diff_b"}:
            return [f"{name} has no factors"]
        wanted = {"diff": shape, "diff_b": (rows,)}
        return [
            f"{name}.{key} is {tuple(parts[key].shape)}, must be {wanted[key]}"
            for key in wanted
            if key in parts and tuple(parts[key].shape) != wanted[key]
        ]


class LoraDeltas:
    """The changes of several files, ready to be added to a transformer's own (fused, reordered) tensors."""

    def __init__(self, config: TransformerConfig, changes: Sequence[tuple[float, Mapping[str, _Change]]]) -> None:
        self._changes = changes
        self._rules = {rule.key: rule for rule in transformer_rules(config)} if changes else {}

    def apply(self, key: str, tensor: Tensor) -> Tensor:
        """A tensor of ours with its changes added in float32, in its dtype and on its device; as it is without any.

        Args:
            key: name in `CausalTransformer`.
        """
        rule = self._rules.get(key)
        if rule is None:
            return tensor
        merged: Tensor | None = None
        for scale, changes in self._changes:
            for rows, change in _changed_rows(rule, scale, changes):
                if merged is None:
                    merged = tensor.to(torch.float32, copy=True)
                merged[rows] += change.to(merged.device).view_as(merged[rows])
        return tensor if merged is None else merged.to(tensor.dtype)


def _changed_rows(rule: Rule, scale: float, changes: Mapping[str, _Change]) -> list[tuple[slice, Tensor]]:
    """Rows of a rule's own tensor and what is added to them, in our order."""
    found = []
    end = 0
    for source in rule.sources:
        start, end = end, end + source.shape[0]
        module, _, kind = source.key.rpartition(".")
        change = changes.get(module)
        if change is None:
            continue
        delta = None
        if kind == "weight":
            delta = change.weight(source.shape, scale)
        elif kind == "bias" and "diff_b" in change.parts:
            delta = change.parts["diff_b"].float() * scale
        if delta is not None:
            found.append((slice(start, end), delta if source.order is None else delta[source.order]))
    return found


def read_loras(files: Sequence[LoraFile], config: TransformerConfig) -> LoraDeltas:
    """Read LoRA files for a transformer; only their factors are kept in memory.

    Raises: WeightsError naming the file and every tensor of it that is unknown, incomplete or misshapen.
    """
    if not files:
        return LoraDeltas(config, ())
    shapes = {
        source.key.removesuffix(".weight"): source.shape
        for rule in transformer_rules(config)
        for source in rule.sources
        if source.key.endswith(".weight")
    }
    return LoraDeltas(config, [(file.scale, _read(file.path, shapes)) for file in files])


def _read(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, _Change]:
    if path.suffix != ".safetensors":
        raise WeightsError(f"{path} must be a safetensors file")
    tensors = LazyTensors(path)
    flat = {name.replace(".", "_"): name for name in shapes}
    changes: dict[str, _Change] = {}
    unknown = []
    for key in tensors:
        match = _PARTS.search(key)
        name = _module_name(key[: match.start()], shapes, flat) if match else None
        if match is None or name is None:
            unknown.append(key)
            continue
        part = str(match.lastgroup)
        changes.setdefault(name, _Change()).parts[part] = tensors[key]
    faults = [f"unknown {key}" for key in sorted(unknown)]
    for name, change in changes.items():
        faults += change.faults(name, shapes[name])
    if faults or not changes:
        raise WeightsError(
            f"{path} does not fit this transformer: {'; '.join(faults) or 'it is empty'}; use a LoRA made for this "
            "model"
        )
    return changes


def _module_name(name: str, shapes: Mapping[str, tuple[int, ...]], flat: Mapping[str, str]) -> str | None:
    """The original name of the module meant, None if there is none such."""
    name = _PREFIX.sub("", name)
    if name in shapes:
        return name
    renamed = transformer_name_from_diffusers(name)
    if renamed in shapes:
        return renamed
    return flat.get(name) or flat.get(_flat_from_diffusers(name))


def _flat_from_diffusers(name: str) -> str:
    """`blocks_0_attn1_to_q` to `blocks_0_self_attn_q`."""
    for old, new in (
        ("attn1_to_", "self_attn_"),
        ("attn2_to_", "cross_attn_"),
        ("_attn_out_0", "_attn_o"),
        ("ffn_net_0_proj", "ffn_0"),
        ("ffn_net_2", "ffn_2"),
    ):
        name = name.replace(old, new)
    return name
