"""HTTPS by the server itself, for who has a certificate and wants no proxy (docs/deploy.md)."""

from __future__ import annotations

import ssl
from pathlib import Path

# A connection is counted (server/limits.py) only once its handshake is done; until then this bounds it.
HANDSHAKE_TIMEOUT_S = 10.0


def tls_context(cert: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """What HTTPS is served with; None where no certificate is set: plain HTTP.

    cert: PEM, the server's certificate and those between it and the root. key: PEM, not encrypted.

    Raises: OSError, naming the file and what to do, when the two cannot be used.
    """
    if cert is None or key is None:
        return None
    for path in (cert, key):
        try:
            path.read_bytes()
        except OSError as error:
            raise OSError(f"{path} cannot be read: {error.strerror}; see --tls-cert and --tls-key") from error
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(cert, key, password=_refused)
    except ssl.SSLError as error:
        raise OSError(
            f"{cert} and {key} are no certificate and its key ({error.reason or error}); give PEM files that belong"
            " together"
        ) from error
    return context


def _refused() -> str:
    """Without this, OpenSSL would ask on the terminal and wait."""
    raise OSError("the TLS key is encrypted; give one without a passphrase: openssl pkey -in KEY -out PLAIN")
