"""Where `livebrush serve` gets its settings from: a TOML file, LIVEBRUSH_* variables on top, flags on top of those.

A setting is named by its path: `engine.width` is `width` under `[engine]` in the file and LIVEBRUSH_ENGINE__WIDTH in
the environment. A refusal names the setting, its value, the bound, and which of the three places it came from.

What nobody sets comes from the model: its size, rate and steps (`serving` in its config.json); and a model or device
that is `auto`, or not set at all, is chosen by what the machine has (engine.choose).
"""

from __future__ import annotations

import contextlib
import reprlib
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from engine.choose import Choice, ChoiceError, Machine, choose, parse_device
from engine.config import AUTO, EngineSettings, ServingProfile
from server.machine import find_machine, need_of
from server.settings import ServerSettings

ENVIRONMENT_PREFIX = "LIVEBRUSH_"
# Names with the prefix that are no settings: the browser that the tests drive.
OTHER_VARIABLES = {"LIVEBRUSH_CHROMIUM", "LIVEBRUSH_MODELS_DIR", "LIVEBRUSH_TOKEN"}
MODEL, DEVICE = ("engine", "model"), ("engine", "device")
SettingPath = tuple[str, ...]


class SettingsError(Exception):
    """The settings are refused; one line for each fault."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """Settings with nothing left open. choice: why this model and device; None with the stand-in engine."""

    settings: ServerSettings
    choice: Choice | None


def load_settings(
    config: Path | None, environment: Mapping[str, str], flags: Mapping[SettingPath, tuple[str, object]]
) -> ServerSettings:
    """The settings of `resolve`."""
    return resolve(config, environment, flags).settings


def resolve(
    config: Path | None,
    environment: Mapping[str, str],
    flags: Mapping[SettingPath, tuple[str, object]],
    *,
    look: Callable[[], Machine] = find_machine,
) -> Resolved:
    """Join the three sources, the later one winning, fill in what they leave open, and check the result.

    Args:
        config: a TOML file, if there is one.
        environment: only names with the prefix LIVEBRUSH_ count, and every one of these must be a setting.
        flags: path -> (the flag's name, its value), only for flags that were given.
        look: what the machine has; asked only with the true engine.

    Raises: SettingsError with all faults at once, for a model that is not there, or one that cannot fit.
    """
    values: dict[str, object] = {}
    origins: dict[SettingPath, str] = {}
    for path, origin, value in [*_from_file(config), *_from_environment(environment), *_from_flags(flags)]:
        _put(values, path, value, origin)
        origins[path] = origin
    choice = _fill_in(values, origins, look)
    try:
        return Resolved(ServerSettings.model_validate(values), choice)
    except ValidationError as error:
        raise SettingsError(explain(error, origins)) from error


def _fill_in(values: dict[str, object], origins: dict[SettingPath, str], look: Callable[[], Machine]) -> Choice | None:
    """Put the model's own figures, and the choice of model and device, where no source said anything."""
    engine = values.setdefault("engine", {})
    if not isinstance(engine, dict):
        return None  # refused below, with its name
    for name in (MODEL, DEVICE):
        if engine.get(name[-1]) == AUTO:
            del engine[name[-1]]
            origins.pop(name)
    fixed = frozenset(path[1] for path in origins if path[0] == "engine" and len(path) == 2)
    fixed |= {"size"} if fixed & {"width", "height"} else set()
    local = values.get("engine_kind", "local") == "local"
    try:
        machine = look() if local else None
        if machine is not None and "device" in fixed:
            engine["device"] = parse_device(str(engine["device"]), machine.devices)
        wish = EngineSettings.model_validate(engine)
    except ValidationError:
        return None  # the whole is validated next, which tells of every fault
    except ChoiceError as error:
        raise SettingsError(f"{error} (from {origins[DEVICE]})") from error
    steps = values.get("steps")
    choice = None
    try:
        if machine is not None:
            choice = choose(
                _with_size_of_model(wish, fixed),
                fixed,
                machine,
                need_of,
                steps=int(steps) if isinstance(steps, int | str) and str(steps).isdigit() else None,
            )
            wish = choice.settings
        profile = _profile(wish, local)
    except (ChoiceError, FileNotFoundError, ValueError) as error:
        raise SettingsError(str(error)) from error
    size = profile.sizes[0] if choice is None else (wish.width, wish.height)
    for path, value in _own_figures(wish, profile, size, values):
        if path not in origins:
            _put(values, path, value, wish.model)
            origins[path] = f"{wish.model}'s own settings"
    return choice


def _with_size_of_model(wish: EngineSettings, fixed: frozenset[str]) -> EngineSettings:
    """One side given, and the model: the other side is the model's."""
    given = fixed & {"width", "height"}
    if len(given) != 1 or "model" not in fixed:
        return wish
    width, height = wish.profile.sizes[0]
    other = {"height": height} if "width" in given else {"width": width}
    return EngineSettings.model_validate(wish.model_dump() | other)


def _profile(engine: EngineSettings, local: bool) -> ServingProfile:
    """The model's own; the stand-in needs no model."""
    try:
        return engine.profile
    except FileNotFoundError:
        if local:
            raise
        return ServingProfile()


def _own_figures(
    engine: EngineSettings, profile: ServingProfile, size: tuple[int, int], values: Mapping[str, object]
) -> Iterator[tuple[SettingPath, object]]:
    """What a model says for settings that nobody set."""
    yield MODEL, engine.model
    yield DEVICE, engine.device
    yield ("engine", "max_streams"), engine.max_streams
    yield ("engine", "width"), size[0]
    yield ("engine", "height"), size[1]
    yield ("steps",), profile.steps
    yield ("max_fps",), profile.fps
    yield ("max_sessions",), min(_seats(engine), int(ServerSettings.model_fields["max_sessions"].default))
    yield ("min_fps",), min(profile.fps, float(ServerSettings.model_fields["min_fps"].default))
    if engine.mode == "batch":
        # A chunk comes back as many chunks later as it has further steps: later than one budget for all allows.
        budget_s = float(ServerSettings.model_fields["latency_budget_s"].default)
        steps, fps = values.get("steps", profile.steps), values.get("max_fps", profile.fps)
        with contextlib.suppress(TypeError, ValueError, ZeroDivisionError):  # refused below, with its name
            yield ("latency_budget_s",), budget_s + (int(str(steps)) - 1) * profile.chunk_frames / float(str(fps))


def _seats(engine: EngineSettings) -> int:
    return engine.max_streams * engine.replica_count


def explain(error: ValidationError, origins: Mapping[SettingPath, str] | None = None) -> str:
    """Pydantic's findings as plain text, one line each: setting, value, bound, and where the value came from."""
    lines = []
    for fault in error.errors(include_url=False):
        path = tuple(str(part) for part in fault["loc"])
        text = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            text = "there is no such setting"
        elif fault["type"] != "value_error":
            text = f"{reprlib.repr(fault['input'])} is refused: {text[:1].lower()}{text[1:]}"
        origin = (origins or {}).get(path)
        where = f" (from {origin})" if origin else ""
        lines.append(f"{'.'.join(path)}: {text}{where}" if path else f"{text}{where}")
    return "\n".join(lines)


def parse_size(text: str) -> tuple[int, int]:
    """WIDTHxHEIGHT in pixels. Raises ValueError that shows the form."""
    width, cross, height = text.lower().partition("x")
    if not (cross and width.isascii() and width.isdigit() and height.isascii() and height.isdigit()):
        raise ValueError(f"{text!r} is no size; write WIDTHxHEIGHT, for example 256x256")
    return int(width), int(height)


def _from_file(config: Path | None) -> Iterator[tuple[SettingPath, str, object]]:
    if config is None:
        return
    try:
        with config.open("rb") as file:
            tables = tomllib.load(file)
    except OSError as error:
        raise SettingsError(f"{config}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{config}: not a TOML file ({error})") from error
    yield from _leaves((), tables, str(config))


def _leaves(
    prefix: SettingPath, tables: Mapping[str, object], origin: str
) -> Iterator[tuple[SettingPath, str, object]]:
    for name, value in tables.items():
        if isinstance(value, dict):
            yield from _leaves((*prefix, name), value, origin)
        else:
            yield (*prefix, name), origin, value


def _from_environment(environment: Mapping[str, str]) -> Iterator[tuple[SettingPath, str, object]]:
    for name, text in sorted(environment.items()):
        if name.startswith(ENVIRONMENT_PREFIX) and name not in OTHER_VARIABLES:
            path = tuple(name.removeprefix(ENVIRONMENT_PREFIX).lower().split("__"))
            # Lists are the one kind that plain text cannot say: LIVEBRUSH_MEDIA__ICE_SERVERS='["stun:a", "stun:b"]'.
            value: object = text
            if text.startswith("["):
                try:
                    value = tomllib.loads(f"value = {text}")["value"]
                except tomllib.TOMLDecodeError as error:
                    raise SettingsError(f"{name}: {text!r} is no list ({error})") from error
            yield path, name, value


def _from_flags(flags: Mapping[SettingPath, tuple[str, object]]) -> Iterator[tuple[SettingPath, str, object]]:
    for path, (flag, value) in flags.items():
        yield path, flag, value


def _put(values: dict[str, object], path: SettingPath, value: object, origin: str) -> None:
    """Set values[path[0]][path[1]]... = value."""
    for part in path[:-1]:
        inner = values.setdefault(part, {})
        if not isinstance(inner, dict):
            raise SettingsError(f"{'.'.join(path)}: {part} is a setting, not a group of settings (from {origin})")
        values = inner
    values[path[-1]] = value
