"""UMT5 under Wan's names and the library's is one encoder, equal to its plain formula."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from engine.wan.checkpoints import WeightsError
from engine.wan.umt5 import (
    UMT5_XXL,
    clean_prompt,
    load_umt5,
    read_umt5_config,
    umt5_from_any,
    umt5_names,
)
from engine.wan.untrained import untrained_text, write_untrained_wan

WIDTH = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wan")
    write_untrained_wan(path)
    return path / "text_encoder"


def wan_tensors() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Random weights under the names of Wan's own checkpoint, and their config."""
    text = untrained_text(WIDTH, torch.Generator().manual_seed(5))
    config = dict(text.config)
    return {source.key: text.tensors[key] for key, source in umt5_names(config).items()}, config


def bucket(distance: int, buckets: int, furthest: int) -> int:
    """T5's bucket of a key's distance from its query: half of them for each side, half of those exact."""
    half = buckets // 2
    base, distance = (half, distance) if distance > 0 else (0, -distance)
    exact = half // 2
    if distance < exact:
        return base + distance
    ratio = math.log(distance / exact) / math.log(furthest / exact)
    return base + min(half - 1, exact + int(ratio * (half - exact)))


def plain_encoder(tensors: dict[str, Tensor], config: dict[str, Any], ids: list[int]) -> Tensor:
    """The encoder restated from its description, on Wan's names; no batch, no mask."""

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config["layer_norm_epsilon"])

    heads, count = config["num_heads"], len(ids)
    x = tensors["token_embedding.weight"][ids]
    buckets = torch.tensor(
        [
            [
                bucket(key - query, config["relative_attention_num_buckets"], config["relative_attention_max_distance"])
                for key in range(count)
            ]
            for query in range(count)
        ]
    )
    for block in range(config["num_layers"]):

        def weight(name: str, block: int = block) -> Tensor:
            return tensors[f"blocks.{block}.{name}.weight"]

        y = norm(x, weight("norm1"))
        q, k, v = (functional.linear(y, weight(f"attn.{n}")).view(count, heads, -1).transpose(0, 1) for n in "qkv")
        bias = weight("pos_embedding.embedding")[buckets].permute(2, 0, 1)
        # T5 does not scale its scores.
        attended = (q @ k.transpose(1, 2) + bias).softmax(-1) @ v
        x = x + functional.linear(attended.transpose(0, 1).reshape(count, -1), weight("attn.o"))
        y = norm(x, weight("norm2"))
        gate = functional.gelu(functional.linear(y, weight("ffn.gate.0")), approximate="tanh")
        x = x + functional.linear(functional.linear(y, weight("ffn.fc1")) * gate, weight("ffn.fc2"))
    return norm(x, tensors["norm.weight"])


def test_the_encoder_of_wan_s_weights_is_the_plain_formula(tmp_path: Path) -> None:
    tensors, config = wan_tensors()
    text = untrained_text(WIDTH, torch.Generator().manual_seed(5))
    save_file(umt5_from_any(tensors, config), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_bytes(text.tokenizer)
    encode = load_umt5(tmp_path)
    prompt = "an oil painting of a harbour, thick strokes, in the manner of no one in particular"
    vocabulary = json.loads(text.tokenizer)["model"]["vocab"]
    ids = [vocabulary[char] for char in prompt if char != " "] + [vocabulary["</s>"]]
    mine, expected = encode(prompt), plain_encoder(tensors, config, ids)
    assert mine.shape == (len(ids), WIDTH)
    # Relative root mean square; 3e-7 seen.
    assert float((mine - expected).norm() / expected.norm()) < 2e-6


def test_padding_changes_nothing(folder: Path) -> None:
    """Wan pads to 512 with a mask and then zeroes what is beyond the prompt; we leave the padding out."""
    library = pytest.importorskip("transformers")
    model = library.UMT5EncoderModel(library.UMT5Config(**read_umt5_config(folder))).eval()
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict(weights | {"encoder.embed_tokens.weight": weights["shared.weight"]})
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    ids = torch.zeros(1, 512, dtype=torch.int64)
    ids[0, :5] = torch.tensor([*(vocabulary[char] for char in "neon"), 1])
    mask = (ids != 0).long()
    with torch.inference_mode():
        padded = model(input_ids=ids, attention_mask=mask).last_hidden_state[0, :5]
    torch.testing.assert_close(load_umt5(folder)("neon"), padded, atol=2e-6, rtol=2e-6)


def test_long_prompts_end_with_the_end_of_the_text(folder: Path) -> None:
    assert load_umt5(folder)("a" * 900).shape == (512, WIDTH)
    assert load_umt5(folder)("").shape == (1, WIDTH)


def test_both_layouts_and_the_tied_embedding_are_taken() -> None:
    tensors, config = wan_tensors()
    ours = umt5_from_any(tensors, config)
    assert umt5_from_any(ours, config).keys() == ours.keys()
    tied = {**ours, "encoder.embed_tokens.weight": ours["shared.weight"]}
    assert umt5_from_any(tied, config).keys() == ours.keys()
    only = {key: tensor for key, tensor in tied.items() if key != "shared.weight"}
    assert torch.equal(umt5_from_any(only, config)["shared.weight"], ours["shared.weight"])


def test_the_published_shape_has_the_published_parameters() -> None:
    count = sum(torch.Size(source.shape).numel() for source in umt5_names(UMT5_XXL).values())
    assert 2 * count == pytest.approx(11.36e9, rel=1e-3)


def test_every_fault_is_named(folder: Path, tmp_path: Path) -> None:
    tensors, config = wan_tensors()
    del tensors["blocks.1.attn.q.weight"]
    tensors["decoder.weight"] = torch.zeros(1)
    tensors["norm.weight"] = torch.zeros(5)
    with pytest.raises(WeightsError) as caught:
        umt5_from_any(tensors, config)
    for said in ("missing blocks.1.attn.q.weight", "unexpected decoder.weight", "norm.weight is (5,), must be (32,)"):
        assert said in str(caught.value)
    with pytest.raises(WeightsError, match=r"cannot read .*config\.json"):
        load_umt5(tmp_path)
    (tmp_path / "config.json").write_text('{"d_model": 32}')
    with pytest.raises(WeightsError, match="no d_ff, d_kv"):
        load_umt5(tmp_path)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(WeightsError, match=r"cannot read .*tokenizer\.json"):
        load_umt5(tmp_path)


@pytest.mark.parametrize(
    ("typed", "clean"),
    [
        ("  oil \n\t painting ", "oil painting"),
        ("salt &amp;amp; pepper", "salt & pepper"),
        ("\u201cneon\u201d cat\u2019s eye", '"neon" cat\'s eye'),
        ("cafe\u0301", "caf\u00e9"),
        ("", ""),
    ],
)
def test_prompts_are_cleaned_as_wan_does(typed: str, clean: str) -> None:
    assert clean_prompt(typed) == clean
