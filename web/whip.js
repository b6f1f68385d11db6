// A stream by WHIP or WHEP: an offer, an answer, the watch over the connection, and a new try whenever it is lost.
// Knows nothing of elements or of where a picture is shown.

// Asked this long without an answer, the server counts as out of reach.
const ANSWER_TIMEOUT_MS = 10_000;
const CONNECT_TIMEOUT_MS = 15_000;
// A viewer gets a picture a second even while nobody publishes, a publisher an answer to its checks: silence means that
// the connection is dead.
const SILENCE_MS = 5_000;
const WATCH_MS = 1_000;
const FIRST_WAIT_MS = 500;
const LONGEST_WAIT_MS = 10_000;
// What a new try cannot cure; it is still made, slowly, because a server may be set up anew.
const HOPELESS = new Set([400, 401, 403, 405, 406, 415, 422]);
const HOPELESS_WAIT_MS = 30_000;

/**
 * How long to wait before the next try.
 * @param {number} tries in a row that brought no picture @param {number | null} retryAfterS what the server said
 * @param {boolean} hopeless @param {number} chance 0 to 1: viewers of a restarted server do not come back all at once
 */
export function waitMs(tries, retryAfterS, hopeless, chance) {
  if (hopeless) return HOPELESS_WAIT_MS;
  const wait = Math.min(FIRST_WAIT_MS * 2 ** tries, LONGEST_WAIT_MS);
  return Math.max((retryAfterS ?? 0) * 1000, wait * (0.75 + 0.5 * chance));
}

/** Goes on until `stop`. Event "state": { state, detail, status, tries } in detail; states: connecting, playing, waiting. */
class Session extends EventTarget {
  /** Where the next try asks. */
  url;
  #token;
  #iceServers;
  #pc = null;
  #resource = null;
  #stopped = false;
  #tries = 0;
  #timer = 0;

  /**
   * @param {string} url
   * @param {{ token?: string, iceServers?: () => Promise<RTCIceServer[]> }} options iceServers: asked at every try,
   *   because the credentials of a relay expire
   */
  constructor(url, { token = "", iceServers = async () => [] } = {}) {
    super();
    this.url = url;
    this.#token = token;
    this.#iceServers = iceServers;
  }

