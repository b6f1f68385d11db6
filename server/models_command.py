"""`livebrush models`: list, download, convert and verify the models that are not shipped with Livebrush."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.model_store import KnownModel, Progress

NOTE = (
    "The published weights of Wan 2.1 were never loaded by Livebrush's authors, whose machines reach no hub: download "
    "and conversion are tested with random weights in the published layouts."
)
_SOURCE_HELP = (
    "another place for a part, such as a mirror or a fixed revision: PART=OWNER/NAME:PATH[@REVISION]; PART is "
    "transformer, vae, text, tokenizer or taehv"
)


def add_models_parser(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the command to the console script's."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "models", help="list, download, convert and verify models", epilog=NOTE
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="models on this machine, and those to be had")
    listing.set_defaults(command=list_models)
    getting = actions.add_parser("download", help="download a model and convert it", epilog=NOTE)
    getting.set_defaults(command=download)
    getting.add_argument("model", metavar="NAME", help="wan2.1-1.3b or wan2.1-14b")
    getting.add_argument("--source", action="append", default=[], type=_source, metavar="PART=…", help=_SOURCE_HELP)
    getting.add_argument("--taehv", type=Path, metavar="FILE", help="also take in the light VAE, taew2_1.pth")
    getting.add_argument("--keep", action="store_true", help="keep the downloaded files beside the converted ones")
    converting = actions.add_parser(
        "convert",
        help="make a model folder from files that are here",
        description="Takes original Wan names, bare or in a pickle below generator, generator_ema or state_dict, FSDP "
        "and torch.compile names, and diffusers' names; a folder stands for all safetensors files in it.",
        epilog=NOTE,
    )
    converting.set_defaults(command=convert)
    converting.add_argument("model", metavar="NAME", help="whose shape the files have: wan2.1-1.3b or wan2.1-14b")
    for part, what in (
        ("transformer", "the causal transformer"),
        ("vae", "Wan2.1_VAE.pth, or diffusers' vae"),
        ("text", "models_t5_umt5-xxl-enc-bf16.pth, or diffusers' text_encoder"),
        ("tokenizer", "tokenizer.json of google/umt5-xxl"),
        ("taehv", "the light VAE, taew2_1.pth"),
    ):
        converting.add_argument(f"--{part}", type=Path, nargs="+", metavar="FILE", help=what)
    converting.add_argument("--name", help="of the new model (default: NAME)")
    for action in (getting, converting):
        action.add_argument("--force", action="store_true", help="replace the model if it is there")
    verifying = actions.add_parser("verify", help="check a model's configuration, sizes, hashes and tensor names")
    verifying.set_defaults(command=verify)
    verifying.add_argument("model", metavar="NAME|FOLDER")
    for action in (listing, getting, converting, verifying):
        action.add_argument("--json", action="store_true", help="print the result as JSON")


def _source(text: str) -> tuple[str, Any]:
    from engine.model_store import parse_source

    try:
        return parse_source(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def list_models(options: argparse.Namespace) -> int:
    """Say which models there are and which could be had."""
    from engine.config import user_models_dir
    from engine.model_store import KNOWN, installed

    here = installed()
    names = {model.name for model in here}
    known = [_facts(model, name in names) for name, model in KNOWN.items()]
    if options.json:
        rows = [
            {"name": m.name, "folder": str(m.folder), "size_bytes": m.size_bytes, "fault": m.fault or None}
            for m in here
        ]
        print(json.dumps({"models_dir": str(user_models_dir()), "installed": rows, "known": known}, indent=2))
        return 0
    print("On this machine:")
    for model in here:
        print(f"  {model.name:<16} {_size(model.size_bytes):>9}  {model.fault or model.folder}")
    print("To be had by `livebrush models download NAME`:")
    for facts in known:
        print(f"  {facts['name']:<16} {_size(facts['folder_bytes']):>9}  {facts['summary']}")
        for text, size in facts["memory"].items():
            print(f"  {'':<26}  needs {size / (1 << 30):.1f} GiB of GPU memory {text}")
        for part, source in facts["sources"].items():
            print(f"  {'':<26}  {part}: {source['repo']}/{source['path']} ({source['licence']})")
    print(NOTE)
    return 0


def _facts(model: KnownModel, is_here: bool) -> dict[str, Any]:
    from engine.memory import Demand, known_shape, needed

    shape = known_shape(model.name)
    memory = {
        f"for one stream of {width}x{height}, {vae} VAE": needed(shape, Demand(width, height, vae=vae)).total_bytes
        for width, height in model.serving.sizes
        for vae in ("full", "light")
    }
    return {
        "name": model.name,
        "summary": model.summary,
        "installed": is_here,
        "folder_bytes": model.folder_bytes,
        "memory": memory,
        "sources": {
            part: {
                "repo": source.remote.repo,
                "path": source.remote.path,
                "revision": source.remote.revision,
                "licence": source.licence,
            }
            for part, source in model.sources.items()
        },
    }


def download(options: argparse.Namespace) -> int:
    """Download and convert a model."""
    from engine.model_store import DownloadOptions, known_model
    from engine.model_store import download as run

    def work(report: Progress) -> Path:
        model = known_model(options.model)
        _say(options, f"{model.name}: {model.summary}\n{_size(model.folder_bytes)} when converted. {NOTE}")
        how = DownloadOptions(dict(options.source), options.taehv, options.force, options.keep)
        return run(model, how, progress=report)

    return _run(options, work)


def convert(options: argparse.Namespace) -> int:
    """Make a model folder from local files."""
    from engine.model_store import LIGHT_PART, PARTS, known_model
    from engine.model_store import convert as run

    def work(report: Progress) -> Path:
        files = {part: getattr(options, part) for part in (*PARTS, LIGHT_PART) if getattr(options, part)}
        return run(known_model(options.model), files, name=options.name, force=options.force, progress=report)

    return _run(options, work)


def verify(options: argparse.Namespace) -> int:
    """Check a model folder."""
    from engine.model_store import find_folder
    from engine.model_store import verify as run

    def work(report: Progress) -> Path:
        folder = find_folder(options.model)
        run(folder, report)
        return folder

    return _run(options, work)


def _run(options: argparse.Namespace, work: Callable[[Progress], Path]) -> int:
    """Do it with a progress bar; say what became of it."""
    from engine.api import EngineError
    from engine.config import CONFIG_FILE

    try:
        with _progress_bar() as report:
            folder = work(report)
    except (EngineError, OSError) as error:
        text = str(error)
        if options.json:
            print(json.dumps({"ok": False, "error": text}, indent=2))
        print("\n".join(f"livebrush: {line}" for line in text.splitlines()), file=sys.stderr)
        return 1
    config = json.loads((folder / CONFIG_FILE).read_bytes())
    files = config.get("files") or {}
    if options.json:
        print(json.dumps({"ok": True, "name": config["name"], "folder": str(folder), "files": files}, indent=2))
    else:
        size = sum(record["size_bytes"] for record in files.values())
        print(f"{folder}: ready" + (f", {len(files)} files, {_size(size)}" if files else ""))
    return 0


def _say(options: argparse.Namespace, text: str) -> None:
    if not options.json:
        print(text)


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e8 else f"{size_bytes / 1e6:.1f} MB"


@contextlib.contextmanager
def _progress_bar() -> Iterator[Progress]:
    """A bar on stderr, where that is a terminal; nothing in a log file."""
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        row = bar.add_task("starting", total=None)
        shown = ""

        def report(what: str, done: int, total: int) -> None:
            nonlocal shown
            if what != shown:
                # A new task begins its own estimate of the time left.
                bar.reset(row, description=what, total=total)
                shown = what
            bar.update(row, completed=done, total=total)

        yield report
