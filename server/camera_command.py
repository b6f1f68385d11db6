"""`livebrush camera`: a published stream as a webcam, for calls and every program that knows cameras and no WebRTC.

It is a program of its own beside the server, on the machine where the webcam is to appear.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import signal
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from server.camera_player import Webcam

STREAM_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
DEFAULT_URL = "http://127.0.0.1:8080"
# What calls expect of a webcam; the picture is fitted in.
DEFAULT_SIZE = (1280, 720)
DEFAULT_FPS = 30.0
MAX_SIDE_PX, MAX_FPS = 4096, 60.0
TOKEN_VARIABLE = "LIVEBRUSH_TOKEN"
MISSING_LIBRARY = (
    "the library that speaks to virtual cameras is not here: pip install 'livebrush[camera]' (pyvirtualcam, GPL-2.0)"
)
CURES = {
    "linux": "sudo modprobe v4l2loopback devices=1 exclusive_caps=1 card_label=Livebrush"
    " (Debian: apt-get install v4l2loopback-dkms)",
    "darwin": "install OBS 28 or newer and press Start Virtual Camera in it once",
    "win32": "install OBS 26 or newer, or Unity Capture",
}


def add_camera_parser(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the command to the console script's."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "camera",
        help="play a published stream into a virtual camera",
        epilog=f"Where the server asks for a token, it is read from the variable {TOKEN_VARIABLE}.",
    )
    parser.set_defaults(command=camera)
    parser.add_argument("--stream", required=True, type=_stream, metavar="NAME", help="the stream's name")
    parser.add_argument("--url", default=DEFAULT_URL, help=f"of the server (default: {DEFAULT_URL})")
    parser.add_argument("--device", metavar="DEVICE", help="say /dev/video10 (default: the first virtual camera found)")
    parser.add_argument(
        "--size",
        type=_size,
        default=DEFAULT_SIZE,
        metavar="WIDTHxHEIGHT",
        help="of the webcam; the picture is fitted in (default: 1280x720)",
    )
    parser.add_argument(
        "--fps", type=_fps, default=DEFAULT_FPS, help=f"of the webcam, up to {MAX_FPS:g} (default: {DEFAULT_FPS:g})"
    )
    parser.add_argument("--mirror", action="store_true", help="left and right exchanged")


def camera(options: argparse.Namespace) -> int:
    """Play until Ctrl-C; returns 1 where there is no camera to play into, or the server refuses for good."""
    try:
        webcam = open_webcam(options.size, options.fps, options.device)
    except (ImportError, RuntimeError) as error:
        print("\n".join(f"livebrush: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 1
    try:
        print(f"The webcam is {webcam.device}, {webcam.width}x{webcam.height} (Ctrl-C ends it)", flush=True)
        return asyncio.run(_play(options, webcam))
    finally:
        webcam.close()


def open_webcam(size: tuple[int, int], fps: float, device: str | None) -> Webcam:
    """The virtual camera. Raises ImportError without its library, RuntimeError without a device; both name the cure."""
    try:
        import pyvirtualcam
    except ImportError:
        raise ImportError(MISSING_LIBRARY) from None
    try:
        made: Webcam = pyvirtualcam.Camera(width=size[0], height=size[1], fps=fps, device=device)
    except (RuntimeError, OSError, ValueError) as error:
        cure = CURES.get(sys.platform, "see docs/obs.md")
        raise RuntimeError(f"no virtual camera could be opened: {str(error).strip()}\n{cure}") from error
    return made


async def _play(options: argparse.Namespace, webcam: Webcam) -> int:
    from server.camera_player import CameraPlayer, Refused

    player = CameraPlayer(
        options.url, options.stream, os.environ.get(TOKEN_VARIABLE, ""), webcam, fps=options.fps, mirror=options.mirror
    )
    task = asyncio.create_task(player.run(lambda line: print(line, flush=True)))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, task.cancel)
    try:
        await task
    except Refused as error:
        print(f"livebrush: {error}", file=sys.stderr)
        return 1
    except asyncio.CancelledError:
        print(f"Ended. Pictures shown: {player.counters['shown']}, repeated: {player.counters['repeated']}", flush=True)
    return 0


def _stream(text: str) -> str:
    if not STREAM_NAME.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r}: a stream's name has 1 to 64 letters, digits, - and _")
    return text


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    size = (int(found[1]), int(found[2])) if found else (0, 0)
    if not all(16 <= side <= MAX_SIDE_PX and side % 2 == 0 for side in size):
        raise argparse.ArgumentTypeError(f"{text!r}: WIDTHxHEIGHT, both even and from 16 to {MAX_SIDE_PX}")
    return size


def _fps(text: str) -> float:
    try:
        fps = float(text)
    except ValueError:
        fps = 0.0
    if not 1 <= fps <= MAX_FPS:
        raise argparse.ArgumentTypeError(f"{text!r}: frames a second, from 1 to {MAX_FPS:g}")
    return fps
