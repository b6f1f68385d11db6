"""What RFC 9725 (WHIP) and the WHEP draft ask of a server, one row each, against `livebrush serve`.

Sections without a name are the RFC's. Not rows: 307 for load balancing, simulcast and protocol extensions, which are
a server's choice and not made here; HTTPS, which a proxy or --tls-cert brings (docs/deploy.md).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from tests.e2e.serving import Server
from tests.interop.asking import FRAGMENT, SDP, Reply, ask
from tests.interop.offers import obs_offer

TOKEN = "a-token-of-the-tests"
STUDIO = "https://studio.example"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
POST = BEARER | {"Content-Type": SDP}
PATCH = BEARER | {"Content-Type": FRAGMENT}
OFFER, WATCH = obs_offer(), obs_offer(direction="recvonly")
CANDIDATE = "a=ice-ufrag:p9Kd\r\na=ice-pwd:Q0wq8rTz2m4nVb6cXy1LsE\r\nm=audio 9 RTP/AVP 0\r\na=mid:0\r\n"
CANDIDATE += (
    "a=candidate:1 1 udp 2130706431 127.0.0.1 40000 typ host\r\na=candidate:2 1 udp 1 nowhere.local 9 typ host\r\n"
)
RESTART = CANDIDATE.replace("p9Kd", "another").replace("Q0wq8rTz2m4nVb6cXy1LsE", "R1xr9sUa3n5oWc7dYz2MtF")
ASKS_TOKEN = {"WWW-Authenticate": "Bearer.*"}
ALLOWED = {"Access-Control-Allow-Origin": re.escape(STUDIO)}


@dataclass(frozen=True)
class Row:
    """One requirement: the request that shows it, and the answer. {session} and {viewer} are open sessions' URLs."""

    section: str
    says: str
    method: str
    path: str
    status: int
    sent: dict[str, str] = field(default_factory=lambda: POST)
    body: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    """Name -> pattern; "" for a header that must not be there."""
    text: tuple[str, ...] = ()


