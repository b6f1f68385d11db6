"""The styles' teachers: deterministic picture filters, RGB uint8 frame in, RGB uint8 frame out.

The model learns to imitate these. They are written for that: every pattern (dots, hatching, tiles, graph
paper) repeats every 8 or 16 px, because the model sees 8 px latents in 16 px tokens and cannot learn any
other period; thresholds are soft and weak contours are damped, because a hard one flickers with the
camera's noise. Neural teachers (Magenta, 26 paintings) were tried: their strokes are unsteady and a model
of this size learns their palette only, so the paintings here are filters as well.

Axes: H, W frame; C colour. Float pictures are float32 in 0..1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import cv2
import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]
Plane = NDArray[np.float32]
Teacher = Callable[["Frame"], Plane]
Colour = tuple[int, int, int]

SCREEN_PX = 8  # the latent grid: every pattern's period
_GRAIN = np.random.default_rng(3).random((8, 8)).astype(np.float32)  # paper: fixed, repeated over the picture
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


class Frame:
    """One clean frame and what several teachers need of it, computed once."""

    def __init__(self, picture_HWC: Picture) -> None:
        self.picture = np.ascontiguousarray(picture_HWC)
        self.rgb: Plane = self.picture.astype(np.float32) / 255.0
        self.height, self.width = self.picture.shape[:2]

    @cached_property
    def luma(self) -> Plane:
        """Brightness [H, W]."""
        return (self.rgb @ _LUMA).astype(np.float32)

    @cached_property
    def flat(self) -> Plane:
        """Colours [H, W, 3] with texture removed and edges kept."""
        smooth: Picture = self.picture
        for _ in range(2):
            smooth = np.asarray(cv2.bilateralFilter(smooth, 9, 36, 7), np.uint8)
        return smooth.astype(np.float32) / 255.0

    @cached_property
    def flat_luma(self) -> Plane:
        """Brightness of the flat colours [H, W]."""
        return (self.flat @ _LUMA).astype(np.float32)

    @cached_property
    def contours(self) -> Plane:
        """Dark side of edges [H, W]: 0 plain, 1 strong; noise and weak texture are damped to 0."""
        near = blur(self.flat_luma, 0.9)
        difference = blur(self.flat_luma, 2.4) - near
        return ramp(difference, 0.012, 0.060)

    @cached_property
    def gradient(self) -> Plane:
        """Strength of the steepest colour edge [H, W], 1 for a full-scale step over two pixels."""
        soft = blur(self.flat, 1.0)
        gx = cv2.Sobel(soft, cv2.CV_32F, 1, 0, scale=0.25)
        gy = cv2.Sobel(soft, cv2.CV_32F, 0, 1, scale=0.25)
        return np.asarray(np.sqrt(gx * gx + gy * gy).max(-1), np.float32)

    def screen(self, kind: str) -> Plane:
        """A repeating pattern of this frame's size [H, W] in 0..1: dots, hatch, grain, lines, tile or graph."""
        y, x = np.mgrid[0 : self.height, 0 : self.width].astype(np.float32)
        if kind == "dots":
            wave = np.cos(2 * np.pi * (x + 0.5) / 8) + np.cos(2 * np.pi * (y + 0.5) / 8)
            return np.asarray(0.5 + 0.25 * wave, np.float32)
        if kind == "hatch":
            return np.asarray(0.5 + 0.5 * np.cos(2 * np.pi * (x + y) / 8), np.float32)
        if kind == "grain":
            tile = blur(np.tile(_GRAIN, (3, 3)), 0.7)[8:16, 8:16]
            tile = (tile - tile.min()) / (tile.max() - tile.min())
            return np.asarray(tile[np.mod(y, 8).astype(int), np.mod(x, 8).astype(int)], np.float32)
        if kind == "lines":
            return np.asarray(0.5 + 0.5 * np.cos(2 * np.pi * (y + 0.5) / 4), np.float32)
        step = 16 if kind == "graph" else 8
        return np.asarray((x % step == step - 1) | (y % step == step - 1), np.float32)


