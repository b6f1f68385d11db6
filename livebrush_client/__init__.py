"""A client of a Livebrush server: open a session, look at its pictures, steer it (docs/steering.md).

async with connect("http://127.0.0.1:8080", track, prompt="watercolor") as live:
    async for frame in live.frames():
        ...
"""

from livebrush_client.api import Answer, Api, Refused, Steered
from livebrush_client.live import Ended, Live, Moved, connect

__all__ = ["Answer", "Api", "Ended", "Live", "Moved", "Refused", "Steered", "connect"]