  /** Begin; harmless when repeated. */
  start() {
    if (this.#pc || this.#timer || this.#stopped) return;
    this.#timer = setTimeout(() => this.#connect());
  }

  /** End, and tell the server, also while the page is going away. */
  stop() {
    this.#stopped = true;
    clearTimeout(this.#timer);
    this.#drop();
  }

  async #connect() {
    const iceServers = await this.#iceServers().catch(() => []);
    this.#timer = 0;
    if (this.#stopped) return;
    const pc = (this.#pc = new RTCPeerConnection({ iceServers, bundlePolicy: "max-bundle" }));
    this.prepare(pc);
    this.#say("connecting");
    try {
      await pc.setLocalDescription();
      // Without waiting for candidates: the server's are all in the answer, and it learns ours from our checks.
      const response = await this.#http("POST", this.url, pc.localDescription.sdp, ANSWER_TIMEOUT_MS);
      if (response.status !== 201) throw await problemOf(response);
      const resource = new URL(response.headers.get("Location"), this.url).href;
      const answer = await response.text();
      if (this.#pc !== pc) {
        this.#leave(resource);
        return;
      }
      this.#resource = resource;
      await pc.setRemoteDescription({ type: "answer", sdp: answer });
    } catch (error) {
      if (this.#pc === pc) this.#lose(error);
      return;
    }
    if (this.#pc === pc) this.#watch(pc);
  }

  /** Look every second whether anything comes; also seen where the page is hidden and draws nothing. */
  #watch(pc) {
    const began = performance.now();
    let heard = 0;
    let heardAt = 0;
    const look = async () => {
      const count = this.heard([...(await pc.getStats()).values()]);
      if (this.#pc !== pc) return;
      const now = performance.now();
      if (count > heard) {
        heard = count;
        if (!heardAt) {
          this.#tries = 0;
          this.came();
          this.#say("playing");
        }
        heardAt = now;
      }
      if (pc.connectionState === "failed" || pc.connectionState === "closed") this.#lose(new Error("the connection broke"));
      else if (heardAt && now - heardAt > SILENCE_MS) this.#lose(new Error("nothing has come for 5 s"));
      else if (!heardAt && now - began > CONNECT_TIMEOUT_MS) this.#lose(new Error("nothing came within 15 s"));
      else this.#timer = setTimeout(look, heardAt ? WATCH_MS : WATCH_MS / 5);
    };
    look();
  }

  /** @param {Error & { status?: number, retryAfterS?: number | null }} error */
  #lose(error) {
    this.#drop();
    if (this.#stopped) return;
    const wait = waitMs(this.#tries, error.retryAfterS ?? null, HOPELESS.has(error.status), Math.random());
    this.#tries += 1;
    this.#say("waiting", error);
    this.#timer = setTimeout(() => this.#connect(), wait);
  }

  #drop() {
    this.#pc?.close();
    this.#pc = null;
    if (this.#resource) this.#leave(this.#resource);
    this.#resource = null;
    this.went();
  }

  #leave(resource) {
    this.#http("DELETE", resource).catch(() => {});
  }

  #http(method, url, body, timeoutMs = ANSWER_TIMEOUT_MS) {
    const headers = {};
    if (body !== undefined) headers["Content-Type"] = "application/sdp";
    if (this.#token) headers.Authorization = `Bearer ${this.#token}`;
    return fetch(url, { method, headers, body, keepalive: method === "DELETE", signal: AbortSignal.timeout(timeoutMs) });
  }

  #say(state, error = null) {
    const detail = { state, detail: error?.message ?? "", status: error?.status ?? 0, tries: this.#tries };
    this.dispatchEvent(new CustomEvent("state", { detail }));
  }
}

/** @param {string} token @returns {Promise<RTCIceServer[]>} none where the server does not say: the offer will tell */
export async function iceServers(token) {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const response = await fetch("/api/v1/ice-servers", { headers, signal: AbortSignal.timeout(3_000) });
  return response.ok ? (await response.json()).iceServers : [];
}

/** Plays a stream. Event "stream": a MediaStream in detail, null when it is lost. */
export class WhepPlayer extends Session {
  #stream = null;

  prepare(pc) {
    const stream = (this.#stream = new MediaStream());
    pc.addTransceiver("video", { direction: "recvonly" });
    pc.ontrack = ({ track, receiver }) => {
      if ("jitterBufferTarget" in receiver) receiver.jitterBufferTarget = 0;
      stream.addTrack(track);
    };
  }

  /** Packets of the picture. */
  heard(reports) {
    return sum(reports, (report) => report.type === "inbound-rtp" && report.kind === "video" && report.packetsReceived);
  }

  came() {
    this.dispatchEvent(new CustomEvent("stream", { detail: this.#stream }));
  }

  went() {
    this.dispatchEvent(new CustomEvent("stream", { detail: null }));
  }
}

/** Publishes the tracks of a MediaStream. */
export class WhipPublisher extends Session {
  #source;

  /** @param {string} url @param {MediaStream} source @param {object} options as a session's */
  constructor(url, source, options) {
    super(url, options);
    this.#source = source;
  }

  prepare(pc) {
    for (const track of this.#source.getTracks()) pc.addTransceiver(track, { direction: "sendonly", streams: [this.#source] });
  }

  /** Answers to the checks of the connection: they come whatever is sent. */
  heard(reports) {
    return sum(reports, (report) => report.type === "candidate-pair" && report.responsesReceived);
  }

  came() {}

  went() {}
}

/** @param {object[]} reports @param {(report: object) => number | false | undefined} count */
function sum(reports, count) {
  return reports.reduce((total, report) => total + (count(report) || 0), 0);
}

/** @param {Response} response what was answered in place of 201 */
async function problemOf(response) {
  const body = await response.json().catch(() => ({}));
  const retryAfterS = Number(response.headers.get("Retry-After")) || null;
  const words = body.detail ?? `the server answered ${response.status}`;
  return Object.assign(new Error(words), { status: response.status, retryAfterS });
}
