"""Server settings: one object, from defaults, a TOML file and LIVEBRUSH_* variables; refused before anything starts."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SecretStr,
    model_validator,
)

from engine.config import MAX_STEPS, EngineSettings
from server.roles import Role

# Goes into a header as it is.
TURN_URL = re.compile(r"turns?:[A-Za-z0-9._\-\[\]:]{1,200}(\?transport=(udp|tcp))?")
MIN_TOKEN_CHARS = 16
MAX_DRAIN_S = 3600.0
WEB_DIR = Path(__file__).parent.parent / "web"


class MediaSettings(BaseModel):
    """Transport, codecs and the limits of one peer connection."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ice_servers: tuple[str, ...] = Field(
        default=(), description="stun: URLs, asked by this server and its clients; none by default"
    )
    turn_urls: tuple[str, ...] = Field(
        default=(),
        description="turn: or turns: URLs of relays for clients without a way of their own, with turn_secret",
    )
    turn_secret: SecretStr | None = Field(
        default=None, description="what coturn has as static-auth-secret; clients get ten-minute credentials of it"
    )
    udp_ports: str = Field(
        default="",
        pattern=r"^(\d{1,5}-\d{1,5})?$",
        description="LOW-HIGH, say 40000-40100: media comes in there, one port a peer; empty: any port",
    )
    start_bitrate: PositiveInt = Field(default=1_500_000, description="bit/s, both ways, before any estimate")
    min_bitrate: PositiveInt = Field(default=150_000, description="bit/s")
    max_bitrate: PositiveInt = Field(default=4_000_000, description="bit/s")
    max_input_pixels: PositiveInt = Field(default=1920 * 1080, description="a camera frame over this ends the input")
    connect_timeout_s: PositiveFloat = Field(default=10.0, description="from the answer to ICE and DTLS done")
    vanish_timeout_s: PositiveFloat = Field(default=14.0, description="no packet for this long: the peer is gone")
    hole_deadline_s: PositiveFloat = Field(default=0.15, description="a gap older than this is skipped, not waited for")
    audio: bool = Field(default=True, description="carry the microphone back in step with the picture")

    @property
    def udp_range(self) -> tuple[int, int]:
        """First and last UDP port of media; (0, 0) for any."""
        low, _, high = (self.udp_ports or "0-0").partition("-")
        return int(low), int(high)

    @model_validator(mode="after")
    def _relays_are_whole(self) -> Self:
        if bool(self.turn_urls) != (self.turn_secret is not None):
            raise ValueError("turn_urls and turn_secret go together: set both, or none")
        for url in self.turn_urls:
            if not TURN_URL.fullmatch(url):
                raise ValueError(
                    f"turn_urls: {url!r} is not of the form turn:HOST:PORT?transport=udp (or tcp, or turns:)"
                )
        return self

    @model_validator(mode="after")
    def _udp_range_is_one(self) -> Self:
        low, high = self.udp_range
        if self.udp_ports and not 1024 <= low <= high <= 65535:
            raise ValueError(f"udp_ports {self.udp_ports}: write LOW-HIGH with 1024 <= LOW <= HIGH <= 65535")
        return self


class TokenSettings(BaseModel):
    """Bearer tokens by role. Each role may all that the ones before it may; with none set, everybody may."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    view: SecretStr | None = Field(default=None, description="watch streams")
    publish: SecretStr | None = Field(default=None, description="open sessions, publish and restyle streams")
    admin: SecretStr | None = Field(default=None, description="see and end the sessions of others too")

    @model_validator(mode="after")
    def _are_keys(self) -> Self:
        # None of these says what it refuses: a token is not to be read on a terminal.
        tokens = self.by_role()
        for role, token in tokens.items():
            if len(token) < MIN_TOKEN_CHARS or not token.isascii() or not token.isprintable() or " " in token:
                raise ValueError(
                    f"{role} must have at least {MIN_TOKEN_CHARS} characters, ASCII and without blanks; for one as good"
                    " as a key: openssl rand -hex 32"
                )
        if len(set(tokens.values())) < len(tokens):
            raise ValueError("two roles have the same token: give each its own, or leave the lower role out")
        if set(tokens) == {Role.VIEW}:
            raise ValueError("view alone would let nobody publish: set publish or admin too")
        return self

    def by_role(self) -> dict[Role, str]:
        """The tokens that are set."""
        named = {Role.VIEW: self.view, Role.PUBLISH: self.publish, Role.ADMIN: self.admin}
        return {role: token.get_secret_value() for role, token in named.items() if token is not None}


class RecordingSettings(BaseModel):
    """Where sessions may be recorded, and how much room that may take."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dir: Path | None = Field(default=None, description="folder for recordings; without one nothing is recorded")
    quota_bytes: PositiveInt = Field(default=20_000_000_000, description="room for all recordings together")
    min_free_bytes: NonNegativeInt = Field(
        default=1_000_000_000, description="a recording ends before less than this would stay free on its disk"
    )
    keep_days: PositiveFloat | None = Field(
        default=None, description="recordings older than this are deleted; none by default"
    )


