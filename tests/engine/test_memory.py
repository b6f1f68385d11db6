"""Memory is computed before anything is loaded: equal to what tensors take, and to the published figures."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.api import EngineError
from engine.config import MODELS_DIR
from engine.memory import (
    GIB,
    Demand,
    check,
    known_shape,
    kv_row_bytes,
    needed,
    prompt_bytes,
    shape_of,
    taehv_parameters,
    taehv_state,
    transformer_parameters,
    wan_vae_parameters,
    wan_vae_state,
)
from engine.wan.presets import LIVEBRUSH_TINY, WAN_1_3B, WAN_14B, TransformerConfig
from engine.wan.taehv import TAEHV
from engine.wan.transformer import CausalTransformer
from engine.wan.untrained import SMALL_TAEHV, SMALL_WAN, SMALL_WAN_VAE, write_untrained_wan
from engine.wan.vae import VAEState
from engine.wan.vae_config import TAEHVConfig, WanVAEConfig
from engine.wan.vae_stages import state_bytes
from engine.wan.wan_vae import WanVAE

MIB = 1 << 20


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("config", [SMALL_WAN, LIVEBRUSH_TINY, WAN_1_3B, WAN_14B])
def test_the_transformer_has_as_many_numbers_as_said(config: TransformerConfig) -> None:
    with torch.device("meta"):
        assert transformer_parameters(config) == parameters(CausalTransformer(config))


def test_the_published_parameter_counts_come_out() -> None:
    assert transformer_parameters(WAN_1_3B) == pytest.approx(1.419e9, rel=1e-3)
    assert transformer_parameters(WAN_14B) == pytest.approx(14.29e9, rel=1e-3)
    assert wan_vae_parameters(WanVAEConfig()) == pytest.approx(53.6e6 + 73.3e6, rel=1e-3)
    assert taehv_parameters(TAEHVConfig()) == pytest.approx(1.5e6 + 9.8e6, rel=1e-2)


def test_the_published_state_sizes_come_out() -> None:
    for config, small, large in ((WAN_1_3B, 1.05, 1.61), (WAN_14B, 4.69, 7.14)):
        assert kv_row_bytes(config, 32 * 32, 2) / GIB == pytest.approx(small, abs=0.01)
        assert kv_row_bytes(config, 30 * 52, 2) / GIB == pytest.approx(large, abs=0.01)
    assert prompt_bytes(WAN_1_3B, 2) == 90 * MIB
    assert prompt_bytes(WAN_14B, 2) == 400 * MIB
    for (width, height), encoder, decoder in (((512, 512), 702, 1182), ((832, 480), 1069, 1801)):
        state = [2 * numbers / MIB for numbers in wan_vae_state(WanVAEConfig(), width, height)]
        assert state == pytest.approx([encoder, decoder], abs=1)


@pytest.mark.parametrize("config", [SMALL_WAN_VAE, WanVAEConfig(dim=4, residual_blocks=1, z_dim=4)])
def test_the_state_of_the_vae_is_what_its_tensors_take(config: WanVAEConfig) -> None:
    vae = WanVAE(config)
    assert wan_vae_parameters(config) == parameters(vae)
    with torch.inference_mode():
        latent, encoder = vae.encode(torch.zeros(1, 5, 3, 32, 48), VAEState())
        _, decoder = vae.decode(latent, VAEState())
    assert [state_bytes(encoder), state_bytes(decoder)] == [4 * n for n in wan_vae_state(config, 48, 32)]


def test_the_state_of_the_light_vae_is_what_its_tensors_take() -> None:
    vae = TAEHV(SMALL_TAEHV)
    assert taehv_parameters(SMALL_TAEHV) == parameters(vae)
    with torch.inference_mode():
        latent, encoder = vae.encode(torch.zeros(1, 5, 3, 32, 48), VAEState())
        _, decoder = vae.decode(latent, VAEState())
    assert [state_bytes(encoder), state_bytes(decoder)] == [4 * n for n in taehv_state(SMALL_TAEHV, 48, 32)]


def test_a_plan_grows_with_what_is_asked() -> None:
    shape = known_shape("wan2.1-1.3b")
    one = Demand(512, 512)
    base = needed(shape, one).total_bytes
    by_name = {part.name: part.size_bytes for part in needed(shape, one).parts}
    assert by_name["KV cache"] == kv_row_bytes(WAN_1_3B, 1024, 2)
    for more in (
        Demand(832, 480),
        Demand(512, 512, streams=2),
        Demand(512, 512, rows=4),
        Demand(512, 512, dtype="float32"),
        Demand(512, 512, text_here=True),
        Demand(512, 512, micro_batch=4),
    ):
        assert needed(shape, more).total_bytes > base
    for less in (Demand(512, 512, vae="light"), Demand(512, 512, fp8=True)):
        assert needed(shape, less).total_bytes < base
    # 3.9 GiB of state a stream at 512x512 with two steps, published; ours holds a second prompt and frames.
    two = needed(shape, Demand(512, 512, rows=2))
    assert sum(part.size_bytes for part in two.parts if part.kind == "stream") / GIB == pytest.approx(4.1, abs=0.1)


def test_what_does_not_fit_is_refused_with_its_parts_the_bound_and_what_would_fit() -> None:
    plan = needed(known_shape("wan2.1-1.3b"), Demand(832, 480, streams=4, rows=2, text_here=True))
    check(plan, plan.total_bytes)
    with pytest.raises(EngineError) as caught:
        check(plan, 24 * GIB)
    said = str(caught.value)
    for word in (
        "wan2.1-1.3b at 832x480, 4 streams, 2 KV rows each",
        "24.0 GiB are there",
        "KV cache",
        "in all",
        "1 stream: 2",
        "text_device cpu and vae light: 1",
    ):
        assert word in said
    with pytest.raises(EngineError, match="No smaller setting fits"):
        check(plan, GIB)


def test_folders_say_their_shape(tmp_path: Path) -> None:
    write_untrained_wan(tmp_path / "wan", light_vae=SMALL_TAEHV)
    shape = shape_of(tmp_path / "wan")
    assert (shape.transformer, shape.vae, shape.light_vae) == (SMALL_WAN, SMALL_WAN_VAE, SMALL_TAEHV)
    assert shape.text_bytes > (tmp_path / "wan" / "text_encoder" / "model.safetensors").stat().st_size
    tiny = shape_of(MODELS_DIR / "livebrush-tiny")
    assert tiny.vae is None
    assert tiny.other_bytes > 5_000_000
    assert needed(tiny, Demand(256, 256, dtype="float32")).total_bytes < GIB
    with pytest.raises(ValueError, match=r"config\.json"):
        shape_of(tmp_path)


def test_planning_loads_no_torch() -> None:
    code = "import sys, engine.memory; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
