"""`livebrush link`: a link that expires, for who has the server's settings."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from server.roles import DEFAULT_LINK_HOURS, MAX_LINK_HOURS, Role


def add_link_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `livebrush link`."""
    parser = commands.add_parser("link", help="a link to publish or to watch, which expires")
    parser.set_defaults(command=link)
    parser.add_argument("--role", choices=("view", "publish"), default="view", help="what it is for (default: view)")
    parser.add_argument("--stream", default="", metavar="NAME", help="the one stream it is for (default: every one)")
    parser.add_argument(
        "--hours", type=float, default=DEFAULT_LINK_HOURS, help=f"how long, up to {MAX_LINK_HOURS:g} (default: 12)"
    )
    parser.add_argument("--url", metavar="URL", help="the server as its users reach it (default: host and port)")
    parser.add_argument("--config", type=Path, metavar="FILE.toml", help="the settings file that the server has")


def link(options: argparse.Namespace) -> int:
    """Print a link, signed with the token of the settings, without asking the server."""
    from server.access import Access
    from server.configure import SettingsError, resolve

    try:
        # The stand-in engine: which model there is does not matter here.
        given: dict[tuple[str, ...], tuple[str, object]] = {("engine_kind",): ("link", "fake")}
        settings = resolve(options.config, os.environ, given).settings
        role = Role[options.role.upper()]
        made = Access(settings.tokens.by_role()).link(role, options.stream, hours=options.hours, unix_now=time.time())
    except (SettingsError, ValueError) as error:
        print(f"livebrush: {error}", file=sys.stderr)
        return 1
    base = (options.url or f"http://{settings.host}:{settings.port}").rstrip("/")
    print(base + made.path)
    if role is Role.PUBLISH and options.stream:
        print(f"bearer token: {made.token}")
    return 0