class ServerSettings(BaseModel):
    """Everything `livebrush serve` can be told."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: int = Field(default=8080, ge=0, le=65535, description="TCP port of the page; 0 picks a free one")
    admin_port: int | None = Field(
        default=None,
        ge=0,
        le=65535,
        description="TCP port of /metrics, on loopback alone; default: the one after `port`, free if that is 0",
    )
    tls_cert: Path | None = Field(default=None, description="PEM file of a certificate: HTTPS, with tls_key")
    tls_key: Path | None = Field(default=None, description="PEM file of its key, without a passphrase")
    tokens: TokenSettings = Field(
        default=TokenSettings(),
        description="bearer tokens; a server that is not on loopback makes some and prints them where none is set",
    )
    trusted_proxies: tuple[str, ...] = Field(
        default=(),
        description="addresses or networks of the proxies before this server, whose X-Forwarded-For tells the client",
    )
    engine: EngineSettings = EngineSettings()
    engine_kind: str = Field(
        default="local",
        pattern=r"^(local|fake|ray(://[A-Za-z0-9._\-\[\]:]+)?)$",
        description="local rank processes, the fake, or groups on a Ray cluster: ray, ray://HOST:PORT",
    )
    media: MediaSettings = MediaSettings()
    latency_budget_s: PositiveFloat = Field(default=0.5, description="a frame older than this at playout is late")
    max_fps: float = Field(default=24.0, gt=0, le=60, description="agreed output rate when there is room")
    steps: int = Field(
        default=1, ge=1, le=MAX_STEPS, description="denoising steps of a session that asks for none; live"
    )
    min_fps: float = Field(default=8.0, gt=0, le=60, description="below this per session the server is full")
    max_sessions: PositiveInt = Field(default=4, description="seats, whatever the engine could carry")
    reserved_seats: dict[str, int] = Field(
        default={},
        description="seats kept for offers of a class, say publisher or paid: others are refused when only these are"
        " left. Until there are tokens, an offer's class is its own word",
    )
    allowed_hosts: tuple[str, ...] = Field(
        default=("localhost", "127.0.0.1", "[::1]"),
        description="names in the Host header that are answered; add the one of your HTTPS proxy",
    )
    allowed_origins: tuple[str, ...] = Field(
        default=(),
        description="other pages, as https://name:port, that may publish and watch by WHIP and WHEP",
    )
    osc_port: int | None = Field(
        default=None, ge=0, le=65535, description="UDP port for OSC, 0 picks a free one; none by default"
    )
    osc_host: str = Field(
        default="127.0.0.1",
        description="address to listen on for OSC, which knows no tokens: whoever reaches it steers every session",
    )
    osc_unprotected: bool = Field(
        default=False, description="let osc_host be an address that other machines reach; refused without"
    )
    drain_s: float = Field(
        default=0.0,
        ge=0,
        le=MAX_DRAIN_S,
        description="after SIGTERM: sessions get so long to end, then they are moved to other servers, if a gateway is"
        " there; 0: they are told to come back in 2 s and ended",
    )
    max_viewers: PositiveInt = Field(default=16, description="WHEP viewers of all streams together")
    recordings: RecordingSettings = RecordingSettings()
    web_dir: Path = WEB_DIR

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if self.min_fps > self.max_fps:
            raise ValueError(f"min_fps {self.min_fps} must not be above max_fps {self.max_fps}")
        if self.max_sessions > (most := self.engine.max_streams * self.engine.replica_count):
            raise ValueError(f"max_sessions {self.max_sessions} is over engine.max_streams {most}, of all replicas")
        low, high = self.media.udp_range
        if self.media.udp_ports and high - low + 1 < self.max_sessions:
            raise ValueError(
                f"media.udp_ports {self.media.udp_ports} holds {high - low + 1} ports, and each of max_sessions"
                f" {self.max_sessions} (and each WHEP viewer) takes one: widen it or lower max_sessions"
            )
        reserved = self.reserved_seats.values()
        if min(reserved, default=0) < 0 or sum(reserved) > self.max_sessions:
            raise ValueError(
                f"reserved_seats {self.reserved_seats}: each must be 0 or more, and all together at most max_sessions"
                f" {self.max_sessions}"
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together: set both, or none")
        if self.osc_port is not None and not is_loopback(self.osc_host) and not self.osc_unprotected:
            raise ValueError(
                f"osc_host {self.osc_host} is reached from elsewhere, and OSC has no tokens: keep 127.0.0.1, or set"
                " osc_unprotected = true on a network that is yours alone"
            )
        for proxy in self.trusted_proxies:
            try:
                ipaddress.ip_network(proxy)
            except ValueError as error:
                raise ValueError(f"trusted_proxies: {error}; write 10.0.0.5 or 10.0.0.0/24") from None
        return self

    @property
    def is_private(self) -> bool:
        """Whether nobody but this machine's users reaches the server: neither directly nor through a proxy."""
        return self.is_loopback and not self.trusted_proxies

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can open a connection to the server."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether only this machine can open a connection to a listener there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
