"""Arenas of the allocator, in a process of its own: they stay for its life."""

import os
import platform
import subprocess
import sys

import pytest

# Threads that allocate at once, each given an arena by glibc as long as there may be more; malloc_info names each.
SCRIPT = """
import ctypes, os, sys, tempfile, threading
from server.allocator import keep_few_arenas
done = keep_few_arenas() if sys.argv[1] == "few" else None
lib = ctypes.CDLL(None)
lib.malloc.restype = ctypes.c_void_p
lib.malloc.argtypes = [ctypes.c_size_t]
meet = threading.Barrier(8)
def work():
    meet.wait()
    for _ in range(200):
        lib.malloc(1000)
    meet.wait()
threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
path = tempfile.mktemp()
lib.fopen.restype = ctypes.c_void_p
lib.fopen.argtypes = [ctypes.c_char_p, ctypes.c_char_p]
file = lib.fopen(path.encode(), b"w")
lib.malloc_info(0, ctypes.c_void_p(file))
lib.fclose(ctypes.c_void_p(file))
print(done, open(path).read().count("<heap nr="))
os.unlink(path)
"""


def arenas(kind: str, **environment: str) -> tuple[str, int]:
    env = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")} | environment
    out = subprocess.run(
        [sys.executable, "-c", SCRIPT, kind], env=env, capture_output=True, text=True, timeout=60, check=True
    )
    done, count = out.stdout.split()
    return done, int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_many_threads_share_two_arenas_unless_the_environment_says_otherwise() -> None:
    assert arenas("few") == ("True", 2)
    assert arenas("all")[1] > 4
    done, count = arenas("few", MALLOC_ARENA_MAX="5")
    assert (done, count) == ("False", 5)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_what_lies_free_between_pieces_in_use_is_given_back() -> None:
    script = (
        "import ctypes, psutil\n"
        "from server.allocator import give_back\n"
        "lib = ctypes.CDLL(None)\n"
        "lib.malloc.restype, lib.malloc.argtypes, lib.free.argtypes = (\n"
        "    ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p])\n"
        "pieces = [lib.malloc(10_000) for _ in range(10_000)]\n"
        "for piece in pieces: ctypes.memset(piece, 1, 10_000)\n"
        "for number, piece in enumerate(pieces):\n"
        "    if number % 10: lib.free(piece)\n"
        "before = psutil.Process().memory_info().rss\n"
        "print(give_back(), (before - psutil.Process().memory_info().rss) >> 20)\n"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    done, given_mb = out.stdout.split()
    # Nine in ten of 100 MB lie free; a page that a piece in use reaches into stays.
    assert done == "True" and int(given_mb) > 30
