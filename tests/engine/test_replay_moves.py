"""A stream that moved on the ladder is replayed as the pipeline gave it live: fewer steps, light VAE, smaller size."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.bundle import Bundle, BundleError, Move, read_spec
from engine.pipeline import Mode, Pipeline
from engine.replay import Replay, RingReplay, main
from engine.session import Item
from engine.wan.taehv import TAEHV
from engine.wan.vae_config import TAEHVConfig
from tests.engine.oracle import Spec, make_bundle

SHAPE = Spec(
    dim=64, layers=3, ffn_dim=96, text_dim=16, text_len=6, text_tokens=4, freq_dim=32, vae_dim=4, height=32, width=64,
    chunks=11, steps=(700, 500), num_kv_cache=4, num_sink=1,
)  # fmt: skip
SMALLER = (32, 16)
LIGHT = {"encoder_dim": 4, "decoder_dims": [8, 6, 4, 4]}

TO_LIGHT_AND_BACK = (Move(chunk=3, light=True), Move(chunk=7))
TWICE_TO_LIGHT = (Move(chunk=2, light=True), Move(chunk=5), Move(chunk=8, light=True))
TO_SMALL_AND_BACK = (Move(chunk=3, small=True), Move(chunk=7))
# Each rung of the ladder down, and up in other steps.
ALL_THE_WAY = (
    Move(chunk=2, steps=1),
    Move(chunk=4, steps=1, light=True),
    Move(chunk=6, steps=1, light=True, small=True),
    Move(chunk=8, small=True),
    Move(chunk=9, light=True),
    Move(chunk=11),
)


def bundle_of(folder: Path, moves: Sequence[Move], **changes: Any) -> Path:
    """A bundle of pictures of eight bits, as a camera's are, with what its moves need."""
    shape = dataclasses.replace(SHAPE, **changes)
    make_bundle(folder, shape, seed=3)
    random = torch.Generator().manual_seed(4)
    inputs = load_file(folder / "inputs.safetensors")
    frames = inputs["video"].add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    save_file(inputs | {"video": frames.float().mul_(1 / 127.5).sub_(1)}, folder / "inputs.safetensors")
    light = TAEHV(TAEHVConfig.model_validate(LIGHT))
    weights = {
        key: torch.randn(tensor.shape, generator=random) / max(1, tensor[0].numel()) ** 0.5
        for key, tensor in light.state_dict().items()
    }
    save_file(weights, folder / "light_vae.safetensors")
    fields = {
        "moves": [move.model_dump(exclude_none=True) for move in moves],
        "small_width": SMALLER[0],
        "small_height": SMALLER[1],
        "light_vae": LIGHT,
    }
    rewrite_spec(folder, **fields)
    spec = read_spec(folder / "spec.json")
    noise = load_file(folder / "noise.safetensors")
    for move in moves:
        before, after = spec.params_of(move.chunk - 1), spec.params_of(move.chunk)
        begins = (before.small, before.light) != (after.small, after.light)
        following = next((later.chunk for later in moves if later.chunk > move.chunk), spec.chunks + 1)
        width, height = spec.size(small=after.small)
        for chunk in range(move.chunk, following):
            count = spec.frames_per_block + (begins and chunk == move.chunk)
            for step in range(len(spec.timesteps)):
                sample = torch.randn(count, spec.z_dim, height // 8, width // 8, generator=random)
                noise[f"noise_{chunk:03d}_{step}"] = sample
    save_file(noise, folder / "noise.safetensors")
    return folder


def rewrite_spec(folder: Path, **fields: object) -> None:
    path = folder / "spec.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


class Watched(Pipeline):
    """Keeps every clean latent."""

    latents: dict[int, Tensor]

    def decode(self, item: Item) -> Tensor:
        self.latents[item.chunk] = item.clean[0].clone()
        return super().decode(item)


def live(folder: Path, mode: Mode) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """What a stream of the engine gives that moves between its chunks: latents, and frames of eight bits."""
    bundle = Bundle.read(folder)
    spec = bundle.spec
    latents: dict[int, Tensor] = {}
    full = Watched(bundle.model, spec.width, spec.height, streams=1, mode=mode)
    pipelines = [full]
    if spec.has_small:
        size = (spec.width, spec.height)
        pipelines.append(Watched(bundle.model, *SMALLER, streams=1, mode=mode, frame_size=size, lanes=full.lanes))
    for pipeline in pipelines:
        pipeline.latents = latents
    state, pipeline = full.open(spec.params_of(0), bundle.noise), full
    frames: dict[int, Tensor] = {}
    for chunk in range(spec.chunks + 1):
        params = spec.params_of(chunk)
        if params.small != state.params.small:
            moved = pipelines[params.small].adopt(state, params, noise=bundle.noise)
            pipeline.close(state)
            pipeline, state = pipelines[params.small], moved
        elif params != state.params:
            pipeline.set_params(state, params)
        pictures = bundle.chunk(chunk).add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
        for done in pipeline.tick([(state, pipeline.upload(pictures.contiguous().numpy()))]):
            assert done.frames is not None
            frames[done.chunk] = done.frames
    return latents, frames


def eight_bits(frames_TCHW: Tensor) -> Tensor:
    return frames_TCHW.add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


@pytest.mark.parametrize(
    ("mode", "moves"),
    [
        ("sequential", TWICE_TO_LIGHT),
        ("batch", TWICE_TO_LIGHT),
        ("sequential", TO_SMALL_AND_BACK),
        ("sequential", ALL_THE_WAY),
    ],
    ids=["light", "light, batch", "small", "all the way"],
)
def test_a_stream_that_moved_is_replayed_bit_for_bit_on_any_number_of_ranks(
    tmp_path: Path, mode: Mode, moves: tuple[Move, ...]
) -> None:
    folder = bundle_of(tmp_path / "bundle", moves)
    latents, frames = live(folder, mode)
    replay = Replay(Bundle.read(folder), mode, slots="plain")
    replay.run()
    # Those between their steps at the end are what only a replay waits for.
    assert SHAPE.chunks - 1 <= len(frames) - (mode == "sequential") <= SHAPE.chunks
    for chunk, shown in frames.items():
        assert torch.equal(replay.results[f"latent_{chunk:03d}"], latents[chunk]), chunk
        assert torch.equal(eight_bits(replay.results[f"frames_{chunk:03d}"]), shown), chunk
    begun = {move.chunk for move in moves} & {chunk for chunk, latent in latents.items() if latent.shape[0] == 2}
    assert len(begun) >= 2  # the first chunk of another size or VAE begins with a frame alone
    rings = [RingReplay(folder, mode, ranks, slots="plain") for ranks in (1, 2)]
    for ring in rings:
        ring.run()
        assert ring.results.keys() == replay.results.keys() and ring.schedule == replay.schedule
    one, two = rings
    for name, tensor in replay.results.items():
        assert torch.equal(one.results[name], two.results[name]), name
        # In batch mode the steps of successive chunks share a pass in the one, and not in the other.
        if mode == "sequential":
            assert torch.equal(one.results[name], tensor), name
        else:
            torch.testing.assert_close(one.results[name], tensor, rtol=1e-4, atol=1e-4)


def test_other_moves_are_another_picture(tmp_path: Path) -> None:
    replays = []
    for number, moves in enumerate((TO_LIGHT_AND_BACK, (TO_LIGHT_AND_BACK[0],))):
        folder = bundle_of(tmp_path / str(number), TO_LIGHT_AND_BACK)
        if number:
            # The noise of the chunk that is no first one any more.
            noise = load_file(folder / "noise.safetensors")
            cut = {name: tensor[:1] if name.startswith("noise_007") else tensor for name, tensor in noise.items()}
            save_file({name: tensor.contiguous() for name, tensor in cut.items()}, folder / "noise.safetensors")
            rewrite_spec(folder, moves=[move.model_dump(exclude_none=True) for move in moves])
        replays.append(Replay(Bundle.read(folder), "sequential", slots="plain"))
        replays[-1].run()
    both, down = (replay.results for replay in replays)
    assert all(torch.equal(both[f"frames_{chunk:03d}"], down[f"frames_{chunk:03d}"]) for chunk in range(7))
    assert not any(torch.equal(both[f"frames_{chunk:03d}"], down[f"frames_{chunk:03d}"]) for chunk in range(7, 12))


def without_light(folder: Path) -> None:
    (folder / "light_vae.safetensors").unlink()


def with_light_key_gone(folder: Path) -> None:
    path = folder / "light_vae.safetensors"
    save_file(dict(list(load_file(path).items())[1:]), path)


def with_short_noise(folder: Path) -> None:
    path = folder / "noise.safetensors"
    noise = load_file(path)
    save_file(noise | {"noise_003_0": noise["noise_003_0"][:1].contiguous()}, path)


def with_large_noise(folder: Path) -> None:
    path = folder / "noise.safetensors"
    noise = load_file(path)
    save_file(noise | {"noise_009_1": noise["noise_000_1"].clone()}, path)


def moved(*moves: dict[str, Any], **fields: object) -> Callable[[Path], None]:
    return lambda folder: rewrite_spec(folder, moves=list(moves), **fields)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_light, r"moves to the light VAE, and .*light_vae\.safetensors is not there"),
        (with_light_key_gone, r"light_vae\.safetensors does not fit its configuration: missing"),
        (with_short_noise, r"noise_003_0 is \(1, 16, 4, 8\), the latent of its chunk \(2, 16, 4, 8\)"),
        (with_large_noise, r"noise_009_1 is \(2, 16, 4, 8\), the latent of its chunk \(1, 16, 2, 4\)"),
        (moved({"chunk": 3, "small": True}, small_width=None), "give small_width and small_height"),
        (moved({"chunk": 5}, {"chunk": 5, "light": True}), "chunk 5 must be above 5"),
        (moved({"chunk": 12, "light": True}), "chunk 12 must be above 0 and at most the last one, 11"),
        (moved({"chunk": 0, "light": True}), "chunk 0 must be above 0"),
        (moved({"chunk": 3, "steps": 3}), "3 steps at chunk 3 are more than the 2 there are"),
        (moved({"chunk": 3, "rung": 1}), "rung"),
        (moved({"chunk": 3, "small": True}, small_width=24), "width 24 must be a positive multiple of 16"),
    ],
)
def test_a_bundle_that_lacks_what_its_moves_need_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Path], None], said: str
) -> None:
    folder = bundle_of(tmp_path / "bundle", (Move(chunk=3, light=True), Move(chunk=8, small=True)))
    change(folder)
    arguments = ["--bundle", str(folder), "--out", str(tmp_path / "out.safetensors"), "--mode", "sequential"]
    assert main(arguments) == 1
    with pytest.raises((BundleError, ValueError), match=rf"(?s){said}"):
        Replay(Bundle.read(folder), "sequential").run()
    assert capsys.readouterr().err.startswith("replay: ")


def test_the_smaller_size_is_refused_in_batch_mode_with_the_cure(tmp_path: Path) -> None:
    folder = bundle_of(tmp_path / "bundle", TO_SMALL_AND_BACK)
    with pytest.raises(BundleError, match="give --mode sequential"):
        Replay(Bundle.read(folder), "batch")
    with pytest.raises(BundleError, match="give --mode sequential"):
        RingReplay(folder, "batch", 2)
