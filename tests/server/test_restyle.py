"""`restyle` over real files: frames, times, size, sound and turning kept; what cannot be done is said."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from engine.api import Engine, StreamParams
from engine.config import EngineSettings
from engine.fake import FakeEngine
from server.clip import ClipError, Picture
from server.restyle import Progress, RestyleError, RestyleJob, RestyleSummary, restyle, work_size

WIDTH, HEIGHT, RATE = 192, 128, 25
UNSTYLED = StreamParams(prompt="none", strength=0.0)


@dataclass
class Decoded:
    """A file as a player sees it. times: of each frame, in seconds, exact."""

    pictures: list[Picture]
    times: list[Fraction]
    sound: list[bytes]
    sound_times: list[Fraction]
    rotation: int
    rate: Fraction | None
    duration_s: float


def scene(index: int, width: int = WIDTH, height: int = HEIGHT) -> Picture:
    """A red left half and a bright bar that moves down with `index`."""
    picture = np.full((height, width, 3), 40, np.uint8)
    picture[:, : width // 2, 0] = 200
    top = index * 4 % (height - 16)
    picture[top : top + 16] = 230
    return picture


def make_clip(
    path: Path,
    frames: int,
    *,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    codec: str = "libx264",
    pts: list[int] | None = None,
    sound: str | None = None,
    rotation: int = 0,
) -> Path:
    """A clip of `scene`s at RATE, with a tone beside it if `sound` names an encoder."""
    with av.open(str(path), "w") as output:
        video = output.add_stream(codec, rate=RATE, options={"crf": "10"})
        assert isinstance(video, av.VideoStream)
        video.width, video.height = size
        video.pix_fmt = "yuv444p" if size[0] % 2 else "yuv420p"
        if rotation:
            video.set_display_rotation(rotation)
        tone = output.add_stream(sound, rate=48_000) if sound else None
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(scene(index, *size), "rgb24")
            frame.pts, frame.time_base = (pts[index] if pts else index), Fraction(1, RATE)
            output.mux(video.encode(frame))
            if isinstance(tone, av.AudioStream):
                wave = np.sin(np.arange(48_000 // RATE) * 0.06 * (1 + index % 5)).astype(np.float32)
                samples = av.AudioFrame.from_ndarray(np.stack([wave, wave]) * 0.3, "fltp", "stereo")
                samples.sample_rate, samples.pts = 48_000, index * (48_000 // RATE)
                output.mux(tone.encode(samples))
        output.mux(video.encode(None))
        if isinstance(tone, av.AudioStream):
            output.mux(tone.encode(None))
    return path


def decode(path: Path) -> Decoded:
    with av.open(str(path)) as clip:
        pictures, times, sound, sound_times, rotation = [], [], [], [], 0
        for packet in clip.demux():
            if packet.stream.type == "audio" and packet.size:
                sound.append(bytes(packet))
                sound_times.append((packet.pts or 0) * (packet.time_base or Fraction(1)))
            elif packet.stream.type == "video":
                for frame in packet.decode():
                    assert isinstance(frame, av.VideoFrame)
                    pictures.append(frame.to_ndarray(format="rgb24").astype(np.uint8))
                    times.append((frame.pts or 0) * (frame.time_base or Fraction(1)))
                    rotation = frame.rotation
        rate = clip.streams.video[0].average_rate
        return Decoded(pictures, times, sound, sound_times, rotation, rate, (clip.duration or 0) / av.time_base)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fake(width: int, height: int) -> Engine:
    return FakeEngine(width, height, delay_s=0.0)


async def run(source: Path, target: Path, params: StreamParams = UNSTYLED, **job: object) -> RestyleSummary:
    return await restyle(RestyleJob(source, target, params, **job), fake)  # type: ignore[arg-type]


@pytest.mark.parametrize("frames", [1, 3, 4, 5, 22])
async def test_every_frame_comes_out_at_its_time(tmp_path: Path, frames: int) -> None:
    source = make_clip(tmp_path / "in.mp4", frames)
    summary = await run(source, tmp_path / "out.mp4")
    before, after = decode(source), decode(tmp_path / "out.mp4")
    assert summary.frames == len(after.pictures) == frames
    assert after.times == before.times
    assert after.rate == before.rate == RATE
    assert after.duration_s == pytest.approx(before.duration_s, abs=0.001)
    assert after.pictures[0].shape == (HEIGHT, WIDTH, 3)
    for was, now in zip(before.pictures, after.pictures, strict=True):
        # Strength 0 shows the input again: the bar stands where it stood and colours are kept.
        assert np.abs(was.astype(int) - now).mean() < 4
        assert np.abs(was.mean((0, 1)) - now.mean((0, 1))).max() < 2


async def test_the_style_reaches_the_file(tmp_path: Path) -> None:
    source = make_clip(tmp_path / "in.mp4", 6)
    await run(source, tmp_path / "out.mp4", StreamParams(prompt="comic", strength=1.0))
    was, now = decode(source).pictures[5], decode(tmp_path / "out.mp4").pictures[5]
    assert np.abs(was.astype(int) - now).mean() > 40


async def test_uneven_times_are_kept(tmp_path: Path) -> None:
    source = make_clip(tmp_path / "in.mp4", 7, pts=[0, 1, 3, 7, 8, 20, 21])
    await run(source, tmp_path / "out.mkv")
    expected = [round(float(time), 3) for time in decode(source).times]
    assert [round(float(time), 3) for time in decode(tmp_path / "out.mkv").times] == expected


@pytest.mark.parametrize(
    ("encoder", "inside", "outside"), [("aac", "mp4", "mp4"), ("aac", "mp4", "mkv"), ("libopus", "mkv", "webm")]
)
async def test_sound_is_copied_bit_for_bit(tmp_path: Path, encoder: str, inside: str, outside: str) -> None:
    source = make_clip(tmp_path / f"in.{inside}", 30, sound=encoder)
    summary = await run(source, tmp_path / f"out.{outside}")
    before, after = decode(source), decode(tmp_path / f"out.{outside}")
    assert summary.audio_streams == 1
    assert after.sound == before.sound
    assert len(before.sound) > 10
    # In step with the picture, to the millisecond that Matroska counts in.
    shift = [float(b - a) for a, b in zip(before.sound_times, after.sound_times, strict=True)]
    assert max(shift) - min(shift) < 0.0021
    assert len(after.pictures) == 30


async def test_sound_is_left_out_on_request(tmp_path: Path) -> None:
    source = make_clip(tmp_path / "in.mp4", 5, sound="aac")
    await run(source, tmp_path / "out.webm", audio=False)
    assert decode(tmp_path / "out.webm").sound == []


async def test_sound_the_container_cannot_hold_is_refused_with_the_cure(tmp_path: Path) -> None:
    source = make_clip(tmp_path / "in.mp4", 5, sound="aac")
    with pytest.raises(ClipError, match=r"\.webm cannot hold aac sound; .*\.mkv.*--no-audio"):
        await run(source, tmp_path / "out.webm")
    assert names(tmp_path) == [source.name]


@pytest.mark.parametrize("rotation", [90, 180, -90])
async def test_a_rotated_clip_comes_out_upright(tmp_path: Path, rotation: int) -> None:
    source = make_clip(tmp_path / "in.mp4", 5, rotation=rotation)
    before = decode(source)
    await run(source, tmp_path / "out.mp4")
    after = decode(tmp_path / "out.mp4")
    assert before.rotation
    assert after.rotation == 0
    shown = np.rot90(before.pictures[2], round(before.rotation / 90))
    assert after.pictures[2].shape == shown.shape
    assert np.abs(shown.astype(int) - after.pictures[2]).mean() < 4


@pytest.mark.parametrize("name", ["out.mp4", "out.webm"])
async def test_an_odd_size_is_kept(tmp_path: Path, name: str) -> None:
    source = make_clip(tmp_path / "in.mp4", 3, size=(191, 127))
    await run(source, tmp_path / name)
    assert decode(tmp_path / name).pictures[0].shape == (127, 191, 3)


async def test_progress_names_the_stage_and_reaches_the_end(tmp_path: Path) -> None:
    source = make_clip(tmp_path / "in.mp4", 10)
    seen: list[Progress] = []
    await restyle(RestyleJob(source, tmp_path / "out.mp4", UNSTYLED), fake, seen.append)
    assert seen[0].stage.startswith("model ")
    assert [step.done for step in seen if step.stage == "restyling"] == [4, 8, 10]
    assert seen[-1].total == 10


async def test_cancelling_leaves_no_file(tmp_path: Path) -> None:
    source = make_clip(tmp_path / "in.mp4", 40)
    underway = asyncio.Event()

    def watch(progress: Progress) -> None:
        if progress.done:
            underway.set()

    task = asyncio.create_task(restyle(RestyleJob(source, tmp_path / "out.mp4", UNSTYLED), fake, watch))
    await asyncio.wait_for(underway.wait(), 30)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert names(tmp_path) == [source.name]
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_dropped_chunk_is_an_error_and_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.restyle.MAX_IN_FLIGHT", 6)
    source = make_clip(tmp_path / "in.mp4", 40)
    with pytest.raises(RestyleError, match=r"lost chunk \d+ \(dropped: \{'engine_behind'"):
        await restyle(RestyleJob(source, tmp_path / "out.mp4", UNSTYLED), lambda w, h: FakeEngine(w, h, delay_s=0.2))
    assert names(tmp_path) == [source.name]


def damaged(folder: Path, kind: str) -> Path:
    path = folder / "bad.mp4"
    if kind == "text":
        path.write_text("this is no video\n" * 100)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "folder":
        path.mkdir()
    elif kind == "cut":
        path.write_bytes(make_clip(folder / "whole.mp4", 10).read_bytes()[:500])
    elif kind == "sound":
        with av.open(str(path), "w") as output:
            tone = output.add_stream("aac", rate=48_000)
            samples = av.AudioFrame.from_ndarray(np.zeros((2, 4096), np.float32), "fltp", "stereo")
            samples.sample_rate, samples.pts = 48_000, 0
            assert isinstance(tone, av.AudioStream)
            output.mux([*tone.encode(samples), *tone.encode(None)])
    return path


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("missing", "no such file"),
        ("folder", "not a file"),
        ("empty", "not a video file"),
        ("text", "not a video file"),
        ("cut", "not a video file"),
        ("sound", "holds no video stream"),
    ],
)
async def test_an_input_that_is_no_video_is_refused(tmp_path: Path, kind: str, text: str) -> None:
    with pytest.raises(ClipError, match=text):
        await run(damaged(tmp_path, kind), tmp_path / "out.mp4")
    assert not [name for name in names(tmp_path) if name.startswith("out")]


async def test_damage_inside_a_clip_is_counted_and_passed_over(tmp_path: Path) -> None:
    source = tmp_path / "damaged.mkv"
    with av.open(str(make_clip(tmp_path / "in.mkv", 40))) as clip, av.open(str(source), "w") as output:
        copy = output.add_stream_from_template(clip.streams.video[0])
        for number, packet in enumerate(packet for packet in clip.demux() if packet.size):
            if number == 20:
                bad = av.Packet(b"\x7f" * 64)
                bad.pts, bad.dts, bad.time_base = packet.pts, packet.dts, packet.time_base
                packet = bad
            packet.stream = copy
            output.mux(packet)
    summary = await run(source, tmp_path / "out.mp4")
    assert summary.damaged_packets == 1
    assert summary.frames == len(decode(tmp_path / "out.mp4").pictures) == 39


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("in.mp4", "same file"),
        ("taken.mp4", "exists already; --force"),
        ("out.avi", "unknown extension '.avi'; use one of .mp4"),
        ("out", "unknown extension ''"),
        ("nowhere/out.mp4", "no such folder"),
        ("folder.mp4", "is a folder"),
    ],
)
async def test_an_output_that_does_not_do_is_refused_before_any_work(tmp_path: Path, target: str, text: str) -> None:
    source = make_clip(tmp_path / "in.mp4", 3)
    (tmp_path / "taken.mp4").write_text("precious")
    (tmp_path / "folder.mp4").mkdir()

    def no_engine(width: int, height: int) -> Engine:
        raise AssertionError("the engine was asked for")

    with pytest.raises(ClipError, match=text):
        await restyle(RestyleJob(source, tmp_path / target, UNSTYLED), no_engine)
    assert (tmp_path / "taken.mp4").read_text() == "precious"


async def test_force_overwrites(tmp_path: Path) -> None:
    source = make_clip(tmp_path / "in.mp4", 3)
    (tmp_path / "taken.mp4").write_text("old")
    await run(source, tmp_path / "taken.mp4", force=True)
    assert len(decode(tmp_path / "taken.mp4").pictures) == 3


@pytest.mark.parametrize(
    ("clip", "largest", "expected"),
    [
        ((640, 480), (256, 256), (288, 224)),
        ((512, 512), (256, 256), (256, 256)),
        ((480, 640), (256, 256), (224, 288)),
        ((1920, 1080), (256, 256), (336, 192)),
        ((640, 480), (320, 240), (320, 240)),
        ((640, 360), (832, 480), (832, 464)),
    ],
)
def test_the_work_size_follows_the_clip(
    clip: tuple[int, int], largest: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert work_size(*clip, largest) == expected


@pytest.mark.parametrize("clip", [(5000, 40), (40, 5000), (1, 1), (3840, 2160)])
def test_the_work_size_is_always_one_the_engine_takes(clip: tuple[int, int]) -> None:
    width, height = work_size(*clip)
    assert EngineSettings(width=width, height=height)
    assert width * height <= 256 * 256


@pytest.mark.parametrize("largest", [(32, 32), (4000, 4000)])
def test_a_size_out_of_range_is_refused_with_the_range(largest: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"size {largest[0]}x{largest[1]} .* 64x64 .*832x480"):
        work_size(640, 480, largest)


async def test_the_real_model_restyles_a_clip(tmp_path: Path) -> None:
    from engine.client import LocalEngine

    source = make_clip(tmp_path / "in.mp4", 10, sound="aac")
    settings = EngineSettings(max_streams=1, start_timeout_s=120)
    job = RestyleJob(source, tmp_path / "out.mp4", StreamParams(prompt="watercolour painting"), (128, 128))
    summary = await restyle(job, lambda w, h: LocalEngine(settings.model_copy(update={"width": w, "height": h})))
    before, after = decode(source), decode(tmp_path / "out.mp4")
    assert summary.frames == len(after.pictures) == 10
    assert after.sound == before.sound
    change = np.abs(before.pictures[9].astype(int) - after.pictures[9]).mean()
    assert 3 < change < 128


# --- models that want to be served in their own way


@pytest.mark.parametrize("frames", [1, 4, 5, 6, 9, 12])
async def test_a_model_with_a_first_chunk_of_five_gives_every_frame_once(tmp_path: Path, frames: int) -> None:
    source = make_clip(tmp_path / "in.mp4", frames)
    job = RestyleJob(source, tmp_path / "out.mp4", UNSTYLED)
    summary = await restyle(job, lambda width, height: FakeEngine(width, height, delay_s=0.0, first_chunk_frames=5))
    before, after = decode(source), decode(job.target)
    assert summary.frames == len(after.pictures) == frames and summary.withheld_frames == 0
    assert after.times == before.times
    for old, new in zip(before.pictures, after.pictures, strict=True):
        assert np.abs(old.astype(int) - new).mean() < 6


async def test_a_file_waits_until_the_words_have_been_read(tmp_path: Path) -> None:
    """What comes back before is the clip itself: it must not be written."""
    source = make_clip(tmp_path / "in.mp4", 13)
    engines: list[FakeEngine] = []

    def make_engine(width: int, height: int) -> Engine:
        engine = FakeEngine(width, height, delay_s=0.0, first_chunk_frames=5)
        engine.fault = "text_pending"
        asyncio.get_running_loop().call_later(0.3, setattr, engine, "fault", "")
        engines.append(engine)
        return engine

    job = RestyleJob(source, tmp_path / "out.mp4", StreamParams(prompt="neon"))
    summary = await restyle(job, make_engine)
    assert (summary.frames, summary.withheld_frames) == (13, 0)
    before, after = decode(source), decode(job.target)
    for old, new in zip(before.pictures, after.pictures, strict=True):
        assert np.abs(old.astype(int) - new).mean() > 30


async def test_frames_left_as_they_were_are_counted(tmp_path: Path) -> None:
    def make_engine(width: int, height: int) -> Engine:
        engine = FakeEngine(width, height, delay_s=0.0)
        engine.fault = "nan"
        return engine

    job = RestyleJob(make_clip(tmp_path / "in.mp4", 6), tmp_path / "out.mp4", StreamParams(prompt="neon"))
    assert (await restyle(job, make_engine)).withheld_frames == 6
