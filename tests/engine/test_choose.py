"""What fits which machine: pure, with machines made up for it."""

from __future__ import annotations

import pytest

from engine.choose import GIB, Choice, ChoiceError, Device, Machine, Model, Need, choose, parse_device
from engine.config import DEFAULT_MODEL, WAN_SERVING, EngineSettings, ServingProfile

TINY = Model(DEFAULT_MODEL, ServingProfile(), 24_000_000)
SMALL = Model("wan2.1-1.3b", WAN_SERVING, 14 * GIB)
LARGE = Model("wan2.1-14b", WAN_SERVING, 40 * GIB)
# GiB of weights, and of a stream at full size.
SIZES = {DEFAULT_MODEL: (0.1, 0.05), "wan2.1-1.3b": (3.0, 5.0), "wan2.1-14b": (28.0, 10.0)}


def host(gib: float = 64) -> Device:
    return Device("cpu", "Some CPU", round(gib * GIB))


def gpu(gib: float | None, number: int = 0) -> Device:
    return Device(f"cuda:{number}", "Some GPU", None if gib is None else round(gib * GIB))


def need_of(settings: EngineSettings, available_bytes: int | None) -> Need:
    weights, stream = SIZES[settings.model]
    area = settings.width * settings.height / (832 * 480)
    parts = {"weights": round(weights * GIB), "streams": round(settings.max_streams * stream * area * GIB)}
    return Need(parts, {} if settings.model == DEFAULT_MODEL else {"text encoder": 11 * GIB})


def chosen(machine: Machine, *fixed: str, steps: int | None = None, **wish: object) -> Choice:
    return choose(EngineSettings.model_validate(wish), frozenset([*wish, *fixed]), machine, need_of, steps=steps)


def figures(choice: Choice) -> tuple[str, str, int, int, int, int]:
    settings = choice.settings
    return (
        settings.model,
        settings.device,
        settings.width,
        settings.height,
        settings.max_streams,
        choice.steps,
    )


def test_without_a_gpu_the_embedded_model_runs_on_the_cpu_and_the_sentence_says_why() -> None:
    alone = chosen(Machine((host(),), (TINY,)))
    assert figures(alone) == (DEFAULT_MODEL, "cpu", 256, 256, 4, 1)
    assert alone.reason == (
        "livebrush-tiny at 256x256, 1 step, on the CPU: made for a CPU; needs 0.1 GiB of the 64.0 GiB free;"
        " no other model is installed, `livebrush models` gets others"
    )
    beside = chosen(Machine((host(),), (TINY, SMALL)))
    assert beside.settings.model == DEFAULT_MODEL and "wan2.1-1.3b wants a GPU and none was found" in beside.reason


@pytest.mark.parametrize(
    ("gib", "expected"),
    [
        (80, ("wan2.1-14b", "cuda:0", 832, 480, 4, 2)),
        (48, ("wan2.1-14b", "cuda:0", 832, 480, 2, 2)),
        (24, ("wan2.1-1.3b", "cuda:0", 832, 480, 4, 2)),
        (9, ("wan2.1-1.3b", "cuda:0", 832, 480, 1, 2)),
        (7, ("wan2.1-1.3b", "cuda:0", 512, 512, 1, 2)),
        (4, (DEFAULT_MODEL, "cpu", 256, 256, 4, 1)),
        (None, ("wan2.1-14b", "cuda:0", 832, 480, 4, 2)),
    ],
)
def test_the_largest_model_at_the_largest_size_that_fits_the_gpu(
    gib: float | None, expected: tuple[str, str, int, int, int, int]
) -> None:
    choice = chosen(Machine((host(), gpu(gib)), (TINY, SMALL, LARGE)))
    assert figures(choice) == expected
    assert f"{expected[2]}x{expected[3]}" in choice.reason