def blur(plane: Plane, sigma_px: float) -> Plane:
    """Gaussian blur of [H, W] or [H, W, C]."""
    return np.asarray(cv2.GaussianBlur(plane, (0, 0), sigma_px), np.float32)


def ramp(value: Plane, low: float, high: float) -> Plane:
    """Smooth step: 0 below low, 1 above high."""
    t = np.clip((value - low) / (high - low), 0.0, 1.0)
    return np.asarray(t * t * (3.0 - 2.0 * t), np.float32)


def palette(value_HW: Plane, colours: Sequence[Colour]) -> Plane:
    """Map 0..1 to evenly spaced colours, linear in between: [H, W] -> [H, W, 3]."""
    table = np.array(colours, np.float32) / 255.0
    stops = np.linspace(0.0, 1.0, len(colours))
    return np.stack([np.interp(value_HW, stops, table[:, c]) for c in range(3)], -1).astype(np.float32)


def posterise(value: Plane, levels: int, softness: float) -> Plane:
    """Pull 0..1 towards `levels` + 1 even values; `softness` (0..0.5) is the half width of each step."""
    scaled = np.clip(value, 0.0, 0.999) * levels
    step = np.floor(scaled)
    return np.asarray((step + ramp(scaled - step, 0.5 - softness, 0.5 + softness)) / levels, np.float32)


def saturate(rgb: Plane, factor: float) -> Plane:
    """Move colours away from (or towards) their grey by a factor."""
    grey = (rgb @ _LUMA)[..., None]
    return np.clip(grey + (rgb - grey) * factor, 0.0, 1.0).astype(np.float32)


def mix(below: Plane, above: Plane | Sequence[float], share_HW: Plane) -> Plane:
    """Lay a picture or one colour over another by share 0..1."""
    share = share_HW[..., None]
    return np.asarray(below * (1 - share) + np.asarray(above, np.float32) * share, np.float32)


def photo(frame: Frame) -> Plane:
    """The camera's picture as it is."""
    return frame.rgb


def watercolor(frame: Frame) -> Plane:
    """Line and wash on grained paper: light vivid washes, bleached highlights, pigment at the rims, a brown line."""
    wash = blur(frame.flat, 1.2)
    tone = (wash @ _LUMA).astype(np.float32)
    stepped = 0.45 * tone + 0.55 * posterise(tone, 5, 0.3)
    lifted = 0.16 + 0.84 * np.clip(stepped, 0, 1) ** 0.62
    wash = saturate(np.clip(wash * (lifted / (tone + 0.05))[..., None], 0, 1).astype(np.float32), 1.6)
    wash = mix(wash, (0.99, 0.965, 0.915), 0.18 + 0.72 * ramp(tone, 0.50, 0.95))
    rim = ramp(np.abs(blur(stepped, 0.8) - blur(stepped, 3.0)), 0.010, 0.10)
    shade = 0.34 * rim + 0.13 * frame.screen("grain") * (1 - 0.6 * ramp(tone, 0.6, 1.0))
    wash = np.asarray(wash * (1 - shade[..., None] * np.array([0.75, 0.85, 1.0], np.float32)), np.float32)
    return mix(wash, (0.30, 0.20, 0.17), 0.8 * frame.contours)


def comic(frame: Frame) -> Plane:
    """Flat bright colours in few tones, bold black outlines."""
    tone = frame.flat_luma
    stepped = 0.15 * tone + 0.85 * posterise(np.clip(tone * 1.1, 0, 1), 4, 0.16)
    flat = saturate(np.clip(frame.flat * ((stepped + 0.02) / (tone + 0.02))[..., None], 0, 1), 1.7)
    line = np.maximum(
        ramp(blur(frame.flat_luma, 3.2) - blur(frame.flat_luma, 1.1), 0.018, 0.05), 0.9 * (1 - ramp(tone, 0.06, 0.16))
    )
    return mix(flat, (0.04, 0.03, 0.07), line)


