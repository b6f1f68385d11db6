"""How near the exported model comes to its teachers, on people it never saw.

Per style: PSNR to the teacher beside that of the unstyled source and of the autoencoder's round trip of the
teacher (the ceiling); PSNR with a phrase never trained on; how often the output is nearest to the teacher asked for;
and how much a frame differs from its predecessor moved along the source's optical flow (warp error), beside the
teacher's own. Each is a mean over a few clips: figures to compare runs by, not a benchmark.

    python -m engine.training.evaluate --work .work/tiny --clips 6
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from engine.training.data import STYLES as STYLE_IDS
from engine.training.data import Shard, shard_paths
from engine.training.export import MODEL_FOLDER, rewrite_card
from engine.training.phrases import BY_ID
from engine.training.train_vae import decode_clip, to_tensor, to_uint8
from engine.wan.vae import VAEState
from engine.wan.weights import Model, load_model

Clip = NDArray[np.uint8]


@torch.inference_mode()
def restyle_clip(model: Model, clip_THWC: Clip, prompt: str, seed: int = 0) -> Clip:
    """Restyle 1 + 4k frames in one step a chunk, with one noise tensor for the whole clip, as the engine does."""
    source = model.vae.encode(to_tensor(clip_THWC[None]), VAEState())[0]
    noise = torch.randn(source[:, :1].shape, generator=torch.Generator().manual_seed(seed)).expand_as(source)
    encoded = model.text.encode(prompt)
    context = model.transformer.prompt_context(encoded.states[None], encoded.mean[None])
    residual = model.transformer.forward_clip(noise, source, torch.tensor([1000.0]), context)
    return np.asarray(to_uint8(decode_clip(model.vae, source + residual))[0])


def psnr(a: Clip, b: Clip) -> float:
    """Peak signal to noise ratio in dB."""
    return float(-10 * np.log10(np.square(a.astype(np.float32) - b).mean() / 255**2 + 1e-9))


def warp_error(clip_THWC: Clip, source_THWC: Clip) -> float:
    """Mean absolute difference between a frame and its predecessor moved along the source's flow, 0 to 255."""
    rows, columns = np.mgrid[0 : clip_THWC.shape[1], 0 : clip_THWC.shape[2]].astype(np.float32)
    errors = []
    for i in range(1, len(clip_THWC)):
        before, now = (cv2.cvtColor(source_THWC[k], cv2.COLOR_RGB2GRAY) for k in (i - 1, i))
        flow = np.zeros((*now.shape, 2), np.float32)
        flow = cv2.calcOpticalFlowFarneback(now, before, flow, 0.5, 3, 15, 3, 5, 1.2, 0)
        moved = cv2.remap(clip_THWC[i - 1], columns + flow[..., 0], rows + flow[..., 1], cv2.INTER_LINEAR)
        errors.append(np.abs(moved.astype(np.float32) - clip_THWC[i]).mean())
    return float(np.mean(errors))


def teachers_of(shard: Shard, clip: int) -> dict[str, Clip]:
    """All teachers' versions of a validation clip, the plain one included."""
    versions = {STYLE_IDS[number]: shard.styled[clip, k] for k, number in enumerate(shard.styles[clip])}
    return {"photo": shard.clean[clip], **versions}


@torch.inference_mode()
def ceiling(model: Model, clip_THWC: Clip) -> Clip:
    """The autoencoder's round trip."""
    latent = model.vae.encode(to_tensor(clip_THWC[None]), VAEState())[0]
    return np.asarray(to_uint8(decode_clip(model.vae, latent))[0])


