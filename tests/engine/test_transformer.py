"""The transformer against the published arithmetic, written out plainly in float64, whole and chunk by chunk."""

from collections.abc import Sequence

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional

from engine.kv_cache import KVPool
from engine.wan.presets import PRESETS, WAN_1_3B, TransformerConfig
from engine.wan.refiner import Refiner
from engine.wan.rope import half_split_order, rope_rotation, rotate
from engine.wan.transformer import CausalTransformer, PromptContext
from engine.wan.untrained import untrained_model

WAN_LIKE = TransformerConfig(
    latent_channels=4,
    dim=48,
    ffn_dim=96,
    heads=2,
    layers=3,
    text_dim=12,
    text_len=5,
    freq_dim=16,
    window_frames=5,
    sink_frames=2,
)
TINY_LIKE = WAN_LIKE.model_copy(
    update={
        "condition_channels": 4,
        "pooled_text": True,
        "prediction": "source_residual",
        "refine_channels": 8,
        "window_frames": 3,
        "sink_frames": 1,
    }
)
CONFIGS = {"wan": WAN_LIKE, "tiny": TINY_LIKE}


class PlainAttention:
    """Whole clip in float64: complex rotation, explicit softmax, and a window that is simulated frame by frame."""

    def __init__(self, config: TransformerConfig, rows: int, columns: int, chunks: Sequence[int]) -> None:
        self.config, self.rows, self.columns, self.chunks = config, rows, columns, chunks

    def turn(self, x: Tensor, position: int) -> Tensor:
        """Rotate one frame's [B, heads, n, D] as if it were at this place in the window."""
        dim = x.shape[-1]
        spatial = 2 * (dim // 6)
        angles = []
        for row in range(self.rows):
            for column in range(self.columns):
                token = []
                for place, width in ((position, dim - 2 * spatial), (row, spatial), (column, spatial)):
                    token += [place * 10000 ** (-2 * i / width) for i in range(width // 2)]
                angles.append(token)
        turn = torch.tensor(angles, dtype=torch.float64)
        low, high = x.double().chunk(2, dim=-1)
        out = torch.complex(low, high) * torch.polar(torch.ones_like(turn), turn)
        return torch.cat((out.real, out.imag), dim=-1)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        n = self.rows * self.columns
        frame = [slice(i * n, (i + 1) * n) for i in range(k.shape[2] // n)]
        window: list[int] = []
        out, seen = [], 0
        for length in self.chunks:
            for _ in range(length):
                window.append(seen)
                seen += 1
                if len(window) > self.config.window_frames:
                    window.pop(self.config.sink_frames)
            keys = torch.cat([self.turn(k[:, :, frame[j]], place) for place, j in enumerate(window)], dim=2)
            values = torch.cat([v[:, :, frame[j]] for j in window], dim=2).double()
            for j in window[len(window) - length :]:
                query = self.turn(q[:, :, frame[j]], window.index(j))
                scores = query @ keys.transpose(-1, -2) / q.shape[-1] ** 0.5
                out.append(scores.softmax(dim=-1) @ values)
        return torch.cat(out, dim=2).to(q.dtype).transpose(1, 2)


def model_of(config: TransformerConfig) -> CausalTransformer:
    return untrained_model(config).transformer


def inputs(
    config: TransformerConfig, frames: int, batch: int = 2
) -> tuple[Tensor, Tensor | None, Tensor, PromptContext]:
    random = torch.Generator().manual_seed(7)
    noisy = torch.randn(batch, frames, 4, 4, 6, generator=random)
    source = torch.randn(noisy.shape, generator=random) if config.condition_channels else None
    timestep = torch.linspace(1000, 250, batch)
    text = torch.randn(batch, config.text_len, config.text_dim, generator=random)
    mean = text.mean(1) if config.pooled_text else None
    return noisy, source, timestep, model_of(config).prompt_context(text, mean)


def stream(
    model: CausalTransformer,
    noisy: Tensor,
    source: Tensor | None,
    timestep: Tensor,
    prompt: PromptContext,
    chunks: Sequence[int],
) -> Tensor:
    pool = KVPool(model.config, (2, 3), len(noisy))
    rows = pool.lease(len(noisy))
    out, start = [], 0
    for length in chunks:
        span = slice(start, start + length)
        view = pool.view(rows, pool.advance(rows, length))
        out.append(model(noisy[:, span], None if source is None else source[:, span], timestep, prompt, view))
        start += length
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("chunks", [(1,) * 9, (2, 1, 1, 1, 1, 1, 2), (1, 1)])
def test_streaming_with_a_cache_equals_the_plain_form_past_the_eviction(name: str, chunks: tuple[int, ...]) -> None:
    config = CONFIGS[name]
    model = model_of(config)
    noisy, source, timestep, prompt = inputs(config, sum(chunks))
    plain = model(noisy, source, timestep, prompt, PlainAttention(config, 2, 3, chunks))
    torch.testing.assert_close(stream(model, noisy, source, timestep, prompt, chunks), plain, atol=5e-6, rtol=0)
    whole = model.forward_clip(noisy, source, timestep, prompt, chunks=chunks)
    torch.testing.assert_close(whole, plain, atol=5e-6, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_no_frame_sees_the_future_and_each_sees_the_sink_but_not_the_evicted(name: str) -> None:
    config = CONFIGS[name].model_copy(update={"layers": 1, "refine_channels": 0})
    model = model_of(config)
    frames = config.window_frames + 2
    noisy, source, timestep, prompt = inputs(config, frames)
    before = model.forward_clip(noisy, source, timestep, prompt)
    for changed in range(frames):
        moved = noisy.clone()
        moved[:, changed] += 1
        after = model.forward_clip(moved, source, timestep, prompt)
        differs = {i for i in range(frames) if not torch.equal(before[:, i], after[:, i])}
        rolling = config.window_frames - config.sink_frames
        end = frames if changed < config.sink_frames else min(frames, changed + rolling)
        if changed < config.sink_frames:
            assert differs == set(range(changed, frames))
        else:
            assert differs == set(range(changed, end))


def published_pass(model: CausalTransformer, noisy: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
    """Wan 2.1 for one latent frame, restated from its published rules in float64 on the state dict alone."""
    config = model.config
    w: dict[str, Tensor] = {key: tensor.double() for key, tensor in model.state_dict().items()}

    def linear(name: str, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))

    def silu(x: Tensor) -> Tensor:
        return x / (1 + (-x).exp())

    def layer_norm(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + config.eps).sqrt()

    def rms(name: str, x: Tensor) -> Tensor:
        inverse: Tensor = (x.square().mean(-1, keepdim=True) + config.eps).rsqrt()
        return w[f"{name}.weight"] * x * inverse

    def heads(x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], config.heads, -1).transpose(1, 2)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores: Tensor = q @ k.transpose(-1, -2) / config.head_dim**0.5
        mixed: Tensor = scores.softmax(-1) @ v
        return mixed.transpose(1, 2).flatten(2)

    plain = PlainAttention(config, 2, 3, (1,))
    tokens = torch.nn.functional.unfold(noisy[:, 0].double(), 2, stride=2).transpose(1, 2)
    x = linear("patch_embed", tokens)
    angle = timestep.double()[:, None] * 10000 ** (-torch.arange(8, dtype=torch.float64) / 8)
    time = linear("time_embed.2", silu(linear("time_embed.0", torch.cat((angle.cos(), angle.sin()), 1))))
    shared = linear("time_project.1", silu(time)).view(len(x), 6, -1)
    context = linear("text_embed.2", gelu(linear("text_embed.0", text.double())))
    for i in range(config.layers):
        b = f"blocks.{i}"
        m = (w[f"{b}.modulation"] + shared)[:, :, None].unbind(1)
        q, k, v = linear(f"{b}.self_attn.qkv", layer_norm(x) * (1 + m[1]) + m[0]).chunk(3, -1)
        q, k = (plain.turn(heads(rms(f"{b}.self_attn.norm_{n}", y)), 0) for n, y in (("q", q), ("k", k)))
        x = x + linear(f"{b}.self_attn.out", attention(q, k, heads(v))) * m[2]
        normed = layer_norm(x) * w[f"{b}.cross_norm.weight"] + w[f"{b}.cross_norm.bias"]
        q = heads(rms(f"{b}.cross_attn.norm_q", linear(f"{b}.cross_attn.q", normed)))
        k, v = linear(f"{b}.cross_attn.kv", context).chunk(2, -1)
        k = heads(rms(f"{b}.cross_attn.norm_k", k))
        x = x + linear(f"{b}.cross_attn.out", attention(q, k, heads(v)))
        inner = gelu(linear(f"{b}.ffn.0", layer_norm(x) * (1 + m[4]) + m[3]))
        x = x + linear(f"{b}.ffn.2", inner) * m[5]
    shift, scale = (w["head_modulation"] + time[:, None])[:, :, None].unbind(1)
    x = linear("head", layer_norm(x) * (1 + scale) + shift)
    out = torch.zeros(len(x), 1, 4, 4, 6, dtype=torch.float64)
    for token in range(6):
        row, column = 2 * (token // 3), 2 * (token % 3)
        out[:, 0, :, row : row + 2, column : column + 2] = x[:, token].view(-1, 2, 2, 4).permute(0, 3, 1, 2)
    return out


def test_arithmetic_is_the_published_one() -> None:
    model = model_of(WAN_LIKE)
    noisy, _, timestep, _ = inputs(WAN_LIKE, 1)
    text = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(3))
    ours = model.forward_clip(noisy, None, timestep, model.prompt_context(text))
    torch.testing.assert_close(ours.double(), published_pass(model, noisy, timestep, text), atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("head_dim", [24, 64, 128])
def test_rotation_equals_a_float64_complex_one(head_dim: int) -> None:
    x = torch.randn(2, 3, 4 * 5 * 6, head_dim, generator=torch.Generator().manual_seed(1))
    ours = rotate(x, rope_rotation(head_dim, 4, 5, 6))
    spatial = head_dim // 6
    for token in range(0, 120, 7):
        places = (token // 30, token // 6 % 5, token % 6)
        counts = (head_dim // 2 - 2 * spatial, spatial, spatial)
        turn = [p * 10000.0 ** (-2 * i / (2 * n)) for p, n in zip(places, counts, strict=True) for i in range(n)]
        low, high = x[:, :, token].double().chunk(2, -1)
        angle = torch.tensor(turn, dtype=torch.float64)
        product = torch.complex(low, high) * torch.complex(angle.cos(), angle.sin())
        expected = torch.cat((product.real, product.imag), -1)
        torch.testing.assert_close(ours[:, :, token].double(), expected, atol=1e-6, rtol=1e-6)


def test_permuted_neighbour_pairs_give_the_same_scores() -> None:
    heads, dim, random = 2, 24, torch.Generator().manual_seed(2)
    q, k = torch.randn(2, 6, heads * dim, generator=random, dtype=torch.float64).unbind(0)
    rotation = rope_rotation(dim, 1, 2, 3)
    turn = torch.complex(rotation.cos[:, : dim // 2].double(), rotation.sin[:, dim // 2 :].double())[:, None]

    def neighbours(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.view(6, heads, dim // 2, 2)) * turn
        return torch.view_as_real(pairs).flatten(2).transpose(0, 1)

    def halves(x: Tensor) -> Tensor:
        return rotate(x[:, half_split_order(heads, dim)].view(6, heads, dim).transpose(0, 1), rotation)

    expected = neighbours(q) @ neighbours(k).transpose(-1, -2)
    torch.testing.assert_close(halves(q) @ halves(k).transpose(-1, -2), expected, atol=1e-4, rtol=1e-4)


def test_a_crop_keeps_its_place_in_the_picture() -> None:
    whole = rope_rotation(24, 2, 6, 7).cos.view(2, 6, 7, -1)
    crop = rope_rotation(24, 2, 3, 2, origin=(2, 4)).cos.view(2, 3, 2, -1)
    assert torch.equal(crop, whole[:, 2:5, 4:6])


@pytest.mark.parametrize(
    ("name", "parameters"),
    # The counts of the published Wan 2.1 checkpoints, and ours.
    [("wan2.1-1.3b", 1_418_996_800), ("wan2.1-14b", 14_288_491_584), ("livebrush-tiny", 4_680_544)],
)
def test_presets_have_the_published_size(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = CausalTransformer(PRESETS[name])
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_wan_layer_shapes_follow_the_published_ones() -> None:
    with torch.device("meta"):
        shapes = {key: tuple(tensor.shape) for key, tensor in CausalTransformer(WAN_1_3B).state_dict().items()}
    assert shapes["patch_embed.weight"] == (1536, 16 * 4)
    assert shapes["text_embed.0.weight"] == (1536, 4096)
    assert shapes["time_embed.0.weight"] == (1536, 256)
    assert shapes["time_project.1.weight"] == (6 * 1536, 1536)
    assert shapes["blocks.29.self_attn.qkv.weight"] == (3 * 1536, 1536)
    assert shapes["blocks.29.self_attn.norm_k.weight"] == (1536,)
    assert shapes["blocks.29.cross_norm.bias"] == (1536,)
    assert shapes["blocks.29.cross_attn.kv.weight"] == (2 * 1536, 1536)
    assert shapes["blocks.29.ffn.0.weight"] == (8960, 1536)
    assert shapes["blocks.29.modulation"] == (6, 1536)
    assert shapes["head.weight"] == (16 * 4, 1536)
    assert not [key for key in shapes if key.startswith(("refine", "pooled"))]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sink_frames": 5}, "must be below window_frames"),
        ({"heads": 5}, "head size"),
        ({"prediction": "source_residual"}, "condition_channels 0"),
        ({"freq_dim": 15}, "freq_dim 15"),
        ({"layer": 3}, "layer"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        TransformerConfig.model_validate(WAN_LIKE.model_dump() | change)


def test_unfit_inputs_are_refused_with_the_bound() -> None:
    model = model_of(TINY_LIKE)
    with pytest.raises(ValueError, match="mean_BK"):
        model.prompt_context(torch.zeros(1, 5, 12))
    with pytest.raises(ValueError, match="multiple of the patch 2x2"):
        model.grid(torch.zeros(1, 1, 4, 5, 6))
    noisy, source, timestep, prompt = inputs(TINY_LIKE, 3)
    with pytest.raises(ValueError, match="add up to 3"):
        model.forward_clip(noisy, source, timestep, prompt, chunks=(1, 1))
    with pytest.raises(ValueError, match="rolling part of the window, 2"):
        model.forward_clip(noisy, source, timestep, prompt, chunks=(3,))


def test_training_reaches_every_parameter() -> None:
    model = model_of(TINY_LIKE).train().requires_grad_(True)
    noisy, source, timestep, _ = inputs(TINY_LIKE, 4)
    text = torch.randn(2, 5, 12)
    prompt = model.prompt_context(text, text.mean(1))
    loss = model.forward_clip(noisy, source, timestep, prompt, origin=(3, 5)).square().mean()
    torch.autograd.backward(loss)
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert still == []


def block_by_hand(weights: dict[str, Tensor], name: str, x_CHW: Tensor, film_2C11: Tensor) -> Tensor:
    """A block of the refiner on one latent."""
    first, second = (
        (weights[f"{name}.{conv}.weight"], weights[f"{name}.{conv}.bias"]) for conv in ("conv_in", "conv_out")
    )
    y = functional.conv2d(x_CHW[None], *first, padding=1)[0] * (1 + film_2C11[0]) + film_2C11[1]
    return x_CHW + functional.conv2d(functional.silu(y)[None], *second, padding=1)[0]


def product_by_hand(weights: dict[str, Tensor], name: str, x_CHW: Tensor) -> Tensor:
    """A 1x1 convolution on one latent."""
    out = torch.einsum("oc,chw->ohw", weights[f"{name}.weight"][:, :, 0, 0], x_CHW)
    return out + weights[f"{name}.bias"][:, None, None]


def fine_by_hand(
    weights: dict[str, Tensor], spread_CHW: Tensor, output_CHW: Tensor, time_E: Tensor, blocks: int
) -> Tensor:
    """What the refiner makes of the features of its first projection, on one latent."""
    width = weights["place"].shape[0]
    film = functional.silu(time_E) @ weights["film.weight"].T + weights["film.bias"]
    film = film.view(blocks + 1, 2, width, 1, 1)
    x = functional.pixel_shuffle(spread_CHW, 2)
    x = x + weights["place"].repeat(1, x.shape[1] // 4, x.shape[2] // 4)
    x = (x * (1 + film[0, 0]) + film[0, 1]).relu()
    for block in range(blocks):
        x = block_by_hand(weights, f"blocks.{block}", x, film[1 + block])
    return output_CHW + product_by_hand(weights, "gather", functional.pixel_unshuffle(x.relu(), 2))


def test_the_refiner_is_convolutions_on_a_grid_twice_as_fine() -> None:
    torch.manual_seed(0)
    refiner = Refiner(TINY_LIKE.model_copy(update={"refine_blocks": 2}))
    output, source, time = torch.randn(2, 3, 4, 4, 6), torch.randn(2, 3, 4, 4, 6), torch.randn(2, 48)
    assert torch.equal(refiner(output, source, time), output)
    for parameter in refiner.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    weights = {name: parameter.detach() for name, parameter in refiner.named_parameters()}
    for row in range(2):
        for frame in range(3):
            both = torch.cat((output[row, frame], source[row, frame]))
            spread = product_by_hand(weights, "spread", both)
            wanted = fine_by_hand(weights, spread, output[row, frame], time[row], blocks=2)
            torch.testing.assert_close(refiner(output, source, time)[row, frame], wanted, atol=1e-4, rtol=1e-4)


def test_coarse_blocks_of_the_refiner_see_latents_and_tokens_at_the_latents_resolution() -> None:
    torch.manual_seed(0)
    shape = {"refine_blocks": 1, "refine_coarse_channels": 6, "refine_coarse_blocks": 2}
    refiner = Refiner(TINY_LIKE.model_copy(update=shape))
    output, source, time = torch.randn(2, 3, 4, 4, 6), torch.randn(2, 3, 4, 4, 6), torch.randn(2, 48)
    hints = torch.randn(2, 3, 6, 4, 6)
    assert torch.equal(refiner(output, source, time, hints), output)
    for parameter in refiner.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    weights = {name: parameter.detach() for name, parameter in refiner.named_parameters()}
    film = functional.silu(time) @ weights["coarse_film.weight"].T + weights["coarse_film.bias"]
    film = film.view(2, 3, 2, 6, 1, 1)
    for row in range(2):
        for frame in range(3):
            both = torch.cat((output[row, frame], source[row, frame]))
            x = product_by_hand(weights, "survey", both) + hints[row, frame]
            x = (x * (1 + film[row, 0, 0]) + film[row, 0, 1]).relu()
            for block in range(2):
                x = block_by_hand(weights, f"coarse_blocks.{block}", x, film[row, 1 + block])
            spread = product_by_hand(weights, "spread", both) + product_by_hand(weights, "descend", x.relu())
            wanted = fine_by_hand(weights, spread, output[row, frame], time[row], blocks=1)
            found = refiner(output, source, time, hints)[row, frame]
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