def test_the_reason_names_need_room_and_what_was_passed_over() -> None:
    choice = chosen(Machine((host(), gpu(4)), (TINY, SMALL)))
    assert (
        "wan2.1-1.3b at 512x512, 1 session needs 6.3 GiB (streams 3.3 GiB, weights 3.0 GiB)"
        " and cuda:0 (Some GPU) has 4.0 GiB free"
    ) in choice.reason
    fits = chosen(Machine((host(), gpu(24)), (TINY, SMALL)))
    assert fits.reason == (
        "wan2.1-1.3b at 832x480, 2 steps, on cuda:0 (Some GPU): the largest installed model that fits;"
        " needs 23.0 GiB of the 24.0 GiB free"
    )


def test_the_gpu_with_most_memory_is_taken_and_main_memory_must_hold_the_text_encoder() -> None:
    machine = Machine((host(), gpu(8), gpu(24, 1)), (TINY, SMALL))
    assert chosen(machine).settings.device == "cuda:1"
    poor = chosen(Machine((host(8), gpu(24)), (TINY, SMALL)))
    assert poor.settings.model == DEFAULT_MODEL and "text encoder 11.0 GiB" in poor.reason
    assert "main memory has 8.0 GiB" in poor.reason


def test_what_is_fixed_stays() -> None:
    machine = Machine((host(), gpu(80)), (TINY, SMALL, LARGE))
    assert figures(chosen(machine, model="wan2.1-1.3b")) == ("wan2.1-1.3b", "cuda:0", 832, 480, 4, 2)
    assert figures(chosen(machine, "size", width=512, height=512))[2:4] == (512, 512)
    assert figures(chosen(machine, model=DEFAULT_MODEL))[:2] == (DEFAULT_MODEL, "cpu")
    assert figures(chosen(machine, model=DEFAULT_MODEL, device="cuda:0"))[:2] == (DEFAULT_MODEL, "cuda:0")
    assert chosen(machine, steps=4).steps == 4
    on_cpu = chosen(machine, model="wan2.1-1.3b", device="cpu")
    assert on_cpu.settings.device == "cpu" and "a CPU stays far below its 16 fps" in on_cpu.reason
    assert chosen(machine, device="cpu").settings.model == DEFAULT_MODEL


def test_a_model_that_cannot_fit_is_refused_with_parts_bound_and_cure() -> None:
    machine = Machine((host(16), gpu(24)), (TINY, SMALL, LARGE))
    with pytest.raises(ChoiceError) as refusal:
        chosen(machine, model="wan2.1-14b", device="cuda:0")
    assert str(refusal.value) == (
        "wan2.1-14b at 512x512, 1 session needs 34.6 GiB (weights 28.0 GiB, streams 6.6 GiB) and cuda:0 (Some GPU)"
        " has 24.0 GiB free: choose a smaller --model (livebrush-tiny, wan2.1-1.3b) or a device with more memory"
    )
    with pytest.raises(ChoiceError, match=r"a smaller --size \(832x480 or 512x512\), fewer max_streams"):
        chosen(Machine((host(), gpu(8)), (SMALL,)), "size", model="wan2.1-1.3b", width=832, height=480, max_streams=4)


def test_one_device_for_now() -> None:
    devices = (host(), gpu(24))
    assert [parse_device(text, devices) for text in ("cpu", "cuda:0", "AUTO", " cuda:0 ")] == [
        "cpu",
        "cuda:0",
        "auto",
        "cuda:0",
    ]
    for text, words in (
        ("cuda:0,cuda:1", "names 2 devices: one process on one device serves for now; give cpu or cuda:0 or auto"),
        ("gpu", "write cpu, cuda:N"),
        ("", "write cpu, cuda:N"),
        ("cuda:1", "nvidia-smi finds 1 GPU; give cpu or cuda:0 or auto"),
    ):
        with pytest.raises(ChoiceError, match=words):
            parse_device(text, devices)
    with pytest.raises(ChoiceError, match="finds no GPU; give cpu or auto"):
        parse_device("cuda:0", (host(),))
