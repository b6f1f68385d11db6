"""The Wan models known by name: where their parts are published, and how they become folders Livebrush can load.

`download` fetches the parts and `convert` writes them into one folder, below `engine.config.user_models_dir`: into a
temporary one first, which takes its name only when it is whole. Interrupted downloads go on where they stopped.

Torch is imported only where tensors are touched. The published weights were never loaded by us, since no machine of
ours reached the hub: names, layouts and sizes are those of the notes, tested with random weights on a loopback hub.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.api import EngineError
from engine.config import (
    CONFIG_FILE,
    DEFAULT_MODEL,
    MODELS_DIR,
    WAN_SAMPLING,
    WAN_SERVING,
    SamplingConfig,
    ServingProfile,
    user_models_dir,
)
from engine.hub import FoundFile, RemoteFile, check_space, fetch, find
from engine.memory import UMT5_XXL_BYTES, transformer_parameters, wan_vae_parameters
from engine.wan.presets import WAN_1_3B, WAN_14B, TransformerConfig
from engine.wan.vae_config import TAEHVConfig, WanVAEConfig

if TYPE_CHECKING:
    from torch import Tensor

    from engine.wan.weights import ModelConfig

# What a Wan model is made of; the light VAE may be left out.
PARTS = ("transformer", "vae", "text", "tokenizer")
LIGHT_PART = "taehv"
LIGHT_VAE_PAGE = "https://github.com/madebyollin/taehv (taew2_1.pth, MIT)"
DOWNLOADS_DIR = ".downloads"
Progress = Callable[[str, int, int], None]


class ModelStoreError(EngineError):
    """A model that cannot be downloaded, converted or checked as asked; the text says why and what to do."""


@dataclass(frozen=True)
class Source:
    """Where one part is published, and under which licence as its page says."""

    remote: RemoteFile
    licence: str


@dataclass(frozen=True)
class KnownModel:
    """A model that `livebrush models download` can get. text: config.json of its text encoder; None: UMT5-XXL."""

    name: str
    summary: str
    sources: Mapping[str, Source]
    transformer: TransformerConfig
    vae: WanVAEConfig = field(default_factory=WanVAEConfig)
    light_vae: TAEHVConfig = field(default_factory=TAEHVConfig)
    sampling: SamplingConfig = WAN_SAMPLING
    serving: ServingProfile = WAN_SERVING
    text: Mapping[str, Any] | None = None

    @property
    def folder_bytes(self) -> int:
        """About what the converted folder takes: the transformer in bfloat16, the VAE in float32, the text encoder."""
        text = UMT5_XXL_BYTES if self.text is None else 0
        return 2 * transformer_parameters(self.transformer) + 4 * wan_vae_parameters(self.vae) + text


_BASE, _V2V = "Wan-AI/Wan2.1-T2V-1.3B", "jerryfeng/StreamDiffusionV2"
_SHARED = {
    "vae": Source(RemoteFile(_BASE, "Wan2.1_VAE.pth"), "Apache-2.0"),
    "text": Source(RemoteFile(_BASE, "models_t5_umt5-xxl-enc-bf16.pth"), "Apache-2.0"),
    "tokenizer": Source(RemoteFile(_BASE, "google/umt5-xxl/tokenizer.json"), "Apache-2.0"),
}
KNOWN = {
    model.name: model
    for model in (
        KnownModel(
            "wan2.1-1.3b",
            "Wan 2.1, 1.3 billion parameters, distilled for causal video to video (StreamDiffusionV2)",
            {"transformer": Source(RemoteFile(_V2V, "wan_causal_dmd_v2v/model.pt"), "Apache-2.0"), **_SHARED},
            WAN_1_3B,
        ),
        KnownModel(
            "wan2.1-14b",
            "Wan 2.1, 14 billion parameters, distilled for causal video to video (StreamDiffusionV2)",
            {
                "transformer": Source(
                    RemoteFile(_V2V, "wan_causal_dmd_v2v_14b/model.pt"), "not verified: derived from CausVid-Plus"
                ),
                **_SHARED,
            },
            WAN_14B,
        ),
    )
}


def known_model(name: str) -> KnownModel:
    """A model by name. Raises: ModelStoreError, naming those there are."""
    if name not in KNOWN:
        raise ModelStoreError(f"no model {name!r} is known; there are {', '.join(KNOWN)}")
    return KNOWN[name]


@dataclass(frozen=True)
class Installed:
    """A model folder on this machine; `fault`: why it cannot be used, where that shows without reading the weights."""

    name: str
    folder: Path
    size_bytes: int
    fault: str = ""


def installed(roots: Sequence[Path] | None = None) -> list[Installed]:
    """The models on this machine: shipped with Livebrush, then downloaded or converted."""
    found = []
    for root in roots or (MODELS_DIR, user_models_dir()):
        for path in sorted(root.glob(f"*/{CONFIG_FILE}")):
            if path.parent.name.startswith("."):
                continue
            size = sum(file.stat().st_size for file in path.parent.rglob("*") if file.is_file())
            try:
                fault = "" if isinstance(json.loads(path.read_bytes()).get("transformer"), dict) else "no transformer"
            except (OSError, ValueError, AttributeError) as error:
                fault = f"{CONFIG_FILE} is not valid: {error}"
            found.append(Installed(path.parent.name, path.parent, size, fault))
    return found


def find_folder(model: str) -> Path:
    """The folder of a model given by name or path. Raises: ModelStoreError."""
    for candidate in (MODELS_DIR / model, user_models_dir() / model, Path(model)):
        if (candidate / CONFIG_FILE).is_file():
            return candidate
    raise ModelStoreError(
        f"no model {model!r} on this machine; there are {', '.join(each.name for each in installed())}; "
        f"`livebrush models download` gets {', '.join(KNOWN)}"
    )


def parse_source(text: str) -> tuple[str, RemoteFile]:
    """PART=OWNER/NAME:PATH or PART=OWNER/NAME:PATH@REVISION. Raises: ValueError."""
    match = re.fullmatch(r"(\w+)=([\w.-]+/[\w.-]+):([^@]+)(?:@(.+))?", text)
    if match is None or match[1] not in (*PARTS, LIGHT_PART):
        raise ValueError(
            f"{text!r} must be PART=OWNER/NAME:PATH or PART=OWNER/NAME:PATH@REVISION, with PART one of "
            f"{', '.join((*PARTS, LIGHT_PART))}"
        )
    return match[1], RemoteFile(match[2], match[3], match[4] or "main")


@dataclass(frozen=True)
class DownloadOptions:
    """How to download.

    sources: other places for some parts, such as a mirror or a fixed revision. light_vae: a local file of TAEHV.
    downloaded files beside the converted ones.
    """

    sources: Mapping[str, RemoteFile] = field(default_factory=dict)
    light_vae: Path | None = None
    force: bool = False
    keep: bool = False


def download(
    model: KnownModel,
    options: DownloadOptions | None = None,
    *,
    root: Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """Fetch a model's parts and convert them; returns its folder.

    Raises: HubError, ModelStoreError, WeightsError.
    """
    options = options or DownloadOptions()
    root = root or user_models_dir()
    report = progress or _silent
    target = _target(root, model.name, force=options.force)
    with _locked(root):
        remotes = {part: source.remote for part, source in model.sources.items()} | dict(options.sources)
        report("asking the hub", 0, len(remotes))
        found = {part: find(remote) for part, remote in remotes.items()}
        places = {part: _place(root, each) for part, each in found.items()}
        missing = sum(each.size_bytes for part, each in found.items() if not (places[part] / each.remote.path).exists())
        check_space(root, missing + model.folder_bytes, f"{model.name} with its downloads")
        files = {}
        for part, each in found.items():
            name = f"downloading {Path(each.remote.path).name}"
            files[part] = [fetch(each, places[part], lambda done, total, name=name: report(name, done, total))]  # type: ignore[misc]
        if options.light_vae is not None:
            files[LIGHT_PART] = [options.light_vae]
        origin = {part: f"{each.remote.repo}/{each.remote.path} at {each.commit}" for part, each in found.items()}
        _install(model, files, target, origin, report)
        if not options.keep:
            for place in set(places.values()):
                shutil.rmtree(place, ignore_errors=True)
    return target


def convert(
    model: KnownModel,
    files: Mapping[str, Sequence[Path]],
    *,
    name: str | None = None,
    root: Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Make a model folder from files that are here, in any published layout; returns it.

    Args:
        model: whose shape and settings the files have.
        files: for each part its files, or one folder of safetensors files; `taehv` may be left out, and so may `text`
            and `tokenizer` together: such a model knows no prompts but those stored with it.
        name: of the new folder; the model's own by default.

    Raises: ModelStoreError for missing parts; WeightsError for files that do not fit.
    """
    missing = {"transformer", "vae"} - files.keys()
    if ("text" in files) != ("tokenizer" in files):
        missing |= {"text", "tokenizer"} - files.keys()
    if missing:
        raise ModelStoreError(
            f"files for {', '.join(sorted(missing))} are missing; give --{' and --'.join(sorted(missing))}"
        )
    root = root or user_models_dir()
    target = _target(root, name or model.name, force=force)
    with _locked(root):
        check_space(root, model.folder_bytes, f"{model.name}, converted,")
        origin = {part: ", ".join(path.name for path in paths) for part, paths in files.items()}
        _install(model, files, target, origin, progress or _silent)
    return target


