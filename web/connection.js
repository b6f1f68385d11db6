// One peer connection to the server: offer and answer over HTTP, candidates as they come, the two data channels.

import { authorizedFetch } from "./access.js";
import { Line, problemOf } from "./line.js";
import { MediaProbe } from "./measure.js";

const OFFER_URL = "/api/v1/webrtc/offer";
const ICE_URL = "/api/v1/ice-servers";
const ICE_FRESH_MS = 240_000;
const MAX_BITRATE = 1_500_000;
// A little more than is used: the compressed picture is softened by scaling it down.
const OVERSAMPLING = 1.25;
const CANDIDATE_BATCH_MS = 20;
// From the answer on; then this network has no way for media (the server waits 10 s itself).
const CONNECT_TIMEOUT_MS = 8_000;
const DISCONNECTED_GRACE_MS = 3_000;

/** Which STUN and TURN servers to use. Credentials are good for ten minutes, so what is older than four is asked anew. */
export class IceServers {
  #asked = null;
  #askedAt = 0;

  /** @returns {Promise<RTCConfiguration>} an empty one where the server does not answer: the offer will say so */
  get() {
    if (!this.#asked || performance.now() - this.#askedAt > ICE_FRESH_MS) {
      this.#askedAt = performance.now();
      this.#asked = authorizedFetch(ICE_URL)
        .then((response) => response.json())
        .then(({ iceServers }) => ({ iceServers: iceServers ?? [] }))
        .catch(() => {
          this.#asked = null;
          return { iceServers: [] };
        });
    }
    return this.#asked;
  }
}

/** A Line over WebRTC. */
export class Connection extends Line {
  #pc;
  #control;
  #video;
  #audio;
  #probe;
  #candidates = [];
  #flushTimer = 0;
  #disconnectedTimer = 0;

  /** @param {RTCConfiguration} configuration */
  constructor(configuration) {
    super();
    this.#pc = new RTCPeerConnection({ ...configuration, bundlePolicy: "max-bundle" });
    this.#probe = new MediaProbe(this.#pc);
    this.#video = this.#pc.addTransceiver("video", {
      direction: "sendrecv",
      sendEncodings: [{ maxBitrate: MAX_BITRATE, maxFramerate: 30 }],
    });
    this.#audio = this.#pc.addTransceiver("audio", { direction: "sendrecv" });
    showAtOnce(this.#video.receiver);
    this.#control = this.#pc.createDataChannel("control", { ordered: true });
    const telemetry = this.#pc.createDataChannel("telemetry", { ordered: false, maxRetransmits: 0 });
    this.#control.onopen = () => this._open();
    this.#control.onclose = () => this._lose("server_gone", "The server ended the connection.");
    this.#control.onmessage = telemetry.onmessage = (event) => this._take(JSON.parse(event.data));
    this.#pc.ontrack = (event) => this._emit("track", event.track);
    this.#pc.onicecandidate = (event) => this.#onCandidate(event.candidate);
    this.#pc.onconnectionstatechange = () => this.#onState();
  }

  /**
   * Negotiates. The tracks may be given later by setTracks: connecting and opening a camera overlap.
   * @param {{prompt: string, strength: number, steps: number, seed: number}} params
   * @param {boolean} bypass
   * @param {{token: string, keep: boolean} | null} resume the session to go on with; keep: with its own settings
   * @returns {Promise<object | null>} the server's answer (docs/protocol.md); null if closed meanwhile
   * @throws {ConnectionLost}
   */
  async open(params, bypass, resume = null) {
    await this.#pc.setLocalDescription();
    const body = { type: "offer", sdp: this.#pc.localDescription.sdp, params, bypass, ...(resume ? { resume } : {}) };
    const response = await this._http("POST", OFFER_URL, body);
    if (!response.ok) throw await problemOf(response);
    const answer = await response.json();
    this._url = answer.url;
    if (this._closed) {
      this._goodbye();
      return null;
    }
    this._begin(answer, CONNECT_TIMEOUT_MS);
    this.#flush();
    await this.#pc.setRemoteDescription({ type: "answer", sdp: answer.sdp });
    return answer;
  }

  /**
   * @param {MediaStreamTrack} video
   * @param {MediaStreamTrack | null} audio
   * @param {number} sideUsed shorter side of the picture that the server works on, in pixels
   */
  async setTracks(video, audio, sideUsed) {
    if ("contentHint" in video) video.contentHint = "motion";
    await this.#sendNoLargerThan(video, sideUsed * OVERSAMPLING);
    await Promise.all([this.#video.sender.replaceTrack(video), this.#audio.sender.replaceTrack(audio)]);
  }

  /** Pixels that the server would throw away are not encoded, sent and decoded first. */
  async #sendNoLargerThan(video, side) {
    const { width = side, height = side } = video.getSettings();
    const parameters = this.#video.sender.getParameters();
    if (!parameters.encodings?.length) return;
    parameters.encodings[0].scaleResolutionDownBy = Math.max(1, Math.min(width, height) / side);
    await this.#video.sender.setParameters(parameters);
  }

  /** @param {MediaStreamTrack | null} audio */
  async setAudio(audio) {
    await this.#audio.sender.replaceTrack(audio);
  }

  _sendText(text) {
    if (this.#control.readyState === "open") this.#control.send(text);
  }

  _readMedia() {
    return this.#probe.read();
  }

  _tearDown() {
    clearTimeout(this.#flushTimer);
    clearTimeout(this.#disconnectedTimer);
    this.#pc.close();
  }

  // --- signalling

  #onCandidate(candidate) {
    this.#candidates.push(candidate ? candidate.toJSON() : { candidate: "", sdpMid: "0", sdpMLineIndex: 0 });
    if (this._url && !this.#flushTimer) this.#flushTimer = setTimeout(() => this.#flush(), CANDIDATE_BATCH_MS);
  }

  #flush() {
    this.#flushTimer = 0;
    if (!this.#candidates.length || this._closed) return;
    const candidates = this.#candidates.splice(0).map(({ candidate, sdpMid, sdpMLineIndex }) => ({ candidate, sdpMid, sdpMLineIndex }));
    // A lost batch is no end: the server learns the page as peer-reflexive; what matters shows in the state.
    this._http("PATCH", this._url, { candidates }).catch(() => {});
  }

  #onState() {
    const state = this.#pc.connectionState;
    clearTimeout(this.#disconnectedTimer);
    if (state === "failed") this._lose(this._opened ? "server_gone" : "no_media_path", "The connection to the server broke.");
    if (state === "disconnected") {
      const lose = () => this._lose("server_gone", "The server is out of reach.");
      this.#disconnectedTimer = setTimeout(lose, DISCONNECTED_GRACE_MS);
    }
  }
}

/** Frames are shown when they are decoded: the pacer on the server has already evened them out. */
function showAtOnce(receiver) {
  if ("jitterBufferTarget" in receiver) receiver.jitterBufferTarget = 0;
  else if ("playoutDelayHint" in receiver) receiver.playoutDelayHint = 0;
}
