"""GStreamer's webrtcbin as WHIP publisher and WHEP player; run by test_gstreamer.py under a Python that has gi.

    python3 gstreamer_client.py URL ENCODER PROFILE

Publishes to URL/whip/gst, watches URL/whep/gst until 30 pictures and 50 pieces of sound were decoded, leaves, and
prints one line of JSON.
"""

import json
import sys
import threading
import time
import urllib.request
from typing import Any

import gi  # type: ignore[import-not-found]

gi.require_version("Gst", "1.0")
gi.require_version("GstWebRTC", "1.0")
gi.require_version("GstSdp", "1.0")
from gi.repository import Gst, GstSdp, GstWebRTC  # type: ignore[import-not-found]  # noqa: E402

PATIENCE_S = 20.0
ENCODERS = {
    "VP8": "vp8enc deadline=1 ! rtpvp8pay pt=96",
    "H264": "x264enc tune=zerolatency key-int-max=30 speed-preset=ultrafast ! video/x-h264,profile={profile}"
    " ! rtph264pay pt=96 config-interval=-1",
}
DECODERS = {
    "VP8": "rtpvp8depay ! vp8dec",
    "H264": "rtph264depay ! h264parse ! openh264dec",
    "OPUS": "rtpopusdepay ! opusdec",
}
VIDEO = "application/x-rtp,media=video,payload=96,clock-rate=90000,encoding-name={name}"
H264 = ",packetization-mode=(string)1,profile-level-id=(string)42e01f"
AUDIO = "application/x-rtp,media=audio,payload=97,clock-rate=48000,encoding-name=OPUS,encoding-params=(string)2"


def negotiate(webrtc: Any, url: str) -> str:
    """Offer, and take the answer; returns the path of the session."""
    made: list[str] = []
    done = threading.Event()

    def on_offer(promise: Any) -> None:
        promise.wait()
        reply = promise.get_reply()
        offer = reply.get_value("offer")
        text = offer.sdp.as_text()
        webrtc.emit("set-local-description", offer, Gst.Promise.new())
        request = urllib.request.Request(url, text.encode(), {"Content-Type": "application/sdp"}, method="POST")
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
            made.append(response.headers["Location"])
            _, sdp = GstSdp.SDPMessage.new_from_text(response.read().decode())
        answer = GstWebRTC.WebRTCSessionDescription.new(GstWebRTC.WebRTCSDPType.ANSWER, sdp)
        webrtc.emit("set-remote-description", answer, Gst.Promise.new())
        done.set()

    webrtc.emit("create-offer", None, Gst.Promise.new_with_change_func(on_offer))
    assert done.wait(PATIENCE_S), "no answer"
    return made[0]


def publisher(name: str, profile: str) -> tuple[Any, Any]:
    """A pipeline that publishes a moving ball and a tone."""
    encoder = ENCODERS[name].format(profile=profile)
    pipeline = Gst.parse_launch(
        "videotestsrc is-live=true pattern=ball ! video/x-raw,width=320,height=240,framerate=30/1 ! videoconvert"
        f" ! {encoder} ! application/x-rtp,media=video,encoding-name={name},payload=96"
        " ! webrtcbin name=webrtc bundle-policy=max-bundle"
        " audiotestsrc is-live=true ! audioconvert ! opusenc ! rtpopuspay pt=97"
        " ! application/x-rtp,media=audio,encoding-name=OPUS,payload=97 ! webrtc."
    )
    webrtc = pipeline.get_by_name("webrtc")
    for index in range(2):
        transceiver = webrtc.emit("get-transceiver", index)
        transceiver.set_property("direction", GstWebRTC.WebRTCRTPTransceiverDirection.SENDONLY)
    return pipeline, webrtc


def player(name: str, counts: dict[str, int]) -> tuple[Any, Any]:
    """A pipeline that decodes what comes and counts it by kind."""
    pipeline = Gst.Pipeline.new("player")
    webrtc = Gst.ElementFactory.make("webrtcbin", "webrtc")
    webrtc.set_property("bundle-policy", GstWebRTC.WebRTCBundlePolicy.MAX_BUNDLE)
    pipeline.add(webrtc)
    for caps in (VIDEO.format(name=name) + (H264 if name == "H264" else ""), AUDIO):
        direction = GstWebRTC.WebRTCRTPTransceiverDirection.RECVONLY
        webrtc.emit("add-transceiver", direction, Gst.Caps.from_string(caps))

    def on_pad(_: object, pad: Any) -> None:
        if pad.get_direction() != Gst.PadDirection.SRC:
            return
        fields = pad.get_current_caps().get_structure(0)
        kind, decoder = fields.get_string("media"), DECODERS[fields.get_string("encoding-name")]
        sink = "fakesink name=sink signal-handoffs=true sync=false async=false"
        decode = Gst.parse_bin_from_description(f"queue ! {decoder} ! {sink}", True)

        def count(*_: object) -> None:
            counts[kind] = counts.get(kind, 0) + 1

        decode.get_by_name("sink").connect("handoff", count)
        pipeline.add(decode)
        decode.sync_state_with_parent()
        pad.link(decode.get_static_pad("sink"))

    webrtc.connect("pad-added", on_pad)
    return pipeline, webrtc


def main() -> None:
    """Publish, play, count, leave."""
    base, name, profile = sys.argv[1:4]
    Gst.init(None)
    counts: dict[str, int] = {}
    publishing, sender = publisher(name, profile)
    playing, receiver = player(name, counts)
    publishing.set_state(Gst.State.PLAYING)
    playing.set_state(Gst.State.PLAYING)
    time.sleep(0.5)  # for the caps of the encoders, which are part of the offer
    sessions = [negotiate(sender, base + "/whip/gst?prompt=neon"), negotiate(receiver, base + "/whep/gst")]
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until and not (counts.get("video", 0) >= 30 and counts.get("audio", 0) >= 50):
        time.sleep(0.05)
    deleted = []
    for path in sessions:
        request = urllib.request.Request(base + path, method="DELETE")
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
            deleted.append(response.status)
    print(json.dumps({"decoded": counts, "deleted": deleted}))
    publishing.set_state(Gst.State.NULL)
    playing.set_state(Gst.State.NULL)


main()
