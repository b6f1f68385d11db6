"""Where `livebrush serve` gets its settings from: a TOML file, LIVEBRUSH_* variables on top, flags on top of those.

A setting is named by its path: `engine.width` is `width` under `[engine]` in the file and LIVEBRUSH_ENGINE__WIDTH in
the environment. A refusal names the setting, its value, the bound, and which of the three places it came from.
"""

from __future__ import annotations

import reprlib
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import ValidationError

from server.settings import ServerSettings

ENVIRONMENT_PREFIX = "LIVEBRUSH_"
# Names with the prefix that are no settings: the browser that the tests drive.
OTHER_VARIABLES = {"LIVEBRUSH_CHROMIUM"}
SettingPath = tuple[str, ...]


class SettingsError(Exception):
    """The settings are refused; one line for each fault."""


def load_settings(
    config: Path | None, environment: Mapping[str, str], flags: Mapping[SettingPath, tuple[str, object]]
) -> ServerSettings:
    """Join the three sources, the later one winning, and check the result.

    Args:
        config: a TOML file, if there is one.
        environment: only names with the prefix LIVEBRUSH_ count, and every one of these must be a setting.
        flags: path -> (the flag's name, its value), only for flags that were given.

    Raises: SettingsError with all faults at once.
    """
    values: dict[str, object] = {}
    origins: dict[SettingPath, str] = {}
    for path, origin, value in [*_from_file(config), *_from_environment(environment), *_from_flags(flags)]:
        _put(values, path, value, origin)
        origins[path] = origin
    try:
        return ServerSettings.model_validate(values)
    except ValidationError as error:
        raise SettingsError(explain(error, origins)) from error


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
