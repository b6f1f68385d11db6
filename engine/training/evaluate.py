"""How near the model comes to its teachers on people it never saw, streamed through the engine as it is served.

For every style the model knows: likeness to the steadied teacher (PSNR, SSIM, a perceptual distance, Magenta's style
vector), whether the style is recognised (nearest of all teachers, and a classifier trained apart), what is kept of the
person (edges, landmarks), and how steady it is (warp error, flicker, seams, a prompt switch, drift). Beside it in the
same table: the teacher frame by frame, the autoencoder's round trip of the teacher, the input itself and, if asked
for, another model. Figures go to evaluation.json in the working folder and into the model card, pictures to
docs/pictures.

    python -m engine.training.evaluate --people ../shared/data --work .work/tiny            (a quarter of an hour)
    python -m engine.training.evaluate --people ../shared/data --work .work/tiny --quick    (minutes, no card)
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from engine.api import StreamParams
from engine.config import EngineSettings
from engine.pipeline import Pipeline
from engine.training.card import measured, with_figures
from engine.training.classifier import StyleVectors, style_judge
from engine.training.export import MODEL_FOLDER
from engine.training.heldout import HeldOut, Teachers, held_out_clips, still_noisy
from engine.training.measures import (
    edges_kept,
    flicker,
    frames_until,
    landmarks_kept,
    psnr,
    seam_ratio,
    ssim,
    token_steps,
    warp_error,
)
from engine.training.phrases import BY_ID
from engine.training.playback import drift, pipeline_for, play, restyle_clip, round_trip, speed, switch, weight
from engine.training.sheets import contact_sheet, motion_strip, save_jpeg, save_png
from engine.training.teachers import TEACHERS
from engine.wan.weights import CARD_FILE, Model, load_model
from engine.worker import dtype_of

__all__ = ["evaluate", "psnr", "restyle_clip"]

Clip = NDArray[np.uint8]
Size = tuple[int, int]

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "docs" / "pictures"
PEOPLE = Path("../shared/data")
# Prompts a person might type, each with the style expected; written before any training and never trained on.
UNSEEN_PROMPTS = ROOT / "tests" / "engine" / "unseen_phrases.txt"
SPEED_SIZES: tuple[Size, ...] = ((256, 256), (384, 224))
SHORT_FRAMES, STILL_FRAMES = 9, 33
SWITCH_CHUNK = 3
STRIP_STYLES = ("comic", "watercolor", "neon", "ukiyo", "pencil")
STRIP_FIRST, STRIP_FRAMES = 3, 10


@dataclass(frozen=True)
class Plan:
    """What one evaluation is asked to do.

    compare: a second model folder for the same table. frames: of a clip, 1 + 4k. sheets: held-out clips shown in the
    contact sheet. baselines: whether the teacher frame by frame is run too.
    """

    people: Path
    work: Path
    model: Path
    compare: Path | None = None
    sizes: tuple[Size, ...] = ((256, 256),)
    clips: int = 6
    frames: int = 49
    steps: int = 1
    phrases_per_clip: int = 2
    sheets: tuple[int, ...] = (0, 1, 3)
    drift_minutes: float = 0.5
    drift_styles: tuple[str, ...] = ("comic",)
    quick: bool = False
    pictures: Path = PICTURES


class Judge(Protocol):
    """Tells styles apart; see `engine.training.classifier.StyleJudge`."""

    def style_of(self, frame_HWC: Clip) -> str:
        """The style of a frame."""

    def distance(self, a_HWC: Clip, b_HWC: Clip) -> float:
        """Perceptual distance of two frames."""


class Vectors(Protocol):
    """Compares styles of painting; see `engine.training.classifier.StyleVectors`."""

    def cosine(self, a_HWC: Clip, b_HWC: Clip) -> float:
        """Cosine of two frames' style vectors."""


