import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("entry", "forbidden"),
    [
        ("server.app", ("torch",)),
        ("server.cli", ("torch", "aiortc")),
        ("server.gateway", ("torch", "aiortc", "av")),
        ("server.restyle", ("torch", "aiortc", "aiohttp")),
        ("engine.worker", ("aiohttp", "aiortc", "av", "server", "torch._dynamo")),
        ("engine.ring_worker", ("aiohttp", "aiortc", "av", "server", "torch._dynamo")),
        ("engine.fake", ("torch",)),
        ("engine.client", ("torch",)),
        ("engine.choose", ("torch",)),
        ("engine.memory", ("torch",)),
        ("server.configure", ("torch", "aiortc")),
        ("livebrush_client", ("torch", "server", "engine")),
    ],
)
def test_entry_point_never_loads(entry: str, forbidden: tuple[str, ...]) -> None:
    code = f"import sys, {entry}; sys.exit(','.join(set({forbidden!r}) & set(sys.modules)) or 0)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
