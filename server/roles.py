"""The roles that tokens and links are for, apart from all that reads them: the command line knows them too."""

from __future__ import annotations

from enum import IntEnum

DEFAULT_LINK_HOURS, MAX_LINK_HOURS = 12.0, 720.0


class Role(IntEnum):
    """What a token or link is for; each role may all that the ones before it may."""

    VIEW = 1
    PUBLISH = 2
    ADMIN = 3

    def __str__(self) -> str:
        return self.name.lower()
