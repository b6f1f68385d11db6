"""The stream batch: one pass of the transformer moves every item given one denoising step on.

An item is a chunk of a stream at its next step. A pass takes any mix of streams, steps and cache fills; its rows only
share their number of latent frames. Steps of one chunk one after another, or the steps of successive chunks together,
are two ways to choose items for a pass, not two kinds of pass.

Axes in names: B rows, T latent frames, C channels, H and W rows and columns.
Source: StreamDiffusionV2, arXiv:2511.07399, section 4.2; steps and streams in one batch are ours.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.flow_match import add_noise, clean_from_flow, stacked
from engine.kv_cache import EMPTY, CacheRow, CacheView, KVPool
from engine.session import Item, PassInput, SessionState
from engine.wan.transformer import CausalTransformer, PromptContext

Pass = Callable[..., tuple[Tensor, Tensor]]
# Rows, latent frames, whether the rows lie side by side, and whether they share a prompt.
PassShape = tuple[int, int, bool, bool]
MAX_COMPILED = 32


def predict_clean(
    prediction: str,
    output_BTCHW: Tensor,
    noisy_BTCHW: Tensor,
    source_BTCHW: Tensor,
    sigma_B: Tensor,
    strength_B: Tensor,
) -> Tensor:
    """The clean latent that the transformer's output stands for.

    Args:
        prediction: of the checkpoint, see `TransformerConfig.prediction`.
        output_BTCHW: what `CausalTransformer.forward` returned for noisy_BTCHW.
        strength_B: scales the residual of a `source_residual` model. With the source as an input, starting from less
            noise alone hardly changes its picture. A `flow` model takes no notice.
    """
    if prediction == "source_residual":
        return source_BTCHW + strength_B.view(-1, 1, 1, 1, 1).to(output_BTCHW.dtype) * output_BTCHW
    return clean_from_flow(noisy_BTCHW, output_BTCHW, sigma_B[:, None])


class StreamBatch:
    """The transformer and its cache as passes over items."""

    def __init__(self, transformer: CausalTransformer, pool: KVPool, *, compile_pass: bool = False) -> None:
        """Put a transformer and a pool together.

        Args:
            compile_pass: run passes over full windows through torch.compile, once for each number of rows. Those of a
                stream's first chunks run as they are: their shapes come once and would take a minute each.
        """
        self.transformer, self.pool = transformer, pool
        self._conditioned = transformer.config.condition_channels > 0
        self._compiled: Pass | None = None
        self._ready: set[PassShape] = set()
        self._sealed = False
        if compile_pass:
            from torch import _dynamo as dynamo  # a second to load, and of no use else

            dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, MAX_COMPILED)
            self._compiled = torch.compile(
                self._one_pass, fullgraph=True, dynamic=False, options={"guard_filter_fn": _keep_guard}
            )
        self._joined: tuple[tuple[PromptContext, ...], PromptContext] | None = None

    def seal(self) -> None:
        """Compile no more: a shape not met so far runs as it is, rather than hold up a stream for a minute."""
        self._sealed = True

    def _pass(self, frames: int, view: CacheView, prompt: PromptContext) -> Pass:
        """The compiled pass, where the view is of the steady state and its shape has one or may have one."""
        steady = view.valid == self.pool.window and view.lengths.mask is None
        if self._compiled is None or not steady:
            return self._one_pass
        shape = (view.query.cos.shape[0], frames, view.rows is None, prompt.keys[0].shape[0] == 1)
        if not self._sealed and len(self._ready) < MAX_COMPILED:
            self._ready.add(shape)
        return self._compiled if shape in self._ready else self._one_pass

    def begin(self, item: Item) -> None:
        """Decide once, for all layers and steps, whether a new chunk of one latent frame takes a sink's place."""
        if self.pool.cache.sink_refresh is None or not item.schedule.steps:
            return
        item.look = self.transformer.look(item.source)
        if item.source.shape[1] == 1:
            item.sink = self.pool.choose_sinks(item.rows[:1], item.look)

    def step(self, items: Sequence[Item]) -> None:
        """Take every item one step on.

        Args:
            items: with the same number of latent frames, none of them done, each on a row of its own.
        """
        # Neighbouring rows in order are read where they lie, others through a copy.
        items = sorted(items, key=lambda item: item.rows[item.step].index)
        self.enter_rows(items)
        rows = [item.rows[item.step] for item in items]
        slots = [item.slots for item in items if item.slots is not None]
        view = self.pool.view(rows, slots[0] if len(slots) == 1 else torch.cat(slots))
        timestep_B = stacked([item.schedule.timesteps[item.step] for item in items])
        clean, noisy = self._run(
            [item.clean for item in items],
            [item.noise.draw(item.chunk, item.step, item.source.shape[1]) for item in items],
            stacked([item.schedule.level(item.step) for item in items]),
            [item.source for item in items],
            timestep_B,
            stacked([item.schedule.sigmas[item.step] for item in items]),
            stacked([item.schedule.strength for item in items]),
            [item.prompt for item in items],
            view,
        )
        for row, item in enumerate(items):
            item.clean = clean[row : row + 1]
            item.step += 1
            if item.done:
                given = PassInput(noisy[row : row + 1], item.source, timestep_B[row : row + 1])
                item.state.history.append(given)

    def enter_rows(self, items: Sequence[Item]) -> None:
        """Take cache slots for those items that come to a row they have not been in."""
        new = [item for item in items if item.step == 0 or item.rows[item.step] is not item.rows[item.step - 1]]
        if not new:
            return
        rows: list[CacheRow] = [item.rows[item.step] for item in new]
        sink = look = None
        if all(item.look is not None for item in new):
            look = torch.cat([item.look for item in new if item.look is not None])
        if any(item.sink is not None for item in new):
            none = torch.full((1,), EMPTY, device=self.pool.held.device)
            sink = torch.cat([none if item.sink is None else item.sink for item in new])
        slots = self.pool.advance(rows, new[0].source.shape[1], sink=sink, look_BE=look)
        for row, item in enumerate(new):
            item.slots = slots[row : row + 1]

    def recache(self, state: SessionState, prompt: PromptContext) -> None:
        """Compute what the cache holds of a stream again for another prompt, oldest frame first.

        Costs a pass for each frame of the window, once; earlier frames then no longer speak for the old prompt.
        Source: KV re-cache of LongLive, arXiv:2509.22622.
        """
        row, *others = state.rows
        self.pool.clear(row)
        for given in state.history:
            slots = self.pool.advance([row], given.noisy.shape[1], look_BE=self._look(given.source))
            none = torch.zeros_like(given.timestep)
            view = self.pool.view([row], slots)
            noisy, source = [given.noisy], [given.source]
            # Noise of level 0 leaves what was noised before.
            self._run(noisy, noisy, none, source, given.timestep, none, none, [prompt], view)
        for other in others:
            self.pool.copy_row(row, other)

    def _look(self, source: Tensor) -> Tensor | None:
        return None if self.pool.cache.sink_refresh is None else self.transformer.look(source)

    def _run(
        self,
        clean: Sequence[Tensor],
        noise: Sequence[Tensor],
        level_B: Tensor,
        source: Sequence[Tensor],
        timestep_B: Tensor,
        sigma_B: Tensor,
        strength_B: Tensor,
        prompts: Sequence[PromptContext],
        view: CacheView,
    ) -> tuple[Tensor, Tensor]:
        clean_BTCHW, noise_BTCHW, source_BTCHW = (
            parts[0] if len(parts) == 1 else torch.cat(tuple(parts)) for parts in (clean, noise, source)
        )
        prompt = self._join(prompts)
        return self._pass(clean_BTCHW.shape[1], view, prompt)(
            clean_BTCHW, noise_BTCHW, level_B, source_BTCHW, timestep_B, sigma_B, strength_B, prompt, view
        )

    def _join(self, prompts: Sequence[PromptContext]) -> PromptContext:
        """One batch of prompts; kept for as long as the same streams come together."""
        wanted = tuple(prompts)
        if (
            self._joined is None
            or len(self._joined[0]) != len(wanted)
            or any(a is not b for a, b in zip(self._joined[0], wanted, strict=True))
        ):
            self._joined = wanted, PromptContext.joined(wanted)
        return self._joined[1]

    def _one_pass(
        self,
        clean_BTCHW: Tensor,
        noise_BTCHW: Tensor,
        level_B: Tensor,
        source_BTCHW: Tensor,
        timestep_B: Tensor,
        sigma_B: Tensor,
        strength_B: Tensor,
        prompt: PromptContext,
        view: CacheView,
    ) -> tuple[Tensor, Tensor]:
        """The whole of a pass on the device: what is compiled, or captured into a graph.

        Returns: the clean latents predicted, and the noisy ones that they were predicted from.
        """
        noisy_BTCHW = add_noise(clean_BTCHW, noise_BTCHW, level_B[:, None].float())
        condition = source_BTCHW if self._conditioned else None
        output = self.transformer(noisy_BTCHW, condition, timestep_B, prompt, view)
        prediction = self.transformer.config.prediction
        return predict_clean(prediction, output, noisy_BTCHW, source_BTCHW, sigma_B, strength_B), noisy_BTCHW


def _keep_guard(guards: Sequence[Any]) -> list[bool]:
    """What a compiled pass checks before it runs: its inputs and settings, but not that modules are still modules and
    weights still of their shape, which never changes.

    Those are most of the checks, and on a small model they cost a quarter of the pass: 1.1 ms of 4.7.
    """
    constants = ("CONSTANT_MATCH", "EQUALS_MATCH")
    return [not guard.name.startswith("self.") or guard.guard_type in constants for guard in guards]
