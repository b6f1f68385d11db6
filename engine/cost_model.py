"""What a pass of the engine will take, learned as it runs: pure arithmetic, no torch and no clock.

    costs = CostModel()
    costs.observe(Work(latents=1, forwards=2, rows=2, context=6), 0.031)
    costs.mean_s(work), costs.upper_s(work)

The seconds of a pass are a sum of its parts, each with a coefficient that is never negative: a constant, one for every
forward of the transformer, and for each of the two sizes one a latent frame (encode and decode), one a row (a latent
frame at one step), one a cached latent frame that a row reads, and one a latent frame by the light VAE. They are fitted
by least squares of the relative
error, recursively, each pass counting a little less than the next (`FORGETTING`). Passes seldom tell all coefficients
apart, so these are held in proportion to a prior: what has not been seen lately is taken to have become slower by as
much as what has. Hence one pass is enough for a sane figure of any other, and a machine that slows down under one
kind of work is not believed to be fast at the rest. `profile` makes what a warm-up has measured the prior, or what an
earlier run has learned where the two agree.

A mean says what a device can carry; whether one pass will be in time needs more. `upper_s` is the mean times a
quantile of observed over predicted of the last passes.

Anything with `mean_s` and `upper_s` (`Costs`) can stand in its place: the simulator's devices do.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from engine.api import ChunkCostAt

# A pass counts 0.93 of the one after it: the last 14 make the figure.
FORGETTING = 0.93
# How firmly coefficients keep their proportions: against 14 passes' worth of evidence.
TIE = 0.05
# How firmly coefficients hold to a fresh profile: one pass moves a prediction a seventh of the way.
PROFILE_WEIGHT = 2.0
# As many passes in a row, all this far on one side of the prediction: the device has changed, follow at once. One that
# is twice off counts for two.
CHANGED_RATIO = 1.3
CHANGED_FAR_RATIO = 2.0
CHANGED_PASSES = 3
# A single pass this far above the prediction is a compilation or a stopped process, not a cost.
OUTLIER_RATIO = 8.0
OUTLIERS_BELIEVED = 3
# Beside video on the same cores a pass takes 1.5 times what it takes in a warm-up: a learned cost this far from the
# measured one still is of the same device.
AGREEING_RATIO = 2.0
QUANTILE = 0.95
RATIOS_KEPT = 100
# Until that many ratios are known the factor is at least FIRST_FACTOR.
RATIOS_WANTED = 20
FIRST_FACTOR = 1.25
# Seconds of a small model on one CPU core; only their proportions matter once a pass has been seen.
PRIOR_S = (1e-3, 2e-3, 10e-3, 10e-3, 0.5e-3)
SMALL_SHARE = 0.5625
# Of a latent frame by the full VAE what the light one takes, before it has been seen.
LIGHT_SHARE = 0.2
FLOOR = 0.01


@dataclass(frozen=True, slots=True)
class Work:
    """What one pass is made of.

    latents: latent frames encoded and decoded. forwards: calls of the transformer. rows: latent frames through it, each
    step counted. context: cached latent frames read, over all rows. small: at the smaller size. light: by the
    light VAE.
    """

    latents: int
    forwards: int
    rows: int
    context: int = 0
    small: bool = False
    light: bool = False

    @classmethod
    def of_chunk(cls, steps: int, *, window: int = 0, small: bool = False, light: bool = False) -> Self:
        """One chunk of one latent frame alone in its pass. window: latent frames in its cache."""
        return cls(1, steps, steps, steps * window, small, light)


class Costs(Protocol):
    """What the scheduler asks of a cost model."""

    def mean_s(self, work: Work) -> float:
        """What the pass takes on average, in seconds."""
        ...

    def upper_s(self, work: Work) -> float:
        """What the pass stays below nearly always, in seconds."""
        ...


def _terms(work: Work) -> tuple[float, ...]:
    latents = float(work.latents)
    scaled = (0.0 if work.light else latents, float(work.rows), float(work.context))
    none = (0.0, 0.0, 0.0)
    light = (latents * (work.light and not work.small), latents * (work.light and work.small))
    return 1.0, float(work.forwards), *(none if work.small else scaled), *(scaled if work.small else none), *light


class CostModel:
    """Coefficients of a pass's parts and the spread around them. Deterministic."""

    def __init__(
        self,
        prior_s: Sequence[float] = PRIOR_S,
        *,
        small_share: float = SMALL_SHARE,
        light_share: float = LIGHT_SHARE,
    ) -> None:
        """Start from a prior, of which the first pass seen will set the scale.

        Args:
            prior_s: seconds of a pass, of a forward, and of a latent frame, a row and a cached frame at full size.
            small_share: what the last three take at the small size, as a share.
            light_share: what a latent frame takes by the light VAE, as a share.

        Raises: ValueError for a prior that is not five positive numbers or a share that is not positive.
        """
        if len(prior_s) != len(PRIOR_S) or min(prior_s) <= 0 or not math.isfinite(sum(prior_s)):
            raise ValueError(f"prior_s {tuple(prior_s)} must be {len(PRIOR_S)} positive numbers of seconds")
        for name, share in (("small_share", small_share), ("light_share", light_share)):
            if not 0 < share < math.inf:
                raise ValueError(f"{name} {share} must be above 0")
        light_s = light_share * prior_s[2]
        prior = (*prior_s, *(small_share * each for each in prior_s[2:]), light_s, small_share * light_s)
        self._prior = np.array(prior)
        self._coefficients: tuple[float, ...] = tuple(map(float, prior))
        self._moments = np.zeros((len(prior), len(prior)))
        self._targets = np.zeros(len(prior))
        self._ratios: deque[float] = deque(maxlen=RATIOS_KEPT)
        self._factor = FIRST_FACTOR
        self._side = self._run = self._run_ratios = self._outliers = 0
        self.passes = 0

    @property
    def coefficients_s(self) -> tuple[float, ...]:
        """Seconds of a pass, a forward, a latent frame, row and cached frame at full and at small size, and of a latent
        frame by the light VAE at both."""
        return self._coefficients

    @property
    def factor(self) -> float:
        """`upper_s` over `mean_s`."""
        return self._factor

    def mean_s(self, work: Work) -> float:
        """See `Costs.mean_s`."""
        constant, forward, latent, row, cached, *small, light, small_light = self._coefficients
        if work.small:
            latent, row, cached = small
        if work.light:
            latent = small_light if work.small else light
        return constant + forward * work.forwards + latent * work.latents + row * work.rows + cached * work.context

    def upper_s(self, work: Work) -> float:
        """See `Costs.upper_s`."""
        return self._factor * self.mean_s(work)

    def observe(self, work: Work, seconds: float, *, waited: bool = False) -> bool:
        """Learn from a pass. Returns whether it counted.

        Args:
            seconds: what it took, without what was spent on anything else.
            waited: it had to wait for its input within that time, so that it says nothing of its cost: not learned.
        """
        if waited or not 0 < seconds < math.inf:
            return False
        predicted_s = self.mean_s(work)
        ratio = seconds / predicted_s
        self._outliers = self._outliers + 1 if self.passes and ratio > OUTLIER_RATIO else 0
        if 0 < self._outliers < OUTLIERS_BELIEVED:
            return False
        if self.passes:
            self._note_ratio(ratio)
        if self._run >= CHANGED_PASSES:
            self._rescale(ratio)
            predicted_s, ratio = seconds, 1.0
        # Relative to the prior and to the prediction: a coefficient of 1 is the prior's, a target of 1 as predicted.
        terms = np.array(_terms(work)) * self._prior / predicted_s
        self._moments = FORGETTING * self._moments + np.outer(terms, terms)
        self._targets = FORGETTING * self._targets + ratio * terms
        learned = _fit(self._moments, self._targets)
        # Nothing costs nothing: what is taken for free could never be found to have become slower.
        learned = np.maximum(learned, FLOOR * learned.mean())
        self._coefficients = tuple(float(each) for each in self._prior * learned)
        # Errors are relative to what was predicted: those from when the device was faster must not outweigh new ones.
        scale = min(1.0, predicted_s / self.mean_s(work)) ** 2
        self._moments *= scale
        self._targets *= scale
        self.passes += 1
        return True

    def profile(self, passes: Sequence[tuple[Work, float]], learned: CostModel | None = None) -> int:
        """Begin anew from measured passes, all of the same weight, in seconds. They become the prior.

        Args:
            learned: by an earlier run, which has seen passes in service, where they take longer. What it says stands
                for each pass of which it is no more than AGREEING_RATIO off; farther off, the device has changed, and
                what was measured now stands. Where it stands for most, its spread does too.

        Returns: for how many passes it stands.
        Raises: ValueError for a time that is not positive.
        """
        if not all(0 < seconds < math.inf for _, seconds in passes):
            raise ValueError("a profile's passes must have taken more than 0 s")
        size, standing = len(self._prior), 0
        ratios: tuple[float, ...] = ()
        if learned is not None:
            known = [(work, learned.mean_s(work), seconds) for work, seconds in passes]
            agreeing = [1 / AGREEING_RATIO <= known_s / seconds <= AGREEING_RATIO for _, known_s, seconds in known]
            standing = sum(agreeing)
            passes = [
                (work, known_s if agrees else seconds)
                for (work, known_s, seconds), agrees in zip(known, agreeing, strict=True)
            ]
            ratios = tuple(learned._ratios) if 2 * standing > len(passes) else ()
        if passes:
            moments, targets = np.zeros((size, size)), np.zeros(size)
            for work, seconds in passes:
                terms = np.array(_terms(work)) * self._prior / seconds
                moments += np.outer(terms, terms)
                targets += terms
            # Such a prior may be of another scale by far: the tie is to a common factor, so that does not matter.
            scale = float(targets.sum() / moments.sum())
            fitted = _fit(moments * scale**2, targets * scale) * scale
            # What the profile gave nothing to keeps a little, or it could never be scaled up again.
            self._prior = np.maximum(fitted, FLOOR * scale) * self._prior
            self._coefficients = tuple(map(float, self._prior))
        self._moments = PROFILE_WEIGHT * np.eye(size)
        self._targets = np.full(size, PROFILE_WEIGHT)
        self.passes = len(passes)
        self._ratios.clear()
        self._ratios.extend(ratios)
        self._factor = _factor(self._ratios)
        self._side = self._run = self._run_ratios = self._outliers = 0
        return standing

    def snapshot(self) -> dict[str, Any]:
        """All of it as JSON values; `from_snapshot` goes on from there as if nothing had been."""
        return {
            "prior_s": self._prior.tolist(),
            "coefficients_s": list(self._coefficients),
            "moments": self._moments.tolist(),
            "targets": self._targets.tolist(),
            "ratios": list(self._ratios),
            "run": [self._side, self._run, self._run_ratios, self._outliers],
            "passes": self.passes,
        }

    @classmethod
    def from_snapshot(cls, snapshot: Mapping[str, Any]) -> Self:
        """A model as it was at `snapshot`. Raises ValueError for anything else, naming what is wrong."""
        model = cls()
        size = len(model._prior)
        try:
            prior, coefficients, targets = (
                _finite(snapshot[name], (size,)) for name in ("prior_s", "coefficients_s", "targets")
            )
            moments = _finite(snapshot["moments"], (size, size))
            ratios = [float(each) for each in snapshot["ratios"]]
            side, run, run_ratios, outliers = (int(each) for each in snapshot["run"])
            passes = int(snapshot["passes"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"no snapshot of a cost model: {error!r}") from error
        if prior.min() <= 0 or coefficients.min() < 0 or not all(0 < each < math.inf for each in ratios):
            raise ValueError("no snapshot of a cost model: priors and ratios must be positive, coefficients 0 or more")
        model._prior, model._moments, model._targets = prior, moments, targets
        model._coefficients = tuple(map(float, coefficients))
        model._ratios.extend(ratios)
        model._side, model._run, model._run_ratios, model._outliers = side, run, run_ratios, outliers
        model.passes = passes
        model._factor = _factor(model._ratios)
        return model

    def _note_ratio(self, ratio: float) -> None:
        side = (ratio > CHANGED_RATIO) - (ratio < 1 / CHANGED_RATIO)
        if not side or side != self._side:
            self._run = self._run_ratios = 0
        self._side = side
        far = max(ratio, 1 / ratio) > CHANGED_FAR_RATIO
        self._run += (2 if far else 1) * abs(side)
        if self._run < CHANGED_PASSES:
            self._ratios.append(ratio)
            self._run_ratios += 1
        else:
            # The device has changed: these were no spread around its mean.
            for _ in range(min(self._run_ratios, len(self._ratios))):
                self._ratios.pop()
            self._run_ratios = 0
        self._factor = _factor(self._ratios)

    def _rescale(self, ratio: float) -> None:
        """All that was seen is taken to have been slower by `ratio`, as what is seen now is."""
        learned = ratio * np.array(self._coefficients) / self._prior
        self._moments /= ratio**2
        self._targets = self._moments @ learned
        self._coefficients = tuple(map(float, learned * self._prior))


def chunk_costs(
    costs: Costs, steps: Iterable[int], *, window: int = 0, has_small: bool = False, has_light: bool = False
) -> tuple[ChunkCostAt, ...]:
    """The cost of a chunk alone in its pass at each number of steps, size and VAE: what `Capacity.costs` holds.

    Args:
        window: latent frames in a stream's cache.
        has_small: whether there is a smaller size.
        has_light: whether there is a light VAE beside the full one.
    """
    numbers = tuple(steps)
    sizes = (False, True) if has_small else (False,)
    vaes = (False, True) if has_light else (False,)
    works = [
        (each, Work.of_chunk(each, window=window, small=small, light=light))
        for light in vaes
        for small in sizes
        for each in numbers
    ]
    return tuple(
        ChunkCostAt(
            steps=each, small=work.small, mean_s=costs.mean_s(work), upper_s=costs.upper_s(work), light=work.light
        )
        for each, work in works
    )


def _factor(ratios: Sequence[float] | deque[float]) -> float:
    lowest = 1.0 if len(ratios) >= RATIOS_WANTED else FIRST_FACTOR
    if not ratios:
        return lowest
    return max(lowest, sorted(ratios)[math.ceil(QUANTILE * len(ratios)) - 1])


def _fit(moments: NDArray[np.float64], targets: NDArray[np.float64]) -> NDArray[np.float64]:
    """Relative coefficients, not negative, that fit best and lie close to their common mean."""
    size = len(targets)
    matrix = moments + TIE * (np.eye(size) - 1 / size)
    free = np.ones(size, bool)
    fitted = np.zeros(size)
    while free.any():
        fitted[:] = 0
        fitted[free] = np.linalg.solve(matrix[np.ix_(free, free)], targets[free])
        if fitted.min() >= 0:
            break
        # The worst is pinned to nothing, and the others take over what it had.
        free[int(fitted.argmin())] = False
    return fitted


def _finite(values: Any, shape: tuple[int, ...]) -> NDArray[np.float64]:
    array = np.array(values, float)
    if array.shape != shape or not np.isfinite(array).all():
        raise ValueError(f"expected finite numbers of shape {shape}, got shape {array.shape}")
    return array
