// What every connection to the server has in common, whichever way it goes (connection.js: WebRTC, socket.js: WebSocket):
// requests and their answers, pings, notices, figures, the end. docs/protocol.md is the contract.

import { authorization, authorizedFetch, token } from "./access.js";
import { ClockMap, FrameMeter } from "./measure.js";

const PING_MS = 1_000;
const HTTP_TIMEOUT_MS = 15_000;
// Telemetry comes twice a second. A server that says nothing for this long is asked, and gone if it does not answer: a
// page that was busy itself has the answer waiting.
const SILENCE_MS = 2_000;
const ASKED_MS = 750;

/** The connection cannot be made or has ended; `code` as in the protocol, server_gone, or no_media_path. */
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
 * It lives once; reconnecting makes a new one (session.js). What begins with _ is for its two kinds.
 * Events: `track` (detail: MediaStreamTrack), `stats`, `notice`, `open` (requests get through),
 * `lost` (detail: ConnectionLost; once, and not after close()).
 */
export class Line extends EventTarget {
  clock = new ClockMap();
  /** @type {FrameMeter} */
  meter;
  session = null;
  agreedFps = null;
  /** What the browser says of the media legs, read each second. */
  media = null;
  _url = null;
  _closed = false;
  _opened = false;
  #connectedBy = 0;
  #silence = 0;
  #timer = 0;
  #nextId = 1;
  /** @type {Map<number, {resolve: Function, reject: Function}>} */
  #requests = new Map();
  #outbox = [];
  #abort = new AbortController();

  /** @param {typeof FrameMeter} Meter */
  constructor(Meter = FrameMeter) {
    super();
    this.meter = new Meter(this.clock);
  }

  // --- for the page

  /**
   * Sends a request (once the connection is up); resolves with its ack, rejects with the server's error. A connection
   * that ends first resolves with null: the caller's settings go into the next one.
   * @param {string} type @param {object} fields @returns {Promise<object | null>}
   */
  request(type, fields) {
    if (this._closed) return Promise.resolve(null);
    const id = this.#nextId++;
    return new Promise((resolve, reject) => {
      this.#requests.set(id, { resolve, reject });
      this.#send({ v: 1, type, id, ...fields });
    });
  }

  /**
   * Ends the connection and frees the seat at once. `leaving`: the page goes away and a beacon gets through best; one
   * carries no token, though.
   */
  close({ leaving = false } = {}) {
    if (this._closed) return;
    this._release();
    if (leaving && this._url && !token()) navigator.sendBeacon(`${this._url}/close`);
    else this._goodbye();
  }

  // --- for its kinds

  /** Sends a text over the open connection. @param {string} text */
  _sendText(text) {
    throw new Error(`no way to send ${text}`);
  }

  /** What the browser says of the media legs. @returns {Promise<object>} */
  async _readMedia() {
    return { encodeMs: null, sent: "", codec: "", heldBy: "", freezes: 0, lost: 0 };
  }

  /** Takes down what the kind itself opened. */
  _tearDown() {}

  /** The server has answered. @param {object} answer @param {number} patienceMs until it must be heard of again */
  _begin(answer, patienceMs) {
    this._url = answer.url;
    this.session = answer.session;
    this.agreedFps = answer.fps;
    this.#connectedBy = performance.now() + patienceMs;
    this.#timer = setInterval(() => this.#tick(), PING_MS);
  }

  /** Requests get through from now on. */
  _open() {
    this._opened = true;
    this.#hear();
    for (const text of this.#outbox.splice(0)) this._sendText(text);
    this.#ping();
    this._emit("open");
  }

  /** A message of the server. @param {object} message */
  _take(message) {
    const now = performance.now();
    if (this._opened) this.#hear();
    if (message.type === "pong") this.clock.add(message.t_ms, now, message.server_s);
    else if (message.type === "notice") this.#onNotice(message);
    else if (message.type === "ack" || message.type === "error") this.#settle(message);
    else if (message.type === "marks") this.meter.onMarks(message.frames);
    else if (message.type === "stats") {
      this.agreedFps = message.agreed_fps ?? this.agreedFps;
      this._emit("stats", message);
    }
  }

  async _http(method, url, body) {
    try {
      return await authorizedFetch(url, {
        method,
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify(body),
        signal: AbortSignal.any([this.#abort.signal, AbortSignal.timeout(HTTP_TIMEOUT_MS)]),
      });
    } catch (error) {
      throw new ConnectionLost("server_gone", "The server does not answer.", { cause: error });
    }
  }

  _goodbye() {
    if (!this._url) return;
    // Nobody waits for this, and a server that is gone needs no goodbye.
    fetch(this._url, { method: "DELETE", headers: authorization(), keepalive: true }).catch(() => {});
  }

  _release() {
    this._closed = true;
    this.#abort.abort();
    clearInterval(this.#timer);
    clearTimeout(this.#silence);
    this._tearDown();
    for (const { resolve } of this.#requests.values()) resolve(null);
    this.#requests.clear();
  }

  /** No goodbye: the session is to be found again. */
  _lose(code, message, options) {
    if (this._closed) return;
    this._release();
    this._emit("lost", new ConnectionLost(code, message, options));
  }

  _emit(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }

  // --- its own

  #hear() {
    clearTimeout(this.#silence);
    if (!this._closed) this.#silence = setTimeout(() => this.#ask(), SILENCE_MS);
  }

  #ask() {
    this.#ping();
    this.#silence = setTimeout(() => this._lose("server_gone", "The server has gone silent."), ASKED_MS);
  }

  #send(message) {
    const text = JSON.stringify(message);
    if (this._opened) this._sendText(text);
    else this.#outbox.push(text);
  }

  #ping() {
    this.#send({ v: 1, type: "ping", id: this.#nextId++, t_ms: performance.now() });
  }

  #settle(message) {
    const request = this.#requests.get(message.id);
    this.#requests.delete(message.id);
    if (message.type === "ack") request?.resolve(message);
    else if (request) request.reject(Object.assign(new Error(message.message), { code: message.code }));
    else this._emit("notice", message);
  }

  #onNotice(message) {
    if (message.code === "rate_changed") this.agreedFps = message.fps;
    this._emit("notice", message);
    if (message.code === "closing") {
      this._lose("closing", message.message, { retryAfterS: message.reconnect_after_s ?? null });
    }
  }

  async #tick() {
    if (this._opened) this.#ping();
    else if (performance.now() > this.#connectedBy) {
      this._lose("no_media_path", "This network lets no video call through.");
      return;
    }
    const media = await this._readMedia();
    if (this._closed) return;
    if (media.encodeMs !== null) this.meter.encodeMs = media.encodeMs;
    this.media = media;
  }
}

/** @param {Response} response @returns {Promise<ConnectionLost>} */
export async function problemOf(response) {
  const fallback = { code: `http_${response.status}`, message: `The server answered ${response.status}.`, retryable: response.status >= 500 };
  const body = await response.json().catch(() => fallback);
  // A proxy that answers in the server's place has the header alone.
  const retryAfterS = body.retry_after_s ?? (Number(response.headers.get("Retry-After")) || null);
  return new ConnectionLost(body.code, body.message, { retryable: body.retryable, retryAfterS });
}
