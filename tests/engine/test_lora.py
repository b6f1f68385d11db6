"""LoRA files of every kind, merged into fused and reordered weights, are what they are on the original weights."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.api import EngineError
from engine.config import LoraFile
from engine.wan.checkpoints import (
    WeightsError,
    transformer_from_original,
    transformer_name_to_diffusers,
    transformer_to_original,
)
from engine.wan.lora import read_loras
from engine.wan.untrained import SMALL_WAN, untrained_wan_model, write_untrained_wan
from engine.wan.weights import load_model

RANK, ALPHA, SCALE = 4, 2.0, 0.7
MODULES = (
    "blocks.0.self_attn.q",
    "blocks.0.self_attn.k",
    "blocks.1.self_attn.v",
    "blocks.1.self_attn.o",
    "blocks.0.cross_attn.q",
    "blocks.1.cross_attn.k",
    "blocks.1.cross_attn.v",
    "blocks.1.cross_attn.o",
    "blocks.0.ffn.0",
    "blocks.1.ffn.2",
    "patch_embedding",
    "text_embedding.2",
    "time_projection.1",
    "head.head",
)


@pytest.fixture(scope="module")
def own() -> dict[str, Tensor]:
    return untrained_wan_model().transformer.state_dict()


@pytest.fixture(scope="module")
def original(own: dict[str, Tensor]) -> dict[str, Tensor]:
    return transformer_to_original(own, SMALL_WAN)


def factors(original: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(3)
    out = {}
    for module in MODULES:
        shape = original[f"{module}.weight"].shape
        down = torch.randn(RANK, *shape[1:], generator=random)
        up = torch.randn(shape[0], RANK, *(1,) * (len(shape) - 2), generator=random)
        out[module] = (down, up)
    return out


def added(original: dict[str, Tensor], alpha: float, scale: float) -> dict[str, Tensor]:
    """The original weights with the changes added to them, before any conversion."""
    out = dict(original)
    for module, (down, up) in factors(original).items():
        weight = out[f"{module}.weight"]
        change = (up.flatten(1) @ down.flatten(1)).view(weight.shape) * (scale * alpha / RANK)
        out[f"{module}.weight"] = weight + change
    return out


KINDS: dict[str, tuple[float, Callable[[str], str], tuple[str, str]]] = {
    "original": (ALPHA, lambda m: f"diffusion_model.{m}", ("lora_down", "lora_up")),
    "peft": (RANK, lambda m: f"base_model.model.{m}", ("lora_A.default", "lora_B.default")),
    "diffusers": (
        RANK,
        lambda m: f"transformer.{transformer_name_to_diffusers(m + '.weight').removesuffix('.weight')}",
        ("lora_A", "lora_B"),
    ),
    "kohya": (ALPHA, lambda m: "lora_unet_" + m.replace(".", "_"), ("lora_down", "lora_up")),
    "kohya, diffusers' names": (
        ALPHA,
        lambda m: (
            "lora_unet_" + transformer_name_to_diffusers(m + ".weight").removesuffix(".weight").replace(".", "_")
            if m.startswith("blocks")
            else "lora_unet_" + m.replace(".", "_")
        ),
        ("lora_down", "lora_up"),
    ),
}


def lora_tensors(original: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    alpha, name, (down_name, up_name) = KINDS[kind]
    tensors = {}
    for module, (down, up) in factors(original).items():
        tensors[f"{name(module)}.{down_name}.weight"] = down
        tensors[f"{name(module)}.{up_name}.weight"] = up
        if alpha != RANK:
            tensors[f"{name(module)}.alpha"] = torch.tensor(alpha)
    return tensors


@pytest.mark.parametrize("kind", KINDS)
def test_merging_equals_adding_to_the_original_weights_before_conversion(
    kind: str, own: dict[str, Tensor], original: dict[str, Tensor], tmp_path: Path
) -> None:
    save_file(lora_tensors(original, kind), tmp_path / "style.safetensors")
    deltas = read_loras([LoraFile(path=tmp_path / "style.safetensors", scale=SCALE)], SMALL_WAN)
    expected = transformer_from_original(added(original, KINDS[kind][0], SCALE), SMALL_WAN)
    changed = 0
    for key, tensor in own.items():
        merged = deltas.apply(key, tensor)
        assert torch.equal(merged, expected[key]), key
        changed += not torch.equal(merged, tensor)
    # q and k are one of ours, and so are the prompt's k and v.
    assert changed == len(MODULES) - 2


def test_several_files_add_up_and_a_loaded_model_has_them(original: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(lora_tensors(original, "original"), tmp_path / "a.safetensors")
    files = [LoraFile(path=tmp_path / "a.safetensors", scale=scale) for scale in (0.5, -0.5)]
    write_untrained_wan(tmp_path / "wan")
    plain, merged = load_model(tmp_path / "wan", "cpu"), load_model(tmp_path / "wan", "cpu", loras=files)
    once = load_model(tmp_path / "wan", "cpu", loras=files[:1])
    try:
        for key, tensor in plain.transformer.state_dict().items():
            torch.testing.assert_close(merged.transformer.state_dict()[key], tensor, atol=1e-6, rtol=1e-6)
        assert not torch.equal(once.transformer.head.weight, plain.transformer.head.weight)
    finally:
        for model in (plain, merged, once):
            model.text.close()


def test_whole_differences_are_added_too(own: dict[str, Tensor], tmp_path: Path) -> None:
    change = torch.ones(48)
    save_file(
        {
            "diffusion_model.blocks.0.self_attn.norm_q.diff": torch.arange(48.0),
            "diffusion_model.blocks.0.norm3.diff": change,
            "diffusion_model.blocks.0.norm3.diff_b": change.clone(),
            "diffusion_model.blocks.1.self_attn.k.diff_b": torch.arange(48.0),
        },
        tmp_path / "d.safetensors",
    )
    deltas = read_loras([LoraFile(path=tmp_path / "d.safetensors")], SMALL_WAN)
    merged = {key: deltas.apply(key, tensor) - tensor for key, tensor in own.items()}
    assert torch.allclose(merged["blocks.0.cross_norm.bias"], change, atol=1e-6)
    assert torch.allclose(merged["blocks.0.cross_norm.weight"], change, atol=1e-6)
    # Neighbours have become halves, head by head.
    assert merged["blocks.0.self_attn.norm_q.weight"][:8].round().tolist() == [0, 2, 4, 6, 8, 10, 1, 3]
    bias = merged["blocks.1.self_attn.qkv.bias"].round()
    assert not bias[:48].any()
    assert bias[48:56].tolist() == [0, 2, 4, 6, 8, 10, 1, 3]
    assert not bias[96:].any()


def test_the_dtype_stays(original: dict[str, Tensor], own: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(lora_tensors(original, "peft"), tmp_path / "a.safetensors")
    deltas = read_loras([LoraFile(path=tmp_path / "a.safetensors")], SMALL_WAN)
    key = "blocks.0.self_attn.qkv.weight"
    merged = deltas.apply(key, own[key].bfloat16())
    assert merged.dtype == torch.bfloat16
    expected = transformer_from_original(added(original, RANK, 1.0), SMALL_WAN)[key]
    torch.testing.assert_close(merged.float(), expected, atol=0.05, rtol=0.02)


def test_every_fault_of_a_file_is_named(original: dict[str, Tensor], tmp_path: Path) -> None:
    tensors = lora_tensors(original, "original")
    tensors["lora_te_layer_0.lora_up.weight"] = torch.zeros(1, 1)
    tensors["diffusion_model.blocks.9.self_attn.q.lora_up.weight"] = torch.zeros(1, 1)
    del tensors["diffusion_model.blocks.0.ffn.0.lora_up.weight"]
    tensors["diffusion_model.head.head.lora_down.weight"] = torch.zeros(RANK, 5)
    path = tmp_path / "bad.safetensors"
    save_file(tensors, path)
    with pytest.raises(WeightsError) as caught:
        read_loras([LoraFile(path=path)], SMALL_WAN)
    for said in (
        "bad.safetensors does not fit this transformer",
        "unknown lora_te_layer_0.lora_up.weight",
        "unknown diffusion_model.blocks.9.self_attn.q.lora_up.weight",
        "blocks.0.ffn.0 has only its down half",
        "head.head has factors (64, 4) and (4, 5), must be (64, rank) and (rank, 48)",
    ):
        assert said in str(caught.value)
    with pytest.raises(WeightsError, match="must be a safetensors file"):
        read_loras([LoraFile(path=tmp_path / "lora.pt")], SMALL_WAN)
    with pytest.raises(WeightsError, match="cannot read"):
        read_loras([LoraFile(path=tmp_path / "none.safetensors")], SMALL_WAN)


def test_the_embedded_model_takes_none(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="LoRA files are for Wan transformers"):
        load_model(model_dir, "cpu", loras=[LoraFile(path=tmp_path / "a.safetensors")])
