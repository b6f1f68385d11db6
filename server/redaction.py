"""What the log must not hold: tokens, the secrets of an SDP, prompts, and the same complaint a thousand times.

The last stand before the handler writes.
"""

from __future__ import annotations

import logging
import re
from collections import Counter, OrderedDict

from server.control import TokenBucket

MAX_CHARS = 16_384
REPEATS_PER_S, REPEATS_BURST = 0.2, 10
MAX_KINDS = 256
GONE = "[redacted]"
# Errors quote what they refuse, a traceback too, with quotes and line ends written out in some of them.
PATTERNS = (
    re.compile(r"(?i)(authorization['\"]?\s*[:=]\s*['\"]?)(?:bearer|basic)?\s*[^\s'\"&,]+"),
    re.compile(r"(?i)(\bbearer[ .])[A-Za-z0-9._~+/=-]{6,}"),
    re.compile(r"(?i)([#?&]token=)[^\s&'\"]+"),
    re.compile(r"()\blink\.(?:view|publish)\.[A-Za-z0-9_-]*\.\d+\.[A-Za-z0-9_-]+"),
    re.compile(r"(?i)(a=(?:ice-pwd|crypto|fingerprint):)[^\r\n\\'\"]+"),
    re.compile(
        r"(?i)(['\"]?\b(?:prompt|credential)['\"]?\s*[:=]\s*)(?:'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|[^\s,)}&]+)"
    ),
    # As pydantic quotes what it refuses; of an offer or a parameter this may be anything.
    re.compile(r"(\binput_value=).*(?=, input_type=)"),
)
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


class RedactingFormatter(logging.Formatter):
    """A formatter that takes secrets out of the whole text, tracebacks included, and bounds its length.

    A line end in a message is written out as \\n, so that no client writes lines of its own.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the base class's name
        """The line without its traceback."""
        record.message = record.message.replace("\r", "\\r").replace("\n", "\\n")
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        """The whole text of a record."""
        text = redact(super().format(record))
        return text if len(text) <= MAX_CHARS else f"{text[:MAX_CHARS]} [{len(text) - MAX_CHARS} characters left out]"


class RepeatLimit(logging.Filter):
    """Lets the same warning or error through at a bounded rate, and says how many were left out before it.

    Why: aiohttp logs a traceback for each request that is no HTTP, and anybody may send those.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: OrderedDict[tuple[str, str], TokenBucket] = OrderedDict()
        self._left_out: Counter[tuple[str, str]] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to write it. The same: of one logger, with the same text before its values are put in."""
        if record.levelno < logging.WARNING:
            return True
        key = (record.name, str(record.msg))
        bucket = self._seen.pop(key, None) or TokenBucket(REPEATS_PER_S, REPEATS_BURST)
        self._seen[key] = bucket
        if len(self._seen) > MAX_KINDS:
            self._left_out.pop(self._seen.popitem(last=False)[0], None)
        if not bucket.take(record.created):
            self._left_out[key] += 1
            return False
        if count := self._left_out.pop(key, 0):
            record.msg = f"{record.msg} (and {count} more before this one)"
        return True


def redact(text: str) -> str:
    """`text` without what stands for a secret in it."""
    for pattern in PATTERNS:
        text = pattern.sub(rf"\1{GONE}", text)
    return CONTROL.sub("?", text)


def configure_logging() -> None:
    """The log of the console script: to stderr, redacted."""
    handler = logging.StreamHandler()
    handler.addFilter(RepeatLimit())
    handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    # It tells of every candidate pair it tries.
    logging.getLogger("aioice").setLevel(logging.WARNING)