def verify(folder: Path, progress: Progress | None = None) -> ModelConfig:
    """Check sizes, hashes and every key of a model folder. Raises: WeightsError."""
    from engine.wan.weights import verify_model

    report = progress or _silent
    return verify_model(folder, lambda share, what: report(f"checking {what}", round(1000 * share), 1000))


def _install(
    model: KnownModel,
    files: Mapping[str, Sequence[Path]],
    target: Path,
    origin: Mapping[str, str],
    report: Progress,
) -> None:
    from pydantic import TypeAdapter

    from engine.wan.checkpoints import WeightsError, original_from_any, unwrap
    from engine.wan.save import TextParts, save_wan_model
    from engine.wan.text_encoder import Style
    from engine.wan.umt5 import UMT5_XXL, umt5_from_any
    from engine.wan.weights import STYLES_FILE

    tensors = {part: _gather(files[part]) for part in files if part != "tokenizer"}
    originals = {}
    for part in ("transformer", "vae"):
        layout, originals[part] = original_from_any(tensors[part])
        if layout.part != part:
            raise WeightsError(f"{_names(files[part])} holds a {layout.part}, not a {part}: were two files swapped?")
    text = None
    if "text" in files:
        config = dict(model.text or UMT5_XXL)
        tokenizer = _tokenizer(files["tokenizer"])
        text = TextParts(umt5_from_any(unwrap(tensors["text"]), config), config, tokenizer)
    light = (model.light_vae, unwrap(tensors[LIGHT_PART])) if LIGHT_PART in files else None
    styles = TypeAdapter(tuple[Style, ...]).validate_json((MODELS_DIR / DEFAULT_MODEL / STYLES_FILE).read_bytes())
    with _staged(target) as folder:
        save_wan_model(
            folder,
            name=target.name,
            transformer=(model.transformer, originals["transformer"]),
            vae=(model.vae, originals["vae"]),
            light_vae=light,
            text=text,
            sampling=model.sampling,
            serving=model.serving,
            styles=styles,
            card=_card(model, origin),
            source=origin,
            progress=lambda share, what: report(what, round(1000 * share), 1000),
        )


