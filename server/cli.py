"""The console script `livebrush`: one short function a command; each imports what it needs when it runs."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from server.camera_command import add_camera_parser
from server.cluster_command import add_cluster_parser
from server.drain_command import add_drain_parser
from server.gateway_command import add_gateway_parser
from server.link_command import add_link_parser
from server.load import add_load_parser
from server.models_command import add_models_parser
from server.plan_command import add_plan_parser
from server.replay_command import add_replay_parser

if TYPE_CHECKING:
    from engine.api import Engine
    from server.restyle import Progress, RestyleJob, RestyleSummary

# What a shell reports for a command ended by SIGINT.
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 failed with a message, 2 misused."""
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        return command(options)
    except KeyboardInterrupt:
        return _fail("stopped", INTERRUPTED)


def serve(options: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C."""
    from server.configure import SettingsError, resolve

    given: list[tuple[tuple[str, ...], str, object]] = [
        (("host",), "--host", options.host),
        (("port",), "--port", options.port),
        (("admin_port",), "--admin-port", options.admin_port),
        (("tls_cert",), "--tls-cert", options.tls_cert),
        (("tls_key",), "--tls-key", options.tls_key),
        (("media", "udp_ports"), "--udp-ports", options.udp_ports),
        (("media", "turn_urls"), "--turn-url", options.turn_url),
        (("media", "turn_secret"), "--turn-secret", options.turn_secret),
        (("engine_kind",), "--engine", options.engine),
        *_engine_flags(options),
        (("engine", "vae"), "--vae", options.vae),
        (("engine", "mode"), "--mode", options.mode),
        (("engine", "ranks"), "--ranks", options.ranks),
        (("engine", "replicas"), "--replicas", options.replicas),
        (("engine", "attention"), "--attention", options.attention),
        (("engine", "compile"), "--compile", options.compile),
        (("steps",), "--steps", options.steps),
        (("max_fps",), "--fps", options.fps),
        (("osc_port",), "--osc-port", options.osc_port),
        (("drain_s",), "--drain", options.drain),
        (("recordings", "dir"), "--recordings", options.recordings),
    ]
    try:
        resolved = resolve(options.config, os.environ, _flags(given))
    except SettingsError as error:
        return _fail(str(error))
    if resolved.choice is not None:
        print(resolved.choice.reason, flush=True, file=sys.stderr)

    from server.allocator import keep_few_arenas

    keep_few_arenas()
    from server.app import serve as run_server
    from server.event_loop import BusyLoop
    from server.redaction import configure_logging

    configure_logging()
    with asyncio.Runner(loop_factory=BusyLoop) as runner:
        return runner.run(run_server(resolved.settings))


def _engine_flags(options: argparse.Namespace) -> list[tuple[tuple[str, ...], str, object]]:
    """The flags that say what to run where, alike in every command."""
    return [
        (("engine", "model"), "--model", options.model),
        (("engine", "device"), "--devices", options.devices),
        (("engine", "width"), "--size", options.size and options.size[0]),
        (("engine", "height"), "--size", options.size and options.size[1]),
    ]


def _flags(given: list[tuple[tuple[str, ...], str, object]]) -> dict[tuple[str, ...], tuple[str, object]]:
    """Those that were given, by the setting they are for."""
    return {path: (flag, value) for path, flag, value in given if value is not None}


def restyle(options: argparse.Namespace) -> int:
    """Restyle a video file."""
    from dataclasses import asdict

    from pydantic import ValidationError

    from engine.api import EngineError, StreamParams
    from engine.config import EngineSettings
    from server.clip import ClipError
    from server.configure import SettingsError, explain, resolve
    from server.restyle import RestyleError, RestyleJob

    def make_engine(width: int, height: int) -> Engine:
        from engine.client import LocalEngine
        from engine.fake import FakeEngine

        if options.engine == "fake":
            return FakeEngine(width, height, delay_s=0.0)
        update = {"width": width, "height": height}
        return LocalEngine(EngineSettings.model_validate(settings.engine.model_dump() | update))

    given: list[tuple[tuple[str, ...], str, object]] = [
        (("engine_kind",), "--engine", options.engine),
        *_engine_flags(options)[:2],
        (("engine", "max_streams"), "restyle", 1),
        (("max_sessions",), "restyle", 1),
    ]
    try:
        steps = {} if options.steps is None else {"steps": options.steps}
        params = StreamParams(prompt=options.prompt, strength=options.strength, seed=options.seed, **steps)
        settings = resolve(None, {}, _flags(given)).settings
        if options.steps is None:
            params = params.model_copy(update={"steps": settings.steps})
        size = options.size or (settings.engine.width, settings.engine.height)
        job = RestyleJob(options.input, options.output, params, size, options.audio, options.force)
        summary = asyncio.run(_restyle_with_progress(job, make_engine))
    except ValidationError as error:
        return _fail(explain(error))
    except (SettingsError, ClipError, RestyleError, EngineError, FileNotFoundError, ValueError) as error:
        return _fail(str(error))
    if options.json:
        print(json.dumps(asdict(summary)))
    else:
        print(
            f"{summary.target}: {summary.frames} frames, {summary.size} at {summary.clip_fps:g} fps,"
            f" sound streams copied: {summary.audio_streams}\n"
            f"{summary.elapsed_s:.1f} s at {summary.frames_per_s:.1f} frames/s (the model works at"
            f" {summary.engine_size}; loading it took {summary.engine_start_s:.1f} s)"
        )
        if summary.damaged_packets:
            print(f"{summary.damaged_packets} packets of the input were damaged and gave no picture", file=sys.stderr)
        if summary.withheld_frames:
            print(f"{summary.withheld_frames} frames were left as they were: the model's were not fit", file=sys.stderr)
    return 0


async def _restyle_with_progress(job: RestyleJob, make_engine: Callable[[int, int], Engine]) -> RestyleSummary:
    from server.restyle import restyle as run_restyle

    # A terminated run tidies up like an interrupted one.
    if task := asyncio.current_task():
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        with _progress_bar() as watch:
            return await run_restyle(job, make_engine, watch)
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


@contextlib.contextmanager
def _progress_bar() -> Iterator[Callable[[Progress], None]]:
    """A bar on stderr, where that is a terminal; nothing in a log file."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        row = bar.add_task("opening", total=None)
        yield lambda now: bar.update(row, description=now.stage, completed=now.done, total=now.total)


def doctor(options: argparse.Namespace) -> int:
    """Say what this machine can do and what is wrong."""
    from engine.config import DEFAULT_MODEL, EngineSettings
    from server.configure import Resolved, SettingsError, resolve
    from server.doctor import examine, to_json, to_text
    from server.settings import ServerSettings

    refusal = ""
    try:
        resolved = resolve(None, os.environ, _flags(_engine_flags(options)))
    except SettingsError as error:
        refusal = str(error)
        model = options.model if options.model and options.model != "auto" else DEFAULT_MODEL
        resolved = Resolved(ServerSettings(engine=EngineSettings(model=model)), None)
    report = asyncio.run(examine(resolved.settings, choice=resolved.choice, refusal=refusal, measure=not options.quick))
    print(to_json(report) if options.json else to_text(report))
    return 0 if report.can_serve else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="livebrush", description="Restyle live video with a causal video diffusion model."
    )
    parser.add_argument("--version", action="version", version=f"livebrush {version('livebrush')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_serve(commands.add_parser("serve", help="serve the page: a camera in, restyled video out"))
    _add_restyle(commands.add_parser("restyle", help="restyle a video file"))
    _add_doctor(commands.add_parser("doctor", help="what this machine can do, and what is wrong"))
    add_models_parser(commands)
    add_camera_parser(commands)
    add_cluster_parser(commands)
    add_drain_parser(commands)
    add_gateway_parser(commands)
    add_link_parser(commands)
    add_load_parser(commands)
    add_plan_parser(commands)
    add_replay_parser(commands)
    return parser


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=serve)
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1); any other needs tokens")
    parser.add_argument("--port", type=int, help="TCP port of the page, 0 for any free one (default: 8080)")
    parser.add_argument("--admin-port", type=int, help="TCP port of /metrics, on loopback (default: the one after)")
    parser.add_argument("--tls-cert", metavar="FILE.pem", help="serve HTTPS with this certificate, and --tls-key")
    parser.add_argument("--tls-key", metavar="FILE.pem", help="its key, without a passphrase")
    parser.add_argument("--udp-ports", metavar="LOW-HIGH", help="media only in this range (default: any port)")
    parser.add_argument("--turn-url", action="append", metavar="URL", help="a relay for clients, turn:HOST:PORT")
    parser.add_argument(
        "--turn-secret", metavar="SECRET", help="shared with the relay; better LIVEBRUSH_MEDIA__TURN_SECRET"
    )
    _add_engine_flags(parser)
    parser.add_argument(
        "--engine", metavar="KIND", help="local (default), fake (no model), ray or ray://HOST:PORT (docs/scale.md)"
    )
    parser.add_argument(
        "--steps", type=int, help="denoising steps a session begins with, 1 to 4 (default: the model's)"
    )
    parser.add_argument("--fps", type=float, help="output rate when there is room (default: the model's)")
    parser.add_argument("--ranks", metavar="N", help="processes that a model is spread over, a ring (default: auto, 1)")
    parser.add_argument("--replicas", metavar="M", help="whole models side by side (default: auto, 1)")
    parser.add_argument("--mode", choices=("sequential", "batch"), help="steps one after another, or a stream batch")
    parser.add_argument("--vae", choices=("auto", "full", "light"), help="of Wan: its own, or the light one")
    parser.add_argument("--attention", choices=("auto", "sdpa", "flex", "varlen"), help="kernel of self attention")
    parser.add_argument("--compile", action="store_true", default=None, help="torch.compile: slower start, faster run")
    parser.add_argument("--osc-port", type=int, metavar="PORT", help="steer by OSC on this UDP port of loopback")
    parser.add_argument(
        "--drain", type=float, metavar="SECONDS", help="for sessions to end after SIGTERM, before they are moved (0)"
    )
    parser.add_argument(
        "--recordings", type=Path, metavar="DIR", help="let sessions be recorded there (default: nothing is recorded)"
    )
    parser.add_argument("--config", type=Path, metavar="FILE.toml", help="settings file; flags and LIVEBRUSH_* win")


