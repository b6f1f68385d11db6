"""Every published layout of Wan's weights becomes ours, exactly, and ours computes what the library's form does."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.wan.checkpoints import (
    Layout,
    WeightsError,
    detect_layout,
    original_from_any,
    read_checkpoint,
    transformer_from_original,
    transformer_name_from_diffusers,
    transformer_name_to_diffusers,
    transformer_to_original,
    vae_name_from_diffusers,
)
from engine.wan.presets import LIVEBRUSH_TINY, TransformerConfig
from engine.wan.transformer import CausalTransformer

SMALL = TransformerConfig(
    dim=48, ffn_dim=80, heads=2, layers=2, text_dim=20, text_len=7, freq_dim=16, window_frames=9, sink_frames=3
)

CONVERTERS = "diffusers.loaders.single_file_utils"


def own_tensors(config: TransformerConfig = SMALL, seed: int = 0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(tensor.shape, generator=random) * 0.2
        for key, tensor in CausalTransformer(config).state_dict().items()
    }


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.fixture
def original() -> dict[str, Tensor]:
    return transformer_to_original(own_tensors(), SMALL)


def diffusers_transformer() -> Any:
    return (
        pytest.importorskip("diffusers")
        .WanTransformer3DModel(
            num_attention_heads=SMALL.heads,
            attention_head_dim=SMALL.head_dim,
            text_dim=SMALL.text_dim,
            freq_dim=SMALL.freq_dim,
            ffn_dim=SMALL.ffn_dim,
            num_layers=SMALL.layers,
        )
        .eval()
    )


def test_ours_to_original_and_back_is_exact(original: dict[str, Tensor]) -> None:
    assert original["patch_embedding.weight"].shape == (48, 16, 1, 2, 2)
    assert original["blocks.1.modulation"].shape == (1, 6, 48)
    assert original["head.modulation"].shape == (1, 2, 48)
    assert same(transformer_from_original(original, SMALL), own_tensors())


def test_original_to_diffusers_and_back_is_exact_and_the_names_are_the_library_s(original: dict[str, Tensor]) -> None:
    renamed = {transformer_name_to_diffusers(key): tensor for key, tensor in original.items()}
    model = diffusers_transformer()
    model.load_state_dict(renamed, strict=True)
    layout, back = original_from_any(model.state_dict())
    assert layout == Layout("transformer", "diffusers")
    assert same(back, original)


def test_our_names_are_those_of_the_library_s_own_converter(original: dict[str, Tensor]) -> None:
    theirs = pytest.importorskip(CONVERTERS).convert_wan_transformer_to_diffusers(dict(original))
    for key, tensor in original.items():
        assert torch.equal(theirs[transformer_name_to_diffusers(key)], tensor)
        assert transformer_name_from_diffusers(transformer_name_to_diffusers(key)) == key


@torch.inference_mode()
def test_one_chunk_with_full_context_equals_the_library_s_transformer(original: dict[str, Tensor]) -> None:
    theirs = diffusers_transformer()
    theirs.load_state_dict({transformer_name_to_diffusers(key): tensor for key, tensor in original.items()})
    ours = CausalTransformer(SMALL).eval()
    ours.load_state_dict(transformer_from_original(original, SMALL))
    random = torch.Generator().manual_seed(1)
    latent = torch.randn(2, 5, 16, 8, 12, generator=random)
    text = torch.randn(2, 7, 20, generator=random)
    timestep = torch.tensor([700.0, 250.0])
    mine = ours.forward_clip(latent, None, timestep, ours.prompt_context(text), chunks=(5,))
    reference = theirs(latent.transpose(1, 2), timestep, text, return_dict=False)[0].transpose(1, 2)
    assert reference.std() > 0.1
    torch.testing.assert_close(mine, reference, atol=2e-5, rtol=2e-5)


BARE = Layout("transformer", "original")
LAYOUTS: list[tuple[str, Callable[[dict[str, Tensor]], dict[str, Any]], Layout]] = [
    ("a.safetensors", lambda t: t, BARE),
    ("a.pth", lambda t: t, BARE),
    ("a.pt", lambda t: {"generator": below("model.", t), "step": 3}, replace(BARE, prefix="model.")),
    ("a.pt", lambda t: {"generator_ema": below("model.", t)}, replace(BARE, prefix="model.")),
    (
        "a.pt",
        lambda t: {"state_dict": below("model.diffusion_model.", t)},
        replace(BARE, prefix="model.diffusion_model."),
    ),
    (
        "a.pt",
        lambda t: {"generator": {f"model._fsdp_wrapped_module.{fsdp(key)}": value for key, value in t.items()}},
        replace(BARE, prefix="model.", wrapped=True),
    ),
    ("a.safetensors", lambda t: below("_orig_mod.", t), replace(BARE, wrapped=True)),
    (
        "a.safetensors",
        lambda t: {transformer_name_to_diffusers(key): value for key, value in t.items()},
        replace(BARE, naming="diffusers"),
    ),
]


@pytest.mark.parametrize(("name", "wrap", "layout"), LAYOUTS)
def test_every_layout_gives_the_same_tensors(
    original: dict[str, Tensor],
    name: str,
    wrap: Callable[[dict[str, Tensor]], dict[str, Any]],
    layout: Layout,
    tmp_path: Path,
) -> None:
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file({key: tensor.contiguous() for key, tensor in wrap(original).items()}, path)
    else:
        torch.save(wrap(original), path)
    found, tensors = original_from_any(read_checkpoint(path))
    assert found == layout
    assert same(tensors, original)


def below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: tensor for key, tensor in tensors.items()}


def fsdp(key: str) -> str:
    """FSDP wraps each block."""
    parts = key.split(".")
    return ".".join([*parts[:2], "_fsdp_wrapped_module", *parts[2:]]) if parts[0] == "blocks" else key


def test_vae_names_are_those_of_the_library() -> None:
    theirs = pytest.importorskip("diffusers").AutoencoderKLWan(base_dim=4, z_dim=4).state_dict()
    layout, original = original_from_any(theirs)
    assert layout == Layout("vae", "diffusers")
    assert not {key for key in original if "block" in key or "conv_in" in key or "quant" in key}
    assert same(pytest.importorskip(CONVERTERS).convert_wan_vae_to_diffusers(dict(original)), theirs)
    assert detect_layout(original) == Layout("vae", "original")
    upsampler = vae_name_from_diffusers("decoder.up_blocks.1.upsamplers.0.time_conv.bias")
    assert upsampler == "decoder.upsamples.7.time_conv.bias"


def test_every_fault_is_named_at_once(original: dict[str, Tensor]) -> None:
    del original["blocks.0.norm3.bias"]
    original["blocks.7.ffn.0.weight"] = torch.zeros(1)
    original["head.head.weight"] = torch.zeros(3, 3)
    with pytest.raises(WeightsError) as caught:
        transformer_from_original(original, SMALL)
    for said in (
        "missing blocks.0.norm3.bias",
        "unexpected blocks.7.ffn.0.weight",
        "head.head.weight is (3, 3), must be (64, 48)",
    ):
        assert said in str(caught.value)


def test_what_is_no_wan_checkpoint_is_told_by_its_names() -> None:
    with pytest.raises(WeightsError, match=r"unknown layout, such as conv\.bias, conv\.weight"):
        detect_layout(["conv.weight", "conv.bias"])
    with pytest.raises(WeightsError, match="no tensors: optimiser"):
        original_from_any({"optimiser": "adam"})
    with pytest.raises(WeightsError, match=r"both patch_embedding\.bias"):
        original_from_any(
            {
                "text_embedding.0.weight": torch.zeros(1),
                "patch_embedding.bias": torch.zeros(1),
                "_orig_mod.patch_embedding.bias": torch.zeros(1),
            }
        )
    with pytest.raises(WeightsError, match="only plain Wan"):
        transformer_to_original({}, LIVEBRUSH_TINY)


class Harmful:
    """What a hostile pickle would run."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (Path("pwned"),)


def test_a_pickle_that_would_run_code_is_refused_without_running_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"generator": Harmful()}, "model.pt")
    with pytest.raises(WeightsError, match="refused by the safe loader"):
        read_checkpoint(Path("model.pt"))
    assert not Path("pwned").exists()


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_damaged_and_missing_files_are_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="cannot read"):
        read_checkpoint(tmp_path / name)
    (tmp_path / name).write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(WeightsError, match=name):
        read_checkpoint(tmp_path / name)


def test_the_format_of_old_torch_is_read_too(original: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(original, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert same(original_from_any(read_checkpoint(tmp_path / "old.pth"))[1], original)
