"""HTTPS by the server itself."""

from __future__ import annotations

import datetime
import ssl
from pathlib import Path

import aiohttp
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import ValidationError

from engine.config import EngineSettings
from engine.fake import FakeEngine
from server.app import running_server
from server.settings import ServerSettings
from server.tls import tls_context

PASSPHRASE = b"open sesame"


def made(folder: Path, passphrase: bytes | None = None) -> tuple[Path, Path]:
    """A certificate for localhost, signed by itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    lock = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    folder.mkdir(exist_ok=True)
    (folder / "cert.pem").write_bytes(certificate.public_bytes(pem))
    (folder / "key.pem").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, lock))
    return folder / "cert.pem", folder / "key.pem"


async def test_https_is_served_and_plain_http_is_not(tmp_path: Path) -> None:
    cert, key = made(tmp_path)
    settings = ServerSettings(
        port=0, engine_kind="fake", engine=EngineSettings(width=64, height=64), tls_cert=cert, tls_key=key
    )
    trusting = ssl.create_default_context(cafile=cert)
    async with running_server(settings, FakeEngine(64, 64)) as (_, port), aiohttp.ClientSession() as http:
        async with http.get(f"https://localhost:{port}/livez", ssl=trusting) as response:
            assert response.status == 200
        with pytest.raises(aiohttp.ClientConnectionError):
            await http.get(f"http://localhost:{port}/livez")


def test_without_a_certificate_it_is_plain_http() -> None:
    assert tls_context(None, None) is None


@pytest.mark.parametrize("half", ["tls_cert", "tls_key"])
def test_half_of_it_is_refused(half: str, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="go together"):
        ServerSettings.model_validate({half: tmp_path / "one.pem"})


def test_files_that_cannot_be_used_are_named_with_what_to_do(tmp_path: Path) -> None:
    cert, key = made(tmp_path / "a")
    with pytest.raises(OSError, match=r"none\.pem cannot be read"):
        tls_context(cert, tmp_path / "none.pem")
    with pytest.raises(OSError, match="belong together"):
        tls_context(cert, made(tmp_path / "b")[1])
    with pytest.raises(OSError, match="belong together"):
        tls_context(key, key)
    with pytest.raises(OSError, match="without a passphrase"):
        tls_context(*made(tmp_path / "c", PASSPHRASE))