@dataclass
class Table:
    """Numbers by candidate (a model or a baseline), style and measure, averaged in the end."""

    _found: dict[str, dict[str, dict[str, list[float]]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    )

    def add(self, candidate: str, style: str, figures: Mapping[str, float]) -> None:
        """One observation of some measures."""
        for name, value in figures.items():
            self._found[candidate][style][name].append(float(value))

    def means(self) -> dict[str, dict[str, dict[str, float]]]:
        """Mean of every measure, rounded to four places."""
        return {
            candidate: {
                style: {name: round(float(np.mean(values)), 4) for name, values in measures.items()}
                for style, measures in styles.items()
            }
            for candidate, styles in self._found.items()
        }


class Bench:
    """One size: clips, their teachers and the models, and what is measured of them."""

    def __init__(
        self,
        plan: Plan,
        models: Mapping[str, Model],
        teachers: Teachers,
        judge: Judge,
        vectors: Vectors,
        clips: Sequence[HeldOut],
    ) -> None:
        self.plan, self.models, self.teachers = plan, models, teachers
        self._judge, self._vectors, self.clips = judge, vectors, clips
        self.table = Table()
        self.stills: dict[str, list[tuple[Clip, Clip]]] = defaultdict(list)
        self.strips: dict[str, Clip] = {}
        self._pipelines: dict[str, Pipeline] = {name: pipeline_for(m, clips[0].clean) for name, m in models.items()}

    def params(self, prompt: str, seed: int = 0) -> StreamParams:
        """Parameters of a stream: full strength, as many steps as planned."""
        return StreamParams(prompt=prompt, steps=self.plan.steps, seed=seed)

    def known(self, name: str) -> list[str]:
        """Styles that a model lists and that have a teacher."""
        listed = {style.id for style in self.models[name].styles.styles}
        return [style for style in self.teachers.styles if style in listed]

    # --- measures of one output

    def likeness(self, out: Clip, teacher: Clip, clip: HeldOut) -> dict[str, float]:
        """How like the teacher an output is."""
        pairs = [(out[k], np.asarray(teacher[k])) for k in clip.sampled]
        return {
            "psnr_db": psnr(out, teacher),
            "ssim": float(np.mean([ssim(a, b) for a, b in pairs])),
            "perceptual": float(np.mean([self._judge.distance(a, b) for a, b in pairs])),
            "style_cosine": float(np.mean([self._vectors.cosine(a, b) for a, b in pairs[::2]])),
            "token_steps": float(np.mean([token_steps(a, b) for a, b in pairs])),
        }

    def character(self, out: Clip, clip: HeldOut) -> dict[str, float]:
        """What an output keeps of the person, and how steady it is: measures that need no teacher."""
        kept = [(np.asarray(out[k]), clip.clean[k], clip.faces[k]) for k in clip.sampled]
        return {
            "edges_kept": float(np.mean([edges_kept(a, b) for a, b, _ in kept])),
            "landmarks_kept": float(np.mean([landmarks_kept(a, b, face) for a, b, face in kept])),
            "warp_error": warp_error(out, clip.motion),
            "seam": seam_ratio(out),
        }

    def recognised(self, out: Clip, style: str, clip: HeldOut) -> dict[str, float]:
        """Whether the classifier takes the output for the style."""
        return {"classifier": float(np.mean([self._judge.style_of(np.asarray(out[k])) == style for k in clip.sampled]))}

    def nearest(self, frame: Clip, versions: Mapping[str, Clip], at: int, styles: Iterable[str]) -> str:
        """The style whose teacher's frame is nearest by PSNR."""
        return max(styles, key=lambda style: psnr(frame, versions[style][at]))

    # --- passes

    def run_clip(self, number: int) -> None:
        """All candidates on one clip in all styles."""
        clip = self.clips[number]
        versions = self.teachers.steadied(clip)
        single = {} if self.plan.quick else self.teachers.per_frame(clip)
        of_input = self.character(clip.source, clip)
        for style in self.teachers.styles:
            teacher = versions[style]
            self.table.add("input", style, self.likeness(clip.source, teacher, clip) | of_input)
            self.table.add("teacher", style, self.character(teacher, clip) | self.recognised(teacher, style, clip))
            if single:
                figures = self.likeness(single[style], teacher, clip) | self.character(single[style], clip)
                self.table.add("teacher per frame", style, figures)
            first_model = next(iter(self.models.values()))
            returned = round_trip(first_model, np.asarray(teacher))
            figures = self.likeness(returned, teacher, clip) | self.character(returned, clip)
            self.table.add("round trip", style, figures | self.recognised(returned, style, clip))
            for name in self.models:
                if style in self.known(name):
                    self._run_style(name, number, style, versions)

    def _run_style(self, name: str, number: int, style: str, versions: Mapping[str, Clip]) -> None:
        clip, known = self.clips[number], self.known(name)
        out = play(self._pipelines[name], clip.source, self.params(BY_ID[style].prompt))
        teacher = versions[style]
        self.table.add(name, style, self.likeness(out, teacher, clip) | self.character(out, clip))
        self.table.add(name, style, self.recognised(out, style, clip))
        self.table.add(name, style, {"nearest_known": self.nearest(out[-1], versions, -1, known) == style})
        for measure, phrases in (("nearest_known", BY_ID[style].phrases), ("nearest_unseen", BY_ID[style].held_out)):
            if self.plan.quick and measure == "nearest_known":
                continue
            for k in range(self.plan.phrases_per_clip):
                phrase = phrases[(number * self.plan.phrases_per_clip + k) % len(phrases)]
                short = play(self._pipelines[name], clip.source[:SHORT_FRAMES], self.params(phrase))
                right = self.nearest(short[-1], versions, SHORT_FRAMES - 1, known) == style
                self.table.add(name, style, {measure: right})
        if name == "model":
            self._keep_pictures(number, style, teacher, out)

    def _keep_pictures(self, number: int, style: str, teacher: Clip, out: Clip) -> None:
        if number in self.plan.sheets:
            self.stills[style].append((np.asarray(teacher[-1]), out[-1]))
        if number == 0 and style in STRIP_STYLES:
            shown = slice(STRIP_FIRST, STRIP_FIRST + STRIP_FRAMES)
            self.strips.setdefault("source", self.clips[0].source[shown])
            self.strips[f"{style}: teacher"] = np.asarray(teacher[shown])
            self.strips[f"{style}: model"] = out[shown]

    def run_still(self, number: int = 1) -> None:
        """A still scene under noise: does the output rest? And does another seed make another picture?"""
        clip = self.clips[min(number, len(self.clips) - 1)]
        noisy = still_noisy(clip, SHORT_FRAMES + 8 if self.plan.quick else STILL_FRAMES)
        settled = slice(5, None)
        before = flicker(noisy[settled])
        for name, pipeline in self._pipelines.items():
            for style in self.known(name):
                prompt = BY_ID[style].prompt
                out = play(pipeline, noisy, self.params(prompt))
                other = play(pipeline, noisy[:SHORT_FRAMES], self.params(prompt, seed=1))
                figures = {"flicker_ratio": flicker(out[settled]) / before}
                self.table.add(name, style, figures | {"other_seed_db": psnr(out[:SHORT_FRAMES], other)})

    def run_dials(self, number: int = 1) -> None:
        """Strength 0 is the camera, a half lies between; two and four steps are no worse than one."""
        clip = self.clips[min(number, len(self.clips) - 1)]
        source, versions = clip.source[:SHORT_FRAMES], self.teachers.steadied(clip)
        pipeline = self._pipelines["model"]
        for style in self.known("model"):
            teacher = versions[style][:SHORT_FRAMES]

            def out(prompt: str = BY_ID[style].prompt, strength: float = 1.0, steps: int = 1) -> Clip:
                return play(pipeline, source, StreamParams(prompt=prompt, strength=strength, steps=steps))

            none, half, full = out(strength=0.0), out(strength=0.5), out()
            middle = np.asarray((none.astype(np.uint16) + full) // 2, np.uint8)
            figures = {"strength_0_db": psnr(none, source), "half_to_middle_db": psnr(half, middle)}
            for steps in (2, 4):
                figures[f"steps_{steps}_gain_db"] = psnr(out(steps=steps), teacher) - psnr(full, teacher)
            self.table.add("model", style, figures)

    def run_switches(self, number: int = 0) -> None:
        """From each style to the one after it in the list, in mid-stream: frames until the new one is nearest."""
        clip = self.clips[number]
        versions = self.teachers.steadied(clip)
        for name, pipeline in self._pipelines.items():
            styles = self.known(name)
            for before, after in zip(styles, styles[1:] + styles[:1], strict=True):
                settings = [(0, self.params(BY_ID[before].prompt)), (SWITCH_CHUNK, self.params(BY_ID[after].prompt))]
                border = 1 + 4 * (SWITCH_CHUNK - 1)
                out = switch(pipeline, clip.source[: border + 4], settings)
                nearest = [self.nearest(out[k], versions, k, styles) for k in range(border, len(out))]
                self.table.add(name, after, {"switch_frames": frames_until(nearest, after)})

    def run_prompts(self, name: str, prompts: Sequence[tuple[str, str]]) -> dict[str, Any]:
        """The prompts of UNSEEN_PROMPTS whose style the model knows: how many come out as expected, and the misses."""
        known = self.known(name)
        asked = [(style, prompt) for style, prompt in prompts if style in known]
        misses = []
        for k, (style, prompt) in enumerate(asked):
            clip = self.clips[k % len(self.clips)]
            out = play(self._pipelines[name], clip.source[:SHORT_FRAMES], self.params(prompt))
            got = self.nearest(out[-1], self.teachers.steadied(clip), SHORT_FRAMES - 1, known)
            if got != style:
                misses.append(f"{prompt}: {style} expected, {got} seen")
        return {"asked": len(asked), "right": len(asked) - len(misses), "of_list": len(prompts), "misses": misses}

    def run_drift(self) -> dict[str, dict[str, float]]:
        """A long stream of the first clip in some styles."""
        if self.plan.drift_minutes <= 0:
            return {}
        clip, pipeline = self.clips[0], self._pipelines["model"]
        return {
            style: _rounded(drift(pipeline, clip.source, self.params(BY_ID[style].prompt), self.plan.drift_minutes))
            for style in self.plan.drift_styles
            if style in self.known("model")
        }


def read_prompts(path: Path = UNSEEN_PROMPTS) -> list[tuple[str, str]]:
    """Pairs of style and prompt from a file of lines "style | prompt"; none where the file is missing."""
    if not path.exists():
        return []
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    return [(style.strip(), prompt.strip()) for style, prompt in (line.split("|", 1) for line in lines)]


def evaluate(
    work: Path, folder: Path, *, people: Path = PEOPLE, clips: int = 6, sheets: Sequence[int] = (0, 1, 3)
) -> dict[str, Any]:
    """Judge one model folder with the usual plan: figures, card, pictures."""
    return run(Plan(people=people, work=work, model=folder, clips=clips, sheets=tuple(sheets)))


def run(plan: Plan) -> dict[str, Any]:
    """Measure, draw and write what `plan` says; returns what evaluation.json holds."""
    cv2.setNumThreads(1)
    dtype = dtype_of(EngineSettings())  # as it is served on this machine
    models = {"model": load_model(plan.model, "cpu", dtype)}
    if plan.compare:
        models["compare"] = load_model(plan.compare, "cpu", dtype)
    listed = {style.id for model in models.values() for style in model.styles.styles}
    styles = [style for style in TEACHERS if style in BY_ID]
    teachers = Teachers(plan.work, [style for style in styles if style in listed])
    judge, vectors = style_judge(plan.people, plan.work, teachers), StyleVectors()
    figures: dict[str, Any] = {
        "format": 3,
        "model": models["model"].config.name,
        "sha256": models["model"].config.sha256,
        "compare": str(plan.compare) if plan.compare else None,
        "frames": plan.frames,
        "steps": plan.steps,
        "offers_seed": models["model"].config.serving.seed,
        "unknown_styles": [style for style in styles if style not in listed],
        "dtype": str(dtype).removeprefix("torch."),
        "speed": {
            str(kind).removeprefix("torch."): speeds(load_model(plan.model, "cpu", kind))
            for kind in dict.fromkeys((dtype, torch.float32))
        },
        "files": _rounded(weight(plan.model, dtype)),
        "sizes": {},
    }
    for size in plan.sizes:
        clips = held_out_clips(plan.people, plan.work, size=size, frames=plan.frames, count=plan.clips)
        bench = Bench(plan, models, teachers, judge, vectors, clips)
        main = size == plan.sizes[0]
        figures["sizes"][_text(size)] = run_size(bench, whole=main)
        if main:
            prompts = read_prompts()
            figures["prompts"] = {name: bench.run_prompts(name, prompts) for name in models}
            figures["drift"] = bench.run_drift()
            draw(bench, plan)
    write(plan, figures)
    return figures


def speeds(model: Model) -> dict[str, dict[str, float]]:
    """By size, on this thread."""
    return {_text(size): _rounded(speed(model, size)) for size in SPEED_SIZES}


def run_size(bench: Bench, *, whole: bool) -> dict[str, Any]:
    """All candidates at one size; `whole`: with switches and stillness too, else on two clips and no more."""
    began = time.monotonic()
    count = len(bench.clips) if whole else min(2, len(bench.clips))
    for number in range(count):
        bench.run_clip(number)
        print(f"{bench.clips[number].name}: {time.monotonic() - began:.0f} s", flush=True)
    if whole:
        bench.run_still()
        bench.run_switches()
        if not bench.plan.quick:
            bench.run_dials()
    return {"clips": [clip.name for clip in bench.clips[:count]], "candidates": bench.table.means()}


def draw(bench: Bench, plan: Plan) -> None:
    """Contact sheet and motion strip: at full size into the working folder, small ones beside the documents."""
    people = [bench.clips[k].source[-1] for k in sorted(plan.sheets) if k < len(bench.clips)]
    suffix = "_quick" if plan.quick else ""
    height = people[0].shape[0]
    save_png(plan.work / f"sheet{suffix}.png", contact_sheet(people, bench.stills, cell_px=height))
    borders = [k - STRIP_FIRST for k in range(1, STRIP_FIRST + STRIP_FRAMES, 4)]
    if bench.strips:
        save_png(plan.work / f"motion{suffix}.png", motion_strip(bench.strips, cell_px=height, borders=borders))
    if plan.quick:
        return
    small = contact_sheet(people, bench.stills, cell_px=112, blocks=2 if len(bench.stills) > 12 else 1)
    save_jpeg(plan.pictures / "tiny-sheet.jpg", small)
    if bench.strips:
        save_jpeg(plan.pictures / "tiny-motion.jpg", motion_strip(bench.strips, cell_px=112, borders=borders))


def write(plan: Plan, figures: dict[str, Any]) -> None:
    """evaluation.json and the model card; a quick run leaves both alone and writes evaluation_quick.json."""
    name = "evaluation_quick.json" if plan.quick else "evaluation.json"
    (plan.work / name).write_text(json.dumps(figures, indent=1), encoding="utf-8")
    if not plan.quick:
        path = plan.model / CARD_FILE
        path.write_text(with_figures(path.read_text(encoding="utf-8"), figures), encoding="utf-8")


def _rounded(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in figures.items()}


def _text(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def _size(text: str) -> Size:
    width, height = text.split("x")
    return int(width), int(height)


def main() -> None:
    """Command line of this stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=Path, default=PEOPLE)
    parser.add_argument("--work", type=Path, default=Path(".work/tiny"))
    parser.add_argument("--model", type=Path, default=MODEL_FOLDER, help="the model folder to judge")
    parser.add_argument("--compare", type=Path, help="a second model folder for the same table")
    parser.add_argument(
        "--sizes", type=_size, nargs="+", default=[(256, 256)], help="the first in full: 256x256 384x224"
    )
    parser.add_argument("--clips", type=int, default=6)
    parser.add_argument("--frames", type=int, default=49, help="of a clip, where it lasts: 1 + 4k")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--sheets", type=int, nargs="*", default=[0, 1, 3], help="clips shown in the contact sheet")
    parser.add_argument("--drift-minutes", type=float, default=0.5, help="of video; 60 takes 40 minutes a style")
    parser.add_argument("--drift-styles", nargs="+", default=["comic"])
    parser.add_argument("--pictures", type=Path, default=PICTURES, help="folder of the small sheet and strip")
    parser.add_argument("--quick", action="store_true", help="three short clips, no card and no pictures for docs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    plan = Plan(
        people=args.people,
        work=args.work,
        model=args.model,
        compare=args.compare,
        sizes=tuple(args.sizes),
        clips=3 if args.quick else args.clips,
        frames=13 if args.quick else args.frames,
        steps=args.steps,
        phrases_per_clip=1 if args.quick else 2,
        sheets=(0, 1, 2) if args.quick else tuple(args.sheets),
        drift_minutes=0.0 if args.quick else args.drift_minutes,
        drift_styles=tuple(args.drift_styles),
        quick=args.quick,
        pictures=args.pictures,
    )
    figures = run(plan)
    print(measured(figures))


if __name__ == "__main__":
    main()
