"""The streaming autoencoder: any split into chunks gives what the whole clip gives."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from engine.wan.untrained import untrained_model
from engine.wan.vae import TinyVAE, TinyVAEConfig, VAEState, channels_from_space, space_from_channels


def small_vae() -> TinyVAE:
    vae = untrained_model(vae=TinyVAEConfig(pixel_channels=4, frame_channels=8, chunk_channels=8)).vae
    assert isinstance(vae, TinyVAE)
    vae.latent_mean += 0.3
    vae.latent_std *= 1.7
    return vae


def clip(frames: int, batch: int = 1) -> Tensor:
    return torch.rand(batch, frames, 3, 16, 24, generator=torch.Generator().manual_seed(frames)) * 2 - 1


@pytest.mark.parametrize("split", [(1, 4, 4, 4), (1, 8, 4), (4, 4, 4), (4, 8)])
def test_streaming_equals_the_whole_clip(split: tuple[int, ...]) -> None:
    vae, frames = small_vae(), clip(sum(split), batch=2)
    whole_latent, _ = vae.encode(frames, VAEState())
    whole, _ = vae.decode(whole_latent, VAEState())
    encoder, decoder = VAEState(), VAEState()
    latents, pictures, start = [], [], 0
    for length in split:
        latent, encoder = vae.encode(frames[:, start : start + length], encoder)
        picture, decoder = vae.decode(latent, decoder)
        latents.append(latent)
        pictures.append(picture[:, -length:])
        start += length
    torch.testing.assert_close(torch.cat(latents, 1), whole_latent, atol=2e-5, rtol=0)
    torch.testing.assert_close(torch.cat(pictures, 1), whole[:, -sum(split) :], atol=2e-5, rtol=0)


def test_the_decoder_remembers_one_frame() -> None:
    vae = small_vae()
    latent, _ = vae.encode(clip(8), VAEState())
    first, state = vae.decode(latent[:, :1], VAEState())
    remembered, _ = vae.decode(latent[:, 1:], state)
    forgetful, _ = vae.decode(latent[:, 1:], VAEState())
    assert not torch.equal(remembered[:, 0], forgetful[:, 0])
    assert torch.equal(remembered[:, 1:], forgetful[:, 1:])
    again, _ = vae.decode(latent[:, :1], VAEState())
    assert torch.equal(first, again)


def test_without_detail_the_decoder_is_the_projection() -> None:
    vae = small_vae()
    for parameter in vae.decode_out.parameters():
        torch.nn.init.zeros_(parameter)
    latent, _ = vae.encode(clip(8), VAEState())
    torch.testing.assert_close(vae.decode(latent, VAEState())[0], vae.linear_picture(latent))


def test_principal_components_restore_what_has_few_of_them() -> None:
    random = torch.Generator().manual_seed(0)
    basis = torch.randn(10, 768, generator=random)
    blocks = torch.randn(3 * 8 * 8, 10, generator=random) @ basis * 0.1 + 0.2
    frames = space_from_channels(blocks.view(3, 8, 8, 768).permute(0, 3, 1, 2), 8).reshape(3, 4, 3, 64, 64)
    vae = TinyVAE(TinyVAEConfig())
    vae.fit_pca(frames)
    latent, _ = vae.encode(frames, VAEState())
    # The convolutional residual starts at zero, so this is the projection alone.
    restored, _ = vae.decode(latent, VAEState())
    torch.testing.assert_close(restored, frames, atol=1e-4, rtol=0)
    assert latent.mean().abs() < 1e-3
    torch.testing.assert_close(latent[:, :, :10].std((0, 1, 3, 4)), torch.ones(10), atol=1e-2, rtol=0)


def test_latent_statistics_are_taken_off_and_put_back() -> None:
    vae = small_vae()
    latent, _ = vae.encode(clip(4), VAEState())
    picture, _ = vae.decode(latent, VAEState())
    plain = small_vae()
    plain.latent_mean.zero_()
    plain.latent_std.fill_(1)
    raw, _ = plain.encode(clip(4), VAEState())
    torch.testing.assert_close(latent, (raw - 0.3) / 1.7)
    torch.testing.assert_close(picture, plain.decode(raw, VAEState())[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_shuffles_are_the_library_ones(factor: int) -> None:
    x = torch.randn(2, 3, 16, 24)
    packed = channels_from_space(x, factor)
    assert torch.equal(packed, functional.pixel_unshuffle(x, factor))
    assert torch.equal(space_from_channels(packed, factor), x)


@pytest.mark.parametrize(
    ("shape", "said"), [((1, 3, 3, 16, 16), "3 frames"), ((1, 0, 3, 16, 16), "0 frames"), ((1, 4, 3, 12, 16), "16x12")]
)
def test_frames_that_do_not_fit_are_refused(shape: tuple[int, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        small_vae().encode(torch.zeros(shape), VAEState())
