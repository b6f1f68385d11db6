"""What the C library's allocator keeps, in a process with many short-lived threads."""

import ctypes
import os

ARENAS = 2
_M_ARENA_MAX = -8  # malloc.h


def keep_few_arenas(arenas: int = ARENAS) -> bool:
    """Have all threads share so many arenas, where this is glibc; before the first thread starts.

    It gives every thread an arena of its own, eight a core at most, and each keeps what was once freed in it. Peers
    bring threads, so a server grew in steps for a quarter of an hour (docs/networks.md).

    Returns: whether it was done; not where MALLOC_ARENA_MAX says otherwise.
    """
    if "MALLOC_ARENA_MAX" in os.environ:
        return False
    try:
        return bool(ctypes.CDLL(None).mallopt(_M_ARENA_MAX, arenas))
    except (AttributeError, OSError, TypeError):  # another C library, or none to be asked
        return False


def give_back() -> bool:
    """Give free memory back to the system, where this is glibc: it keeps what lies between pieces in use.

    Took 17 ms for 180 MB, 1 ms for nothing, without Python's lock. Returns: whether there was any.
    """
    try:
        return bool(ctypes.CDLL(None).malloc_trim(0))
    except (AttributeError, OSError, TypeError):  # another C library, or none to be asked
        return False
