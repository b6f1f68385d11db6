"""What a stream's prompts amount to, chunk by chunk: blends by weight and transitions over time, colours included.

Text states are mixed, not pictures: a blend of two prompts is one prompt to the transformer. The text encoder may live
elsewhere and take seconds; until it has answered, a stream keeps what it shows.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.api import Understood, WeightedPrompt
from engine.wan.grade import mix
from engine.wan.text_encoder import EncodedPrompt
from engine.wan.transformer import PromptContext

Encode = Callable[[str], EncodedPrompt | None]
Contextualise = Callable[[Tensor, Tensor], PromptContext]


@dataclass(frozen=True)
class Embedding:
    """Text states [L, K], their mean [K] and colours of a blend, or of a moment between two.

    grade: see `engine.wan.grade`; None changes nothing. understood: of each prompt, where the encoder tells.
    """

    states: Tensor
    mean: Tensor
    grade: Tensor | None = None
    understood: tuple[Understood, ...] = ()

    def towards(self, goal: "Embedding", share: float) -> "Embedding":
        """The straight way to `goal`: 0 here, 1 there."""
        return Embedding(
            torch.lerp(self.states, goal.states, share),
            torch.lerp(self.mean, goal.mean, share),
            mix([(1 - share, self.grade), (share, goal.grade)]),
            goal.understood,
        )


def embed(prompts: tuple[WeightedPrompt, ...], encode: Encode) -> Embedding | None:
    """The weighted mean of the prompts' text states; None while one of them is still being encoded."""
    encoded = [encode(prompt.text) for prompt in prompts]
    known = [one for one in encoded if one is not None]
    if len(known) < len(prompts):
        return None
    understood = tuple(
        Understood(styles=one.styles, score=one.score, modifiers=one.modifiers) for one in known if one.styles
    )
    if len(known) == 1:
        return Embedding(known[0].states, known[0].mean, known[0].grade, understood)
    total = sum(prompt.weight for prompt in prompts)
    shares = [prompt.weight / total for prompt in prompts]
    states = torch.stack([share * one.states.float() for share, one in zip(shares, known, strict=True)]).sum(0)
    mean = torch.stack([share * one.mean.float() for share, one in zip(shares, known, strict=True)]).sum(0)
    grade = mix([(share, one.grade) for share, one in zip(shares, known, strict=True)])
    return Embedding(states.to(known[0].states.dtype), mean.to(known[0].mean.dtype), grade, understood)


@dataclass
class PromptState:
    """The prompts of one stream: those wanted, and how far it has come to them.

    context: text keys and values in force; None until the first prompt is encoded. changed: whether the last `advance`
    reached new prompts, which is when a cache may be rewritten for them. grade, understood: as in `Embedding`, of the
    moment that `context` is of.
    """

    wanted: tuple[WeightedPrompt, ...]
    transition_chunks: int = 0
    context: PromptContext | None = None
    changed: bool = False
    grade: Tensor | None = None
    understood: tuple[Understood, ...] = ()
    _now: Embedding | None = None
    _origin: Embedding | None = None
    _goal: Embedding | None = None
    _pending: bool = field(default=True)
    _done: int = 0
    # Of the transition under way: what is wanted next has its own pace.
    _chunks: int = 0

    def want(self, prompts: tuple[WeightedPrompt, ...], transition_chunks: int) -> None:
        """New prompts, taken up at the next chunk border and reached after so many chunks more."""
        self.transition_chunks = transition_chunks
        if prompts != self.wanted:
            self.wanted, self._pending = prompts, True

    @property
    def pending(self) -> bool:
        """Whether wanted prompts have not begun to show, for their text is still being encoded."""
        return self._pending

    @property
    def moving(self) -> bool:
        """Whether the next chunk may be rendered with another context than the last."""
        return self._pending or self._goal is not None

    def advance(self, encode: Encode, contextualise: Contextualise) -> None:
        """Go on by one chunk; `context` is then what that chunk is rendered with."""
        self.changed = False
        if self._pending:
            goal = embed(self.wanted, encode)
            if goal is not None:
                self._origin, self._goal, self._done, self._pending = self._now, goal, 0, False
                self._chunks = self.transition_chunks
        if self._goal is None:
            return
        self._done += 1
        if self._origin is None or self._done > self._chunks:
            self._now, self._goal, self.changed = self._goal, None, self._origin is not None
        else:
            self._now = self._origin.towards(self._goal, self._done / (self._chunks + 1))
        self.context = contextualise(self._now.states, self._now.mean)
        self.grade, self.understood = self._now.grade, self._now.understood