ROWS = [
    # --- 4.1, 4.2: one POST makes a session
    Row("4.2", "an offer by POST gets 201, the answer and Location", "POST", "/whip/a", 201, body=OFFER,
        headers={"Location": r"\S+", "Content-Type": "application/sdp"}, text=("v=0", "a=recvonly")),
    Row("4.2", "the offer may be sent recvonly by nobody", "POST", "/whip/a", 422, body=WATCH),
    Row("4.2", "another content type is refused", "POST", "/whip/a", 415,
        BEARER | {"Content-Type": "text/plain"}, OFFER),
    Row("4.2", "a body that is no SDP is refused with 4xx", "POST", "/whip/a", 400, body="hello"),
    Row("4.2", "a body without any media is refused with 4xx", "POST", "/whip/a", 422, body=OFFER.split("m=")[0]),
    Row("4.2", "the session's URL is not to be guessed", "POST", "/whip/a", 201, body=OFFER,
        headers={"Location": r".*/[A-Za-z0-9_.-]{20,}"}),
    Row("4.2", "GET and HEAD of the endpoint have no content", "GET", "/whip/a", 204),
    Row("4.2", "GET of a session has no content", "GET", "{session}", 204),
    Row("4.2", "other methods of the endpoint are 405 with Allow", "PUT", "/whip/a", 405, body=OFFER,
        headers={"Allow": ".*POST.*"}),
    Row("4.2", "POST to a session is 405", "POST", "{session}", 405, body=OFFER, headers={"Allow": ".*DELETE.*"}),
    Row("4.2", "DELETE ends the session with 200", "DELETE", "{session}", 200, BEARER),
    Row("4.3.1", "DELETE does not heed entity tags", "DELETE", "{session}", 200, BEARER | {"If-Match": '"another"'}),
    Row("4.2", "a session that is not there is 404", "PATCH", "/whip/a/none", 404, PATCH, CANDIDATE),
    Row("4.2", "OPTIONS tells by Accept-Post what is taken", "OPTIONS", "/whip/a", 200, {},
        headers={"Accept-Post": "application/sdp"}),
    Row("4.2", "CORS: a preflight needs no token", "OPTIONS", "/whip/a", 200,
        {"Origin": STUDIO, "Access-Control-Request-Method": "POST"},
        headers=ALLOWED
        | {"Access-Control-Allow-Headers": ".*Authorization.*", "Access-Control-Allow-Methods": ".*POST.*"}),
    Row("4.2", "CORS: preflight of a session", "OPTIONS", "{session}", 200,
        {"Origin": STUDIO, "Access-Control-Request-Method": "PATCH"},
        headers=ALLOWED
        | {"Access-Control-Allow-Headers": ".*If-Match.*", "Access-Control-Allow-Methods": ".*PATCH.*DELETE.*"}),
    Row("4.2", "CORS: a page may read what it needs", "POST", "/whip/a", 201, POST | {"Origin": STUDIO}, OFFER,
        ALLOWED | {"Access-Control-Expose-Headers": "(?=.*Location)(?=.*Link)(?=.*ETag).*"}),
    Row("4.2", "CORS: no other page", "POST", "/whip/a", 403, POST | {"Origin": "https://evil.example"}, OFFER,
        {"Access-Control-Allow-Origin": ""}),
    # --- 4.3: ICE
    Row("4.3.1", "a trickled candidate is 204 without ETag", "PATCH", "{session}", 204, PATCH, CANDIDATE, {"ETag": ""}),
    Row("4.3.1", "a candidate with the session's tag", "PATCH", "{session}", 204,
        PATCH | {"If-Match": "{etag}"}, CANDIDATE),
    Row("4.3.1", "another tag is 412", "PATCH", "{session}", 412, PATCH | {"If-Match": '"another"'}, CANDIDATE),
    Row("4.3.1", "another content type of a PATCH is refused", "PATCH", "{session}", 415, POST, CANDIDATE),
    Row("4.3.1", "a broken fragment is refused", "PATCH", "{session}", 400, PATCH, "hello"),
    Row("4.3.2", "end-of-candidates is taken", "PATCH", "{session}", 204, PATCH,
        "a=ice-ufrag:p9Kd\r\na=end-of-candidates\r\n"),
    Row("4.3.1", "a restart where only trickle is supported is 422", "PATCH", "{session}", 422,
        PATCH | {"If-Match": "*"}, RESTART),
    Row("4.3.2", "all candidates of the server stand in the answer", "POST", "/whip/a", 201, body=OFFER,
        text=("a=candidate:", "a=end-of-candidates")),
    Row("4.3.1", "the 201 has a strong ETag", "POST", "/whip/a", 201, body=OFFER, headers={"ETag": r'"[^"]+"'}),
    # --- 4.4: WebRTC
    Row("4.4.1", "everything is bundled, RTP and RTCP in one", "POST", "/whip/a", 201, body=OFFER,
        text=("a=group:BUNDLE 0 1", "a=rtcp-mux\r\n", "a=rtcp-mux-only")),
    Row("4.4.1", "without bundle nothing is accepted", "POST", "/whip/a", 422,
        body=OFFER.replace("a=group:BUNDLE 0 1\r\n", "")),
    Row("4.4.3", "no answer in part: one section that cannot be, none", "POST", "/whip/a", 422,
        body=obs_offer(codec="H265")),
    Row("4.4.4", "actpass is answered passive", "POST", "/whip/a", 201, body=OFFER, text=("a=setup:passive",)),
    Row("4.4.4", "active is answered passive", "POST", "/whip/a", 201, body=obs_offer(setup="active"),
        text=("a=setup:passive",)),
    # --- 4.5 to 4.8
    Row("4.6", "ICE servers are linked in the 201", "POST", "/whip/a", 201, body=OFFER,
        headers={"Link": r'<turn:relay\.example:3478>; rel="ice-server"; username="[^"]+"; credential="[^"]+";.*'}),
    Row("4.6", "but not in a preflight", "OPTIONS", "/whip/a", 200,
        {"Origin": STUDIO, "Access-Control-Request-Method": "POST"}, headers={"Link": ""}),
    Row("4.7", "without a token 401", "POST", "/whip/a", 401, {"Content-Type": SDP}, OFFER, ASKS_TOKEN),
    Row("4.7", "with a wrong token 401", "POST", "/whip/a", 401,
        {"Content-Type": SDP, "Authorization": "Bearer no"}, OFFER, ASKS_TOKEN),
    Row("4.7", "a session asks for it too", "DELETE", "{session}", 401, {}),
    Row("4.8", "simulcast that is not supported is refused whole", "POST", "/whip/a", 422, body=obs_offer(layers=3)),
    # --- the WHEP draft
    Row("WHEP 4.2", "an offer to receive gets 201, the answer and Location", "POST", "/whep/live", 201, body=WATCH,
        headers={"Location": r"\S+", "Content-Type": "application/sdp", "ETag": r'"[^"]+"'}, text=("a=sendonly",)),
    Row("WHEP 4.2", "an offer that sends is refused", "POST", "/whep/live", 422, body=OFFER),
    Row("WHEP 4.2", "a stream that is not live tells when to come back", "POST", "/whep/nobody", 404, body=WATCH,
        headers={"Retry-After": r"\d+"}),
    Row("WHEP 4.2", "HEAD of the endpoint tells its type", "HEAD", "/whep/live", 200, BEARER,
        headers={"Content-Type": "application/sdp"}),
    Row("WHEP 4.2", "OPTIONS tells what is taken", "OPTIONS", "/whep/live", 200, {},
        headers={"Accept-Post": "application/sdp"}),
    Row("WHEP 4.2", "DELETE ends the session with 200", "DELETE", "{viewer}", 200, BEARER),
    Row("WHEP 4.3", "a trickled candidate is 204", "PATCH", "{viewer}", 204, PATCH, CANDIDATE),
    Row("WHEP 4.3", "a restart where only trickle is supported is 422", "PATCH", "{viewer}", 422,
        PATCH | {"If-Match": "*"}, RESTART),
    Row("WHEP 4.6", "ICE servers are linked in the 201", "POST", "/whep/live", 201, body=WATCH,
        headers={"Link": '.*rel="ice-server".*'}),
    Row("WHEP 4.7", "without a token 401", "POST", "/whep/live", 401, {"Content-Type": SDP}, WATCH,
        ASKS_TOKEN),
]  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(
        tmp_path_factory.mktemp("server") / "log",
        engine="fake",
        patient=True,
        LIVEBRUSH_TOKENS__PUBLISH=TOKEN,
        LIVEBRUSH_TRUSTED_PROXIES=json.dumps(["127.0.0.1"]),
        LIVEBRUSH_ALLOWED_ORIGINS=json.dumps([STUDIO]),
        LIVEBRUSH_MEDIA__TURN_URLS=json.dumps(["turn:relay.example:3478"]),
        LIVEBRUSH_MEDIA__TURN_SECRET="a-secret-of-the-tests",
    ) as running:
        yield running