def _add_engine_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="NAME", help="an installed model, a path to a folder, or auto (default: what fits best here)"
    )
    parser.add_argument("--devices", metavar="DEVICE", help="cpu, cuda:N or auto (default: auto)")
    parser.add_argument("--size", type=_size, metavar="WIDTHxHEIGHT", help="picture size (default: the model's)")


def _add_restyle(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=restyle)
    parser.add_argument("input", type=Path, metavar="IN", help="a video file")
    parser.add_argument("output", type=Path, metavar="OUT", help="the result: .mp4, .m4v, .mov, .mkv or .webm")
    parser.add_argument("--prompt", required=True, help='the style in free words, such as "watercolour painting"')
    parser.add_argument("--strength", type=float, default=1.0, help="0 the input, 1 the full style (default: 1)")
    parser.add_argument("--steps", type=int, help="denoising steps, 1 to 4 (default: the model's)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same picture (default: 0)")
    parser.add_argument(
        "--size",
        type=_size,
        metavar="WIDTHxHEIGHT",
        help="largest picture of the model; its shape follows the clip, the output keeps the clip's size"
        " (default: the model's)",
    )
    parser.add_argument("--model", metavar="NAME", default="livebrush-tiny", help="an installed model, or a folder")
    parser.add_argument("--devices", metavar="DEVICE", help="cpu, cuda:N or auto (default: auto)")
    parser.add_argument("--engine", choices=("local", "fake"), default="local", help="the model, or a stand-in")
    parser.add_argument("--no-audio", dest="audio", action="store_false", help="leave the sound out")
    parser.add_argument("--force", action="store_true", help="overwrite OUT")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=doctor)
    _add_engine_flags(parser)
    parser.add_argument("--quick", action="store_true", help="do not start the engine to measure it")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def _size(text: str) -> tuple[int, int]:
    from server.configure import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _fail(message: str, status: int = 1) -> int:
    print("\n".join(f"livebrush: {line}" for line in message.splitlines()), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
