"""Prompt to text states: the contract, and a text encoder without a network, a table with one vector per word piece.

The table holds a sentence encoder's answer to every single vocabulary entry, projected to a few dimensions and
stored in int8 (2 MB). The transformer is trained on one prompt a style, so the table only has to encode these; which
of them a free prompt means, and which colours it adds, is settled by `engine.wan.prompt_reader` before.

Axes in names: L text positions, K text width, V vocabulary entries.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from engine.wan.prompt_reader import READER_KEYS, PromptReader, ReaderWeights

TABLE_KEY, SCALE_KEY, VOCABULARY_KEY = "table_int8", "scale_fp16", "vocab"
MAX_WORD_CHARS = 100

# British spellings, mapped to the American ones that the vocabulary knows as whole words.
_SPELLINGS = (
    (re.compile(r"colour"), "color"),
    (re.compile(r"\bgrey"), "gray"),
    (re.compile(r"\b(centre|theatre|sombre|fibre|lustre)(s?)\b"), lambda m: m[1][:-2] + "er" + m[2]),
    (re.compile(r"\bmonochromatise"), "monochromatize"),
    (re.compile(r"(styl|real|ideal|minimal|abstract|pixel|solar|poster|vapor|general)is(e[ds]?|ing)\b"), r"\1iz\2"),
    (re.compile(r"\b(vap|hum|neighb|harb|flav|sav|glam)our(?!ous)"), r"\1or"),
    (re.compile(r"\bmould"), "mold"),
    (re.compile(r"\bjewellery\b"), "jewelry"),
    (re.compile(r"\bcosy\b"), "cozy"),
    (re.compile(r"\bpencilled\b"), "penciled"),
    (re.compile(r"\bmosaicked\b"), "mosaiced"),
    (re.compile(r"\b(pyjama)(s?)\b"), r"pajama\2"),
    (re.compile(r"\banaemic\b"), "anemic"),
    (re.compile(r"\barchaeolog"), "archeolog"),
    (re.compile(r"\bmediaeval\b"), "medieval"),
)


def normalise(text: str) -> str:
    """Lower case, without accents, in American spelling."""
    text = unicodedata.normalize("NFD", text.lower())
    text = "".join(char for char in text if unicodedata.category(char) != "Mn")
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    return text


class WordPiece:
    """BERT's greedy tokenizer: each word is cut into the longest known pieces from the left."""

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self._ids = {piece: index for index, piece in enumerate(vocabulary)}

    def __call__(self, text: str) -> list[int]:
        """Piece ids of a text; a word that cannot be cut into known pieces has none."""
        return [index for word in re.findall(r"\w+|[^\w\s]", normalise(text)) for index in self._word(word)]

    def _word(self, word: str) -> list[int]:
        pieces: list[int] = []
        start = 0
        if len(word) > MAX_WORD_CHARS:
            return []
        while start < len(word):
            prefix = "##" if start else ""
            for end in range(len(word), start, -1):
                if (index := self._ids.get(prefix + word[start:end])) is not None:
                    pieces.append(index)
                    start = end
                    break
            else:
                return []
        return pieces


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the transformer takes it, and what was understood of it.

    states: [L, K] float32, zero rows after the last piece. mean: [K] over all pieces, also those beyond L.
    styles: ids and shares of the styles it stands for, the greatest first; empty where any words are understood, as by
        Wan's encoder. score: 0 to 1, how near the prompt is to them. grade: the colours it adds, see
        `engine.wan.grade`; None: none. modifiers: their ids.
    """

    states: Tensor
    mean: Tensor
    pieces: int
    styles: tuple[tuple[str, float], ...] = ()
    score: float = 1.0
    grade: Tensor | None = None
    modifiers: tuple[str, ...] = ()


class TextEncoder(Protocol):
    """What turns prompts into states; runs once per prompt."""

    def request(self, prompt: str) -> EncodedPrompt | None:
        """States of a prompt if they are there, at once; None: they were ordered, ask again at the next chunk.

        Raises: EngineError, if they will never come; the text says why.
        """

    def encode(self, prompt: str) -> EncodedPrompt:
        """States of a prompt, waited for. Raises: EngineError, as `request` and when it takes too long."""

    def close(self) -> None:
        """Free what the encoder holds."""


class StaticTextEncoder:
    """Reads prompts and looks them up; always on the CPU, since it runs once per prompt."""

    def __init__(
        self,
        table_VK: Tensor,
        scale_V1: Tensor,
        vocabulary: Sequence[str],
        text_len: int,
        *,
        reader: ReaderWeights | None = None,
        styles: Sequence[str] = (),
    ) -> None:
        """Take the tables as they are stored.

        Args:
            table_VK: int8; a piece's vector is its row times its scale.
            scale_V1: float16.
            reader: what finds the style of a prompt; without it a prompt's own pieces are its states.
            styles: ids that the transformer knows, where these are not all of the reader's.

        Raises: ValueError, if the three differ in length, or the reader knows none of the styles.
        """
        if not len(table_VK) == len(scale_V1) == len(vocabulary):
            raise ValueError(
                f"text table of {len(table_VK)} rows, {len(scale_V1)} scales and {len(vocabulary)} pieces: not equal"
            )
        self.table_VK, self.scale_V1 = table_VK, scale_V1
        self.vocabulary = tuple(vocabulary)
        self.text_len = text_len
        self._tokenize = WordPiece(self.vocabulary)
        self.reader: PromptReader | None = None
        if reader is not None:
            if len(reader.piece_rows) != len(vocabulary):
                raise ValueError(
                    f"text reader of {len(reader.piece_rows)} pieces for {len(vocabulary)} in the vocabulary"
                )
            words = frozenset(piece for piece in self.vocabulary if piece.isalpha())
            self.reader = PromptReader(reader, self._tokenize, words, normalise, styles)

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], text_len: int, styles: Sequence[str] = ()
    ) -> "StaticTextEncoder":
        """Read `table_int8`, `scale_fp16`, `vocab` (UTF-8 bytes of the newline-joined vocabulary) and the reader's
        tensors, if they are there. styles: see `__init__`."""
        vocabulary = bytes(tensors[VOCABULARY_KEY].tolist()).decode().split("\n")
        reader = ReaderWeights.from_tensors(tensors) if READER_KEYS[0] in tensors else None
        return cls(tensors[TABLE_KEY], tensors[SCALE_KEY], vocabulary, text_len, reader=reader, styles=styles)

    def to_tensors(self) -> dict[str, Tensor]:
        """The inverse of `from_tensors`."""
        joined = bytearray("\n".join(self.vocabulary).encode())
        return {
            TABLE_KEY: self.table_VK,
            SCALE_KEY: self.scale_V1,
            VOCABULARY_KEY: torch.frombuffer(joined, dtype=torch.uint8).clone(),
            **({} if self.reader is None else self.reader.weights.to_tensors()),
        }

    @property
    def text_dim(self) -> int:
        """Width K of a state."""
        return self.table_VK.shape[1]

    def encode(self, prompt: str) -> EncodedPrompt:
        """States and mean of the style meant, or of two, mixed; see `engine.wan.prompt_reader`.

        Without a reader: of the prompt's own pieces, and zero where it has none.
        """
        if self.reader is None:
            return self._look_up(prompt)
        reading = self.reader.read(prompt)
        parts = [(share, self.canonical(style)) for style, share in reading.styles]
        return EncodedPrompt(
            sum((share * part.states for share, part in parts), torch.zeros(())),
            sum((share * part.mean for share, part in parts), torch.zeros(())),
            max(part.pieces for _, part in parts),
            reading.styles,
            reading.score,
            reading.grade,
            reading.modifiers,
        )

    def canonical(self, style: str) -> EncodedPrompt:
        """A style's own prompt, the one the transformer is trained on.

        Raises: KeyError for a style that the reader does not have.
        """
        if self.reader is None:
            raise KeyError(f"no reader in this text table: style {style!r} has no prompt")
        encoded = self._look_up(self.reader.weights.prompts[style])
        return replace(encoded, styles=((style, 1.0),))

    def _look_up(self, prompt: str) -> EncodedPrompt:
        ids = self._tokenize(prompt)
        rows = self.table_VK[ids].float() * self.scale_V1[ids].float()
        states = torch.zeros(self.text_len, self.text_dim)
        states[: len(ids)] = rows[: self.text_len]
        mean = rows.mean(0) if ids else torch.zeros(self.text_dim)
        return EncodedPrompt(states, mean, len(ids))

    def request(self, prompt: str) -> EncodedPrompt:
        """The same as `encode`, which takes a millisecond."""
        return self.encode(prompt)

    def close(self) -> None:
        """Nothing is held."""


class Style(BaseModel):
    """A style the model was trained on, as `styles.json` lists it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(min_length=1)
    name: str = Field(min_length=1, description="for people")
    prompt: str = Field(description="the phrase that a tile sends")
    phrases: tuple[str, ...] = Field(default=(), description="other ways to ask for it")
    carried: float = Field(
        default=0.0, ge=0, lt=1, description="how far its pictures move along with the camera, see `engine.steady`"
    )
    thumbnail: str = Field(default="", description="path of its picture on the page, such as /styles/neon.jpg")


class StyleIndex:
    """The styles a model lists, and which of them a prompt means.

    Without something that reads prompts, as for Wan, only a style's own phrases are known.
    """

    def __init__(self, encoder: StaticTextEncoder | None, styles: Sequence[Style]) -> None:
        self.styles = tuple(styles)
        self._reader = None if encoder is None else encoder.reader
        self._named = {
            normalise(phrase).strip(): style.id for style in self.styles for phrase in (style.prompt, *style.phrases)
        }

    def nearest(self, prompt: str) -> tuple[str, float] | None:
        """Id of the style and how near it is, 0 to 1; None where nothing tells."""
        if self._reader is not None:
            reading = self._reader.read(prompt)
            return reading.styles[0][0], reading.score
        named = self._named.get(normalise(prompt).strip())
        return None if named is None else (named, 1.0)
