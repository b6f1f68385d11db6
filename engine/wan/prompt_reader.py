"""What a free prompt means: the one or two styles it names or is nearest to, and the colours and moods it adds.

The transformer knows one prompt a style and mixtures of two; everything else that a person may type is settled here,
once per prompt and in a millisecond. The order: words that belong together because a style is called so ("night
vision") are kept from being taken for moods; moods and colours are taken out; what then names two styles is a mixture;
the rest goes to a linear classifier over word pieces and short word sequences. It was trained on the styles' phrases
and on a sentence encoder's opinion of every vocabulary entry, see `engine.training.text_table`.

Axes in names: V vocabulary entries, N word sequences, S styles.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from engine.wan import grade as grades
from engine.wan.grade import AMOUNTS, FREE, MODIFIERS, OBJECTS, OWN, SLIGHT, SLIGHT_ENDING

NEUTRAL = "photo"
# Beyond so many words that are no fillers, evidence is thinned by this power of their number. Without it one random
# prompt of eight words in two scores above a half, with it one in a hundred.
FEW_WORDS, THINNING = 3, 0.75
READER_KEYS = (
    "reader_json",
    "reader_piece_int8",
    "reader_piece_fp16",
    "reader_sequence_int8",
    "reader_sequence_fp16",
    "reader_bias",
)
MAX_WORDS = 64
LONGEST = 6  # words of a phrase
TYPO_LENGTH = 5  # shorter words have too many neighbours
# Below this score a style is not worth more than the camera with the colours asked for.
FAINT = 0.3


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Words that ask for something without saying what.
FILLERS = _words(
    "a an the of in on at to into as like with and or me my i im us we you your it its this that is are be am make "
    "made makes making turn turned show shown look looks looking please want would let give get put do can could "
    "just style styled filter effect mode theme version render rendered restyle restyled everything everyone all "
    "whole picture image video scene room person people man woman men women guy girl boy face faces portrait "
    "someone somebody friends family high quality detailed beautiful nice art artwork if were was for by from so "
    "some more bit slightly very really little than now here there tint tinted colors color colored tone tones "
    "toned mood light lighting lights hue vibe feel feeling atmosphere through transform change myself selfie "
    "webcam add smiling waving wearing hello hi hey but"
)
# Fillers that say something where nothing else does.
_WEAK = frozenset(("light", "lights", "lighting", "art", "artwork", "portrait", "picture", "image", "video"))


def words_of(normal: str) -> list[str]:
    """The words of a normalised text; hyphens part words, apostrophes do not."""
    joined = re.sub(r"'s\b", "", normal.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")).replace("'", "")
    return re.findall(r"[a-z0-9]+", joined)[:MAX_WORDS]


def sequences(words: Sequence[str]) -> list[str]:
    """Every run of one to three words."""
    return [" ".join(words[i : i + n]) for n in (1, 2, 3) for i in range(len(words) - n + 1)]


@dataclass(frozen=True)
class Reading:
    """What was understood: styles with their shares, how sure, and the moods with their amounts."""

    styles: tuple[tuple[str, float], ...]
    score: float
    grade: Tensor | None = None
    modifiers: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Moods:
    """What is left of a prompt without its moods, and these with their amounts and places in order."""

    rest: list[str]
    amounts: dict[str, float]


@dataclass(frozen=True)
class ReaderWeights:
    """The classifier as it is stored.

    prompts: canonical prompt of every style, in the order of S. phrases: known phrases with the place of their style.
    names: phrases so plain that two of them make a mixture. sequences: what sequence_rows stand for. Rows: int8 [V, S]
        and [N, S], to be multiplied by their scales, float16 [V, 1] and [N, 1].
    """

    prompts: dict[str, str]
    phrases: dict[str, int]
    names: dict[str, int]
    sequences: tuple[str, ...]
    piece_rows: Tensor
    piece_scales: Tensor
    sequence_rows: Tensor
    sequence_scales: Tensor
    bias: Tensor

    def to_tensors(self) -> dict[str, Tensor]:
        """As `from_tensors` reads it."""
        texts = {
            "prompts": self.prompts,
            "phrases": self.phrases,
            "names": self.names,
            "sequences": self.sequences,
        }
        packed = torch.tensor(bytearray(json.dumps(texts, separators=(",", ":")).encode()), dtype=torch.uint8)
        parts = (self.piece_rows, self.piece_scales, self.sequence_rows, self.sequence_scales, self.bias)
        return dict(zip(READER_KEYS, (packed, *parts), strict=True))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> ReaderWeights:
        """Raises: ValueError for parts that do not fit each other."""
        packed, *parts = (tensors[key] for key in READER_KEYS)
        try:
            texts = json.loads(bytes(packed.tolist()))
            out = cls(texts["prompts"], texts["phrases"], texts["names"], tuple(texts["sequences"]), *parts)
        except (KeyError, ValueError) as error:
            raise ValueError(f"text reader: {READER_KEYS[0]} is damaged ({error})") from error
        styles = len(out.prompts)
        if not (
            out.piece_rows.shape[1] == out.sequence_rows.shape[1] == len(out.bias) == styles
            and len(out.sequence_rows) == len(out.sequences) == len(out.sequence_scales)
            and len(out.piece_rows) == len(out.piece_scales)
        ):
            raise ValueError(f"text reader: its parts do not fit {styles} styles and {len(out.sequences)} sequences")
        return out


@dataclass
class PromptReader:
    """Reads prompts for the styles in `known`, all of the weights' styles unless told otherwise."""

    weights: ReaderWeights
    tokenize: Callable[[str], list[int]]
    vocabulary: Collection[str]
    normalise: Callable[[str], str]
    known: Collection[str] = ()
    _shields: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        ids = list(self.weights.prompts)
        self._ids = ids
        self.known = [style for style in ids if not self.known or style in self.known]
        if not self.known:
            raise ValueError(f"text reader: none of the model's styles is one of {', '.join(ids)}")
        self._allowed = torch.tensor([style in self.known for style in ids])
        self._rows = {sequence: row for row, sequence in enumerate(self.weights.sequences)}
        triggers = {part for word in self._modifier_words for part in word.split()}
        self._shields = {
            phrase: style
            for phrase, style in self.weights.phrases.items()
            if " " in phrase
            and any(word in triggers for word in phrase.split())
            and not any(self._holds(phrase, mood) for mood in FREE.get(ids[style], ()))
        }

    def _holds(self, phrase: str, mood: str) -> bool:
        return any(f" {word} " in f" {phrase} " for word, known in self._modifier_words.items() if known == mood)

    # --- reading

    def read(self, prompt: str) -> Reading:
        """Understand one prompt. Never raises: what is not understood is the nearest style with a low score."""
        words = [self._spelled(word) for word in words_of(self.normalise(prompt))]
        moods = self._take_moods(words)
        styles, score = self._styles(moods)
        amounts = {
            mood: amount
            for mood, amount in moods.amounts.items()
            if amount and not any(mood in OWN.get(style, ()) for style, _ in styles)
        }
        grade = None
        for mood, amount in amounts.items():
            own = grades.BY_ID[mood].at(amount)
            grade = own if grade is None else grades.compose(grade, own)
        return Reading(styles, score, grade, tuple(amounts))

    def _styles(self, moods: _Moods) -> tuple[tuple[tuple[str, float], ...], float]:
        unsaid = all(word in FILLERS or word in AMOUNTS for word in moods.rest)
        weak = bool(moods.rest) and not moods.amounts and _WEAK.issuperset(moods.rest)
        if unsaid and not weak and NEUTRAL in self.known:
            # Nothing asked for, or moods alone: the camera itself.
            return ((NEUTRAL, 1.0),), 1.0
        content = [word for word in moods.rest if word not in FILLERS]
        known = self.weights.phrases.get(" ".join(moods.rest), self.weights.phrases.get(" ".join(content)))
        if known is not None and self._ids[known] in self.known:
            return ((self._ids[known], 1.0),), 1.0
        if pair := self._pair(moods.rest):
            return pair
        shares = self.shares(moods.rest)
        allowed = torch.where(self._allowed, shares, -1.0)
        best = int(allowed.argmax())
        if moods.amounts and shares[best] < FAINT and NEUTRAL in self.known:
            # "A sunny day": colours are all that can be had of it.
            best = self._ids.index(NEUTRAL)
        return ((self._ids[best], 1.0),), float(shares[best])

    def logits(self, words: Sequence[str]) -> Tensor:
        """Evidence for every style, known or not [S]; of many words each counts less, for chance adds up too."""
        weights = self.weights
        out = torch.zeros(len(self._ids))
        pieces = torch.tensor(self.tokenize(" ".join(words)), dtype=torch.long)
        out += (weights.piece_rows[pieces].float() * weights.piece_scales[pieces].float()).sum(0)
        rows = torch.tensor([self._rows[s] for s in sequences(words) if s in self._rows], dtype=torch.long)
        out += (weights.sequence_rows[rows].float() * weights.sequence_scales[rows].float()).sum(0)
        content = sum(word not in FILLERS for word in words)
        out *= min(1.0, FEW_WORDS / max(content, 1)) ** THINNING
        return out + weights.bias

    def shares(self, words: Sequence[str]) -> Tensor:
        """Probability of every style, known or not [S]."""
        return self.logits(words).softmax(0)

    def _pair(self, words: list[str]) -> tuple[tuple[tuple[str, float], ...], float] | None:
        """Two styles plainly named, none of them inside a phrase of a third."""
        found: list[tuple[int, int]] = []  # place, style
        start = 0
        while start < len(words):
            for end in range(min(len(words), start + LONGEST), start, -1):
                text = " ".join(words[start:end])
                if text in self.weights.names:
                    found.append((start, self.weights.names[text]))
                elif end - start == 1 or text not in self.weights.phrases:
                    continue
                start = end - 1
                break
            start += 1
        styles = list(dict.fromkeys(self._ids[style] for _, style in found))
        styles = [style for style in styles if style in self.known and style != NEUTRAL]
        if len(styles) != 2:
            return None
        second = next(place for place, style in reversed(found) if self._ids[style] == styles[1])
        hinted = {"touch", "hint", "bit", "little", "slightly", "some"} & set(words[max(0, second - 3) : second])
        first = 0.7 if hinted else 0.5
        return ((styles[0], first), (styles[1], 1 - first)), 1.0

    # --- colours and moods

    @cached_property
    def _modifier_words(self) -> dict[str, str]:
        return {" ".join(words_of(self.normalise(word))): mod.id for mod in MODIFIERS for word in mod.words}

    def _take_moods(self, words: list[str]) -> _Moods:
        """Split a prompt into moods and the rest; words inside a style's own phrase stay with it."""
        rest: list[str] = []
        amounts: dict[str, float] = {}
        at = 0
        while at < len(words):
            if length := self._longest(words, at, self._shields):
                rest += words[at : at + length]
                at += length
                continue
            length = self._longest(words, at, self._modifier_words)
            if not length:
                rest.append(words[at])
                at += 1
                continue
            if OBJECTS.intersection(words[at + length : at + length + 1]):
                at += length  # the colour of a thing: neither mood nor style
                continue
            named = " ".join(words[at : at + length])
            amount, said = self._amount(rest)
            del rest[len(rest) - said :]
            if named in SLIGHT_ENDING:
                amount *= SLIGHT
            amounts[self._modifier_words[named]] = amount
            at += length
        return _Moods(rest, amounts)

    @staticmethod
    def _longest(words: list[str], at: int, known: Mapping[str, object]) -> int:
        for length in range(min(LONGEST, len(words) - at), 0, -1):
            if " ".join(words[at : at + length]) in known:
                return length
        return 0

    @staticmethod
    def _amount(before: list[str]) -> tuple[float, int]:
        """How much the words before a mood make of it, and how many of them belong to it."""
        amounts, said = [1.0], 0
        while said < min(4, len(before)):
            word = before[-1 - said]
            if word in AMOUNTS:
                amounts.append(AMOUNTS[word])
            elif word not in ("a", "of", "so", "too", "any"):
                break
            said += 1
        # An article that only stood before the mood's noun is no part of it.
        while said and before[-said] in ("a", "of", "so", "any") and not any(w in AMOUNTS for w in before[-said:]):
            said -= 1
        return min(amounts) * max(amounts), said

    # --- spelling

    @cached_property
    def _style_words(self) -> frozenset[str]:
        phrases = {word for phrase in self.weights.phrases for word in phrase.split()}
        moods = {word for text in self._modifier_words for word in text.split()}
        return frozenset(word for word in phrases | moods if len(word) >= TYPO_LENGTH)

    def _spelled(self, word: str) -> str:
        """A word one slip away from a style's word, put right; words of the vocabulary are left alone."""
        if len(word) < TYPO_LENGTH or word in self.vocabulary or word in self._style_words or not word.isalpha():
            return word
        near = sorted(known for known in self._style_words if _one_slip(word, known))
        return near[0] if near else word


def _one_slip(a: str, b: str) -> bool:
    """Whether one insertion, deletion, replacement or swap of neighbours leads from one to the other."""
    if abs(len(a) - len(b)) > 1 or a == b:
        return False
    if len(a) > len(b):
        a, b = b, a
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))
    if len(a) < len(b):
        return a[start:] == b[start + 1 :]
    swapped = a[start : start + 2][::-1] == b[start : start + 2] and a[start + 2 :] == b[start + 2 :]
    return swapped or a[start + 1 :] == b[start + 1 :]
