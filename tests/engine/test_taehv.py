"""The tiny autoencoder: published names and arithmetic, and a stream that does not depend on how it is cut."""

from collections.abc import Sequence

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from engine.wan.taehv import TAEHV
from engine.wan.vae import VAEState
from engine.wan.vae_config import TAEHVConfig
from engine.wan.vae_stages import state_bytes

SMALL = TAEHVConfig(encoder_dim=8, decoder_dims=(16, 12, 8, 8))
HEIGHT, WIDTH = 32, 48
# The published layers by their number: what has weights, and what lies between.
BLOCKS = ("memory",) * 3
ENCODER = ("conv", "relu", *("pool", "half", *BLOCKS) * 3, "conv")
DECODER = ("bend", "conv", "relu", *(*BLOCKS, "double", "grow", "conv") * 3, "relu", "conv")


def small_vae() -> TAEHV:
    """Random weights that leave no layer without effect."""
    vae = TAEHV(SMALL).requires_grad_(False)
    random = torch.Generator().manual_seed(5)
    for name, parameter in sorted(vae.state_dict().items()):
        bound = 0.1 if name.endswith("bias") else 1.8 / parameter[0].numel() ** 0.5
        parameter.uniform_(-bound, bound, generator=random)
    vae.state_dict()["decoder.22.weight"].mul_(0.3)
    vae.state_dict()["decoder.22.bias"].fill_(0.5)
    return vae


def plain(layers: Sequence[str], weights: dict[str, Tensor], x_TCHW: Tensor) -> Tensor:
    """The published form of a whole clip: every layer over all frames, those before the first being zeros."""
    x = x_TCHW
    for number, layer in enumerate(layers):
        own = {name: weights.get(f"{number}.{name}") for name in ("weight", "bias", "conv.weight")}
        match layer:
            case "conv" | "half":
                weight = own["weight"]
                assert weight is not None
                x = functional.conv2d(x, weight, own["bias"], padding=1, stride=2 if layer == "half" else 1)
            case "relu":
                x = x.relu()
            case "bend":
                x = torch.tanh(x / 3) * 3
            case "double":
                x = functional.interpolate(x, scale_factor=2, mode="nearest")
            case "memory":
                y = torch.cat((x, torch.cat((torch.zeros_like(x[:1]), x[:-1]))), dim=1)
                for inner in (0, 2, 4):
                    y = functional.conv2d(
                        y, weights[f"{number}.conv.{inner}.weight"], weights[f"{number}.conv.{inner}.bias"], padding=1
                    )
                    y = y.relu() if inner < 4 else y
                x = (x + y).relu()
            case "pool" | "grow":
                weight = own["conv.weight"]
                assert weight is not None
                if layer == "pool":
                    x = x.reshape(-1, weight.shape[1], *x.shape[2:])
                x = functional.conv2d(x, weight)
                if layer == "grow":
                    x = x.reshape(-1, weight.shape[1], *x.shape[2:])
    return x


