"""What `livebrush gateway` can be told."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from server.gateway_nodes import Node
from server.settings import is_loopback


class GatewaySettings(BaseModel):
    """Its nodes, where it listens, and whom it trusts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    nodes: tuple[str, ...] = Field(min_length=1, description="URL, or URL=PUBLIC_URL where clients reach it elsewhere")
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    admin_port: int | None = Field(default=None, ge=0, le=65535)
    tls_cert: Path | None = None
    tls_key: Path | None = None
    token: SecretStr | None = Field(default=None, description="what nodes with tokens are asked with; view is enough")
    trusted_proxies: tuple[str, ...] = ()
    redirects: bool = Field(default=True, description="whether WHIP and WHEP clients may be sent to a node's own URL")

    @field_validator("nodes")
    @classmethod
    def _are_urls(cls, nodes: tuple[str, ...]) -> tuple[str, ...]:
        for url in (part for node in nodes for part in node.split("=")):
            try:
                parts = urlsplit(url)
                named = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1)
            except ValueError:
                named = False
            if not named or parts.path.strip("/") or parts.query or parts.fragment or "@" in parts.netloc:
                raise ValueError(f"{url!r} must be of the form http://HOST:PORT")
        urls = [node.partition("=")[0] for node in nodes]
        if twice := [url for url in urls if urls.count(url) > 1]:
            raise ValueError(f"{twice[0]} is named twice")
        return nodes

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("--tls-cert and --tls-key go together: set both, or none")
        for proxy in self.trusted_proxies:
            try:
                ipaddress.ip_network(proxy)
            except ValueError as error:
                raise ValueError(f"--trusted-proxy: {error}; write 10.0.0.5 or 10.0.0.0/24") from None
        return self

    @property
    def is_private(self) -> bool:
        """Whether nobody but this machine's users reaches it."""
        return is_loopback(self.host) and not self.trusted_proxies

    def make_nodes(self) -> list[Node]:
        """The nodes, of whom nothing is known yet."""
        pairs = [node.partition("=") for node in self.nodes]
        return [Node(url.rstrip("/"), (public or url).rstrip("/")) for url, _, public in pairs]