def pencil(frame: Frame) -> Plane:
    """Graphite on warm paper: dodged shading, contour lines and diagonal strokes in the shadows."""
    tone = frame.flat_luma
    dodge = np.clip(tone / (blur(tone, 7.0) + 0.02), 0, 1) ** 1.7
    shade = dodge * (0.66 + 0.34 * ramp(tone, 0.0, 0.75))
    shade = shade - 0.30 * frame.screen("hatch") * (1 - ramp(tone, 0.15, 0.62))
    shade = np.clip(shade - 0.55 * frame.contours, 0, 1)
    return palette(np.asarray(shade, np.float32), [(34, 32, 40), (118, 115, 118), (196, 192, 187), (248, 244, 234)])


def ink(frame: Frame) -> Plane:
    """Brush and ink: black shadows and lines on cream paper, hatched half tones."""
    tone = frame.flat_luma
    lines = ramp(blur(tone, 3.0) - blur(tone, 1.0), 0.016, 0.045)
    black = 1 - ramp(blur(tone, 1.2), 0.20, 0.30)
    hatch = ramp(frame.screen("hatch"), 0.55, 0.85) * (1 - ramp(tone, 0.36, 0.50)) * 0.8
    share = np.maximum(np.maximum(lines, black), hatch)
    return mix(np.full_like(frame.rgb, 1.0) * np.array([0.985, 0.965, 0.915], np.float32), (0.05, 0.06, 0.13), share)


def neon(frame: Frame) -> Plane:
    """Glowing contours in the dark; the hue follows the brightness behind them."""
    strength = ramp(frame.gradient, 0.02, 0.22)
    hue = palette(blur(frame.flat_luma, 5.0), [(255, 30, 190), (170, 60, 255), (20, 170, 255), (60, 255, 200)])
    line = strength[..., None] * hue
    glow = blur(np.asarray(line, np.float32), 4.0)
    base = 0.16 * blur(frame.flat, 2.0) * np.array([0.55, 0.45, 1.0], np.float32)
    return np.asarray(np.array([0.02, 0.015, 0.07], np.float32) + base + line + 0.85 * glow, np.float32)


def riso(frame: Frame) -> Plane:
    """Two-ink risograph: warm paper tones and blue dots that grow with the shadow."""
    tone = blur(frame.flat_luma, 1.0)
    dots = 1 / (1 + np.exp(-13 * ((1 - tone) * 1.06 - (1 - frame.screen("dots")))))
    base = palette(tone, [(255, 66, 118), (255, 132, 122), (255, 236, 210)])
    return mix(base, (0.08, 0.22, 0.58), np.asarray(dots, np.float32))