def clip(frames: int, batch: int = 1, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.rand(batch, frames, 3, HEIGHT, WIDTH, generator=random) * 2 - 1


def latents(count: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, count, 16, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(count))


def encode_in(vae: TAEHV, frames: Tensor, split: Sequence[int]) -> Tensor:
    state, parts = VAEState(), []
    for part in torch.split(frames, list(split), dim=1):
        latent, state = vae.encode(part, state)
        parts.append(latent)
    return torch.cat(parts, dim=1)


def decode_in(vae: TAEHV, latent: Tensor, split: Sequence[int]) -> Tensor:
    state, parts = VAEState(), []
    for part in torch.split(latent, list(split), dim=1):
        frames, state = vae.decode(part, state)
        parts.append(frames)
    return torch.cat(parts, dim=1)


def difference(got: Tensor, want: Tensor) -> float:
    """Root mean square, relative to what is wanted."""
    return float((got - want).norm() / want.norm())


@pytest.fixture(scope="module")
def vae() -> TAEHV:
    return small_vae()


def test_each_latent_is_the_published_last_one_of_the_clip_so_far(vae: TAEHV) -> None:
    frames = clip(13)
    got = encode_in(vae, frames, (5, 4, 4))
    weights = vae.encoder.state_dict()
    for count in (1, 5, 9, 13):
        so_far = frames[0, :count] / 2 + 0.5
        filled = torch.cat((so_far, so_far[-1:].expand(3, -1, -1, -1)))
        want = plain(ENCODER, weights, filled)[-1]
        assert want.std() > 0.05
        torch.testing.assert_close(vae.normalise(got[:, count // 4 : count // 4 + 1])[0, 0], want, atol=2e-5, rtol=0)


def test_decoding_is_the_published_whole_clip_without_its_first_three_frames(vae: TAEHV) -> None:
    latent = latents(4)
    want = plain(DECODER, vae.decoder.state_dict(), latent[0])[3:].clamp(0, 1) * 2 - 1
    assert want.std() > 0.05
    assert (want.abs() < 1).float().mean() > 0.3
    torch.testing.assert_close(decode_in(vae, latent, (2, 1, 1))[0], want, atol=2e-5, rtol=0)


def test_any_split_of_a_stream_gives_the_same_bits(vae: TAEHV) -> None:
    frames, latent = clip(13), latents(4)
    encoded, decoded = encode_in(vae, frames, (13,)), decode_in(vae, latent, (4,))
    assert (encoded.shape, decoded.shape) == ((1, 4, 16, 4, 6), (1, 13, 3, 32, 48))
    for split in ((1, 4, 4, 4), (5, 8), (1, 12)):
        assert torch.equal(encode_in(vae, frames, split), encoded)
    for split in ((1, 1, 1, 1), (2, 2), (3, 1)):
        assert torch.equal(decode_in(vae, latent, split), decoded)


def test_frames_between_two_latents_are_remembered(vae: TAEHV) -> None:
    frames = clip(9)
    other = frames.clone()
    other[:, 2] += 0.2
    before, after = encode_in(vae, frames, (9,)), encode_in(vae, other, (9,))
    assert torch.equal(before[:, 0], after[:, 0])
    assert not torch.equal(before[:, 1], after[:, 1])
    assert not torch.equal(before[:, 2], after[:, 2])


def test_sessions_that_take_turns_do_not_know_of_each_other(vae: TAEHV) -> None:
    clips = [clip(9, seed=seed) for seed in (3, 4)]
    alone = [encode_in(vae, frames, (5, 4)) for frames in clips]
    shown = [decode_in(vae, vae.normalise(latent), (2, 1)) for latent in alone]
    encoders, decoders = [VAEState()] * 2, [VAEState()] * 2
    for taken, given in ((slice(0, 5), slice(0, 2)), (slice(5, 9), slice(2, 3))):
        for i, frames in enumerate(clips):
            latent, encoders[i] = vae.encode(frames[:, taken], encoders[i])
            assert torch.equal(latent, alone[i][:, given])
            pictures, decoders[i] = vae.decode(vae.normalise(latent), decoders[i])
            assert torch.equal(pictures, shown[i][:, taken])


def test_a_state_can_be_used_again(vae: TAEHV) -> None:
    frames = clip(9)
    buffer = frames[:, :5].clone()
    _, state = vae.encode(buffer, VAEState())
    buffer.zero_()  # a caller may write the next frames to where the last ones were
    first, _ = vae.encode(frames[:, 5:], state)
    again, _ = vae.encode(frames[:, 5:], state)
    assert torch.equal(first, again)
    assert torch.equal(first, encode_in(vae, frames, (5, 4))[:, 2:])


def test_a_call_compiles_as_one_graph(vae: TAEHV) -> None:
    frames = clip(9)
    latent, encoder = vae.encode(frames[:, :5], VAEState())
    _, decoder = vae.decode(latent, VAEState())
    encode = torch.compile(vae.encode, fullgraph=True, backend="eager")
    decode = torch.compile(vae.decode, fullgraph=True, backend="eager")
    assert torch.equal(encode(frames[:, 5:], encoder)[0], vae.encode(frames[:, 5:], encoder)[0])
    assert torch.equal(decode(latent[:, :1], decoder)[0], vae.decode(latent[:, :1], decoder)[0])


def test_two_sessions_in_a_batch_equal_each_alone(vae: TAEHV) -> None:
    frames, latent = clip(9, batch=2), latents(3, batch=2)
    encoded, decoded = encode_in(vae, frames, (5, 4)), decode_in(vae, latent, (2, 1))
    for i in range(2):
        assert difference(encoded[i : i + 1], encode_in(vae, frames[i : i + 1], (5, 4))) < 2e-6
        assert difference(decoded[i : i + 1], decode_in(vae, latent[i : i + 1], (2, 1))) < 2e-6


@pytest.mark.parametrize(
    ("shape", "started", "said"),
    [
        ((1, 4, 3, 16, 16), False, r"4 frames cannot start .* 1 \+ 4k"),
        ((1, 5, 3, 16, 16), True, "5 frames cannot go on .* 4k"),
        ((1, 5, 3, 12, 16), False, "16x12 must be a multiple of 8"),
    ],
)
def test_frames_that_do_not_fit_are_refused(vae: TAEHV, shape: tuple[int, ...], started: bool, said: str) -> None:
    state = VAEState((torch.zeros(1),)) if started else VAEState()
    with pytest.raises(ValueError, match=said):
        vae.encode(torch.zeros(shape), state)
    with pytest.raises(ValueError, match="0 latent frames"):
        vae.decode(latents(1)[:, :0], state)


def test_names_and_sizes_are_the_published_ones() -> None:
    with torch.device("meta"):
        vae = TAEHV(TAEHVConfig())
    names = vae.state_dict()
    assert len(names) == 128
    assert names["encoder.2.conv.weight"].shape == (64, 128, 1, 1)
    assert names["encoder.4.conv.0.weight"].shape == (64, 128, 3, 3)
    assert names["encoder.17.weight"].shape == (16, 64, 3, 3)
    assert names["decoder.1.weight"].shape == (256, 16, 3, 3)
    assert names["decoder.13.conv.weight"].shape == (256, 128, 1, 1)
    assert names["decoder.22.bias"].shape == (3,)
    assert not {"encoder.3.bias", "decoder.8.bias", "scale.mean"} & names.keys()
    assert sum(parameter.numel() for parameter in vae.encoder.parameters()) == 1_470_928
    assert sum(parameter.numel() for parameter in vae.decoder.parameters()) == 9_844_611


@pytest.mark.parametrize(
    ("height", "width", "encoder_mib", "decoder_mib", "encode_tflop", "decode_tflop"),
    [(512, 512, 33.0, 42.0, 0.318, 0.346), (480, 832, 50.3, 64.0, 0.484, 0.527)],
)
def test_what_a_stream_costs_at_full_width(
    height: int, width: int, encoder_mib: float, decoder_mib: float, encode_tflop: float, decode_tflop: float
) -> None:
    """On the meta device in bfloat16: a host read, a tensor left on the CPU or a wrong dtype would raise."""
    with torch.device("meta"):
        vae = TAEHV(TAEHVConfig()).bfloat16().requires_grad_(False)
    frames = torch.empty(1, 5, 3, height, width, device="meta", dtype=torch.bfloat16)
    first, encoder = vae.encode(frames[:, :1], VAEState())
    _, decoder = vae.decode(first, VAEState())
    with FlopCounterMode(display=False) as encode:
        latent, later_encoder = vae.encode(frames[:, 1:], encoder)
    with FlopCounterMode(display=False) as decode:
        pictures, later_decoder = vae.decode(latent, decoder)
    assert (latent.shape, latent.dtype) == ((1, 1, 16, height // 8, width // 8), torch.bfloat16)
    assert (pictures.shape, pictures.dtype) == ((1, 4, 3, height, width), torch.bfloat16)
    assert state_bytes(encoder) / 2**20 == pytest.approx(encoder_mib, abs=0.1)
    assert state_bytes(decoder) / 2**20 == pytest.approx(decoder_mib, abs=0.1)
    assert encode.get_total_flops() / 1e12 == pytest.approx(encode_tflop, abs=0.005)
    assert decode.get_total_flops() / 1e12 == pytest.approx(decode_tflop, abs=0.005)
    for before, after in ((encoder, later_encoder), (decoder, later_decoder)):
        assert [tensor.shape for tensor in before.memory] == [tensor.shape for tensor in after.memory]


def test_settings_are_closed() -> None:
    with pytest.raises(ValidationError, match="width"):
        TAEHVConfig.model_validate({"width": 3})
