"""Which model, device, size, steps, autoencoder and mode fit a machine, and why. Pure: what there is, is passed in.

What a person fixed is kept and never exchanged: where it cannot fit, that is refused with the cure. What was left open
is chosen: the largest model that fits a GPU, at the largest of its sizes that fits; without a GPU the embedded model,
since a CPU is far too slow for the others. The first device is enough: one rank renders everything for now.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from engine.config import AUTO, DEFAULT_MODEL, EngineSettings, ServingProfile

CPU = "cpu"
# What a person may fix; `size` stands for width and height.
Fixed = frozenset[str]
_DEVICE = re.compile(r"cpu|cuda:\d+")
# On a CPU a model of more weights than this stays far below its rate: 1.3B takes seconds a frame.
SLOW_ON_CPU_BYTES = 1 << 30
GIB = 1 << 30
# Streams to hold memory for, where all that are wished for do not fit.
FEWER_STREAMS = (2, 1)


class ChoiceError(Exception):
    """What was asked for is not possible here; the text says what, the bound and the cure."""


@dataclass(frozen=True, slots=True)
class Device:
    """A device found. memory_bytes: free on it, None where that is unknown. title: its name for people."""

    name: str
    title: str
    memory_bytes: int | None

    @property
    def is_gpu(self) -> bool:
        """Whether this is not the CPU."""
        return self.name != CPU


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes a model needs by part: on its device, and on the host where parts stay there (Wan's text encoder)."""

    device: Mapping[str, int]
    host: Mapping[str, int] = field(default_factory=dict)

    @property
    def device_bytes(self) -> int:
        """All parts on the device."""
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        """All parts on the host."""
        return sum(self.host.values())


@dataclass(frozen=True, slots=True)
class Model:
    """An installed model. weights_bytes: on disk, by which models are ranked."""

    name: str
    profile: ServingProfile
    weights_bytes: int


@dataclass(frozen=True, slots=True)
class Choice:
    """What to serve, what it needs, and why, in one sentence."""

    settings: EngineSettings
    steps: int
    need: Need
    reason: str


NeedOf = Callable[[EngineSettings, int | None], Need]
"""What settings need of a device with so many bytes free, None where that is unknown."""


@dataclass(frozen=True, slots=True)
class _Candidate:
    model: Model
    device: Device
    settings: EngineSettings
    need: Need


@dataclass(frozen=True, slots=True)
class Machine:
    """What there is: the CPU with the host's memory, GPUs, and installed models."""

    devices: tuple[Device, ...]
    models: tuple[Model, ...]

    @property
    def host(self) -> Device:
        """The CPU."""
        return next(device for device in self.devices if not device.is_gpu)

    @property
    def gpus(self) -> list[Device]:
        """GPUs, the one with most memory first."""
        found = [device for device in self.devices if device.is_gpu]
        return sorted(found, key=lambda gpu: -(gpu.memory_bytes or 0))


def parse_device(text: str, devices: Sequence[Device] = ()) -> str:
    """`cpu`, `cuda:N` or `auto`, as given.

    Raises: ChoiceError for more than one device, another word, or a GPU that is not there.
    """
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    possible = " or ".join([*dict.fromkeys(device.name for device in devices or (_CPU,)), AUTO])
    if len(names) > 1:
        raise ChoiceError(
            f"{text!r} names {len(names)} devices: one process on one device serves for now; give {possible}"
        )
    if not names or not (names[0] == AUTO or _DEVICE.fullmatch(names[0])):
        raise ChoiceError(f"device {text!r} is none; write cpu, cuda:N (such as cuda:0) or auto; here: {possible}")
    if devices and names[0] not in (AUTO, CPU, *(device.name for device in devices)):
        gpus = sum(device.is_gpu for device in devices)
        count = "no GPU" if not gpus else "1 GPU" if gpus == 1 else f"{gpus} GPUs"
        raise ChoiceError(f"device {names[0]} is not there: nvidia-smi finds {count}; give {possible}")
    return names[0]


def choose(
    wish: EngineSettings, fixed: Fixed, machine: Machine, need_of: NeedOf, *, steps: int | None = None
) -> Choice:
    """Fill in what `wish` leaves open.

    Args:
        wish: settings of which only those named in `fixed` (model, device, size, max_streams) were asked for.
        steps: as asked for, or None for the model's own.
        need_of: may raise OSError or ValueError for a model that is broken.

    Raises: ChoiceError where what is fixed cannot fit; FileNotFoundError or ValueError for a model that is none.
    """
    if "model" in fixed:
        return _choose_for(_model(wish, machine), wish, fixed, machine, need_of, steps)
    largest_first = sorted(machine.models, key=lambda model: -model.weights_bytes)
    passed_over = []
    for model in largest_first:
        if model.name == DEFAULT_MODEL:
            continue
        gpus = [gpu for gpu in machine.gpus if "device" not in fixed or gpu.name == wish.device]
        found, refusal = _first_fit(model, gpus, wish, fixed, machine, need_of)
        if found is not None:
            return _told(found, steps, "the largest installed model that fits")
        passed_over.append(refusal)
    choice = _choose_for(
        _model(wish.model_copy(update={"model": DEFAULT_MODEL}), machine), wish, fixed, machine, need_of, steps
    )
    why = "; ".join(passed_over) or "no other model is installed, `livebrush models` gets others"
    return Choice(choice.settings, choice.steps, choice.need, f"{choice.reason}; {why}")


_CPU = Device(CPU, "CPU", None)


