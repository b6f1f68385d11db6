"""Devices and models for `engine.simulator`: data-sheet figures, constants fitted to the paper, costs of a chunk.

No GPU was ever used for this: the one source of measured times is the tables of StreamDiffusionV2 (arXiv 2511.07399,
`engine.published`), fitted by `engine.published.fit`. A device that is not in them is scaled from one that is.

Cost of one pass of R rows through one transformer block of width C and feed-forward width F, with L tokens a latent
frame and W latent frames of window:

    t = launch + R (flops / peak + traffic L C),   flops = L (2 (6 C² + 2 C F) + 4 C W L + 4 C 512)

and of the VAE: flops of a chunk over a rate. launch, traffic, rate and the hop between ranks are the fitted ones; peak
is the data sheet's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import exp, log
from typing import Any, Literal

from engine.cost_model import CostModel, Work
from engine.wan.presets import PRESETS, TransformerConfig

# Floating point operations of one chunk of four frames, for each pixel of a frame: counted on the repository's own
# modules at 832x480 and 512x512 (8.05 and 13.55, 5.27 and 8.88 TFLOP; TAEHV 0.24 and 0.54, 0.16 and 0.36).
VAE_FLOPS_A_PIXEL = {"full": (20.15e6, 33.9e6), "light": (0.61e6, 1.36e6)}
PIXELS_PER_TOKEN = 256
# Launches that are left when a pass is captured as a graph: an assumption, no measurement. Others report whole passes
# 1.4 to 3.1 times as fast.
GRAPH_SHARE = 0.1
MAX_DEVICES = 64
CPU_MODEL = "livebrush-tiny"
CPU_PIXELS = 256 * 256
Z95 = 1.645
# Of encode and decode together, where only their sum was measured.
ENCODE_SHARE = 0.4

Vae = Literal["full", "light"]
# Of encode and decode the parts that can lie on any rank (`engine.chain`), as shares: counted likewise, at 832x480; at
# other sizes the two attentions alone differ.
VAE_PARTS: dict[Vae, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "full": (
        (0.0031, 0.1975, 0.2057, 0.1499, 0.1975, 0.0096, 0.075, 0.0987, 0.0048, 0.0123, 0.0123, 0.0207, 0.0123,
         0.0005),
        (0.0002, 0.0123, 0.0073, 0.0073, 0.0073, 0.0073, 0.0057, 0.0445, 0.0587, 0.0587, 0.0456, 0.1173, 0.1173,
         0.1565, 0.1173, 0.1173, 0.1173, 0.0018),
    ),
    "light": (
        (1.0,),
        (0.0567, 0.0559, 0.0854, 0.0559, 0.0559, 0.1149, 0.1117, 0.1117, 0.3519),
    ),
}  # fmt: skip
# Whether at the smaller size, and whether by the light VAE: what the ladder changes of a pass beside its steps.
Setting = tuple[bool, bool]
AS_WISHED: Setting = (False, False)


@dataclass(frozen=True)
class Device:
    """One kind of device.

    peak_flops: dense bfloat16 with float32 sums, a second. bandwidth: bytes a second. launch_s: of one block's
    operations, eager. traffic_s: of one element of a block's activations. vae_flops: what the VAE reaches, a second.
    hop_s: what a rank loses on a message to the next. basis: where the last four come from.
    """

    name: str
    title: str
    peak_flops: float
    bandwidth: float
    memory_bytes: int
    link: str
    launch_s: float
    traffic_s: float
    vae_flops: float
    hop_s: float
    basis: str


@dataclass(frozen=True)
class ChunkCosts:
    """What one device takes for a pass, part by part, in seconds. Stands in for `engine.cost_model.Costs`.

    encode_s, decode_s: of one latent frame. blocks: of the transformer. pass_s, row_s: of one block, for a forward and
    for each row in it, with a full window. fixed_s: once a pass. hop_s: between ranks. noise: spread of the times, the
    standard deviation of their logarithm; 0.03 is an assumption. others: the same device's at other settings, where it
    can change to them while it serves. encode_parts, decode_parts: shares of what can lie on any rank; whole where
    nothing is known of them.
    """

    encode_s: float
    decode_s: float
    blocks: int
    pass_s: float
    row_s: float
    fixed_s: float = 0.0
    hop_s: float = 0.0
    noise: float = 0.03
    others: Mapping[Setting, ChunkCosts] = field(default_factory=dict)
    encode_parts: tuple[float, ...] = (1.0,)
    decode_parts: tuple[float, ...] = (1.0,)

    def at(self, *, small: bool, light: bool) -> ChunkCosts:
        """At a smaller size or by a light VAE; as they are where there is none."""
        return self.others.get((small, light), self)

    def mean_s(self, work: Work) -> float:
        """See `engine.cost_model.Costs`."""
        costs = self.at(small=work.small, light=work.light)
        coded = costs.fixed_s + work.latents * (costs.encode_s + costs.decode_s)
        return coded + costs.blocks * (work.forwards * costs.pass_s + work.rows * costs.row_s)

    def upper_s(self, work: Work) -> float:
        """See `engine.cost_model.Costs`: the 95 % point."""
        return self.mean_s(work) * exp(Z95 * self.noise - self.noise**2 / 2)

    def with_graphs(self) -> ChunkCosts:
        """The same with passes captured as graphs."""
        return self._changed(lambda costs: replace(costs, pass_s=costs.pass_s * GRAPH_SHARE))

    def times(self, factor: float) -> ChunkCosts:
        """Of a device that takes so many times as long for all but hops."""
        return self._changed(
            lambda costs: replace(
                costs,
                encode_s=costs.encode_s * factor,
                decode_s=costs.decode_s * factor,
                pass_s=costs.pass_s * factor,
                row_s=costs.row_s * factor,
                fixed_s=costs.fixed_s * factor,
            )
        )

    def _changed(self, change: Callable[[ChunkCosts], ChunkCosts]) -> ChunkCosts:
        others = {setting: change(costs) for setting, costs in self.others.items()}
        return replace(change(self), others=others)


def with_settings(cost_at: Callable[[Setting], ChunkCosts], *, has_small: bool, has_light: bool) -> ChunkCosts:
    """Costs as wished, with those of the other settings that there are."""
    settings = [(small, light) for small in (False, True)[: 1 + has_small] for light in (False, True)[: 1 + has_light]]
    others = {setting: cost_at(setting) for setting in settings if setting != AS_WISHED}
    return replace(cost_at(AS_WISHED), others=others)


def _gpu(name: str, title: str, tflops: float, tbytes: float, gigabytes: int, link: str, base: Device) -> Device:
    """A device scaled from a fitted one: what is bound by memory goes with its bandwidth, launches stay."""
    faster = tbytes * 1e12 / base.bandwidth
    return Device(
        name,
        title,
        tflops * 1e12,
        tbytes * 1e12,
        gigabytes * 10**9,
        link,
        base.launch_s,
        base.traffic_s / faster,
        base.vae_flops * faster,
        base.hop_s,
        f"scaled by memory bandwidth from {base.name}",
    )


_PAPER = "fitted to the paper's table"
# The constants that `engine.published.fit` finds, rounded; tests/engine/test_simulator.py holds them to it.
H100 = Device(
    "h100",
    "NVIDIA H100 SXM 80 GB",
    989e12,
    3.35e12,
    80 * 10**9,
    "NVLink",
    launch_s=1.14e-3,
    traffic_s=2.66e-10,
    vae_flops=149.9e12,
    hop_s=2.4e-3,
    basis=_PAPER,
)
RTX4090 = Device(
    "rtx4090",
    "NVIDIA GeForce RTX 4090 24 GB",
    165.2e12,
    1.008e12,
    24 * 10**9,
    "PCIe 4.0",
    launch_s=0.25e-3,
    traffic_s=4.57e-10,
    vae_flops=56.3e12,
    hop_s=0.0,
    basis=_PAPER,
)
# Figures of NVIDIA's data sheets and, for the GeForce cards, of its architecture white papers (Ampere GA102, Ada,
# Blackwell): dense bfloat16 TFLOP/s, TB/s, GB.
DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        H100,
        _gpu("h100-pcie", "NVIDIA H100 PCIe 80 GB", 756, 2.0, 80, "PCIe 5.0", H100),
        _gpu("h200", "NVIDIA H200 SXM 141 GB", 989, 4.8, 141, "NVLink", H100),
        _gpu("b200", "NVIDIA B200 180 GB", 2250, 7.7, 180, "NVLink", H100),
        _gpu("a100", "NVIDIA A100 SXM 80 GB", 312, 2.039, 80, "NVLink", H100),
        _gpu("l40s", "NVIDIA L40S 48 GB", 362, 0.864, 48, "PCIe 4.0", RTX4090),
        _gpu("l4", "NVIDIA L4 24 GB", 121, 0.3, 24, "PCIe 4.0", RTX4090),
        RTX4090,
        _gpu("rtx5090", "NVIDIA GeForce RTX 5090 32 GB", 209.5, 1.792, 32, "PCIe 5.0", RTX4090),
        _gpu("rtx3090", "NVIDIA GeForce RTX 3090 24 GB", 71, 0.936, 24, "PCIe 4.0", RTX4090),
    )
}
# livebrush-tiny at 256x256 on one core of the machine it was developed on: 85 ms a chunk alone, of which encode and
# decode 20; a common pass of four chunks is 1.1 times as fast as four passes (docs/engine.md, bench_engine.py).
# Its decoder falls into three parts: 6.4, 4.1 and 12.3 ms of CPU, medians of 40 chunks.
CPU_COSTS = ChunkCosts(
    encode_s=0.008,
    decode_s=0.012,
    blocks=1,
    pass_s=0.0103,
    row_s=0.0547,
    noise=0.08,
    decode_parts=(0.281, 0.179, 0.54),
)


def parse_devices(text: str) -> tuple[str, ...]:
    """`h100:4`, `cpu`, `h100:2,a100:2` as one name for each device, in that order.

    Raises: ValueError naming the part, what is known and how many are allowed.
    """
    names: list[str] = []
    for part in text.split(","):
        name, _, count = part.strip().lower().partition(":")
        if name != "cpu" and name not in DEVICES:
            raise ValueError(f"device {name!r} is not known; known are cpu, {', '.join(DEVICES)}")
        if count and not (count.isascii() and count.isdigit() and 1 <= int(count) <= MAX_DEVICES):
            raise ValueError(f"{part.strip()!r}: the number of devices must be a whole number from 1 to {MAX_DEVICES}")
        names += [name] * int(count or 1)
    if len(names) > MAX_DEVICES:
        raise ValueError(f"{len(names)} devices are more than {MAX_DEVICES}; plan for fewer and multiply")
    if "cpu" in names and set(names) != {"cpu"}:
        raise ValueError("cpu runs another model than the GPUs do: plan for the one or for the others")
    return tuple(names)


def transformer_flops(config: TransformerConfig, tokens: int) -> float:
    """Floating point operations of one block for one row: one latent frame of `tokens` against a full window."""
    dim, window = config.dim, config.window_frames * tokens
    weights = 2 * (6 * dim * dim + 2 * dim * config.ffn_dim)
    return float(tokens * (weights + 4 * dim * window + 4 * dim * config.text_len))


def wan_costs(device: Device, model: str, width: int, height: int, *, vae: Vae = "full") -> ChunkCosts:
    """Costs of a Wan model as the public code runs it: eager, in bfloat16.

    Args:
        width, height: in pixels, multiples of 16.
        vae: the model's own, or the light one in both directions.
    Raises: KeyError for a model without preset.
    """
    config = PRESETS[model]
    pixels = width * height
    tokens = pixels // PIXELS_PER_TOKEN
    encode, decode = VAE_FLOPS_A_PIXEL[vae]
    row_s = transformer_flops(config, tokens) / device.peak_flops + device.traffic_s * tokens * config.dim
    return ChunkCosts(
        encode * pixels / device.vae_flops,
        decode * pixels / device.vae_flops,
        config.layers,
        device.launch_s,
        row_s,
        hop_s=device.hop_s,
        encode_parts=_whole(VAE_PARTS[vae][0]),
        decode_parts=_whole(VAE_PARTS[vae][1]),
    )


def _whole(shares: Sequence[float]) -> tuple[float, ...]:
    """Rounded shares, so that they add up."""
    return tuple(share / sum(shares) for share in shares)


def cpu_costs(width: int, height: int) -> ChunkCosts:
    """Costs of livebrush-tiny on one core of the measured machine; other sizes in proportion to their pixels."""
    share = width * height / CPU_PIXELS
    costs = CPU_COSTS
    return replace(costs, encode_s=costs.encode_s * share, decode_s=costs.decode_s * share, row_s=costs.row_s * share)


def measured_costs(
    profile: Mapping[str, Any], *, window: int, has_small: bool = False, has_light: bool = False
) -> ChunkCosts:
    """Costs from a measured profile: a `CostModel.snapshot()`, or an object with `costs` as in `Capacity.costs` or
    in doctor's figures.

    Costs by steps alone do not tell what a common pass of several chunks would save: none is assumed then.

    Args:
        window: latent frames in the model's cache.
        has_small, has_light: whether there are a smaller size and a light VAE to change to. A snapshot does not tell;
            of a list those are taken that are in it, too.
    Raises: ValueError naming what is missing.
    """
    if "coefficients_s" in profile:
        model = CostModel.from_snapshot(profile)
        return with_settings(partial(_learned, model, window), has_small=has_small, has_light=has_light)
    known: dict[Setting, list[tuple[int, float, float]]] = {AS_WISHED: []}
    try:
        for cost in profile["costs"]:
            setting = bool(cost.get("small", False)), bool(cost.get("light", False))
            entry = int(cost["steps"]), _seconds(cost, "mean"), _seconds(cost, "upper")
            known.setdefault(setting, []).append(entry)
        entries = [entry for listed in known.values() for entry in listed]
        if not known[AS_WISHED] or not all(steps >= 1 and 0 < mean_s <= upper_s for steps, mean_s, upper_s in entries):
            raise ValueError("steps must be 1 or more, and 0 < mean_s <= upper_s")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"no profile: expected a cost model's snapshot, or costs of steps in mean_s or mean_ms, upper ({error!r})"
        ) from error
    each = {setting: _listed(sorted(listed)) for setting, listed in known.items()}
    return replace(each.pop(AS_WISHED), others=each)


def _learned(model: CostModel, window: int, setting: Setting) -> ChunkCosts:
    """What a cost model says of chunks at a setting."""

    def cost_s(latents: int, forwards: int, rows: int, context: int) -> float:
        return model.mean_s(Work(latents, forwards, rows, context, *setting))

    fixed_s = cost_s(0, 0, 0, 0)
    latent_s, forward_s = cost_s(1, 0, 0, 0) - fixed_s, cost_s(0, 1, 0, 0) - fixed_s
    row_s, noise = cost_s(0, 0, 1, window) - fixed_s, log(model.factor) / Z95
    return ChunkCosts(ENCODE_SHARE * latent_s, (1 - ENCODE_SHARE) * latent_s, 1, forward_s, row_s, fixed_s, noise=noise)


def _listed(known: Sequence[tuple[int, float, float]]) -> ChunkCosts:
    """Of a list of (steps, mean, upper), the fewest first."""
    (few, few_s, upper_s), (many, many_s, _) = known[0], known[-1]
    step_s = (many_s - few_s) / (many - few) if many > few else few_s / few
    step_s = min(max(step_s, 0.0), few_s / few)
    coded_s = few_s - few * step_s
    return ChunkCosts(
        ENCODE_SHARE * coded_s, (1 - ENCODE_SHARE) * coded_s, 1, 0.0, step_s, noise=log(upper_s / few_s) / Z95
    )


def _seconds(cost: Mapping[str, Any], name: str) -> float:
    return float(cost[f"{name}_s"]) if f"{name}_s" in cost else float(cost[f"{name}_ms"]) / 1e3
