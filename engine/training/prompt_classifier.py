"""Fits what finds the style of a free prompt: evidence of every word piece and short word sequence for every style.

Two teachers. The phrases say outright which style is meant. For all that no phrase says, a regression on a sentence
encoder's vectors (MiniLM, 23 MB) of the phrases is asked: about each vocabulary entry, which gives the table its start,
and about made-up prompts of vocabulary words, whose answers the sum over pieces is fitted to. Far from every phrase
that answer is made vague, so that the score says how near a prompt is. A fifth of the phrases held out, the encoder
itself finds 81 % of them, the table 79 % (77 % without made-up prompts, 78 % without the start); it takes two minutes.

Axes in names: V vocabulary entries, N word sequences, S styles, E width of the encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from engine.training.phrases import LEXICON, NAMES, STYLES, in_template
from engine.wan.prompt_reader import ReaderWeights, sequences, words_of
from engine.wan.text_encoder import WordPiece, normalise

Embed = Callable[[Sequence[str]], NDArray[np.float32]]

MADE_UP = 20_000
TEMPLATES_PER_PHRASE = 3
STEPS, RATE = 250, 0.02
PHRASES_A_STEP, MADE_UP_A_STEP = 384, 512
# Of the encoder's opinion that the table starts with; more and less were no better.
START = 0.3
# Pieces this frequent ("a", "of") start with little to say.
FREQUENT, FREQUENT_SHARE = 1000, 0.1
RARE_FROM, SHORTEST = 2000, 3  # of made-up words
NEAR, NEAR_SLOPE = 0.5, 14.0  # cosine to the nearest phrase at which an opinion counts half
DROP, DROP_SEQUENCES = 0.15, 0.3
HOLD = 2e-5  # pull of the table to its start


def clean(text: str) -> str:
    """A text as the reader sees it."""
    return " ".join(words_of(normalise(text)))


def made_up_prompts(vocabulary: Sequence[str], known: Sequence[str], rng: np.random.Generator) -> list[str]:
    """Prompts of rare vocabulary words and words of the phrases, alone, in twos and threes, some in templates."""
    rare = [piece for piece in vocabulary[RARE_FROM:] if piece.isalpha() and len(piece) >= SHORTEST]

    def any_word() -> str:
        return rare[int(len(rare) * rng.random() ** 1.5)]

    def known_word() -> str:
        return known[int(rng.integers(len(known)))]

    kinds: tuple[tuple[float, Callable[[], str]], ...] = (
        (0.25, any_word),
        (0.25, lambda: f"{any_word()} {any_word()}"),
        (0.10, lambda: f"{any_word()} {known_word()}"),
        (0.10, lambda: f"{known_word()} {any_word()}"),
        (0.15, lambda: f"{known_word()} {known_word()}"),
        (0.15, lambda: f"{any_word()} {any_word()} {any_word()}"),
    )
    prompts = []
    for kind in rng.choice(len(kinds), MADE_UP, p=[share for share, _ in kinds]):
        text = kinds[kind][1]()
        prompts.append(in_template(text, rng) if rng.random() < 0.3 else text)
    return prompts


class Opinion:
    """The sentence encoder's: a regression from its vectors to styles, vague where no phrase is near."""

    def __init__(self, vectors_NE: Tensor, styles_N: Tensor, phrases_ME: Tensor) -> None:
        self._phrases_ME = phrases_ME
        self.weight = torch.zeros(vectors_NE.shape[1], len(STYLES), requires_grad=True)
        self.bias = torch.zeros(len(STYLES), requires_grad=True)
        optimiser = torch.optim.Adam([self.weight, self.bias], lr=0.03)
        for _ in range(250):
            loss = functional.cross_entropy(self._logits(vectors_NE), styles_N)
            loss = loss + 3e-4 * self.weight.square().sum()
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()

    def _logits(self, vectors_NE: Tensor) -> Tensor:
        return 10 * vectors_NE @ self.weight + self.bias

    @torch.no_grad()
    def evidence(self, vectors_NE: Tensor) -> Tensor:
        """For every style, centred [N, S]."""
        logits = self._logits(vectors_NE)
        return logits - logits.mean(1, keepdim=True)

    @torch.no_grad()
    def shares(self, vectors_NE: Tensor) -> Tensor:
        """Probability of every style [N, S]."""
        nearest = (vectors_NE @ self._phrases_ME.T).max(1, keepdim=True).values
        sure = torch.sigmoid((nearest - NEAR) * NEAR_SLOPE)
        return sure * self._logits(vectors_NE).softmax(1) + (1 - sure) / len(STYLES)