def _gather(paths: Sequence[Path]) -> dict[str, Any]:
    """What several checkpoint files, or the safetensors files of a folder, hold together."""
    from engine.wan.checkpoints import WeightsError, read_checkpoint

    gathered: dict[str, Tensor] = {}
    for path in paths:
        shards = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not shards:
            raise WeightsError(f"{path} holds no safetensors files")
        for shard in shards:
            content = read_checkpoint(shard)
            if twice := sorted(gathered.keys() & content.keys()):
                raise WeightsError(f"{shard}: {twice[0]} is in another of the files too; give each part once")
            gathered |= content
    return gathered


def _tokenizer(paths: Sequence[Path]) -> bytes:
    path = paths[0] / "tokenizer.json" if paths[0].is_dir() else paths[0]
    try:
        content = path.read_bytes()
        if "model" not in json.loads(content):
            raise ValueError("no model in it")
    except OSError as error:
        raise ModelStoreError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise ModelStoreError(f"{path} is no tokenizer.json: {error}; take the one of google/umt5-xxl") from error
    return content


def _card(model: KnownModel, origin: Mapping[str, str]) -> str:
    lines = [f"# {model.name}", "", model.summary, "", "Converted by Livebrush; trained and published by others:", ""]
    for part, place in origin.items():
        licence = f" ({model.sources[part].licence})" if part in model.sources else ""
        lines.append(f"- {part}: {place}{licence}")
    return "\n".join([*lines, ""])


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(str(path) for path in paths)


def _place(root: Path, found: FoundFile) -> Path:
    return root / DOWNLOADS_DIR / found.remote.repo.replace("/", "--") / found.commit


def _target(root: Path, name: str, *, force: bool) -> Path:
    if not re.fullmatch(r"[\w][\w.-]*", name):
        raise ModelStoreError(f"{name!r} cannot name a folder; use letters, digits, dots, hyphens and underscores")
    target = root / name
    if target.exists() and not force:
        raise ModelStoreError(f"{target} is there already; --force replaces it")
    return target


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """One command at a time for a folder of models. Raises: ModelStoreError."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with (root / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ModelStoreError(f"another `livebrush models` works in {root}: wait until it is done") from error
            yield
    except PermissionError as error:
        raise ModelStoreError(f"cannot write {root}: {error.strerror}; set LIVEBRUSH_MODELS_DIR") from error


@contextlib.contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target` if all goes well, in place of what was there, else is removed."""
    staging = target.with_name(f".{target.name}.part")
    # Left behind by a command that was killed.
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        staging.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _silent(what: str, done: int, total: int) -> None:
    """Progress that nobody asked for."""
