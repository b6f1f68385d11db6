"""Colours and moods as colour transforms: what "warm", "night" or "pastel" add to any style, or to the plain camera.

A grade is an affine map of RGB in 0..1, [3, 4]: a matrix and an offset. It lies over the decoded picture, so it costs
no training and no transformer time, combines with every style, and can be scaled, mixed and composed like a number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Rec. 709, on gamma-coded values: good enough for a look.
LUMA = (0.2126, 0.7152, 0.0722)


def identity() -> Tensor:
    """The grade that changes nothing."""
    return torch.eye(3, 4)


def compose(first: Tensor, second: Tensor) -> Tensor:
    """One grade that does `first`, then `second`."""
    matrix = second[:, :3] @ first[:, :3]
    offset = second[:, :3] @ first[:, 3] + second[:, 3]
    return torch.cat((matrix, offset[:, None]), 1)


def mix(parts: Sequence[tuple[float, Tensor | None]]) -> Tensor | None:
    """The weighted mean of grades, where None is the identity; None if all are."""
    if all(grade is None for _, grade in parts):
        return None
    total = sum(weight for weight, _ in parts)
    return torch.stack([weight / total * (identity() if grade is None else grade) for weight, grade in parts]).sum(0)


def scaled(grade: Tensor, strength: float) -> Tensor:
    """A grade at part of its strength; the identity at 0."""
    return torch.lerp(identity(), grade, strength)


def apply(grade: Tensor, frames_TCHW: Tensor) -> Tensor:
    """Grade frames in [-1, 1]; the result may leave that range. Runs where the tensors lie, without a host sync."""
    matrix = grade[:, :3]
    # In [0, 1] it is A x + b; on this scale the offset is A 1 + 2 b - 1.
    offset = matrix.sum(1) + 2 * grade[:, 3] - 1
    return torch.einsum("ij,tjhw->tihw", matrix, frames_TCHW) + offset[:, None, None]


# --- the transforms


def _affine(matrix: Tensor, offset: Sequence[float] = (0.0, 0.0, 0.0)) -> Tensor:
    return torch.cat((matrix.float(), torch.tensor(offset)[:, None]), 1)


def _saturation(amount: float) -> Tensor:
    """0: grey, 1: as it is, above: more vivid."""
    grey = torch.tensor(LUMA).expand(3, 3)
    return _affine(amount * torch.eye(3) + (1 - amount) * grey)


def _gain(red: float, green: float, blue: float, lift: Sequence[float] = (0.0, 0.0, 0.0)) -> Tensor:
    return _affine(torch.diag(torch.tensor((red, green, blue))), lift)


def _contrast(amount: float, pivot: float = 0.5) -> Tensor:
    return _affine(amount * torch.eye(3), ((1 - amount) * pivot,) * 3)


def _tint(red: float, green: float, blue: float, share: float = 0.6) -> Tensor:
    """Towards black to colour to light: `share` of the picture becomes its brightness in this colour."""
    colour = torch.tensor((red, green, blue))
    lit = _affine(0.85 * colour[:, None] * torch.tensor(LUMA)[None], tuple((0.13 * colour).tolist()))
    return torch.lerp(identity(), lit, share)


def _chain(*grades: Tensor) -> Tensor:
    out = identity()
    for grade in grades:
        out = compose(out, grade)
    return out


@dataclass(frozen=True, eq=False)
class Modifier:
    """One colour or mood. words: what people call it, the first is its name. most: the greatest useful amount."""

    id: str
    words: tuple[str, ...]
    grade: Tensor
    most: float = 1.6

    def at(self, amount: float) -> Tensor:
        """The grade at some amount: 1 as it is, below slighter, above stronger."""
        return torch.lerp(identity(), self.grade, min(amount, self.most))


def _modifier(id_: str, words: str, grade: Tensor, most: float = 1.6) -> Modifier:
    return Modifier(id_, tuple(" ".join(word.split()) for word in words.split(",")), grade, most)


MODIFIERS: tuple[Modifier, ...] = (
    _modifier(
        "warm",
        "warm, warmer, warmth, warm light, warm colors, warm tones, candlelit, candlelight, cozy, toasty, fireside",
        _gain(1.12, 1.0, 0.78, (0.03, 0.01, -0.01)),
    ),
    _modifier(
        "cool",
        "cool, cooler, cold, colder, chilly, icy, frosty, wintry, winter, cold light, cool colors, cool tones, arctic",
        _gain(0.80, 0.97, 1.12, (0.0, 0.01, 0.05)),
    ),
    _modifier(
        "night",
        "night, nighttime, night time, at night, by night, midnight, moonlit, nocturnal, after dark, late at night",
        _chain(_saturation(0.65), _contrast(1.1), _gain(0.36, 0.44, 0.68, (0.0, 0.005, 0.035))),
        1.25,
    ),
    _modifier("dark", "dark, darker, dim, dimmer, dimly lit, low light, shadowy, in the dark", _gain(0.55, 0.55, 0.57)),
    _modifier(
        "bright",
        "bright, brighter, lighter, sunny, sunlit, sunshine, sunlight, daylight, brightly lit, high key, "
        "summer, summery, cheerful, happy, in the sun",
        _gain(1.15, 1.14, 1.06, (0.08, 0.075, 0.05)),
    ),
    _modifier(
        "pastel",
        "pastel, pastels, pastel colors, pastel tones, in pastel, in pastels, candy colors, baby colors, powdery",
        _gain(0.64, 0.64, 0.64, (0.35, 0.33, 0.35)),
        1.2,
    ),
    _modifier(
        "vivid",
        "vivid, vividly, vibrant, saturated, colorful, more color, more colors, rich colors, bold colors, intense, "
        "intense colors, bright colors, strong colors, punchy, vivid colors, vibrant colors, rainbow",
        _chain(_saturation(1.7), _contrast(1.1)),
        1.5,
    ),
    _modifier(
        "muted",
        "muted, faded, washed out, desaturated, subdued, pale, paler, dull, less color, muted colors, soft colors, "
        "earthy, low saturation, drained, bleached, dusty",
        _chain(_saturation(0.45), _contrast(0.82, 0.56)),
        1.4,
    ),
    _modifier(
        "monochrome",
        "monochrome, black and white, black white, b w, bw, grayscale, gray scale, gray, greyscale, monochromatic, "
        "colorless, without color, no color, no colors, achromatic, white and black",
        _saturation(0.0),
        1.0,
    ),
    _modifier(
        "contrast",
        "high contrast, contrasty, more contrast, strong contrast, hard light, harsh light, stark",
        _contrast(1.4, 0.47),
    ),
    _modifier("soft", "low contrast, less contrast, misty, foggy, hazy, fog, mist", _contrast(0.68, 0.62)),
    _modifier(
        "golden",
        "golden, gold, gilded, golden hour, sunset, sunrise, dusk, dawn, at sunset, honey, amber, sun drenched",
        _chain(_tint(1.0, 0.80, 0.42, 0.35), _gain(1.12, 1.02, 0.82, (0.03, 0.01, 0.0))),
        1.5,
    ),
    _modifier(
        "moody",
        "moody, gloomy, somber, melancholy, melancholic, sad, dramatic, brooding, stormy, rainy, spooky, scary, eerie, "
        "haunted, creepy, ominous",
        _chain(_saturation(0.55), _contrast(1.15, 0.55), _gain(0.72, 0.8, 0.84, (0.0, 0.01, 0.02))),
        1.4,
    ),
    _modifier(
        "red", "red, redder, reddish, crimson, scarlet, ruby, blood red, in red, all red", _tint(1.0, 0.22, 0.18)
    ),
    _modifier(
        "green", "green, greener, greenish, emerald, lime, in green, all green, olive, jade", _tint(0.30, 0.95, 0.35)
    ),
    _modifier(
        "blue",
        "blue, bluer, bluish, navy, azure, indigo, cobalt, in blue, all blue, sapphire, underwater",
        _tint(0.25, 0.50, 1.0),
    ),
    _modifier(
        "purple",
        "purple, purplish, violet, lavender, lilac, magenta, in purple, all purple, mauve, plum",
        _tint(0.68, 0.32, 1.0),
    ),
    _modifier(
        "pink",
        "pink, pinker, pinkish, rosy, hot pink, in pink, all pink, barbie, bubblegum, salmon",
        _tint(1.0, 0.45, 0.72),
    ),
    _modifier(
        "orange",
        "orange, orangey, tangerine, autumn, autumnal, in orange, all orange, copper, rusty",
        _tint(1.0, 0.58, 0.2),
    ),
    _modifier("yellow", "yellow, yellowish, lemon, in yellow, all yellow, mustard", _tint(1.0, 0.9, 0.25)),
    _modifier("teal", "teal, turquoise, cyan, aqua, aquamarine, in teal, all teal, sea green", _tint(0.16, 0.85, 0.85)),
)
BY_ID = {modifier.id: modifier for modifier in MODIFIERS}

# Words before a modifier (or "ish" inside it) that say how much of it; 0 takes it away.
AMOUNTS: dict[str, float] = {
    **dict.fromkeys(("very", "really", "extremely", "super", "strongly", "deeply", "deep", "intensely", "ultra"), 1.5),
    **dict.fromkeys(("heavily", "totally", "completely", "incredibly", "much", "too", "hyper"), 1.5),
    **dict.fromkeys(("slightly", "bit", "little", "somewhat", "subtly", "subtle", "faintly", "faint", "mildly"), 0.5),
    **dict.fromkeys(("lightly", "touch", "hint", "gently", "softly", "kinda", "rather", "tad", "fairly"), 0.5),
    **dict.fromkeys(("not", "no", "without", "never", "less", "isnt", "dont"), 0.0),
}
SLIGHT_ENDING, SLIGHT = ("reddish", "greenish", "bluish", "purplish", "pinkish", "yellowish"), 0.6


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# A colour of one of these is what a person wears or what stands there, not the light.
OBJECTS = _words(
    "shirt tshirt hair eyes dress hat cap jacket coat sweater jumper pants trousers jeans skirt scarf tie suit "
    "shoes car wall walls door chair sofa couch curtain curtains lipstick nose beard glasses flower flowers rose "
    "roses ball balloon balloons carpet cat dog panda bull"
)

# Moods that act also from inside a style's phrase: sepia must give way in "a black and white film".
FREE: dict[str, frozenset[str]] = {"vintage": frozenset({"monochrome"})}

# A word that a style means anyway says nothing more: a neon picture is dark, a night vision green.
OWN: dict[str, frozenset[str]] = {
    "neon": frozenset({"night", "dark", "bright", "vivid"}),
    "nightvision": frozenset({"night", "dark", "green", "monochrome"}),
    "starry": frozenset({"night", "dark", "blue", "yellow", "golden"}),
    "thermal": frozenset({"warm", "cool", "red", "night", "vivid"}),
    "ink": frozenset({"dark", "monochrome", "contrast"}),
    "pencil": frozenset({"dark", "monochrome", "soft"}),
    "chalk": frozenset({"dark", "monochrome"}),
    "blueprint": frozenset({"blue"}),
    "halftone": frozenset({"monochrome"}),
    "popart": frozenset({"vivid", "bright"}),
    "vintage": frozenset({"muted"}),
    "mosaic": frozenset({"golden"}),
    "stainedglass": frozenset({"bright", "vivid"}),
    "marble": frozenset({"monochrome"}),
    "impressionist": frozenset({"soft", "bright"}),
}
