// A session over one WebSocket, for networks that let no UDP through (docs/networks.md). Pictures go up and come down as
// VP8 where the browser has WebCodecs, else as JPEG; there is no sound. Either side has few pictures under way without
// a receipt: a picture that finds no room is not encoded, and the newest wins.

import { protocols } from "./access.js";
import { ConnectionLost, Line } from "./line.js";
import { FrameMeter } from "./measure.js";

const SOCKET_URL = "/api/v1/socket";
const NODE_CHARS = 8;
const PICTURE = 1;
const KEY_PICTURE = 2;
const RECEIPT = 3;
const HEADER_BYTES = 5;
const MAX_IN_FLIGHT = 12;
const LAG_MS = 400;
const MAX_BUFFERED_BYTES = 256 * 1024;
const MAX_ENCODING = 2;
const BITRATE = { least: 150_000, most: 1_500_000, fall: 0.8, rise: 1.25 };
// Seconds without a picture left out, before the bitrate rises.
const RISE_S = 5;
const JPEG_QUALITY = 0.75;
const OVERSAMPLING = 1.25;
const PATIENCE_MS = 10_000;
const WELCOME_MS = 10_000;
const MICROSECONDS_PER_TICK = 1000 / 90;

/** Counts what is drawn here; the picture element, which shows the canvas, knows nothing of RTP timestamps. */
class DrawnMeter extends FrameMeter {
  #drawn = 0;

  onFrame() {}

