"""The parts of every autoencoder, and of what follows the last block, are in a row the whole, bit for bit."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from engine.chain import chain_of
from engine.devices import VAE_PARTS, Vae
from engine.wan.presets import LIVEBRUSH_TINY
from engine.wan.taehv import TAEHV
from engine.wan.transformer import CausalTransformer
from engine.wan.untrained import untrained_model
from engine.wan.vae import Carried, Memory, Part, StreamVAE, TinyVAEConfig, VAEState
from engine.wan.vae_config import TAEHVConfig, WanVAEConfig
from engine.wan.wan_vae import WanVAE
from engine.wan.weights import Model
from tests.engine import ring_models

HEIGHT, WIDTH = 16, 24


def tiny() -> StreamVAE:
    vae = untrained_model(vae=TinyVAEConfig(latent_channels=96, pixel_channels=4, frame_channels=8)).vae
    for parameter in vae.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return vae


def wan() -> StreamVAE:
    torch.manual_seed(0)
    return WanVAE(WanVAEConfig(dim=4)).eval()


def light() -> StreamVAE:
    torch.manual_seed(0)
    return TAEHV(TAEHVConfig(encoder_dim=4, decoder_dims=(8, 6, 4, 4))).eval()


VAES: dict[str, Callable[[], StreamVAE]] = {"tiny": tiny, "wan": wan, "light": light}


class Apart:
    """Parts as ranks run them: each keeps its own memory, and tensors come to it as copies in plain order."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        self.memories: list[Memory] = [()] * len(parts)

    def run(self, x: Tensor) -> Tensor:
        carried: Carried = (x,)
        for number, part in enumerate(self.parts):
            carried, self.memories[number] = part.run(carried, self.memories[number])
            assert len(self.memories[number]) == part.slots
            carried = tuple(tensor.clone(memory_format=torch.contiguous_format) for tensor in carried)
        return carried[0]


@pytest.mark.parametrize("name", VAES)
@pytest.mark.parametrize("split", [(5, 4, 4), (5, 8, 4)])
@torch.inference_mode()
def test_parts_in_a_row_are_the_whole(name: str, split: tuple[int, ...]) -> None:
    vae = VAES[name]()
    encoder, decoder = Apart(vae.encode_parts()), Apart(vae.decode_parts())
    encoding, decoding = VAEState(), VAEState()
    for number, count in enumerate(split):
        frames = torch.rand(1, count, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(number)) * 2 - 1
        latent, encoding = vae.encode(frames, encoding)
        pictures, decoding = vae.decode(vae.normalise(latent), decoding)
        assert torch.equal(encoder.run(frames), latent)
        assert torch.equal(decoder.run(vae.normalise(latent)), pictures)
        # What the parts keep is what the whole keeps.
        for apart, state in ((encoder, encoding), (decoder, decoding)):
            kept = [tensor for memory in apart.memories for tensor in memory]
            assert all(torch.equal(one, other) for one, other in zip(kept, state.memory, strict=True))


@pytest.mark.parametrize("name", ["embedded", "wan", "light"])
@torch.inference_mode()
def test_a_chain_knows_what_its_units_keep_and_hand_on(name: str) -> None:
    model: Model = getattr(ring_models, name)(0)
    height, width, span, streams = 64, 96, 2, 3
    chain = chain_of(model, width, height, span=span, streams=streams, rows=1)
    channels, size = model.config.transformer.latent_channels, (height // 8, width // 8)
    kept: list[int] = []
    most = 0
    for parts, x in (
        (model.vae.encode_parts(), torch.zeros(1, 4 * span, 3, height, width)),
        (model.vae.decode_parts(), torch.zeros(1, span, channels, *size)),
    ):
        apart = Apart(parts)
        apart.run(x[:, :1])
        carried: Carried = (x,)
        for number, part in enumerate(parts):
            carried, memory = part.run(carried, apart.memories[number])
            kept.append(streams * sum(tensor.numel() * tensor.element_size() for tensor in memory))
            most = max(most, sum(tensor.numel() for tensor in carried))
    assert [chain.unit_bytes[unit] for unit in (*chain.encode, *chain.decode)] == kept
    assert sum(kept) > 0
    assert chain.carried >= most


def test_a_wan_autoencoder_falls_into_its_stages() -> None:
    vae = WanVAE(WanVAEConfig(dim=4))
    assert (len(vae.encode_parts()), len(vae.decode_parts())) == (14, 18)


@pytest.mark.parametrize("name", ["full", "light"])
def test_the_plan_counts_what_each_part_does(name: Vae) -> None:
    with torch.device("meta"), torch.inference_mode():
        vae: StreamVAE = WanVAE(WanVAEConfig()) if name == "full" else TAEHV(TAEHVConfig())
        ways = (
            (vae.encode_parts(), torch.empty(1, 4, 3, 480, 832), VAE_PARTS[name][0]),
            (vae.decode_parts(), torch.empty(1, 1, 16, 60, 104), VAE_PARTS[name][1]),
        )
        for parts, x, shares in ways:
            first: Carried = (x[:, :1],)
            carried: Carried = (x,)
            counted = []
            for part in parts:
                first, memory = part.run(first, ())
                with FlopCounterMode(display=False) as counter:
                    carried, _ = part.run(carried, memory)
                counted.append(counter.get_total_flops())
            assert [count / sum(counted) for count in counted] == pytest.approx(list(shares), abs=1e-3)


@pytest.mark.parametrize(("blocks", "coarse"), [(0, 0), (1, 0), (3, 0), (2, 6)])
@torch.inference_mode()
def test_the_head_and_the_refiner_block_by_block_are_the_tail(blocks: int, coarse: int) -> None:
    shape = {"dim": 48, "ffn_dim": 64, "heads": 2, "layers": 1, "refine_channels": 8 if blocks else 0}
    shape |= {"refine_coarse_channels": coarse}
    config = LIVEBRUSH_TINY.model_copy(update={**shape, "refine_blocks": max(1, blocks)})
    torch.manual_seed(0)
    transformer = CausalTransformer(config)
    for parameter in transformer.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    frames, size = 2, (4, 6)
    source = torch.randn(1, frames, config.condition_channels, *size)
    grid = transformer.grid(source)
    x, time = torch.randn(1, grid[0] * grid[1] * grid[2], config.dim), torch.randn(1, config.dim)
    carried: Carried = (x,)
    assert transformer.tail_parts == 1 + blocks
    for part in range(transformer.tail_parts):
        carried = transformer.tail(part, carried, time, transformer.film(time, frames), grid, source)
        carried = tuple(tensor.clone() for tensor in carried)
    assert torch.equal(carried[0], transformer.leave(x, time, grid, source))
    assert carried[0].std() > 0.01