def measure(model: Model, work: Path, clips: int) -> dict[str, dict[str, float]]:
    """Figures per style and their mean over styles ("mean")."""
    sums: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for k, (shard, i) in enumerate(_validation(work, clips)):
        teachers = teachers_of(shard, i)
        for style, teacher in teachers.items():
            own = sums[style]
            phrases = BY_ID[style]
            known = restyle_clip(model, shard.source[i], phrases.phrases[k % len(phrases.phrases)])
            unseen = restyle_clip(model, shard.source[i], phrases.held_out[k % len(phrases.held_out)])
            own["psnr_db"].append(psnr(known, teacher))
            own["source_psnr_db"].append(psnr(shard.source[i], teacher))
            own["ceiling_psnr_db"].append(psnr(ceiling(model, teacher), teacher))
            own["unseen_phrase_psnr_db"].append(psnr(unseen, teacher))
            for key, out in (("nearest_is_asked", known), ("nearest_is_asked_unseen", unseen)):
                nearest = max(teachers, key=lambda name, out=out: psnr(out[-1], teachers[name][-1]))  # type: ignore[misc]
                own[key].append(float(nearest == style))
            own["warp_error"].append(warp_error(known, shard.clean[i]))
            own["teacher_warp_error"].append(warp_error(teacher, shard.clean[i]))
    figures = {style: {key: round(float(np.mean(v)), 2) for key, v in own.items()} for style, own in sums.items()}
    keys = next(iter(figures.values()))
    mean = {key: round(float(np.mean([own[key] for own in figures.values()])), 2) for key in keys}
    return {**figures, "mean": {**mean, "clips": float(clips)}}


def _validation(work: Path, clips: int) -> list[tuple[Shard, int]]:
    shards = [Shard.load(path) for path in shard_paths(work, "validation")]
    return [(shard, i) for shard in shards for i in range(len(shard.source))][:clips]


def contact_sheet(model: Model, work: Path, clip: int, styles: list[str], frame: int = -1) -> Clip:
    """Rows of source, teacher and model for a held-out clip, one style a column."""
    shard, i = _validation(work, clip + 1)[clip]
    teachers = teachers_of(shard, i)
    columns = []
    for style in styles:
        out = restyle_clip(model, shard.source[i], BY_ID[style].prompt)[frame].copy()
        cv2.putText(out, style, (6, 18), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (255, 0, 0), 1)
        columns.append(np.concatenate([shard.source[i][frame], teachers[style][frame], out]))
    return np.concatenate(columns, axis=1)


def save_sheets(model: Model, work: Path, clips: list[int]) -> None:
    """Write sheet_<clip>.png into the working folder: all styles in rows of eight."""
    for clip in clips:
        halves = [contact_sheet(model, work, clip, list(STYLE_IDS[k : k + 8])) for k in range(0, len(STYLE_IDS), 8)]
        width = max(half.shape[1] for half in halves)
        padded = [np.pad(half, ((0, 0), (0, width - half.shape[1]), (0, 0))) for half in halves]
        cv2.imwrite(str(work / f"sheet_{clip}.png"), np.concatenate(padded)[..., ::-1])


def evaluate(work: Path, folder: Path, *, clips: int, sheets: list[int]) -> dict[str, dict[str, float]]:
    """Draw contact sheets, measure (0 clips: not), keep the figures in `work` and put them into the model card."""
    cv2.setNumThreads(1)
    model = load_model(folder, "cpu")
    save_sheets(model, work, sheets)
    if not clips:
        return {}
    figures = measure(model, work, clips)
    (work / "evaluation.json").write_text(json.dumps(figures, indent=2), encoding="utf-8")
    rewrite_card(work, folder)
    return figures


def main() -> None:
    """Command line of this stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(".work/tiny"))
    parser.add_argument("--model", type=Path, default=MODEL_FOLDER)
    parser.add_argument("--clips", type=int, default=6)
    parser.add_argument("--sheets", type=int, nargs="*", default=[0, 1], help="held-out clips to draw sheets of")
    args = parser.parse_args()
    torch.set_num_threads(1)
    figures = evaluate(args.work, args.model, clips=args.clips, sheets=args.sheets)
    print(json.dumps(figures.get("mean", {}), indent=2))


if __name__ == "__main__":
    main()
