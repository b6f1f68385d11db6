"""The styles' teachers: deterministic picture filters, RGB uint8 frame in, RGB uint8 frame out.

The model learns to imitate these. They are written for that: every pattern (dots, hatching, panes, strokes, graph
paper) repeats every 8 or 16 px from the top left, because the model sees 8 px latents in 16 px tokens and cannot
learn any other period; no statistics of the whole frame, and nothing further away than 48 px; thresholds are soft,
because a hard one flickers with the camera's noise; lines are two pixels wide, because the autoencoder loses thinner
ones. Neural teachers (Magenta, 26 paintings) were tried: their strokes are unsteady and a model of this size learns
their palette only, so the paintings here are filters as well. What flicker is left is averaged along the optical flow
(`stylise_clip`).

Axes: H, W frame; C colour. Float pictures are float32 in 0..1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]
Plane = NDArray[np.float32]
Teacher = Callable[["Frame"], Plane]
Colour = tuple[int, int, int]

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


class Tiling(NamedTuple):
    """A tessellation that repeats every 16 px, seen from each of its pixels [16, 16]."""

    down: NDArray[np.int64]  # to the pane's centre
    right: NDArray[np.int64]
    rim: Plane  # px to the pane's border
    pane: NDArray[np.int64]  # number of the pane


def _tiling(centres: Sequence[tuple[float, float]], *, slant: float = 0.0) -> Tiling:
    """Voronoi panes around centres (y, x) on a 16 px torus; `slant` stretches them along the falling diagonal."""
    y, x = np.mgrid[0:16, 0:16].astype(np.float64)
    spread = [(cy + dy, cx + dx) for cy, cx in centres for dy in (-16, 0, 16) for dx in (-16, 0, 16)]
    down, right = (np.stack([c[k] - axis for c in spread]) for k, axis in enumerate((y, x)))
    distance = np.sqrt(down**2 + right**2 - 2 * slant * down * right)
    order = np.argsort(distance, axis=0, kind="stable")
    first, second = (np.take_along_axis(distance, order[k : k + 1], 0)[0] for k in (0, 1))
    nearest = order[0]
    down, right = (np.rint(np.take_along_axis(a, nearest[None], 0)[0]).astype(np.int64) for a in (down, right))
    return Tiling(down, right, rim=((second - first) / 2).astype(np.float32), pane=nearest // 9)


def _triangles() -> Tiling:
    """Squares of 16 px cut along both diagonals: four triangles, upper, left, right, lower."""
    y, x = np.mgrid[0:16, 0:16]
    upper, left = y < x, y < 15 - x
    pane = np.where(upper, np.where(left, 0, 2), np.where(left, 1, 3))
    # centroids: a third of the way from the square's side to its middle
    down = np.array([3, 8, 7, 12])[pane] - y
    right = np.array([8, 3, 12, 7])[pane] - x
    return Tiling(down, right, np.zeros((16, 16), np.float32), pane)


def _texture(seed: int, along_px: float, across_px: float, angle: float) -> Plane:
    """Noise on a 16 px torus smoothed more along one direction [16, 16]: mean 0, almost all in -1..1."""
    fy, fx = np.meshgrid(np.fft.fftfreq(16), np.fft.fftfreq(16), indexing="ij")
    along, across = fx * np.cos(angle) + fy * np.sin(angle), fy * np.cos(angle) - fx * np.sin(angle)
    gain = np.exp(-2 * np.pi**2 * ((along * along_px) ** 2 + (across * across_px) ** 2))
    gain[0, 0] = 0
    noise = np.random.default_rng(seed).normal(size=(16, 16))
    tile = np.fft.ifft2(np.fft.fft2(noise) * gain).real
    return np.asarray(np.clip(tile / (2 * tile.std()), -1, 1), np.float32)


_GRAIN = 0.5 + 0.5 * _texture(3, 1.5, 1.5, 0.0)  # paper
# gradient at k * 22.5 degrees, so the stroke is square to it
_STROKE_TILES = [_texture(11, 6.0, 1.1, np.pi * k / 8 + np.pi / 2) for k in range(8)]
_TESSERAE = _tiling([(3.4, 3.2), (4.2, 11.6), (11.8, 4.4), (12.2, 12.4)])
_GLASS = _tiling([(7.6, 7.4)], slant=0.42)
_TRIANGLES = _triangles()
_DOWN_RIGHT = np.array([[1, 0, 1.2], [0, 1, 1.2]], np.float32)
_THUMBS = _texture(21, 2.6, 2.6, 0.0)
_DUST = _texture(23, 1.6, 0.9, -np.pi / 4)
_VEINS = _texture(29, 2.4, 2.4, 0.0)
_DABS = _tiling([(1.5, 2.5), (4.0, 9.5), (8.5, 4.5), (7.0, 14.5), (12.5, 10.5), (14.0, 1.0)], slant=0.7)
_TONES = np.random.default_rng(5).uniform(-1, 1, 9).astype(np.float32)  # a pane's own lightness, by number


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

    @cached_property
    def thin_lines(self) -> Plane:
        """A fine pen's lines [H, W], 0..1, two pixels wide: dark features and colour edges."""
        dark = ramp(blur(self.lit, 2.2) - blur(self.lit, 1.0), 0.010, 0.045)
        crest = ramp(self.gradient - 0.80 * blur(self.gradient, 2.6), 0.006, 0.042)
        return blur(np.maximum(0.9 * dark, crest * (1 - 0.35 * blur(dark, 2.0))), 0.6)

    @cached_property
    def lit(self) -> Plane:
        """Brightness [H, W] with dark surroundings lifted, so that a dark face keeps its features in few tones."""
        around = blur(self.flat_luma, 9.0)
        return np.asarray(np.clip(self.flat_luma, 1e-3, 1) ** (0.52 + 0.48 * ramp(around, 0.05, 0.5)), np.float32)

    @cached_property
    def lit_flat(self) -> Plane:
        """The flat colours [H, W, 3] with half of that lift."""
        gain = (0.5 * (self.lit + self.flat_luma) + 0.01) / (self.flat_luma + 0.01)
        return np.asarray(np.clip(self.flat * gain[..., None], 0, 1), np.float32)

    @cached_property
    def strokes(self) -> Plane:
        """Long brush strokes along the contours [H, W], -1..1: fixed 16 px textures, mixed by direction."""
        return self._mix_directions(_STROKE_TILES)

    def tiled(self, tile: NDArray[Any]) -> NDArray[Any]:
        """A tile repeated from the top left to this frame's size."""
        rows, columns = -(-self.height // tile.shape[0]), -(-self.width // tile.shape[1])
        return np.tile(tile, (rows, columns) + (1,) * (tile.ndim - 2))[: self.height, : self.width]

    def panes(self, tiling: Tiling, rgb_HWC: Plane, sigma_px: float) -> Plane:
        """Each pane of a tiling in the mean colour around its centre [H, W, 3]."""
        soft = blur(rgb_HWC, sigma_px)
        rows = np.arange(self.height)[:, None] + self.tiled(tiling.down)
        columns = np.arange(self.width)[None] + self.tiled(tiling.right)
        return np.asarray(soft[np.clip(rows, 0, self.height - 1), np.clip(columns, 0, self.width - 1)], np.float32)

    def _mix_directions(self, tiles: Sequence[Plane]) -> Plane:
        gx = cv2.Sobel(blur(self.flat_luma, 1.5), cv2.CV_32F, 1, 0, scale=0.25)
        gy = cv2.Sobel(blur(self.flat_luma, 1.5), cv2.CV_32F, 0, 1, scale=0.25)
        along, across = blur(gx * gx - gy * gy, 4.0), blur(2 * gx * gy, 4.0)
        size = np.sqrt(along * along + across * across) + 1.2e-4
        total, weights = np.zeros_like(self.luma), np.full_like(self.luma, 1e-3)
        for k, tile in enumerate(tiles):
            angle = 2 * np.pi * k / len(tiles)  # of the gradient, doubled; a calm place takes the slanted strokes
            fit = (along * np.cos(angle) + across * np.sin(angle)) / size + (0.3 if 4 * k == len(tiles) else 0.0)
            weight = np.clip(fit, 0, None) ** 3
            total += weight * self.tiled(tile)
            weights += weight
        return np.asarray(total / weights, np.float32)

    def screen(self, kind: str) -> Plane:
        """A repeating pattern of this frame's size [H, W] in 0..1: dots, slant (dots set in diamonds), hatch,
        grain, lines, tile or graph."""
        y, x = np.mgrid[0 : self.height, 0 : self.width].astype(np.float32)
        if kind == "dots":
            wave = np.cos(2 * np.pi * (x + 0.5) / 8) + np.cos(2 * np.pi * (y + 0.5) / 8)
            return np.asarray(0.5 + 0.25 * wave, np.float32)
        if kind == "hatch":
            return np.asarray(0.5 + 0.5 * np.cos(2 * np.pi * (x + y) / 8), np.float32)
        if kind == "slant":
            return np.asarray(0.5 + 0.5 * np.cos(2 * np.pi * x / 8) * np.cos(2 * np.pi * y / 8), np.float32)
        if kind == "grain":
            return self.tiled(_GRAIN)
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
    shade = 0.34 * rim + 0.07 * frame.screen("grain") * (1 - 0.6 * ramp(tone, 0.6, 1.0))
    wash = np.asarray(wash * (1 - shade[..., None] * np.array([0.75, 0.85, 1.0], np.float32)), np.float32)
    return mix(wash, (0.30, 0.20, 0.17), 0.8 * frame.contours)


def comic(frame: Frame) -> Plane:
    """A printed comic: three flat tones of loud colour, bold black outlines, solid black shadows."""
    tone = frame.lit
    stepped = 0.06 * tone + 0.94 * posterise(np.clip(0.04 + tone * 1.02, 0, 1), 3, 0.15)
    flat = blur(frame.flat, 1.2)
    flat = saturate(np.clip(flat * ((0.93 * stepped + 0.04) / ((flat @ _LUMA) + 0.03))[..., None], 0, 1), 1.9)
    flat = 0.35 * flat + 0.65 * posterise(flat, 4, 0.25)
    line = blur(ramp(blur(frame.lit, 3.4) - blur(frame.lit, 1.1), 0.016, 0.052), 0.7)
    black = 1 - ramp(blur(frame.lit, 1.4), 0.14, 0.25)
    return mix(np.asarray(flat, np.float32), (0.03, 0.02, 0.06), np.maximum(line, black))


def pencil(frame: Frame) -> Plane:
    """Graphite on warm paper: dodged shading, contour lines and diagonal strokes in the shadows."""
    tone = blur(frame.flat_luma, 0.7)
    dodge = np.clip(tone / (blur(tone, 7.0) + 0.02), 0, 1) ** 1.7
    shade = dodge * (0.66 + 0.34 * ramp(tone, 0.0, 0.75))
    shade = shade - 0.30 * frame.screen("hatch") * (1 - ramp(tone, 0.15, 0.62))
    shade = np.clip(shade - 0.55 * blur(frame.contours, 0.7), 0, 1)
    return palette(np.asarray(shade, np.float32), [(34, 32, 40), (118, 115, 118), (196, 192, 187), (248, 244, 234)])


def ink(frame: Frame) -> Plane:
    """Brush and ink: black shadows and lines on cream paper, hatched half tones."""
    tone = frame.lit
    lines = blur(ramp(blur(tone, 3.2) - blur(tone, 1.1), 0.016, 0.05), 0.7)
    black = 1 - ramp(blur(tone, 1.4), 0.20, 0.33)
    hatch = ramp(frame.screen("hatch"), 0.35, 0.95) * (1 - ramp(tone, 0.38, 0.52)) * 0.8
    share = np.maximum(np.maximum(lines, black), hatch)
    return mix(np.full_like(frame.rgb, 1.0) * np.array([0.985, 0.965, 0.915], np.float32), (0.05, 0.06, 0.13), share)


def neon(frame: Frame) -> Plane:
    """Glowing tubes along the contours, in a dark violet night; the hue follows the brightness behind them."""
    hue = palette(blur(frame.lit, 5.0), [(255, 30, 170), (214, 60, 255), (40, 160, 255), (60, 255, 210)])
    line = np.asarray(frame.thin_lines[..., None] * hue, np.float32)
    glow = blur(line, 1.6) * 0.45 + blur(line, 5.0) * 0.9
    base = palette(blur(frame.lit, 1.0), [(4, 2, 16), (15, 7, 42), (34, 15, 74), (48, 26, 98)])
    return np.asarray(base + 0.95 * line + glow, np.float32)


def riso(frame: Frame) -> Plane:
    """Two-ink risograph: warm paper tones and blue dots that grow with the shadow."""
    tone = blur(frame.lit, 0.8)
    dots = 1 / (1 + np.exp(-11 * ((1 - tone) * 1.02 - (1 - frame.screen("dots")))))
    base = palette(tone, [(255, 66, 118), (255, 132, 122), (255, 236, 210)])
    return mix(base, (0.08, 0.22, 0.58), np.asarray(np.maximum(dots, 0.6 * frame.contours), np.float32))


def pixel(frame: Frame) -> Plane:
    """Video-game pixels: 8 px tiles in few vivid colours with a thin seam."""
    small = cv2.resize(frame.lit_flat, (frame.width // 8, frame.height // 8), interpolation=cv2.INTER_AREA)
    small = saturate(np.asarray(small, np.float32), 1.45)
    small = 0.3 * small + 0.7 * posterise(np.clip(small * 1.05, 0, 1), 5, 0.25)
    tiles = cv2.resize(small, (frame.width, frame.height), interpolation=cv2.INTER_NEAREST)
    return np.asarray(tiles * (1 - 0.20 * frame.screen("tile")[..., None]), np.float32)


def ukiyo(frame: Frame) -> Plane:
    """Japanese woodblock: indigo, ochre and paper in flat steps, dark outlines."""
    tone = np.clip((blur(0.5 * (frame.flat_luma + frame.lit), 0.8) - 0.07) * 1.12, 0, 1)
    inks = [(22, 32, 66), (42, 84, 126), (184, 98, 74), (228, 184, 132), (247, 235, 206)]
    flat = 0.78 * palette(posterise(np.asarray(tone, np.float32), 4, 0.22), inks) + 0.22 * frame.flat
    lines = blur(ramp(blur(frame.lit, 2.8) - blur(frame.lit, 1.0), 0.014, 0.05), 0.6)
    return mix(np.asarray(flat, np.float32), (0.07, 0.09, 0.19), 0.85 * lines)


def thermal(frame: Frame) -> Plane:
    """Heat camera: brightness as black, violet, red, orange, pale yellow."""
    heat = blur(frame.flat_luma, 1.6)
    return palette(heat, [(2, 0, 22), (58, 10, 108), (140, 28, 110), (212, 62, 66), (250, 140, 24), (252, 252, 170)])


def blueprint(frame: Frame) -> Plane:
    """Technical drawing: fine pale lines on blue graph paper, the lit side brushed in lighter."""
    base = palette(blur(frame.lit, 1.0), [(8, 34, 92), (16, 56, 134), (36, 88, 172), (74, 126, 200)])
    base = mix(base, (0.60, 0.76, 0.98), 0.26 * frame.screen("graph"))
    return mix(base, (0.95, 0.98, 1.0), 0.95 * frame.thin_lines)


def popart(frame: Frame) -> Plane:
    """Screen-printed poster: four loud flat inks by brightness."""
    tone = np.clip((blur(0.5 * (frame.flat_luma + frame.lit), 1.5) - 0.06) * 1.15, 0, 1)
    inks = [(38, 14, 84), (232, 24, 112), (255, 122, 40), (255, 214, 46), (150, 240, 224)]
    flat = blur(palette(posterise(np.asarray(tone, np.float32), 4, 0.2), inks), 0.6)
    return mix(flat, (0.08, 0.03, 0.20), 0.8 * blur(frame.contours, 0.7))


def vintage(frame: Frame) -> Plane:
    """Old film: sepia, lifted blacks, highlights that bloom."""
    tone = 0.5 + (frame.luma - 0.5) * 1.12
    bloom = blur(ramp(frame.luma, 0.6, 1.0), 6.0)
    tone = np.clip(0.07 + 0.88 * tone + 0.22 * bloom, 0, 1)
    return palette(np.asarray(tone, np.float32), [(40, 25, 18), (112, 78, 52), (196, 158, 112), (252, 238, 208)])


def nightvision(frame: Frame) -> Plane:
    """Image intensifier: bright green, lifted shadows, scan lines, glow."""
    tone = np.clip(0.5 * (frame.flat_luma + frame.lit), 0, 1) ** 0.85
    tone = np.clip(tone + 0.35 * blur(ramp(np.asarray(tone, np.float32), 0.6, 1.0), 5.0), 0, 1)
    tone = np.asarray(tone * (1 - 0.28 * frame.screen("lines")), np.float32)
    return palette(tone, [(2, 14, 6), (12, 92, 34), (58, 214, 84), (214, 255, 196)])


def oil(frame: Frame) -> Plane:
    """Oil on canvas: Kuwahara patches of rich colour, with bristle marks along the forms, lit from the top left."""
    strokes = frame.strokes * (1 - 0.45 * ramp(frame.lit, 0.65, 1.0))
    patches = saturate(kuwahara(frame.lit_flat, 4), 1.55)
    patches = np.clip(0.5 + (patches - 0.5) * 1.1, 0, 1).astype(np.float32)
    tone = (patches @ _LUMA).astype(np.float32)
    # a stroke carries more or less paint: warm where thick, the cool ground where thin
    patches = patches * (1 + 0.17 * strokes[..., None] * np.array([1.0, 0.85, 0.45], np.float32))
    height = 0.24 * strokes + tone
    light = height - cv2.warpAffine(height, _DOWN_RIGHT, (frame.width, frame.height), borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(patches + 0.42 * np.clip(light, -0.3, 0.3)[..., None], np.float32)


def starry(frame: Frame) -> Plane:
    """After Van Gogh: night blues and lamp yellows, thick strokes that run along the contours of light."""
    patches = blur(kuwahara(frame.flat, 3), 0.7)
    tone = (patches @ _LUMA).astype(np.float32)
    inks = [(8, 16, 58), (22, 56, 140), (56, 118, 194), (148, 184, 170), (244, 206, 78), (255, 246, 186)]
    strokes = brush_strokes(blur(frame.flat_luma, 1.5))
    shifted = np.clip(tone * 0.92 + 0.04 + 0.15 * (strokes - 0.5), 0, 1)
    base = 0.84 * palette(np.asarray(shifted, np.float32), inks) + 0.16 * saturate(patches, 1.6)
    return mix(np.asarray(base, np.float32), (0.03, 0.05, 0.20), 0.7 * blur(frame.contours, 0.7))


def halftone(frame: Frame) -> Plane:
    """A newspaper photograph: black dots, set in diamonds, on grey newsprint."""
    tone = np.clip(blur(frame.lit, 1.2) + 0.8 * (blur(frame.lit, 1.2) - blur(frame.lit, 4.5)), 0, 1)
    dots = 1 / (1 + np.exp(-5.5 * ((1 - tone) * 1.06 - (1 - frame.screen("slant")))))
    share = np.maximum(0.96 * dots, 0.75 * blur(frame.contours, 0.7))
    paper = np.ones_like(frame.rgb) * np.array([0.90, 0.875, 0.81], np.float32)
    return mix(paper, (0.09, 0.085, 0.09), np.asarray(share, np.float32))


def mosaic(frame: Frame) -> Plane:
    """A Roman floor: uneven stones with pale grout; terracotta and gold for warm colours, the sea for the others."""
    smooth = saturate(frame.lit_flat, 1.4)
    stone = 0.62 * frame.panes(_TESSERAE, smooth, 2.2) + 0.38 * blur(smooth, 1.0)
    tone = np.clip(0.42 + 1.25 * ((stone @ _LUMA) - 0.5) + 0.05 * frame.tiled(_TONES[_TESSERAE.pane]), 0, 1).astype(
        np.float32
    )
    warm = palette(tone, [(40, 14, 20), (132, 40, 26), (206, 88, 42), (240, 176, 64), (255, 240, 200)])
    cool = palette(tone, [(8, 20, 52), (8, 66, 112), (22, 132, 156), (120, 204, 196), (244, 244, 226)])
    share = ramp((stone[..., 0] - stone[..., 2]).astype(np.float32), -0.04, 0.14)
    colour = 0.72 * mix(cool, warm, share) + 0.28 * saturate(np.asarray(stone, np.float32), 1.8)
    rim: Plane = frame.tiled(_TESSERAE.rim)
    colour = colour * (0.90 + 0.16 * ramp(rim, 0.8, 3.5))[..., None]
    outlined = mix(np.asarray(colour, np.float32), (0.05, 0.06, 0.11), 0.8 * blur(frame.contours, 0.7))
    return mix(outlined, (0.86, 0.80, 0.68), 0.6 * (1 - ramp(rim, 0.2, 1.7)))


def stainedglass(frame: Frame) -> Plane:
    """A church window: glowing saturated panes, dark lead between them and along strong contours."""
    smooth = blur(frame.flat, 1.0)
    pane = 0.5 * frame.panes(_GLASS, smooth, 3.5) + 0.5 * smooth
    tone = (pane @ _LUMA).astype(np.float32)
    shine = (0.5 * tone + 0.5 * blur(frame.lit, 1.5)).astype(np.float32)
    bright = 0.12 + 0.80 * posterise(np.clip(shine, 1e-3, 1) ** 0.8, 5, 0.3)
    glass = pane * (bright / (tone + 0.06))[..., None]
    chroma = glass - (glass @ _LUMA)[..., None]
    # glass is never grey: cool light in what has no colour
    glass = glass + 2.0 * chroma * np.array([1.0, 0.9, 1.0], np.float32) + np.array([-0.05, -0.01, 0.09], np.float32)
    rim: Plane = frame.tiled(_GLASS.rim)
    glass = glass * (0.80 + 0.34 * ramp(rim, 0.5, 7.0))[..., None]
    came = blur(ramp(blur(frame.lit, 3.6) - blur(frame.lit, 1.3), 0.016, 0.06), 0.8)
    lead = np.maximum(0.68 * (1 - ramp(rim, 0.2, 2.0)), came)
    return mix(np.clip(glass, 0, 1).astype(np.float32), (0.045, 0.04, 0.05), np.asarray(lead, np.float32))


def lowpoly(frame: Frame) -> Plane:
    """Flat triangles, each with its own light as if the picture were folded paper."""
    smooth = saturate(frame.lit_flat, 1.6)
    facet = frame.panes(_TRIANGLES, smooth, 2.0)
    light = np.array([1.0, 0.3, -0.35, -1.0], np.float32)[_TRIANGLES.pane]
    tone = facet * (1 + 0.18 * frame.tiled(light))[..., None]
    return np.asarray(0.78 * tone + 0.22 * smooth + 0.02, np.float32)


def clay(frame: Frame) -> Plane:
    """Plasticine: rounded masses of few soft colours, lit from the top left, with dents of thumbs."""
    flat = blur(kuwahara(frame.flat, 4), 1.6)
    tone = np.clip(flat @ _LUMA, 1e-3, 1).astype(np.float32)
    matte = 0.20 + 0.72 * posterise(np.asarray(tone**0.8, np.float32), 4, 0.35)
    colour = saturate(np.clip(flat * (matte / (tone + 0.04))[..., None], 0, 1).astype(np.float32), 1.7)
    dents = frame.tiled(_THUMBS)
    height = 9.0 * blur(frame.lit, 2.2) + 6.0 * blur(frame.lit, 5.0) + 0.11 * dents
    gx = cv2.Sobel(height, cv2.CV_32F, 1, 0, scale=0.125)
    gy = cv2.Sobel(height, cv2.CV_32F, 0, 1, scale=0.125)
    slope = -(gx + gy) * 0.7 / np.sqrt(1 + gx * gx + gy * gy)
    shaded = colour * (1 - 0.55 * slope)[..., None]
    crease = 0.5 * ramp(blur(frame.lit, 4.0) - blur(frame.lit, 1.6), 0.02, 0.09)
    creased = mix(np.asarray(shaded, np.float32), (0.16, 0.09, 0.08), crease)
    return np.asarray(creased + 0.30 * ramp(np.asarray(-slope, np.float32), 0.10, 0.55)[..., None], np.float32)


def chalk(frame: Frame) -> Plane:
    """White and coloured chalk on a green school board: drawn lines, rubbed light with the board's grain in it."""
    dust, tone = frame.tiled(_DUST), blur(frame.lit, 0.9)
    board = np.array([0.095, 0.215, 0.165], np.float32) * (1 + 0.12 * dust)[..., None]
    soft = saturate(blur(frame.flat, 1.5), 1.6)
    sticks = np.clip(0.50 + 0.50 * soft, 0, 1) * np.array([1.0, 0.99, 0.94], np.float32)
    light = tone + 0.9 * (tone - blur(frame.lit, 9.0))
    rubbed = 0.04 + 0.70 * ramp(np.asarray(light, np.float32), 0.20, 1.0)
    rubbed = rubbed * (0.82 + 0.32 * (frame.screen("hatch") - 0.5) + 0.16 * dust) * (1 - 0.7 * frame.contours)
    drawn = ramp(blur(frame.lit, 1.0) - blur(frame.lit, 3.4), 0.012, 0.07) * (0.88 + 0.12 * dust)
    picture = mix(np.asarray(board, np.float32), sticks, np.asarray(np.clip(rubbed, 0, 1), np.float32))
    return mix(picture, (0.95, 0.95, 0.90), np.asarray(0.9 * np.clip(drawn, 0, 1), np.float32))


def marble(frame: Frame) -> Plane:
    """A statue of white marble: form without colour, cool shadows, polished lights, faint veins."""
    around = blur(frame.flat_luma, 8.0)
    relief = np.clip(frame.flat_luma / (around + 0.03), 0, 2)
    near = blur(frame.flat_luma, 1.0) - blur(frame.flat_luma, 5.0)
    tone = 0.06 + 0.36 * relief + 0.34 * np.clip(frame.flat_luma, 0, 1) ** 0.6 + 1.1 * near / (0.25 + around)
    level = blur(frame.flat_luma, 6.0) * 5.0 + 0.04 * frame.tiled(_VEINS)
    vein = np.exp(-(((level - np.floor(level) - 0.5) / 0.07) ** 2))
    tone = np.clip(tone - 0.09 * vein * ramp(np.asarray(tone, np.float32), 0.3, 0.6), 0, 1)
    return palette(
        np.asarray(tone, np.float32), [(24, 30, 44), (84, 95, 116), (156, 166, 182), (220, 222, 224), (255, 253, 248)]
    )


def vhs(frame: Frame) -> Plane:
    """A worn video tape: colour that bleeds to the right, split edges, scan lines, washed blacks."""
    luma = cv2.GaussianBlur(frame.luma, (0, 0), sigmaX=1.5, sigmaY=0.5)
    luma = luma + 0.7 * (luma - cv2.GaussianBlur(luma, (0, 0), sigmaX=3.0, sigmaY=0.5))
    luma = 0.14 + 0.78 * np.clip(luma, 0, 1)
    chroma = cv2.GaussianBlur(frame.rgb - frame.luma[..., None], (0, 0), sigmaX=6.0, sigmaY=1.5)
    chroma = shifted(np.asarray(chroma, np.float32), 6) * 1.5
    split = np.stack([shifted(luma, 3), luma, shifted(luma, -3)], -1)
    tape = split + chroma + np.array([0.05, -0.02, 0.07], np.float32)
    y = np.arange(frame.height, dtype=np.float32)[:, None, None]
    return np.asarray(tape * (0.90 + 0.10 * np.cos(2 * np.pi * y / 8)) + 0.02 * np.cos(np.pi * y / 8), np.float32)


def embroidery(frame: Frame) -> Plane:
    """Satin stitch: columns of slanted thread in few dyes, shining in the middle, a dark outline sewn on top."""
    flat = blur(frame.flat, 1.4)
    tone = (flat @ _LUMA).astype(np.float32)
    stepped = 0.10 + 0.86 * (0.3 * frame.lit + 0.7 * posterise(frame.lit, 4, 0.25))
    dyed = saturate(np.clip(flat * (stepped / (tone + 0.04))[..., None], 0, 1).astype(np.float32), 1.75)
    y, x = np.mgrid[0 : frame.height, 0 : frame.width].astype(np.float32)
    thread = 0.5 + 0.5 * np.cos(2 * np.pi * (y + np.abs((x + 0.5) % 16 - 8)) / 8)
    sheen = 0.5 + 0.5 * np.cos(2 * np.pi * (x - 3.5) / 8)
    sewn = (
        dyed * (0.64 + 0.40 * thread * (0.5 + 0.5 * sheen) + 0.10 * sheen)[..., None]
        + 0.10 * (thread * sheen)[..., None]
    )
    line = ramp(blur(frame.lit, 3.0) - blur(frame.lit, 1.1), 0.018, 0.06)
    return mix(np.asarray(sewn, np.float32), (0.10, 0.07, 0.13), np.asarray(line * (0.62 + 0.3 * thread), np.float32))


def impressionist(frame: Frame) -> Plane:
    """After Monet: short slanted dabs of clean colour, violet shadows, sunlit lights, no black."""
    smooth = blur(frame.flat, 0.8)
    dab = frame.panes(_DABS, smooth, 1.6)
    own = frame.tiled(_TONES[_DABS.pane])[..., None]
    paint = 0.58 * dab + 0.42 * smooth
    tone = np.clip(paint @ _LUMA, 0, 1).astype(np.float32) ** 0.8
    light = palette(tone, [(38, 34, 96), (84, 88, 168), (150, 150, 196), (240, 208, 172), (255, 246, 216)])
    chroma = paint - (paint @ _LUMA)[..., None]
    colour = light + 1.7 * chroma - 0.3 * chroma.mean(-1, keepdims=True)
    tint = np.array([0.085, 0.035, -0.095], np.float32)  # broken colour: neighbours lean to sun or to sky
    colour = colour + 0.6 * own * tint + 0.05 * frame.strokes[..., None] + 0.02 * own
    return np.asarray(colour * (0.95 + 0.06 * ramp(frame.tiled(_DABS.rim), 0.0, 2.0))[..., None], np.float32)


def shifted(plane: Plane, right_px: int) -> Plane:
    """A picture moved to the right, its edge repeated."""
    columns = np.clip(np.arange(plane.shape[1]) - right_px, 0, plane.shape[1] - 1)
    return np.asarray(plane[:, columns], np.float32)


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
    "halftone": halftone,
    "mosaic": mosaic,
    "stainedglass": stainedglass,
    "lowpoly": lowpoly,
    "clay": clay,
    "chalk": chalk,
    "marble": marble,
    "vhs": vhs,
    "embroidery": embroidery,
    "impressionist": impressionist,
}


STEADINESS = 0.6  # share of the predecessor where it fits: the noise of a still picture halves
# without a pattern fixed to the frame: their outputs may be moved along the flow
UNSCREENED = frozenset(("comic", "neon", "ukiyo", "thermal", "popart", "vintage", "marble"))


def stylise(style: str, picture_HWC: Picture) -> Picture:
    """One frame in a style. Raises: KeyError for a style that has no teacher."""
    return render(TEACHERS[style], Frame(picture_HWC))


def render(teacher: Teacher, frame: Frame) -> Picture:
    """Run a teacher on a prepared frame: RGB uint8 [H, W, 3]."""
    return np.asarray(np.clip(teacher(frame), 0, 1) * 255.0 + 0.5, np.uint8)


def stylise_clip(styles: Sequence[str], clip_THWC: Picture) -> Picture:
    """A clip in several styles, steadied over time: [T, H, W, 3] -> [S, T, H, W, 3].

    Source and output are averaged with their predecessors, moved along the clip's optical flow, which is found once
    for all styles; nothing is averaged where the moved source disagrees with the source. A style with a screen fixed
    to the frame takes that from the steadied source, and from its own output only where nothing moves: a moved screen
    would smear. The plain photo stays the clip itself.
    """
    steadied = np.empty((len(styles), *clip_THWC.shape), np.uint8)
    before = np.empty((len(styles), *clip_THWC.shape[1:]), np.float32)
    source = clip_THWC[0].astype(np.float32)
    for t, picture in enumerate(clip_THWC):
        motion = Motion.between(clip_THWC[t - 1], picture) if t else None
        if motion:
            source = motion.blend(source, picture.astype(np.float32), motion.trust)
        frame = Frame(np.asarray(source + 0.5, np.uint8))
        for k, style in enumerate(styles):
            if style == "photo":
                steadied[k, t] = picture
                continue
            now = np.clip(TEACHERS[style](frame), 0, 1).astype(np.float32) * 255.0
            if motion and style in UNSCREENED:
                now = motion.blend(before[k], now, motion.trust)
            elif motion:
                now = now + motion.still[..., None] * (before[k] - now)
            before[k] = now
            steadied[k, t] = np.asarray(now + 0.5, np.uint8)
    return steadied


class Motion:
    """How one frame moved into the next, and how far its predecessor may be trusted there."""

    def __init__(self, rows: Plane, columns: Plane, trust: Plane, still: Plane) -> None:
        self._rows, self._columns = rows, columns
        self.trust = trust  # [H, W] share of the moved predecessor, 0 where something was uncovered
        self.still = still  # [H, W] share of the predecessor as it lies, 0 where anything moves

    @classmethod
    def between(cls, before_HWC: Picture, now_HWC: Picture) -> Motion:
        """Optical flow (DIS) from now back to before, softened, and where it explains the frame."""
        before, now = (cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) for picture in (before_HWC, now_HWC))
        flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST).calc(
            now, before, np.zeros((*now.shape, 2), np.float32)
        )
        flow = blur(np.asarray(flow, np.float32), 1.5)
        length = np.sqrt((flow * flow).sum(-1))
        quiet = (1 - ramp(length, 0.15, 0.5)) * (1 - ramp(_distance(before_HWC, now_HWC), 4.0, 9.0))
        flow = flow * (1 - quiet[..., None])  # what flow finds in noise would only blur
        y, x = np.mgrid[0 : now.shape[0], 0 : now.shape[1]].astype(np.float32)
        rows, columns = y + flow[..., 1], x + flow[..., 0]
        moved = cv2.remap(before_HWC, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        moved_HWC = np.asarray(moved, np.uint8)
        inside = (rows > -1) & (columns > -1) & (rows < now.shape[0]) & (columns < now.shape[1])
        trust = STEADINESS * (1 - ramp(_distance(moved_HWC, now_HWC), 5.0, 14.0)) * inside
        still = STEADINESS * quiet
        return cls(rows, columns, np.asarray(trust, np.float32), np.asarray(still, np.float32))

    def blend(self, before_HWC: Plane, now_HWC: Plane, share_HW: Plane) -> Plane:
        """The frame, averaged with its moved predecessor."""
        moved = cv2.remap(before_HWC, self._columns, self._rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        return np.asarray(now_HWC + share_HW[..., None] * (moved - now_HWC), np.float32)


def _distance(a_HWC: Picture, b_HWC: Picture) -> Plane:
    """Mean absolute difference around each pixel [H, W], 0 to 255; camera noise averages to a few."""
    return blur(cv2.absdiff(a_HWC, b_HWC).astype(np.float32).mean(-1), 2.0)
