"""What `livebrush plan` is asked about: devices, a model on them and its costs, from the command's options."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from engine.devices import ChunkCosts, Setting
    from engine.simulator_load import Workload
    from engine.simulator_outcome import Outcome
    from engine.simulator_ranks import RankShare
    from server.plan_server import PlannedServer

SIZE_STEP, MIN_SIDE, MAX_SIDE = 16, 64, 2048
FITTED_SIZES = ((832, 480), (512, 512))
# Of a device's memory, what is left to the driver and to fragments.
MEMORY_SPARED = 0.1
MIN_SLOWER, MAX_SLOWER = 0.1, 100.0
MAX_MICRO_BATCH = 16

Vae = Literal["auto", "full", "light"]


@dataclass(frozen=True)
class Form:
    """A model as it is to be run. smaller: the size below, where there is one. vae: auto is both, the light one for
    when the other is too slow."""

    model: str
    size: tuple[int, int]
    smaller: tuple[int, int] | None
    vae: Vae

    @property
    def has_small(self) -> bool:
        """Whether there is a smaller size to change to."""
        return self.smaller is not None

    @property
    def has_light(self) -> bool:
        """Whether there is a light VAE to change to."""
        return self.vae == "auto"


@dataclass(frozen=True)
class Setup:
    """What is asked about. costs: of each device, as the chosen system runs the model. fits: `arrange`'s. has_ladder:
    whether a server stands around the engine."""

    devices: tuple[str, ...]
    form: Form
    steps: int
    as_published: bool
    has_ladder: bool
    micro_batch: int
    costs: tuple[ChunkCosts, ...]
    fits: Callable[[int], int] | None
    basis: str

    def run(self, workload: Workload, server: PlannedServer | None = None) -> Outcome:
        """Simulate. Raises ValueError, if the model does not fit into memory."""
        from engine.simulator import simulate
        from engine.simulator_published import simulate_published

        if self.as_published:
            return simulate_published(self.costs, self.steps, workload)
        return simulate(self._arranged(workload), self.steps, workload, micro_batch=self.micro_batch, server=server)

    def server(self, workload: Workload) -> PlannedServer:
        """What stands around the engine in one run."""
        from server.plan_server import PlannedServer

        return PlannedServer(self._arranged(workload), self.steps, workload, most=self.most_sessions(workload))

    def groups(self, workload: Workload) -> list[int]:
        """Devices of each copy of the model."""
        return [len(self.costs)] if self.as_published else [len(group) for group in self._arranged(workload)]

    def _arranged(self, workload: Workload) -> tuple[tuple[RankShare, ...], ...]:
        from engine.simulator_ranks import arrange

        return arrange(self.costs, self.steps, workload, self.fits)

    def most_sessions(self, workload: Workload) -> int:
        """That fit into memory."""
        from engine.simulator_load import MAX_SESSIONS

        if self.fits is None or self.as_published:
            return MAX_SESSIONS
        return min(MAX_SESSIONS, sum(self.fits(count) for count in self.groups(workload)))


def model_of(options: argparse.Namespace) -> str:
    """The one asked for, or the usual one of such devices. Raises ValueError."""
    from engine.devices import CPU_MODEL, parse_devices
    from engine.wan.presets import PRESETS

    cpu = "cpu" in parse_devices(options.devices)
    model = options.model or (CPU_MODEL if cpu else "wan2.1-1.3b")
    if model not in PRESETS:
        raise ValueError(f"model {model!r} is not known; known are {', '.join(PRESETS)}")
    if options.profile is None and cpu != (model == CPU_MODEL):
        raise ValueError(
            f"no times of {model} on {options.devices} are known: plan {CPU_MODEL} on cpu, a Wan model on GPUs, or "
            "give measured costs by --profile"
        )
    return str(model)


def setup_of(options: argparse.Namespace) -> Setup:
    """Raises ValueError or OSError, in words."""
    from engine.config import MAX_STEPS, WAN_SERVING, EngineSettings, serving_profile
    from engine.devices import CPU_MODEL, parse_devices

    devices, model = parse_devices(options.devices), model_of(options)
    serving = serving_profile(EngineSettings().model_dir) if model == CPU_MODEL else WAN_SERVING
    size = _size(options.size) if options.size else serving.sizes[0]
    steps = serving.steps if options.steps is None else options.steps
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps must be 1 to {MAX_STEPS}, not {steps}")
    if not 1 <= options.micro_batch <= MAX_MICRO_BATCH:
        raise ValueError(f"micro-batch must be 1 to {MAX_MICRO_BATCH}, not {options.micro_batch}")
    if not MIN_SLOWER <= options.slower <= MAX_SLOWER:
        raise ValueError(f"slower must be {MIN_SLOWER} to {MAX_SLOWER:g}, not {options.slower}")
    if options.as_published and (options.profile is not None or model == CPU_MODEL or options.vae == "light"):
        raise ValueError("--as-published is known for Wan models with their own VAE on GPUs, and without --profile")
    form = Form(model, size, serving.smaller(*size), _vae(options, model))
    fits = None
    if options.profile is None and model != CPU_MODEL:
        form, fits = _fitting(form, devices)
        if options.as_published and fits(1) < 1:
            width, height = size
            raise ValueError(
                f"{model} at {width}x{height} does not fit into one of these devices, as each must hold it"
            )
    costs, basis = _costs(options, form, devices)
    if options.slower != 1:
        costs, basis = [each.times(options.slower) for each in costs], f"{options.slower:g} times: {basis}"
    return Setup(
        devices,
        form,
        steps,
        options.as_published,
        not (options.as_published or options.no_ladder),
        options.micro_batch,
        tuple(costs),
        fits,
        basis,
    )


def _vae(options: argparse.Namespace, model: str) -> Vae:
    """The embedded model has one VAE, and the public code uses one."""
    from engine.devices import CPU_MODEL

    return "full" if options.as_published or model == CPU_MODEL else options.vae


def _fitting(form: Form, devices: Sequence[str]) -> tuple[Form, Callable[[int], int]]:
    """The form, with one VAE where a device has no room for both, and the sessions that fit into so many devices."""
    from engine.devices import DEVICES

    memory_bytes = min(DEVICES[name].memory_bytes for name in devices)
    fits = _memory(form, memory_bytes)
    if form.vae == "auto" and fits(1) < 1:
        form = replace(form, vae="full")
        fits = _memory(form, memory_bytes)
    return form, fits


def _costs(options: argparse.Namespace, form: Form, devices: Sequence[str]) -> tuple[Sequence[ChunkCosts], str]:
    """Of each device, at all settings of the form, and where they come from."""
    from engine.devices import CPU_MODEL, DEVICES, cpu_costs, measured_costs, wan_costs, with_settings
    from engine.wan.presets import PRESETS

    if options.profile is not None:
        window = PRESETS[form.model].window_frames
        known = measured_costs(
            _profile(options.profile), window=window, has_small=form.has_small, has_light=form.has_light
        )
        return [known] * len(devices), f"measured: {options.profile.name}"

    def at(device: str, setting: Setting) -> ChunkCosts:
        small, light = setting
        width, height = form.smaller if small and form.smaller else form.size
        if form.model == CPU_MODEL:
            return cpu_costs(width, height)
        costs = wan_costs(
            DEVICES[device], form.model, width, height, vae="light" if light or form.vae == "light" else "full"
        )
        return costs if options.as_published else costs.with_graphs()

    costs = [with_settings(partial(at, name), has_small=form.has_small, has_light=form.has_light) for name in devices]
    if form.model == CPU_MODEL:
        return costs, "measured on one core of the developers' machine"
    basis = "; ".join(f"{name}: {DEVICES[name].basis}" for name in dict.fromkeys(devices))
    if form.size not in FITTED_SIZES:
        basis += f"; no figures are published for {form.size[0]}x{form.size[1]}"
    return costs, basis


def _memory(form: Form, device_bytes: int) -> Callable[[int], int]:
    from engine.memory import Demand, known_shape, needed

    which: Literal["both", "full", "light"] = "both" if form.vae == "auto" else form.vae
    sizes = [size for size in (form.size, form.smaller) if size is not None]
    plans = [needed(known_shape(form.model), Demand(*size, vae=which)) for size in sizes]
    shared = sum(part.size_bytes for part in plans[0].parts if part.kind != "stream")
    stream = sum(part.size_bytes for plan in plans for part in plan.parts if part.kind == "stream")
    return lambda devices: int(max((1 - MEMORY_SPARED) * device_bytes * devices - shared, 0) // stream)


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,5})[xX](\d{1,5})", text.strip())
    if match:
        width, height = int(match[1]), int(match[2])
        if all(MIN_SIDE <= side <= MAX_SIDE and side % SIZE_STEP == 0 for side in (width, height)):
            return width, height
    raise ValueError(
        f"size {text!r} must be WIDTHxHEIGHT, each a multiple of {SIZE_STEP} from {MIN_SIDE} to {MAX_SIDE}; "
        "figures are published for 832x480 and 512x512"
    )


def _profile(path: Path) -> dict[str, Any]:
    """A cost model's snapshot or a list of costs, at the top of the file or below `measured` (doctor)."""
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if isinstance(found, dict) and "measured" in found:
        found = found["measured"]
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected an object of measured costs; doctor --json writes one where the engine ran")
    return found
