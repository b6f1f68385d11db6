// One peer connection to the server: offer and answer over HTTP, candidates as they come, the two data channels.
// It lives once; reconnecting makes a new one (session.js). docs/protocol.md is the contract.

import { ClockMap, FrameMeter, MediaProbe } from "./measure.js";

const OFFER_URL = "/api/v1/webrtc/offer";
const ICE_URL = "/api/v1/ice-servers";
const ICE_FRESH_MS = 240_000;
const MAX_BITRATE = 1_500_000;
// A little more than is used: the compressed picture is softened by scaling it down.
const OVERSAMPLING = 1.25;
const PING_MS = 1_000;
const CANDIDATE_BATCH_MS = 20;
const HTTP_TIMEOUT_MS = 15_000;
const CONNECT_TIMEOUT_MS = 12_000;
// Telemetry comes twice a second; a server that says nothing for this long is gone.
const SILENCE_MS = 5_000;
const DISCONNECTED_GRACE_MS = 3_000;

/** Which STUN and TURN servers to use. Credentials are good for ten minutes, so what is older than four is asked anew. */
export class IceServers {
  #asked = null;
  #askedAt = 0;

  /** @returns {Promise<RTCConfiguration>} an empty one where the server does not answer: the offer will say so */
  get() {
    if (!this.#asked || performance.now() - this.#askedAt > ICE_FRESH_MS) {
      this.#askedAt = performance.now();
      this.#asked = fetch(ICE_URL)
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

/** The connection cannot be made or has ended; `code` as in the protocol, or server_gone. */
export class ConnectionLost extends Error {
  /** @param {string} code @param {string} message @param {{retryable?: boolean, retryAfterS?: number | null, cause?: Error}} options */
  constructor(code, message, { retryable = true, retryAfterS = null, cause } = {}) {
    super(message, { cause });
    this.code = code;
    this.retryable = retryable;
    this.retryAfterS = retryAfterS;
  }
}

/**
 * Events: `track` (detail: MediaStreamTrack), `stats`, `notice`, `open` (control channel usable),
 * `lost` (detail: ConnectionLost; once, and not after close()).
 */
export class Connection extends EventTarget {
  clock = new ClockMap();
  meter = new FrameMeter(this.clock);
  session = null;
  agreedFps = null;
  /** What the browser says of the media legs, read each second. */
  media = null;
  #url = null;
  #closed = false;
  #pc;
  #control;
  #video;
  #audio;
  #probe;
  #candidates = [];
  #flushTimer = 0;
  #timers = [];
  #heardAt = 0;
  #disconnectedTimer = 0;
  #nextId = 1;
  /** @type {Map<number, {resolve: Function, reject: Function}>} */
  #requests = new Map();
  #outbox = [];
  #abort = new AbortController();

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
    this.#control.onopen = () => this.#onControlOpen();
    this.#control.onclose = () => this.#lose("server_gone", "The server ended the connection.");
    this.#control.onmessage = (event) => this.#onControl(JSON.parse(event.data));
    telemetry.onmessage = (event) => this.#onTelemetry(JSON.parse(event.data));
    this.#pc.ontrack = (event) => this.#emit("track", event.track);
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
    const response = await this.#http("POST", OFFER_URL, body);
    if (!response.ok) throw await problemOf(response);
    const answer = await response.json();
    this.#url = answer.url;
    if (this.#closed) {
      this.#goodbye();
      return null;
    }
    this.session = answer.session;
    this.agreedFps = answer.fps;
    this.#flush();
    await this.#pc.setRemoteDescription({ type: "answer", sdp: answer.sdp });
    this.#heardAt = performance.now() + CONNECT_TIMEOUT_MS - SILENCE_MS;
    this.#timers.push(setInterval(() => this.#tick(), PING_MS));
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

  /**
   * Sends a request over `control` (waiting for the channel if need be); resolves with its ack, rejects with the
   * server's error. A connection that ends first resolves with null: the caller's settings go into the next offer.
   * @param {string} type @param {object} fields @returns {Promise<object | null>}
   */
  request(type, fields) {
    if (this.#closed) return Promise.resolve(null);
    const id = this.#nextId++;
    return new Promise((resolve, reject) => {
      this.#requests.set(id, { resolve, reject });
      this.#send({ v: 1, type, id, ...fields });
    });
  }

  /** Ends the connection and frees the seat at once. `leaving`: the page goes away, only a beacon gets through. */
  close({ leaving = false } = {}) {
    if (this.#closed) return;
    this.#release();
    if (leaving && this.#url) navigator.sendBeacon(`${this.#url}/close`);
    else this.#goodbye();
  }

  #goodbye() {
    if (!this.#url) return;
    // Nobody waits for this, and a server that is gone needs no goodbye.
    fetch(this.#url, { method: "DELETE", keepalive: true }).catch(() => {});
  }

  #release() {
    this.#closed = true;
    this.#abort.abort();
    this.#timers.forEach(clearInterval);
    clearTimeout(this.#flushTimer);
    clearTimeout(this.#disconnectedTimer);
    this.#pc.close();
    for (const { resolve } of this.#requests.values()) resolve(null);
    this.#requests.clear();
  }

  /** No goodbye: the session is to be found again. */
  #lose(code, message, options) {
    if (this.#closed) return;
    this.#release();
    this.#emit("lost", new ConnectionLost(code, message, options));
  }

  // --- signalling

  async #http(method, url, body) {
    try {
      return await fetch(url, {
        method,
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify(body),
        signal: AbortSignal.any([this.#abort.signal, AbortSignal.timeout(HTTP_TIMEOUT_MS)]),
      });
    } catch (error) {
      throw new ConnectionLost("server_gone", "The server does not answer.", { cause: error });
    }
  }

  #onCandidate(candidate) {
    this.#candidates.push(candidate ? candidate.toJSON() : { candidate: "", sdpMid: "0", sdpMLineIndex: 0 });
    if (this.#url && !this.#flushTimer) this.#flushTimer = setTimeout(() => this.#flush(), CANDIDATE_BATCH_MS);
  }

  #flush() {
    this.#flushTimer = 0;
    if (!this.#candidates.length || this.#closed) return;
    const candidates = this.#candidates.splice(0).map(({ candidate, sdpMid, sdpMLineIndex }) => ({ candidate, sdpMid, sdpMLineIndex }));
    // A lost batch is no end: the server learns the page as peer-reflexive; what matters shows in the state.
    this.#http("PATCH", this.#url, { candidates }).catch(() => {});
  }

  #onState() {
    const state = this.#pc.connectionState;
    clearTimeout(this.#disconnectedTimer);
    if (state === "failed") this.#lose("server_gone", "The connection to the server broke.");
    if (state === "disconnected") {
      const lose = () => this.#lose("server_gone", "The server is out of reach.");
      this.#disconnectedTimer = setTimeout(lose, DISCONNECTED_GRACE_MS);
    }
  }

  // --- data channels

  #onControlOpen() {
    this.#heardAt = performance.now();
    for (const text of this.#outbox.splice(0)) this.#control.send(text);
    this.#ping();
    this.#emit("open");
  }

  #send(message) {
    const text = JSON.stringify(message);
    if (this.#control.readyState === "open") this.#control.send(text);
    else if (this.#control.readyState === "connecting") this.#outbox.push(text);
  }

  #ping() {
    this.#send({ v: 1, type: "ping", id: this.#nextId++, t_ms: performance.now() });
  }

  #onControl(message) {
    const now = performance.now();
    this.#heardAt = now;
    if (message.type === "pong") this.clock.add(message.t_ms, now, message.server_s);
    else if (message.type === "notice") this.#onNotice(message);
    else if (message.type === "ack" || message.type === "error") this.#settle(message);
  }

  #settle(message) {
    const request = this.#requests.get(message.id);
    this.#requests.delete(message.id);
    if (message.type === "ack") request?.resolve(message);
    else if (request) request.reject(Object.assign(new Error(message.message), { code: message.code }));
    else this.#emit("notice", message);
  }

  #onNotice(message) {
    if (message.code === "rate_changed") this.agreedFps = message.fps;
    this.#emit("notice", message);
    if (message.code === "closing") {
      this.#lose("closing", message.message, { retryAfterS: message.reconnect_after_s ?? null });
    }
  }

  #onTelemetry(message) {
    this.#heardAt = Math.max(this.#heardAt, performance.now());
    if (message.type === "marks") this.meter.onMarks(message.frames);
    if (message.type === "stats") {
      this.agreedFps = message.agreed_fps ?? this.agreedFps;
      this.#emit("stats", message);
    }
  }

  async #tick() {
    if (performance.now() - this.#heardAt > SILENCE_MS) {
      this.#lose("server_gone", "The server has gone silent.");
      return;
    }
    if (this.#control.readyState === "open") this.#ping();
    const media = await this.#probe.read();
    if (this.#closed) return;
    if (media.encodeMs !== null) this.meter.encodeMs = media.encodeMs;
    this.media = media;
  }

  #emit(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}

/** Frames are shown when they are decoded: the pacer on the server has already evened them out. */
function showAtOnce(receiver) {
  if ("jitterBufferTarget" in receiver) receiver.jitterBufferTarget = 0;
  else if ("playoutDelayHint" in receiver) receiver.playoutDelayHint = 0;
}

/** @param {Response} response @returns {Promise<ConnectionLost>} */
async function problemOf(response) {
  const fallback = { code: `http_${response.status}`, message: `The server answered ${response.status}.`, retryable: response.status >= 500 };
  const body = await response.json().catch(() => fallback);
  // A proxy that answers in the server's place has the header alone.
  const retryAfterS = body.retry_after_s ?? (Number(response.headers.get("Retry-After")) || null);
  return new ConnectionLost(body.code, body.message, { retryable: body.retryable, retryAfterS });
}
