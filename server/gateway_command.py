"""`livebrush gateway`: several servers behind one address (docs/scale.md)."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from server.gateway_settings import GatewaySettings

TOKEN_VARIABLE = "LIVEBRUSH_TOKEN"
DEFAULT_PORT = 8000


def add_gateway_parser(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the command to the console script's."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "gateway",
        help="several servers behind one address",
        epilog=f"Nodes with tokens are asked with the variable {TOKEN_VARIABLE}; one for the view role is enough.",
    )
    parser.set_defaults(command=gateway)
    parser.add_argument(
        "--nodes",
        required=True,
        metavar="URL[,URL...]",
        help="the servers, say http://10.0.0.1:8080; URL=PUBLIC_URL where clients reach one at another",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument(
        "--port", type=int, default=DEFAULT_PORT, help=f"TCP port, 0 for any free one (default: {DEFAULT_PORT})"
    )
    parser.add_argument("--admin-port", type=int, help="TCP port of /metrics, on loopback (default: the one after)")
    parser.add_argument("--tls-cert", type=Path, metavar="FILE.pem", help="HTTPS with this certificate, and --tls-key")
    parser.add_argument("--tls-key", type=Path, metavar="FILE.pem", help="its key, without a passphrase")
    parser.add_argument(
        "--trusted-proxy",
        action="append",
        default=[],
        metavar="ADDRESS",
        help="a proxy before this gateway, whose X-Forwarded-For tells the client",
    )
    parser.add_argument(
        "--no-redirect",
        dest="redirects",
        action="store_false",
        help="pass WHIP and WHEP on as well: where clients do not reach the nodes' URLs",
    )


def gateway(options: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM; 1 where it cannot, 2 for misuse."""
    from pydantic import ValidationError

    from server.gateway_settings import GatewaySettings
    from server.redaction import configure_logging

    try:
        settings = GatewaySettings.model_validate(
            {
                "nodes": tuple(filter(None, (part.strip() for part in options.nodes.split(",")))),
                "token": os.environ.get(TOKEN_VARIABLE) or None,
                "trusted_proxies": tuple(options.trusted_proxy),
                **{
                    name: getattr(options, name)
                    for name in ("host", "port", "admin_port", "tls_cert", "tls_key", "redirects")
                },
            }
        )
    except ValidationError as error:
        for fault in error.errors():
            where = ".".join(map(str, fault["loc"]))
            print(f"livebrush: {where + ': ' if where else ''}{fault['msg']}", file=sys.stderr)
        return 2
    configure_logging()
    return asyncio.run(_serve(settings))


async def _serve(settings: GatewaySettings) -> int:
    from server.gateway import running_gateway
    from server.health import why_not_listening

    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        async with running_gateway(settings) as (_, port):
            scheme = "https" if settings.tls_cert else "http"
            print(f"The gateway is at {scheme}://{settings.host}:{port}  (Ctrl-C stops it)", flush=True)
            await stop.wait()
    except OSError as error:
        print(why_not_listening(error), file=sys.stderr)
        return 1
    return 0