class Classifier:
    """A row for every piece and for every word sequence of the phrases; a prompt's evidence is the sum of its rows."""

    def __init__(self, vocabulary: Sequence[str], phrases: Sequence[str], start_VS: Tensor) -> None:
        self._tokenize = WordPiece(vocabulary)
        self.pieces = len(vocabulary)
        self.sequences = list(dict.fromkeys(s for phrase in phrases for s in sequences(clean(phrase).split())))
        self._rows = {sequence: self.pieces + row for row, sequence in enumerate(self.sequences)}
        start_VS = START * start_VS
        start_VS[:FREQUENT] *= FREQUENT_SHARE
        self.start = torch.cat((start_VS, torch.zeros(len(self.sequences), start_VS.shape[1])))
        self.table = self.start.clone().requires_grad_()
        self.bias = torch.zeros(start_VS.shape[1], requires_grad=True)

    def features(self, text: str) -> tuple[list[int], list[int]]:
        """Rows of a text's pieces and of its sequences."""
        text = clean(text)
        return self._tokenize(text), [self._rows[s] for s in sequences(text.split()) if s in self._rows]

    def logits(self, features: Sequence[tuple[list[int], list[int]]], rng: np.random.Generator | None = None) -> Tensor:
        """Evidence [B, S]; with `rng`, rows are left out at random, so that none is leant on alone."""
        rows: list[int] = []
        offsets = []
        for pieces, found in features:
            offsets.append(len(rows))
            if rng is None:
                rows += pieces + found
                continue
            kept = pieces if rng.random() < DROP_SEQUENCES else pieces + found
            rows += [row for row in kept if rng.random() >= DROP]
        bags = functional.embedding_bag(
            torch.tensor(rows, dtype=torch.long), self.table, torch.tensor(offsets, dtype=torch.long), mode="sum"
        )
        return bags + self.bias


def fit(vocabulary: Sequence[str], vectors_VE: NDArray[np.float32], embed: Embed, seed: int = 0) -> ReaderWeights:
    """Train on the phrases; the same every time on the same machine.

    Args:
        vectors_VE: the encoder's answer to every vocabulary entry. embed: its answer to texts; unit vectors.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    labelled = _labelled()
    phrases, styles = [phrase for phrase, _ in labelled], torch.tensor([place for _, place in labelled])
    known = sorted({word for phrase in phrases for word in clean(phrase).split() if len(word) >= SHORTEST})
    made_up = made_up_prompts(vocabulary, known, rng)
    templated = [in_template(phrase, rng) for phrase in phrases for _ in range(TEMPLATES_PER_PHRASE)]
    phrases_ME = torch.from_numpy(embed(phrases))
    opinion = Opinion(
        torch.cat((phrases_ME, torch.from_numpy(embed(templated)))),
        torch.cat((styles, styles.repeat_interleave(TEMPLATES_PER_PHRASE))),
        phrases_ME,
    )
    classifier = Classifier(vocabulary, phrases, opinion.evidence(torch.from_numpy(vectors_VE)))
    wanted, features = opinion.shares(torch.from_numpy(embed(made_up))), [classifier.features(text) for text in made_up]
    optimiser = torch.optim.Adam([classifier.table, classifier.bias], lr=RATE)
    for _ in range(STEPS):
        chosen = rng.integers(len(phrases), size=PHRASES_A_STEP)
        texts = [in_template(phrases[i], rng) if rng.random() < 0.6 else phrases[i] for i in chosen]
        asked = classifier.logits([classifier.features(text) for text in texts], rng)
        loss = functional.cross_entropy(asked, styles[torch.from_numpy(chosen)], label_smoothing=0.02)
        drawn = rng.integers(len(made_up), size=MADE_UP_A_STEP)
        answered = classifier.logits([features[i] for i in drawn], rng=None).log_softmax(1)
        loss = loss + functional.kl_div(answered, wanted[torch.from_numpy(drawn)], reduction="batchmean")
        loss = loss + HOLD * (classifier.table - classifier.start).square().sum()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return _stored(classifier)


def _labelled() -> list[tuple[str, int]]:
    """Every phrase that means a style outright, with its place; what a style is called goes before the lexicon."""
    own = [(phrase, place) for place, style in enumerate(STYLES) for phrase in style.phrases]
    taken = {clean(phrase) for phrase, _ in own}
    more = [(phrase, place) for place, style in enumerate(STYLES) for phrase in LEXICON[style.id]]
    return own + [(phrase, place) for phrase, place in more if clean(phrase) not in taken]


def _texts() -> dict[str, Any]:
    return {
        "prompts": {style.id: style.prompt for style in STYLES},
        "phrases": {clean(phrase): place for phrase, place in _labelled()},
        "names": {clean(name): place for place, style in enumerate(STYLES) for name in NAMES[style.id]},
    }


def unfitted(vocabulary: Sequence[str]) -> ReaderWeights:
    """What knows the phrases as they stand and nothing else: for tests, which do without the sentence encoder."""
    return _stored(Classifier(vocabulary, [], torch.zeros(len(vocabulary), len(STYLES))))


def is_current(weights: ReaderWeights) -> bool:
    """Whether these were fitted to the phrases as they are now."""
    return all(getattr(weights, name) == wanted for name, wanted in _texts().items())


def _stored(classifier: Classifier) -> ReaderWeights:
    table = classifier.table.detach()
    scale = (table.abs().amax(1, keepdim=True) / 127 + 1e-6).half()
    rows = (table / scale.float()).round().clamp(-127, 127).to(torch.int8)
    split = classifier.pieces
    return ReaderWeights(
        **_texts(),
        sequences=tuple(classifier.sequences),
        piece_rows=rows[:split].contiguous(),
        piece_scales=scale[:split].contiguous(),
        sequence_rows=rows[split:].contiguous(),
        sequence_scales=scale[split:].contiguous(),
        bias=classifier.bias.detach().clone(),
    )