def opened(server: Server, path: str, offer: str, client: dict[str, str]) -> Reply:
    reply = ask("POST", server.url + path, offer, POST | client)
    assert reply.status == 201, reply.text
    return reply


@pytest.mark.parametrize("number", range(len(ROWS)), ids=[f"{row.section}: {row.says}" for row in ROWS])
def test_requirement(server: Server, number: int) -> None:
    row = ROWS[number]
    # Each row is a client of its own: all of them together make more offers than one may.
    client = {"X-Forwarded-For": f"192.0.2.{number}"}
    made: list[Reply] = []
    if "{session}" in row.path:
        made.append(opened(server, "/whip/a", OFFER, client))
    if "{viewer}" in row.path or row.path == "/whep/live":
        made.append(opened(server, "/whip/live", OFFER, client))
    if "{viewer}" in row.path:
        made.append(opened(server, "/whep/live", WATCH, client))
    url, etag = (made[-1].headers["Location"], made[-1].headers["ETag"]) if made else ("", "")
    path = row.path.format(session=url, viewer=url)
    sent = client | {name: value.replace("{etag}", etag) for name, value in row.sent.items()}
    reply = ask(row.method, server.url + path, row.body, sent)
    if reply.status == 201:
        made.append(reply)
    for session in reversed(made):
        ask("DELETE", server.url + session.headers["Location"], headers=BEARER | client)
    assert reply.status == row.status, reply.text
    for name, pattern in row.headers.items():
        found = reply.headers.get(name, "")
        assert re.fullmatch(pattern, found), (name, found)
    for part in row.text:
        assert part in reply.text
    if reply.status >= 400 and row.method != "HEAD":
        assert reply.headers.get_content_type() == "application/problem+json"