  /** @param {number} stamp RTP timestamp @param {number} receivedAt */
  drawn(stamp, receivedAt) {
    const now = performance.now();
    this.#drawn += 1;
    super.onFrame(now, { presentedFrames: this.#drawn, rtpTimestamp: stamp, expectedDisplayTime: now, receiveTime: receivedAt });
  }
}

/** The same as Connection, over a WebSocket. */
export class SocketConnection extends Line {
  #socket = null;
  #canvas = document.createElement("canvas");
  #context = this.#canvas.getContext("2d");
  #sender = new PictureSender((kind, number, data) => this.#sendPicture(kind, number, data));
  #decoder = null;
  #receivedAt = new Map();
  #told;

  /** @param {string} told why there is no WebRTC, for the server's log */
  constructor(told = "") {
    super(DrawnMeter);
    this.#told = told;
  }

  /**
   * @param {object} params @param {boolean} bypass
   * @param {{token: string, keep: boolean} | null} resume the session to go on with
   * @returns {Promise<object | null>} the server's answer; null if closed meanwhile
   * @throws {ConnectionLost}
   */
  async open(params, bypass, resume = null) {
    const format = (await hasVp8()) ? "vp8" : "jpeg";
    if (this._closed) return null;
    const url = new URL(SOCKET_URL, location.href.replace(/^http/, "ws"));
    // Of several servers behind one address the token's first characters name the one that has the session.
    if (resume) url.searchParams.set("node", resume.token.slice(0, NODE_CHARS));
    this.#socket = new WebSocket(url, protocols());
    this.#socket.binaryType = "arraybuffer";
    const hello = { v: 1, type: "hello", sends: format, shows: format, told: this.#told, params, bypass, ...(resume ? { resume } : {}) };
    const answer = await this.#welcome(hello);
    if (this._closed) return null;
    [this.#canvas.width, this.#canvas.height] = answer.size.split("x").map(Number);
    if (format === "vp8") this.#decoder = this.#makeDecoder();
    this.#socket.onmessage = ({ data }) => this.#onMessage(data);
    this.#socket.onclose = () => this._lose("server_gone", "The connection to the server broke.");
    this._begin(answer, PATIENCE_MS);
    this._open();
    this._emit("track", this.#canvas.captureStream().getVideoTracks()[0]);
    this.#sender.start(format, answer.fps);
    return answer;
  }

  /** @returns {Promise<object>} the welcome @throws {ConnectionLost} */
  #welcome(hello) {
    const socket = this.#socket;
    return new Promise((resolve, reject) => {
      const gone = () => reject(new ConnectionLost("server_gone", "The server does not answer."));
      setTimeout(gone, WELCOME_MS);
      socket.onopen = () => socket.send(JSON.stringify(hello));
      socket.onclose = gone;
      socket.onmessage = ({ data }) => {
        const message = JSON.parse(data);
        if (message.type === "welcome") resolve(message);
        const { retryable, retry_after_s: retryAfterS = null } = message;
        reject(new ConnectionLost(message.code, message.message, { retryable, retryAfterS }));
      };
    });
  }

  /** As Connection.setTracks; sound stays here. */
  async setTracks(video, audio, sideUsed) {
    await this.#sender.setTrack(video, sideUsed * OVERSAMPLING);
  }

  async setAudio() {}

  _sendText(text) {
    if (this.#socket.readyState === WebSocket.OPEN) this.#socket.send(text);
  }

  async _readMedia() {
    this.#sender.adapt(this.agreedFps);
    return this.#sender.figures();
  }

  _tearDown() {
    this.#sender.stop();
    if (this.#decoder?.state !== "closed") this.#decoder?.close();
    if (!this.#socket) return;
    this.#socket.onclose = this.#socket.onmessage = null;
    this.#socket.close(1000);
  }

  // --- up

  #sendPicture(kind, number, data) {
    if (this._closed || this.#socket.readyState !== WebSocket.OPEN) return 0;
    const message = new Uint8Array(HEADER_BYTES + data.byteLength);
    const header = new DataView(message.buffer);
    header.setUint8(0, kind);
    header.setUint32(1, number);
    message.set(data, HEADER_BYTES);
    this.#socket.send(message);
    return this.#socket.bufferedAmount;
  }

  // --- down

  #onMessage(data) {
    if (typeof data !== "string") return this.#onBinary(data);
    const message = JSON.parse(data);
    if (message.type === "key_frame") this.#sender.askForKey();
    else this._take(message);
    return undefined;
  }

  #onBinary(buffer) {
    const header = new DataView(buffer);
    const kind = header.getUint8(0);
    const number = header.getUint32(1);
    if (kind === RECEIPT) return this.#sender.received(number);
    this.#receivedAt.set(number, performance.now());
    const data = new Uint8Array(buffer, HEADER_BYTES);
    if (!this.#decoder) return this.#showJpeg(data, number);
    const type = kind === KEY_PICTURE ? "key" : "delta";
    this.#decoder.decode(new EncodedVideoChunk({ type, timestamp: Math.round(number * MICROSECONDS_PER_TICK), data }));
    return undefined;
  }

  #makeDecoder() {
    const decoder = new VideoDecoder({
      output: (frame) => {
        this.#show(frame, Math.round(frame.timestamp / MICROSECONDS_PER_TICK));
        frame.close();
      },
      error: (error) => this._lose("server_gone", `The picture cannot be decoded (${error.message}).`),
    });
    decoder.configure({ codec: "vp8", optimizeForLatency: true });
    return decoder;
  }

  async #showJpeg(data, number) {
    const picture = await createImageBitmap(new Blob([data], { type: "image/jpeg" }));
    this.#show(picture, number);
    picture.close();
  }

  #show(picture, number) {
    if (this._closed) return;
    this.#context.drawImage(picture, 0, 0, this.#canvas.width, this.#canvas.height);
    this.meter.drawn(number, this.#receivedAt.get(number) ?? performance.now());
    this.#receivedAt.delete(number);
    this.#sendPicture(RECEIPT, number, new Uint8Array(0));
  }
}

/** The camera's way up: the newest picture, as often as the server takes one, while the line has room. */
class PictureSender {
  #send;
  #video = Object.assign(document.createElement("video"), { muted: true, playsInline: true });
  #canvas = document.createElement("canvas");
  #context = this.#canvas.getContext("2d");
  #side = 0;
  #format = "jpeg";
  #encoder = null;
  #encoding = 0;
  #buffered = 0;
  #bitrate = BITRATE.most;
  #keyAsked = true;
  #number = 0;
  /** Sent without a receipt: number -> when. */
  #inFlight = new Map();
  #timer = 0;
  #periodMs = 1000 / 24;
  #nextAt = 0;
  #stopped = false;
  #leftOut = 0;
  #leftOutBefore = 0;
  #freeSeconds = 0;
  #encodeMs = null;

  /** @param {(kind: number, number: number, data: Uint8Array) => number} send returns the bytes that wait */
  constructor(send) {
    this.#send = send;
  }

  /** @param {MediaStreamTrack} track @param {number} side shorter side to send, in pixels */
  async setTrack(track, side) {
    this.#side = side;
    this.#video.srcObject = new MediaStream([track]);
    // Fails when the next track comes at once; that one plays then.
    await this.#video.play().catch(() => {});
  }

  /** @param {"vp8" | "jpeg"} format @param {number} fps */
  start(format, fps) {
    this.#format = format;
    this.#periodMs = 1000 / fps;
    this.#nextAt = performance.now();
    this.#step();
  }

  stop() {
    this.#stopped = true;
    clearTimeout(this.#timer);
    this.#video.srcObject = null;
    if (this.#encoder && this.#encoder.state !== "closed") this.#encoder.close();
  }

  askForKey() {
    this.#keyAsked = true;
  }

  /** The server has taken a picture, and all before it. */
  received(number) {
    for (const sent of this.#inFlight.keys()) if (sent <= number) this.#inFlight.delete(sent);
  }

  /** Once a second: fewer bits after pictures were left out, more after RISE_S without. */
  adapt(fps) {
    if (fps) this.#periodMs = 1000 / fps;
    const held = this.#leftOut > this.#leftOutBefore;
    this.#leftOutBefore = this.#leftOut;
    this.#freeSeconds = held ? 0 : this.#freeSeconds + 1;
    let wanted = this.#bitrate;
    if (held) wanted = Math.max(BITRATE.least, wanted * BITRATE.fall);
    else if (this.#freeSeconds >= RISE_S) {
      wanted = Math.min(BITRATE.most, wanted * BITRATE.rise);
      this.#freeSeconds = 0;
    }
    if (wanted === this.#bitrate) return;
    this.#bitrate = wanted;
    if (this.#encoder) this.#configure();
  }

  figures() {
    const sent = this.#canvas.width ? `${this.#canvas.width}x${this.#canvas.height}` : "";
    const codec = `${this.#format.toUpperCase()} over WebSocket`;
    const heldBy = this.#freeSeconds ? "" : "bandwidth";
    return { encodeMs: this.#encodeMs, sent, codec, heldBy, freezes: 0, lost: this.#leftOut };
  }

  #step() {
    if (this.#stopped) return;
    const now = performance.now();
    // A page that was asleep does not catch up.
    this.#nextAt = Math.max(this.#nextAt + this.#periodMs, now);
    this.#timer = setTimeout(() => this.#step(), this.#nextAt - now);
    if (this.#video.readyState < HTMLMediaElement.HAVE_CURRENT_DATA || !this.#side) return;
    if (!this.#hasRoom(now)) {
      this.#leftOut += 1;
      return;
    }
    this.#draw();
    if (this.#format === "vp8") this.#encodeVp8(now);
    else this.#encodeJpeg(now);
  }

  #hasRoom(now) {
    const oldest = this.#inFlight.values().next().value ?? now;
    const isFree = this.#inFlight.size < MAX_IN_FLIGHT && now - oldest < LAG_MS && this.#buffered < MAX_BUFFERED_BYTES;
    return isFree && this.#encoding < MAX_ENCODING;
  }

  #draw() {
    const { videoWidth, videoHeight } = this.#video;
    const scale = Math.min(1, this.#side / Math.min(videoWidth, videoHeight));
    const [width, height] = [videoWidth, videoHeight].map((side) => 2 * Math.round((side * scale) / 2));
    if (width !== this.#canvas.width || height !== this.#canvas.height) {
      [this.#canvas.width, this.#canvas.height] = [width, height];
      if (this.#format === "vp8") this.#configure();
    }
    this.#context.drawImage(this.#video, 0, 0, width, height);
  }

  #configure() {
    this.#encoder ??= new VideoEncoder({
      output: (chunk) => {
        const data = new Uint8Array(chunk.byteLength);
        chunk.copyTo(data);
        this.#sendEncoded(chunk.type === "key" ? KEY_PICTURE : PICTURE, data, chunk.timestamp / 1000);
      },
      error: () => {
        this.#encoder = null; // the next picture makes another
        this.#encoding = this.#canvas.width = 0;
      },
    });
    const { width, height } = this.#canvas;
    this.#encoder.configure({ codec: "vp8", width, height, bitrate: Math.round(this.#bitrate), framerate: 1000 / this.#periodMs, latencyMode: "realtime" });
    this.#keyAsked = true;
  }

  #encodeVp8(now) {
    const frame = new VideoFrame(this.#canvas, { timestamp: Math.round(now * 1000) });
    this.#encoding += 1;
    this.#encoder.encode(frame, { keyFrame: this.#keyAsked });
    this.#keyAsked = false;
    frame.close();
  }

  #encodeJpeg(now) {
    this.#encoding += 1;
    this.#canvas.toBlob(async (blob) => this.#sendEncoded(KEY_PICTURE, new Uint8Array(await blob.arrayBuffer()), now), "image/jpeg", JPEG_QUALITY);
  }

  #sendEncoded(kind, data, startedAt) {
    this.#encoding -= 1;
    if (this.#stopped) return;
    const now = performance.now();
    this.#encodeMs = now - startedAt;
    this.#inFlight.set(this.#number, now);
    this.#buffered = this.#send(kind, this.#number, data);
    this.#number += 1;
  }
}

/** Whether VP8 is encoded and decoded here (WebCodecs, which insecure pages do not have). */
async function hasVp8() {
  if (!("VideoEncoder" in window && "VideoDecoder" in window)) return false;
  const { supported } = await VideoEncoder.isConfigSupported({ codec: "vp8", width: 320, height: 320 }).catch(() => ({ supported: false }));
  return Boolean(supported);
}
