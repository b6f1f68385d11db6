"""A recorded stream gives what the oracle gives, in every mode; a bundle that cannot be run says why."""

import dataclasses
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.bundle import Bundle, BundleError, read_spec
from engine.pipeline import Mode
from engine.replay import Replay, RingReplay, Slots, main
from engine.wan.weights import WeightsError
from tests.engine.oracle import Mode as OracleMode
from tests.engine.oracle import Spec, make_bundle, run_bundle
from tests.engine.streams import relative_rms

STEPS = (700, 500, 400, 200)
# Past the filling of the window in both modes; head size 32.
SMALL = Spec(
    dim=64, layers=2, ffn_dim=96, text_dim=16, text_len=6, text_tokens=4, freq_dim=32, vae_dim=4, height=16, width=32,
    chunks=8,
)  # fmt: skip
RUNS: dict[OracleMode, tuple[Mode, Slots]] = {
    "batch": ("batch", "published"),
    "sequential": ("sequential", "plain"),
    "slipping": ("sequential", "published"),
}


def replayed(folder: Path, mode: OracleMode) -> Replay:
    run, slots = RUNS[mode]
    replay = Replay(Bundle.read(folder), run, slots=slots)
    replay.run()
    return replay


def largest_error(results: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert results.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (results[name].shape, results[name].dtype) == (tensor.shape, torch.float32)
    return max(relative_rms(results[name], expected[name]) for name in expected)


@pytest.mark.parametrize("mode", RUNS)
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_replay_is_the_oracle(tmp_path: Path, mode: OracleMode, steps: int) -> None:
    folder = make_bundle(tmp_path / "bundle", dataclasses.replace(SMALL, steps=STEPS[:steps]), seed=steps)
    assert largest_error(replayed(folder, mode).results, run_bundle(folder, mode)) < 1e-5


@pytest.mark.parametrize("mode", ["batch", "slipping"])
@pytest.mark.parametrize(
    "change",
    [
        {"num_kv_cache": 8, "chunks": 11},
        {"heads": 4, "height": 32, "width": 16, "layers": 1},
        {"adaptive_noise": False, "noise_scale": 0.7, "steps": (650, 400)},
        # Motion brings the first step below the second: no guard in the public code.
        {"noise_scale": 0.65, "steps": (550, 530)},
        {"shift": 5.0, "z_dim": 16, "text_tokens": 6},
    ],
    ids=["window of 8", "heads and size", "still noise", "rising steps", "shift"],
)
def test_other_shapes_and_settings_are_the_oracle_too(tmp_path: Path, mode: OracleMode, change: dict[str, Any]) -> None:
    folder = make_bundle(tmp_path / "bundle", dataclasses.replace(SMALL, **change), seed=9)
    replay = replayed(folder, mode)
    assert largest_error(replay.results, run_bundle(folder, mode)) < 1e-5
    if "noise_scale" in change and change.get("adaptive_noise", True):
        assert min(first for _, first in replay.schedule) < 530


@pytest.mark.parametrize("mode", ["batch", "slipping"])
def test_bfloat16_is_the_oracle_within_its_rounding(tmp_path: Path, mode: OracleMode) -> None:
    spec = dataclasses.replace(SMALL, dtype="bfloat16", vae_dim=8, chunks=6)
    folder = make_bundle(tmp_path / "bundle", spec, seed=5)
    results, expected = replayed(folder, mode).results, run_bundle(folder, mode)
    assert 1e-6 < largest_error(results, expected) < 3e-2
    # And no further from the truth than the oracle is itself.
    exact = run_bundle(folder, mode, torch.float32)
    assert largest_error(results, exact) < 1.2 * largest_error(expected, exact)


def test_two_replays_of_one_bundle_are_bit_equal(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "bundle", SMALL, seed=6)
    bundle = Bundle.read(folder)
    first, second = Replay(bundle, "batch"), Replay(bundle, "batch")
    first.run()
    second.run()
    assert all(torch.equal(first.results[name], second.results[name]) for name in first.results)
    assert first.schedule == second.schedule


def test_the_schedule_is_the_public_controllers(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "bundle", SMALL, seed=7)
    replay = replayed(folder, "batch")
    video = load_file(folder / "inputs.safetensors")["video"][0].transpose(0, 1)
    previous, expected = 0.8, []
    for chunk in range(1, SMALL.chunks + 1):
        frames = video[4 * chunk : 4 * chunk + 5]
        rms = (frames[1:] - frames[:-1]).pow(2).mean((1, 2, 3)).sqrt()
        motion = float((rms.max() / 0.2).clamp(0, 1))
        previous = (0.8 - 0.1 * motion) * 0.9 + previous * 0.1
        expected.append([previous, int(1000 * previous) - 100])
    assert [first for _, first in replay.schedule] == [first for _, first in expected]
    assert [scale for scale, _ in replay.schedule] == pytest.approx([scale for scale, _ in expected], abs=1e-8)
    assert len({scale for scale, _ in replay.schedule}) > 4


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle", dataclasses.replace(SMALL, chunks=2), seed=8)


def rewrite_spec(folder: Path, **fields: object) -> None:
    path = folder / "spec.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_number_of_steps_stands_for_the_public_ones_and_a_closing_zero_is_none(bundle: Path) -> None:
    for given, expected in ((3, (700, 500, 400)), ([700, 0], (700,)), ([800, 300], (800, 300))):
        rewrite_spec(bundle, steps=given)
        assert read_spec(bundle / "spec.json").timesteps == expected


def test_keys_that_are_not_known_are_ignored_with_a_warning(bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = replayed(bundle, "batch").results
    rewrite_spec(bundle, colour="red", ranks=3)
    with caplog.at_level(logging.WARNING):
        results = replayed(bundle, "batch").results
    assert "ignored what is not known: colour, ranks" in caplog.text
    assert all(torch.equal(results[name], expected[name]) for name in expected)


def drop(part: str, name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / f"{part}.safetensors"
        save_file({key: tensor for key, tensor in load_file(path).items() if key != name}, path)

    return change


def shorten(folder: Path) -> None:
    path = folder / "inputs.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"video": tensors["video"][:, :, :12].contiguous()}, path)


def changed_spec(**fields: object) -> Callable[[Path], None]:
    return lambda folder: rewrite_spec(folder, **fields)


def without_heads(folder: Path) -> None:
    path = folder / "spec.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "heads"}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "spec.json").unlink(), r"cannot read .*spec\.json"),
        (lambda folder: (folder / "spec.json").write_text("{"), r"spec\.json is not JSON"),
        (without_heads, r"spec\.json: .*\sheads"),
        (changed_spec(dim="wide"), r"spec\.json: .*\sdim"),
        (changed_spec(dtype="int4"), "dtype 'int4' must be one of float32"),
        (changed_spec(steps=[0]), "must be 1 to 4 timesteps"),
        (changed_spec(steps=[900, 800, 700, 600, 500]), "must be 1 to 4 timesteps"),
        (changed_spec(dim=68), r"patch_embedding\.weight is \(64, 16"),
        (changed_spec(vae_dim=6), r"vae\.safetensors"),
        (lambda folder: (folder / "vae.safetensors").unlink(), r"cannot read .*vae\.safetensors"),
        (lambda folder: (folder / "dit.safetensors").write_bytes(b"none"), r"dit\.safetensors is no safetensors"),
        (drop("dit", "blocks.1.ffn.2.bias"), r"blocks\.1\.ffn\.2"),
        (drop("vae", "conv2.weight"), r"conv2\.weight"),
        (drop("inputs", "prompt_embeds"), r"inputs\.safetensors has no prompt_embeds"),
        (drop("noise", "noise_002_1"), r"noise\.safetensors has no noise_002_1"),
        (shorten, "T of 13 at least"),
    ],
)
def test_a_broken_bundle_is_refused_with_the_file_and_the_cause(
    bundle: Path, change: Callable[[Path], object], said: str
) -> None:
    change(bundle)
    with pytest.raises((BundleError, WeightsError), match=rf"(?s){said}"):
        replayed(bundle, "sequential")


def test_the_command_reports_a_broken_bundle_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--bundle", str(tmp_path), "--out", str(tmp_path / "out.safetensors")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("replay: cannot read ")
    assert said.count("\n") == 1
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("mode", "slots", "change"),
    [
        ("batch", "published", {"steps": STEPS}),
        ("sequential", "published", {"steps": STEPS[:2]}),
        # Chunks of two latent frames, the first of three: more than one piece on the wire.
        ("batch", "plain", {"frames_per_block": 2, "steps": STEPS[:1], "chunks": 4}),
    ],
    ids=["batch", "sequential", "long chunks"],
)
def test_ranks_change_nothing(tmp_path: Path, mode: Mode, slots: Slots, change: dict[str, Any]) -> None:
    spec = dataclasses.replace(SMALL, layers=3, **change)
    folder = make_bundle(tmp_path / "bundle", spec, seed=11)
    runs = [RingReplay(folder, mode, ranks, slots=slots) for ranks in (1, 3)]
    for run in runs:
        run.run()
    one, three = runs
    plain = Replay(Bundle.read(folder), mode, slots=slots)
    plain.run()
    # The steps of successive chunks in one pass round otherwise, and the cache carries that on.
    assert largest_error(one.results, plain.results) < (2e-6 if mode == "batch" else 1e-9)
    assert largest_error(one.results, run_bundle(folder, "batch" if mode == "batch" else "slipping")) < 1e-5
    assert one.results.keys() == three.results.keys()
    assert all(torch.equal(one.results[name], three.results[name]) for name in one.results)
    assert one.schedule == three.schedule == plain.schedule
    # Cut in the encoder, and behind the last block.
    assert three.report()["ranks"]["bounds"] == (0, 12, 24, 36)


