"""The Wan autoencoder: published names and arithmetic, and a stream that does not depend on how it is cut."""

import importlib
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from engine.wan.vae import VAEState
from engine.wan.vae_config import WAN_LATENT_MEAN, WAN_LATENT_STD, LatentConfig, WanVAEConfig
from engine.wan.vae_stages import channels_last, channels_third, run_stages, state_bytes
from engine.wan.wan_vae import CausalConv, WanVAE

SMALL = WanVAEConfig(dim=8)
HEIGHT, WIDTH = 32, 48


def small_vae(config: WanVAEConfig = SMALL) -> WanVAE:
    """Random weights that leave no layer without effect."""
    vae = WanVAE(config).requires_grad_(False)
    random = torch.Generator().manual_seed(7)
    for name, parameter in sorted(vae.state_dict().items()):
        if name.endswith("gamma"):
            parameter.uniform_(0.5, 1.5, generator=random)
        elif name.endswith("bias"):
            parameter.uniform_(-0.2, 0.2, generator=random)
        else:
            bound = 2.5 / parameter[0].numel() ** 0.5
            parameter.uniform_(-bound, bound, generator=random)
    return vae


def clip(frames: int, batch: int = 1, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.rand(batch, frames, 3, HEIGHT, WIDTH, generator=random) * 2 - 1


def latents(count: int, batch: int = 1, seed: int = 1) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(batch, count, SMALL.z_dim, HEIGHT // 8, WIDTH // 8, generator=random)


def encode_in(vae: WanVAE, frames: Tensor, split: tuple[int, ...]) -> Tensor:
    state, parts = VAEState(), []
    for part in torch.split(frames, list(split), dim=1):
        latent, state = vae.encode(part, state)
        parts.append(latent)
    return torch.cat(parts, dim=1)


def decode_in(vae: WanVAE, latent: Tensor, split: tuple[int, ...]) -> Tensor:
    state, parts = VAEState(), []
    for part in torch.split(latent, list(split), dim=1):
        frames, state = vae.decode(part, state)
        parts.append(frames)
    return torch.cat(parts, dim=1)


def difference(got: Tensor, want: Tensor) -> float:
    """Root mean square, relative to what is wanted."""
    return float((got - want).norm() / want.norm())


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    return small_vae()


@pytest.mark.filterwarnings("default")
def test_the_library_reads_our_names_and_computes_the_same(vae: WanVAE) -> None:
    diffusers: Any = importlib.import_module("diffusers")
    convert: Any = importlib.import_module("diffusers.loaders.single_file_utils").convert_wan_vae_to_diffusers
    library = diffusers.AutoencoderKLWan(base_dim=SMALL.dim, z_dim=SMALL.z_dim)
    # The library's map knows the names of the original checkpoint; strict loading shows that ours are those.
    library.load_state_dict(convert(dict(vae.state_dict())), strict=True)
    frames, latent = clip(13, batch=2), latents(4, batch=2)
    with torch.inference_mode():
        raw = library.encode(frames.transpose(1, 2)).latent_dist.mean.transpose(1, 2)
        pictures = library.decode(vae.denormalise(latent).transpose(1, 2)).sample.transpose(1, 2)
    assert raw.std() > 0.1
    assert (pictures.abs() < 1).float().mean() > 0.3
    torch.testing.assert_close(encode_in(vae, frames, (1, 4, 8)), raw, atol=2e-5, rtol=0)
    torch.testing.assert_close(decode_in(vae, latent, (1, 1, 2)), pictures, atol=2e-5, rtol=0)


def test_any_split_of_a_stream_gives_the_same_bits(vae: WanVAE) -> None:
    frames, latent = clip(13), latents(4)
    encoded, decoded = encode_in(vae, frames, (13,)), decode_in(vae, latent, (4,))
    assert (encoded.shape, decoded.shape) == ((1, 4, 16, 4, 6), (1, 13, 3, 32, 48))
    for split in ((1, 4, 4, 4), (5, 8), (1, 12)):
        assert torch.equal(encode_in(vae, frames, split), encoded)
    for split in ((1, 1, 1, 1), (2, 2), (3, 1)):
        assert torch.equal(decode_in(vae, latent, split), decoded)


def test_a_pass_over_many_frames_equals_many_passes(vae: WanVAE) -> None:
    frames, latent = clip(13), latents(4)
    for stages, x, want in (
        (vae.encode_stages(), frames, encode_in(vae, frames, (13,))),
        (vae.decode_stages(), vae.denormalise(latent), decode_in(vae, latent, (4,))),
    ):
        first, memory = run_stages(stages, channels_last(x[:, :1]), ())
        rest, _ = run_stages(stages, channels_last(x[:, 1:]), memory)
        whole = channels_third(torch.cat((first, rest), dim=1))
        if stages[-1] is vae.decoder.head:
            whole = whole.clamp(-1, 1)
        torch.testing.assert_close(whole, want, atol=2e-5, rtol=0)


def test_what_came_before_matters(vae: WanVAE) -> None:
    frames, latent = clip(9), latents(3)
    other_frames, other_latent = frames.clone(), latent.clone()
    other_frames[:, :5] += 0.1
    other_latent[:, :2] += 0.1
    assert not torch.equal(encode_in(vae, frames, (5, 4))[:, 2:], encode_in(vae, other_frames, (5, 4))[:, 2:])
    assert not torch.equal(decode_in(vae, latent, (2, 1))[:, 5:], decode_in(vae, other_latent, (2, 1))[:, 5:])


def test_sessions_that_take_turns_do_not_know_of_each_other(vae: WanVAE) -> None:
    clips = [clip(9, seed=seed) for seed in (3, 4)]
    alone = [encode_in(vae, frames, (5, 4)) for frames in clips]
    shown = [decode_in(vae, latent, (2, 1)) for latent in alone]
    encoders, decoders = [VAEState()] * 2, [VAEState()] * 2
    for part, place in ((slice(0, 5), slice(0, 2)), (slice(5, 9), slice(2, 3))):
        for i, frames in enumerate(clips):
            latent, encoders[i] = vae.encode(frames[:, part], encoders[i])
            assert torch.equal(latent, alone[i][:, place])
            pictures, decoders[i] = vae.decode(latent, decoders[i])
            assert torch.equal(pictures, shown[i][:, slice(0, 5) if place.start == 0 else slice(5, 9)])


def test_a_state_can_be_used_again(vae: WanVAE) -> None:
    """A call changes neither the state nor the frames that it is given: what failed can be tried once more."""
    frames = clip(9)
    buffer = frames[:, :5].clone()
    _, state = vae.encode(buffer, VAEState())
    buffer.zero_()  # a caller may write the next frames to where the last ones were
    first, _ = vae.encode(frames[:, 5:], state)
    again, _ = vae.encode(frames[:, 5:], state)
    assert torch.equal(first, again)
    assert torch.equal(first, encode_in(vae, frames, (5, 4))[:, 2:])


def test_a_call_compiles_as_one_graph(vae: WanVAE) -> None:
    frames = clip(9)
    latent, encoder = vae.encode(frames[:, :5], VAEState())
    _, decoder = vae.decode(latent, VAEState())
    encode = torch.compile(vae.encode, fullgraph=True, backend="eager")
    decode = torch.compile(vae.decode, fullgraph=True, backend="eager")
    assert torch.equal(encode(frames[:, 5:], encoder)[0], vae.encode(frames[:, 5:], encoder)[0])
    assert torch.equal(decode(latent[:, :1], decoder)[0], vae.decode(latent[:, :1], decoder)[0])


def test_two_sessions_in_a_batch_equal_each_alone(vae: WanVAE) -> None:
    frames, latent = clip(9, batch=2), latents(3, batch=2)
    encoded, decoded = encode_in(vae, frames, (5, 4)), decode_in(vae, latent, (2, 1))
    for i in range(2):
        assert difference(encoded[i : i + 1], encode_in(vae, frames[i : i + 1], (5, 4))) < 2e-6
        assert difference(decoded[i : i + 1], decode_in(vae, latent[i : i + 1], (2, 1))) < 2e-6


def test_both_ways_to_convolve_are_one(vae: WanVAE) -> None:
    whole = WanVAE(SMALL, conv="conv3d")
    whole.load_state_dict(vae.state_dict())
    taps = WanVAE(SMALL, conv="taps")
    taps.load_state_dict(vae.state_dict())
    frames, latent = clip(9, batch=2), latents(3, batch=2)
    with torch.inference_mode():
        torch.testing.assert_close(encode_in(whole, frames, (5, 4)), encode_in(taps, frames, (5, 4)), atol=2e-5, rtol=0)
        torch.testing.assert_close(decode_in(whole, latent, (2, 1)), decode_in(taps, latent, (2, 1)), atol=2e-5, rtol=0)
    # On a CPU, auto means taps.
    assert torch.equal(encode_in(vae, frames, (9,)), encode_in(taps, frames, (9,)))


@pytest.mark.parametrize(("size", "stride", "frames"), [(3, 1, 3), (3, 1, 6), (1, 2, 5), (1, 2, 9), (1, 1, 4)])
def test_a_convolution_is_the_sum_of_its_taps(size: Any, stride: int, frames: int) -> None:
    conv = CausalConv(5, 7, size, stride)
    x = torch.randn(2, frames, 6, 4, 5)
    results = []
    for path in ("conv3d", "taps"):
        conv.path = path
        results.append(conv.convolve(x))
    assert results[0].shape == (2, (frames - 3) // stride + 1, 6, 4, 7)
    torch.testing.assert_close(*results, atol=1e-5, rtol=0)


def test_it_can_be_made_without_memory_and_given_its_weights(vae: WanVAE) -> None:
    with torch.device("meta"):
        empty = WanVAE(SMALL)
    empty.load_state_dict(vae.state_dict(), strict=True, assign=True)
    assert torch.equal(decode_in(empty, latents(2), (2,)), decode_in(vae, latents(2), (2,)))
    raw, _ = empty.encode(clip(1), VAEState())
    assert torch.equal(empty.normalise(raw), vae.normalise(raw))


def test_normalise_and_denormalise_are_inverse() -> None:
    vae = WanVAE(SMALL)
    raw = torch.tensor(WAN_LATENT_MEAN).view(1, 1, -1, 1, 1) + torch.tensor(WAN_LATENT_STD).view(1, 1, -1, 1, 1)
    torch.testing.assert_close(vae.normalise(raw), torch.ones_like(raw))
    torch.testing.assert_close(vae.denormalise(torch.ones_like(raw)), raw)
    assert vae.normalise(raw.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("shape", "started", "said"),
    [
        ((1, 4, 3, 16, 16), False, r"4 frames cannot start .* 1 \+ 4k"),
        ((1, 0, 3, 16, 16), False, "0 frames cannot start"),
        ((1, 5, 3, 16, 16), True, "5 frames cannot go on .* 4k"),
        ((1, 0, 3, 16, 16), True, "0 frames cannot go on"),
        ((1, 5, 3, 12, 16), False, "16x12 must be a multiple of 8"),
    ],
)
def test_frames_that_do_not_fit_are_refused(vae: WanVAE, shape: tuple[int, ...], started: bool, said: str) -> None:
    state = VAEState((torch.zeros(1),)) if started else VAEState()
    with pytest.raises(ValueError, match=said):
        vae.encode(torch.zeros(shape), state)


def test_no_latents_are_refused(vae: WanVAE) -> None:
    with pytest.raises(ValueError, match="0 latent frames"):
        vae.decode(latents(3)[:, :0], VAEState())


def full_vae() -> WanVAE:
    with torch.device("meta"):
        return WanVAE(WanVAEConfig()).bfloat16().requires_grad_(False)


def test_full_width_has_the_published_number_of_parameters() -> None:
    vae = full_vae()
    assert sum(parameter.numel() for parameter in vae.encoder.parameters()) == 53_595_872
    assert sum(parameter.numel() for parameter in vae.decoder.parameters()) == 73_295_331
    assert not any(name.startswith("scale") for name in vae.state_dict())


@pytest.mark.parametrize(
    ("height", "width", "encoder_mib", "decoder_mib", "encode_tflop", "decode_tflop"),
    [(512, 512, 702, 1182, 5.27, 8.88), (480, 832, 1069, 1801, 8.05, 13.55)],
)
def test_what_a_stream_costs_at_full_width(
    height: int, width: int, encoder_mib: int, decoder_mib: int, encode_tflop: float, decode_tflop: float
) -> None:
    """On the meta device in bfloat16: a host read, a tensor left on the CPU or a wrong dtype would raise."""
    vae = full_vae()
    frames = torch.empty(1, 5, 3, height, width, device="meta", dtype=torch.bfloat16)
    latent, encoder = vae.encode(frames, VAEState())
    pictures, decoder = vae.decode(vae.normalise(latent), VAEState())
    assert (latent.shape, latent.dtype) == ((1, 2, 16, height // 8, width // 8), torch.bfloat16)
    assert (pictures.shape, pictures.dtype) == (frames.shape, torch.bfloat16)
    assert (state_bytes(encoder) >> 20, state_bytes(decoder) >> 20) == (encoder_mib, decoder_mib)
    with FlopCounterMode(display=False) as encode:
        _, later_encoder = vae.encode(frames[:, 1:], encoder)
    with FlopCounterMode(display=False) as decode:
        _, later_decoder = vae.decode(latent[:, 1:], decoder)
    assert encode.get_total_flops() / 1e12 == pytest.approx(encode_tflop, abs=0.01)
    assert decode.get_total_flops() / 1e12 == pytest.approx(decode_tflop, abs=0.01)
    for before, after in ((encoder, later_encoder), (decoder, later_decoder)):
        assert [tensor.shape for tensor in before.memory] == [tensor.shape for tensor in after.memory]


def test_settings_are_closed_and_consistent() -> None:
    assert LatentConfig().latent_mean == WAN_LATENT_MEAN
    assert WanVAEConfig(z_dim=4).latent_std == (1.0,) * 4
    for fault, said in (
        ({"latent_mean": (0.0,)}, "latent_mean has 1 values"),
        ({"z_dim": 1, "latent_std": (0.0,)}, "must be above 0"),
        ({"temporal_down": (False, False, True)}, "two True"),
        ({"dim": 7, "multipliers": (1, 1, 2, 2)}, "even"),
        ({"width": 3}, "width"),
    ):
        with pytest.raises(ValidationError, match=said):
            WanVAEConfig.model_validate(fault)