def _model(wish: EngineSettings, machine: Machine) -> Model:
    """The installed model of that name, or the folder given."""
    known = next((model for model in machine.models if model.name == wish.model), None)
    return known or Model(wish.model, wish.profile, 0)


def _choose_for(
    model: Model, wish: EngineSettings, fixed: Fixed, machine: Machine, need_of: NeedOf, steps: int | None
) -> Choice:
    """A place for one model, or the refusal that says why there is none."""
    if "device" in fixed:
        known = next((device for device in machine.devices if device.name == wish.device), None)
        devices = [known or Device(wish.device, wish.device, None)]
    elif model.name == DEFAULT_MODEL:
        devices = [machine.host]  # made for it, and never run on another
    else:
        devices = machine.gpus or [machine.host]
    found, refusal = _first_fit(model, devices, wish, fixed, machine, need_of)
    if found is None:
        raise ChoiceError(f"{refusal}: {_cure(model, fixed, machine)}")
    reason = "as asked for" if "model" in fixed else "made for a CPU"
    return _told(found, steps, reason)


def _first_fit(
    model: Model, devices: Sequence[Device], wish: EngineSettings, fixed: Fixed, machine: Machine, need_of: NeedOf
) -> tuple[_Candidate | None, str]:
    """The best of a model's forms that fits one of the devices; without one, why even the smallest does not."""
    smallest: _Candidate | None = None
    for device in devices:
        for settings in _forms(model, device, wish, fixed):
            candidate = _Candidate(model, device, settings, need_of(settings, device.memory_bytes))
            if _fits(candidate, machine):
                return candidate, ""
            if smallest is None or candidate.need.device_bytes < smallest.need.device_bytes:
                smallest = candidate
    if smallest is None:
        return None, f"{model.name} wants a GPU and none was found"
    return None, _shortfall(smallest, machine)


def _forms(model: Model, device: Device, wish: EngineSettings, fixed: Fixed) -> Iterator[EngineSettings]:
    """The settings a model may run in on a device, the best first: its own size, then others, large to small."""
    first, *others = model.profile.sizes
    sizes = [first, *sorted(others, key=lambda size: -size[0] * size[1])]
    if "size" in fixed:
        sizes = [(wish.width, wish.height)]
    streams = [wish.max_streams]
    if "max_streams" not in fixed:
        streams += [count for count in FEWER_STREAMS if count < wish.max_streams]
    for (width, height), count in product(sizes, streams):
        update = {"model": model.name, "device": device.name, "width": width, "height": height, "max_streams": count}
        yield EngineSettings.model_validate(wish.model_dump() | update)


def _fits(candidate: _Candidate, machine: Machine) -> bool:
    need, device, host = candidate.need, candidate.device, machine.host
    if not device.is_gpu:
        return host.memory_bytes is None or need.device_bytes + need.host_bytes <= host.memory_bytes
    on_device = device.memory_bytes is None or need.device_bytes <= device.memory_bytes
    return on_device and (host.memory_bytes is None or need.host_bytes <= host.memory_bytes)


def _told(found: _Candidate, steps: int | None, why: str) -> Choice:
    settings, device, need = found.settings, found.device, found.need
    count = steps or found.model.profile.steps
    total = need.device_bytes + (0 if device.is_gpu else need.host_bytes)
    room = "" if device.memory_bytes is None else f" of the {_gb(device.memory_bytes)} free"
    place = f"{device.name} ({device.title})" if device.is_gpu else "the CPU"
    text = f"{_form(found)}, {count} step{'s' if count > 1 else ''}, on {place}: {why}; needs {_gb(total)}{room}"
    if not device.is_gpu and need.device_bytes > SLOW_ON_CPU_BYTES and found.model.name != DEFAULT_MODEL:
        text += f"; a CPU stays far below its {found.model.profile.fps:g} fps"
    return Choice(settings, count, need, text)


def _form(found: _Candidate) -> str:
    settings = found.settings
    streams = ""
    if settings.max_streams < EngineSettings.model_fields["max_streams"].default:
        streams = f", {settings.max_streams} session{'s' if settings.max_streams > 1 else ''}"
    return f"{Path(found.model.name).name} at {settings.width}x{settings.height}{streams}"


def _shortfall(candidate: _Candidate, machine: Machine) -> str:
    """What a candidate lacks, by its largest parts."""
    need, device = candidate.need, candidate.device
    if device.is_gpu and device.memory_bytes is not None and need.device_bytes > device.memory_bytes:
        parts, free, where = need.device, device.memory_bytes, f"{device.name} ({device.title})"
    else:
        parts = need.host if device.is_gpu else {**need.device, **need.host}
        free, where = machine.host.memory_bytes or 0, "main memory"
    largest = sorted(parts.items(), key=lambda part: -part[1])[:3]
    listed = ", ".join(f"{name} {_gb(size)}" for name, size in largest)
    return f"{_form(candidate)} needs {_gb(sum(parts.values()))} ({listed}) and {where} has {_gb(free)} free"


def _cure(model: Model, fixed: Fixed, machine: Machine) -> str:
    cures = []
    if "size" in fixed:
        cures.append(f"a smaller --size ({' or '.join(f'{w}x{h}' for w, h in model.profile.sizes)})")
    if "max_streams" in fixed:
        cures.append("fewer max_streams")
    smaller = [other.name for other in machine.models if other.weights_bytes < model.weights_bytes]
    cures.append(f"a smaller --model ({', '.join(smaller)})" if smaller else "a smaller --model")
    cures.append("a device with more memory")
    return "choose " + ", ".join(cures[:-1]) + " or " + cures[-1]


def _gb(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