def test_a_compiled_ring_is_refused(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out.safetensors")
    assert main(["--bundle", str(bundle), "--out", out, "--ranks", "2", "--compile"]) == 1
    assert main(["--bundle", str(bundle), "--out", out, "--ranks", "0"]) == 1
    said = capsys.readouterr().err
    assert "leave one of them out" in said
    assert "ranks 0" in said


def test_the_command_writes_tensors_and_a_report(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "results" / "out.safetensors"
    command = [
        sys.executable,
        "-m",
        "engine.replay",
        "--bundle",
        str(bundle),
        "--out",
        str(out),
        "--mode",
        "sequential",
    ]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2], timeout=120)
    expected = run_bundle(bundle, "slipping")
    assert largest_error(load_file(out), expected) < 1e-5
    assert load_file(out)["frames_000"].shape == (5, 3, 16, 32)
    assert load_file(out)["latent_002"].shape == (1, 16, 2, 4)
    assert all(tensor.abs().max() <= 1 for name, tensor in load_file(out).items() if name.startswith("frames"))
    report = json.loads(out.with_name("out.safetensors.json").read_text())
    (session,) = report["sessions"]
    assert session.keys() == {"encode", "dit", "decode", "schedule"}
    assert all(
        session[part].keys() == {"cpu_ms"} and session[part]["cpu_ms"] > 0 for part in ("encode", "dit", "decode")
    )
    assert [len(entry) for entry in session["schedule"]] == [2, 2]
    assert all(0.7 <= scale <= 0.8 and first == int(1000 * scale) - 100 for scale, first in session["schedule"])