def pixel(frame: Frame) -> Plane:
    """Video-game pixels: 8 px tiles in few vivid colours with a thin seam."""
    small = cv2.resize(frame.flat, (frame.width // 8, frame.height // 8), interpolation=cv2.INTER_AREA)
    small = saturate(np.asarray(small, np.float32), 1.45)
    small = 0.3 * small + 0.7 * posterise(np.clip(small * 1.05, 0, 1), 5, 0.25)
    tiles = cv2.resize(small, (frame.width, frame.height), interpolation=cv2.INTER_NEAREST)
    return np.asarray(tiles * (1 - 0.25 * frame.screen("tile")[..., None]), np.float32)


def ukiyo(frame: Frame) -> Plane:
    """Japanese woodblock: indigo, ochre and paper in flat steps, dark outlines."""
    tone = np.clip((frame.flat_luma - 0.05) * 1.12, 0, 1)
    inks = [(22, 32, 66), (42, 84, 126), (184, 98, 74), (228, 184, 132), (247, 235, 206)]
    flat = 0.78 * palette(posterise(np.asarray(tone, np.float32), 4, 0.22), inks) + 0.22 * frame.flat
    lines = ramp(blur(frame.flat_luma, 2.8) - blur(frame.flat_luma, 1.0), 0.014, 0.05)
    return mix(np.asarray(flat, np.float32), (0.07, 0.09, 0.19), 0.85 * lines)


def thermal(frame: Frame) -> Plane:
    """Heat camera: brightness as black, violet, red, orange, pale yellow."""
    heat = blur(frame.flat_luma, 1.6)
    return palette(heat, [(2, 0, 22), (58, 10, 108), (140, 28, 110), (212, 62, 66), (250, 140, 24), (252, 252, 170)])


def blueprint(frame: Frame) -> Plane:
    """Technical drawing: pale lines on blue graph paper."""
    base = palette(frame.flat_luma, [(10, 36, 92), (22, 66, 142), (38, 92, 172)])
    base = mix(base, (0.55, 0.72, 0.95), 0.22 * frame.screen("graph"))
    line = np.maximum(ramp(frame.gradient, 0.015, 0.13), ramp(frame.contours, 0.1, 0.8))
    return mix(base, (0.93, 0.97, 1.0), np.asarray(0.92 * line, np.float32))


def popart(frame: Frame) -> Plane:
    """Screen-printed poster: four loud flat inks by brightness."""
    tone = np.clip((blur(frame.flat_luma, 1.0) - 0.06) * 1.15, 0, 1)
    inks = [(38, 14, 84), (232, 24, 112), (255, 122, 40), (255, 214, 46), (150, 240, 224)]
    flat = palette(posterise(np.asarray(tone, np.float32), 4, 0.14), inks)
    return mix(flat, (0.08, 0.03, 0.20), 0.8 * frame.contours)


def vintage(frame: Frame) -> Plane:
    """Old film: sepia, lifted blacks, highlights that bloom."""
    tone = 0.5 + (frame.luma - 0.5) * 1.12
    bloom = blur(ramp(frame.luma, 0.6, 1.0), 6.0)
    tone = np.clip(0.07 + 0.88 * tone + 0.22 * bloom, 0, 1)
    return palette(np.asarray(tone, np.float32), [(40, 25, 18), (112, 78, 52), (196, 158, 112), (252, 238, 208)])


def nightvision(frame: Frame) -> Plane:
    """Image intensifier: bright green, lifted shadows, scan lines, glow."""
    tone = np.clip(frame.flat_luma, 0, 1) ** 0.72
    tone = np.clip(tone + 0.35 * blur(ramp(np.asarray(tone, np.float32), 0.6, 1.0), 5.0), 0, 1)
    tone = np.asarray(tone * (1 - 0.28 * frame.screen("lines")), np.float32)
    return palette(tone, [(2, 14, 6), (12, 92, 34), (58, 214, 84), (214, 255, 196)])


def oil(frame: Frame) -> Plane:
    """Oil on canvas: Kuwahara patches, rich colour, ridges of paint along the edges."""
    patches = saturate(kuwahara(frame.rgb, 3), 1.5)
    patches = np.clip(0.5 + (patches - 0.5) * 1.12, 0, 1).astype(np.float32)
    relief = (patches @ _LUMA).astype(np.float32)
    ridge = np.clip(relief - blur(relief, 1.6), -0.2, 0.2)
    return np.asarray(patches + 0.7 * ridge[..., None], np.float32)


def starry(frame: Frame) -> Plane:
    """After Van Gogh: night blues and lamp yellows, thick strokes that run along the contours of light."""
    patches = kuwahara(frame.flat, 3)
    tone = (patches @ _LUMA).astype(np.float32)
    inks = [(8, 16, 58), (22, 56, 140), (56, 118, 194), (148, 184, 170), (244, 206, 78), (255, 246, 186)]
    strokes = brush_strokes(blur(frame.flat_luma, 1.5))
    shifted = np.clip(tone * 0.92 + 0.04 + 0.15 * (strokes - 0.5), 0, 1)
    base = 0.84 * palette(np.asarray(shifted, np.float32), inks) + 0.16 * saturate(patches, 1.6)
    return mix(np.asarray(base, np.float32), (0.03, 0.05, 0.20), 0.7 * frame.contours)


def brush_strokes(luma_HW: Plane) -> Plane:
    """Strokes in four directions, each locked to the 8 px grid; the contours' direction weighs them [H, W]."""
    gx = cv2.Sobel(luma_HW, cv2.CV_32F, 1, 0, scale=0.25)
    gy = cv2.Sobel(luma_HW, cv2.CV_32F, 0, 1, scale=0.25)
    along = blur(np.asarray(gx * gx - gy * gy, np.float32), 5.0)
    across = blur(np.asarray(2 * gx * gy, np.float32), 5.0)
    size = np.sqrt(along * along + across * across) + 1.5e-4
    y, x = np.mgrid[0 : luma_HW.shape[0], 0 : luma_HW.shape[1]].astype(np.float32)
    total, weights = np.zeros_like(luma_HW), np.full_like(luma_HW, 1e-3)
    # the double angle of the gradient: 0 for vertical strokes, pi for level ones
    for wave, cosine, sine in ((x, 1, 0), (x + y, 0, 1), (y, -1, 0), (x - y, 0, -1)):
        weight = np.clip((along * cosine + across * sine) / size + (0.25 if sine > 0 else 0.0), 0, None) ** 2
        total += weight * np.cos(2 * np.pi * wave / 8)
        weights += weight
    return np.asarray(0.5 + 0.5 * total / weights, np.float32)


def kuwahara(rgb_HWC: Plane, radius_px: int) -> Plane:
    """Soft Kuwahara filter: each pixel takes the mean of its calmest neighbouring quadrant [H, W, C].

    Source: Kuwahara 1976; quadrants are weighted by variance to the power -4 (Papari et al. 2007), not
    chosen, so that the choice does not flicker.
    """
    size = radius_px + 1
    half = (size + 1) // 2
    padded = cv2.copyMakeBorder(rgb_HWC, half, half, half, half, cv2.BORDER_REFLECT)
    mean = cv2.boxFilter(padded, -1, (size, size))
    square = cv2.boxFilter(padded * padded, -1, (size, size))
    quality = ((square - mean * mean).sum(-1).clip(0) + 4e-5) ** -4.0
    height, width = rgb_HWC.shape[:2]
    total, weights = np.zeros_like(rgb_HWC), np.zeros((height, width), np.float32)
    for top in (0, 2 * half):
        for left in (0, 2 * half):
            weight = quality[top : top + height, left : left + width]
            total += mean[top : top + height, left : left + width] * weight[..., None]
            weights += weight
    return np.asarray(total / weights[..., None], np.float32)


TEACHERS: dict[str, Teacher] = {
    "photo": photo,
    "watercolor": watercolor,
    "comic": comic,
    "pencil": pencil,
    "ink": ink,
    "neon": neon,
    "riso": riso,
    "pixel": pixel,
    "ukiyo": ukiyo,
    "thermal": thermal,
    "blueprint": blueprint,
    "popart": popart,
    "vintage": vintage,
    "nightvision": nightvision,
    "oil": oil,
    "starry": starry,
}


def stylise(style: str, picture_HWC: Picture) -> Picture:
    """One frame in a style. Raises: KeyError for a style that has no teacher."""
    return render(TEACHERS[style], Frame(picture_HWC))


def render(teacher: Teacher, frame: Frame) -> Picture:
    """Run a teacher on a prepared frame: RGB uint8 [H, W, 3]."""
    return np.asarray(np.clip(teacher(frame), 0, 1) * 255.0 + 0.5, np.uint8)


def stylise_clip(styles: Sequence[str], clip_THWC: Picture) -> Picture:
    """A clip in several styles: [T, H, W, 3] -> [S, T, H, W, 3], frame by frame."""
    frames = [Frame(picture) for picture in clip_THWC]
    return np.stack([np.stack([render(TEACHERS[style], frame) for frame in frames]) for style in styles])
