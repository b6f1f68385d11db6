// A person's session: one source, one set of settings, and as many connections after each other as it takes.

import { Connection, IceServers } from "./connection.js";
import { ConnectionLost } from "./line.js";
import { SocketConnection } from "./socket.js";
import { SourceError, cameraIsGranted, openMicrophone, openSource } from "./sources.js";
import { Ticket } from "./ticket.js";

const BACKOFF_S = [0.25, 1, 2, 4, 8];
const FULL_RETRY_S = 5;
// Pages that were told the same time do not come back in the same instant; none comes earlier than it was told.
const RETRY_JITTER = 0.2;
// A connection that held this long was a good one: the next loss begins the back-off anew.
const STEADY_MS = 10_000;
const LATENCY_WINDOW_S = 10;
const FPS_WINDOW_S = 2;

/**
 * @typedef {"idle"|"asking"|"connecting"|"loading"|"live"|"reconnecting"|"waiting"|"stopped"|"failed"} State
 * idle: nothing started; asking: a source is being opened; loading: connected, the camera passes through until the
 * model is ready; reconnecting: the server is gone; waiting: the server is full; failed: see `problem`.
 * @typedef {{prompt: string, blend: {text: string, weight: number}[], transition_s: number, strength: number,
 *   steps: number, seed: number}} Settings blend: in place of the prompt, where it is not empty
 */

/** Events: `change` (state, problem or settings), `track` (a remote track), `source`, `notice`, `ack`, `answer`. */
export class LiveSession extends EventTarget {
  /** @type {State} */
  state = "idle";
  /** What is wrong and the cure, or null. @type {{code: string, title: string, message: string} | null} */
  problem = null;
  /** @type {Settings} */
  settings = { prompt: "", blend: [], transition_s: 0, strength: 1, steps: 1, seed: 0 };
  bypass = false;
  /** The server's last `stats`, or null. */
  server = null;
  /** @type {import("./sources.js").Source | null} */
  source = null;
  /** @type {Connection | null} */
  connection = null;
  /** How far the model is while it loads, or why it does not. @type {{percent: number | null, message: string} | null} */
  loading = null;
  /** When the next attempt comes (page clock), while reconnecting or waiting. */
  retryAt = null;
  clickToPictureMs = null;
  /** The model's picture, in pixels. */
  size = { width: 256, height: 256 };
  #ice = new IceServers();
  #clickedAt = 0;
  #attempt = 0;
  #openedAt = 0;
  #retryTimer = 0;
  #microphone = null;
  #ticket = new Ticket();
  /** Whether the settings were chosen here, and do not give way to those of a session that is resumed. */
  #own = false;
  #told = "";
  /** Counts starts and stops: what was awaited in an older one is thrown away. */
  #epoch = 0;

  constructor() {
    super();
    this.#ice.get(); // now, so that the first click need not wait for it
  }

  /** Whether media goes over a WebSocket, because nothing else gets through. */
  get overSocket() {
    return this.#ticket.overSocket;
  }

  set overSocket(is) {
    this.#ticket.overSocket = is;
  }

  /** Whether a session is under way, in whatever state of health. */
  get active() {
    return !["idle", "stopped", "failed"].includes(this.state);
  }

  /**
   * Starts, or changes the source of the running session without a new connection.
   * @param {string} kind camera, screen, clip or file
   * @param {{microphone?: boolean, file?: File}} options
   */
  async start(kind, options = {}) {
    const epoch = ++this.#epoch;
    const live = this.connection !== null;
    this.problem = null;
    if (!live) {
      this.#clickedAt = performance.now();
      this.clickToPictureMs = null;
      this.#attempt = 0;
      clearTimeout(this.#retryTimer);
      this.#set("asking");
      // A camera that need not be asked for opens while the connection is made; so does a clip.
      if (kind === "clip" || (kind === "camera" && (await cameraIsGranted()))) this.#connect(epoch);
    }
    try {
      const source = await openSource(kind, { size: this.size, ...options });
      if (epoch !== this.#epoch) return source.stop();
      this.#takeSource(source);
    } catch (error) {
      if (!(error instanceof SourceError)) throw error;
      if (epoch === this.#epoch) this.#refuseSource(error, live);
      return undefined;
    }
    if (this.connection) await this.#giveTracks();
    else await this.#connect(epoch);
    return undefined;
  }

  /** Stops for good and frees the seat. */
  stop({ leaving = false } = {}) {
    this.#epoch++;
    clearTimeout(this.#retryTimer);
    this.#disconnect({ leaving });
    this.#dropSource();
    if (!leaving) this.#ticket.token = null;
    if (this.active) this.#set("stopped");
  }

  /** What is set where nobody has chosen anything: a session that is resumed has its own. @param {Partial<Settings>} defaults */
  begin(defaults) {
    this.settings = { ...this.settings, ...defaults };
    this.#emit("change");
  }

  /**
   * Changes settings; what is not connected keeps them for the next offer.
   * @param {Partial<Settings>} change
   * @returns {Promise<object>} the server's ack: `first_frame` is the first frame that shows it, null if none is known
   */
  async set(change) {
    this.#own = true;
    const before = this.settings;
    // One style asked for replaces a mix, here as in the server.
    if ("prompt" in change && !("blend" in change)) change = { ...change, blend: [] };
    this.settings = { ...before, ...change };
    this.#emit("change");
    try {
      const ack = await this.connection?.request("params", change);
      if (ack) this.#emit("ack", ack);
      return ack ?? { first_frame: null, params: this.settings };
    } catch (error) {
      // Refused by the server: what was in force before stays so.
      for (const key of Object.keys(change)) if (this.settings[key] === change[key]) this.settings[key] = before[key];
      this.#emit("change");
      throw error;
    }
  }

  /** @param {boolean} on show the camera as it is */
  async setBypass(on) {
    this.#own = true;
    this.bypass = on;
    this.#emit("change");
    return (await this.connection?.request("bypass", { on })) ?? null;
  }

  /** Switches the microphone on or off while a camera runs. @param {boolean} on */
  async setMicrophone(on) {
    this.#microphone?.stop();
    this.#microphone = null;
    try {
      if (on && this.source?.kind === "camera") this.#microphone = await openMicrophone();
    } finally {
      if (this.connection) await this.connection.setAudio(this.#soundTrack());
    }
  }

  /** The verdict's figures as numbers; null where nothing is known. 
   * @param {{window_s?: number, fps_window_s?: number}} options over how long latency and fps are taken (at most 120)
   */
  stats({ window_s: windowS = LATENCY_WINDOW_S, fps_window_s: fpsWindowS = FPS_WINDOW_S } = {}) {
    const { connection, server } = this;
    const now = performance.now();
    const latency = connection?.meter.latency(now, windowS);
    return {
      fps: connection?.meter.fps(now, fpsWindowS * 1000) ?? null,
      latency_p50_ms: latency?.p50 ?? null,
      latency_p95_ms: latency?.p95 ?? null,
      on_time: server?.on_time ?? null,
      ttff_ms: server?.ttff_ms ?? null,
      click_to_picture_ms: this.clickToPictureMs,
      state: this.state,
      frame_index: connection?.meter.lastIndex ?? null,
      largest_gap_ms: connection?.meter.largestGapMs(now, windowS) ?? null,
      frames_shown: connection?.meter.framesShown ?? 0,
      restyled_shown: connection?.meter.restyledShown ?? 0,
      session: connection?.session ?? null,
      agreed_fps: connection?.agreedFps ?? null,
      limited_by: server?.limited_by ?? null,
      problem: this.problem?.code ?? null,
      server,
    };
  }

  // --- source

  #takeSource(source) {
    this.#dropSource();
    this.source = source;
    source.onended = () => this.#onSourceEnded();
    this.#emit("source", source);
  }

  #dropSource() {
    this.#microphone?.stop();
    this.#microphone = null;
    if (!this.source) return;
    this.source.onended = null;
    this.source.stop();
    this.source = null;
    this.#emit("source", null);
  }

  #refuseSource(error, live) {
    this.problem = { code: error.code, title: error.title, message: error.message };
    if (live && this.source) {
      this.#emit("change"); // the old source goes on
      return;
    }
    this.#disconnect();
    this.#set("failed");
  }

  #onSourceEnded() {
    const { kind } = this.source;
    this.stop();
    if (kind === "screen") return;
    this.problem = {
      code: "camera_ended",
      title: "The camera stopped",
      message: "It was unplugged, or another program took it. Connect it and start again.",
    };
    this.#set("failed");
  }

  #soundTrack() {
    return this.#microphone ?? this.source?.stream.getAudioTracks()[0] ?? null;
  }

  async #giveTracks() {
    await this.connection.setTracks(this.source.stream.getVideoTracks()[0], this.#soundTrack(), Math.min(this.size.width, this.size.height));
  }

  // --- connection

  async #connect(epoch) {
    const ice = await this.#ice.get();
    if (epoch !== this.#epoch || this.connection) return;
    const connection = this.overSocket ? new SocketConnection(this.#told) : new Connection(ice);
    this.connection = connection;
    this.server = null;
    this.#set("connecting");
    this.#listen(connection);
    try {
      if (this.source) await this.#giveTracks();
      const { token } = this.#ticket;
      const answer = await connection.open(this.settings, this.bypass, token ? { token, keep: !this.#own } : null);
      if (answer === null) return;
      this.#openedAt = performance.now();
      this.#ticket.token = answer.resume;
      this.#adopt(answer);
      this.#emit("answer", answer);
      // Set while the offer was under way: the newer settings and source win.
      if (this.source && connection === this.connection) await this.#giveTracks();
    } catch (error) {
      if (connection !== this.connection) return;
      if (!(error instanceof ConnectionLost)) throw error;
      this.#onLost(error);
    }
  }

  /** A page that was reloaded goes on with what was set before, unless something else was chosen meanwhile. */
  #adopt(answer) {
    if (answer.resumed && !this.#own) {
      for (const key of Object.keys(this.settings)) this.settings[key] = answer.params[key] ?? this.settings[key];
      this.bypass = answer.bypass;
      this.#emit("change");
    }
    this.#own = true;
  }

  #listen(connection) {
    const when = (type, handle) =>
      connection.addEventListener(type, (event) => connection === this.connection && handle(event.detail));
    when("track", (track) => this.#emit("track", track));
    when("lost", (error) => this.#onLost(error));
    when("notice", (notice) => this.#onNotice(notice));
    when("stats", (stats) => this.#onStats(stats));
  }

  #disconnect(options) {
    this.connection?.close(options);
    this.connection = null;
    this.loading = null;
    this.retryAt = null;
  }

  #onStats(stats) {
    this.server = stats;
    this.problem = null;
    const { firstRestyledAt } = this.connection.meter;
    if (this.clickToPictureMs === null && firstRestyledAt !== null) {
      this.clickToPictureMs = firstRestyledAt - this.#clickedAt;
    }
    if (performance.now() - this.#openedAt > STEADY_MS) this.#attempt = 0;
    if (stats.state !== "passthrough") this.#set("live");
    else if (this.loading) this.#set("loading");
  }

  #onNotice(notice) {
    // The camera passes through meanwhile; the first picture of the model ends it.
    if (notice.code === "model_loading" || notice.code === "engine_lost") {
      this.loading = { percent: notice.percent ?? null, message: notice.message };
      this.#set("loading");
    } else if (notice.code === "model_ready" || notice.code === "engine_back") {
      if (this.loading) this.loading = { percent: 100, message: notice.message };
      this.#emit("change");
    } else if (notice.code === "params_changed") {
      // Somebody else steered, or the scene list did.
      this.settings = { ...this.settings, ...notice.params };
      this.bypass = notice.bypass;
      this.#emit("change");
    }
    this.#emit("notice", notice);
  }

  /** @param {ConnectionLost} lost */
  #onLost(lost) {
    const epoch = this.#epoch;
    const wasOpen = this.connection?.agreedFps != null;
    this.#disconnect();
    if (lost.code === "no_media_path") {
      this.overSocket = true;
      this.#told = lost.message;
      this.#emit("notice", { type: "notice", code: "over_socket", message: "This network lets no video call through: going on over the web connection, without sound." });
      this.#connect(epoch);
      return;
    }
    // Where a socket cannot even be opened, the other way is tried again.
    if (lost.code === "server_gone" && !wasOpen) this.overSocket = false;
    if (!lost.retryable) {
      this.#dropSource();
      this.problem = { code: lost.code, title: "The server refused", message: lost.message };
      this.#set("failed");
      return;
    }
    const full = lost.code === "full";
    const backoff = BACKOFF_S[Math.min(this.#attempt++, BACKOFF_S.length - 1)];
    const delayS = (lost.retryAfterS ?? (full ? FULL_RETRY_S : backoff)) * (1 + RETRY_JITTER * Math.random());
    this.problem = full
      ? { code: "full", title: "The server is full", message: `${fullStop(lost.message)} This page tries again by itself, about when a seat is expected to be free.` }
      : { code: lost.code, title: "The server is gone", message: `${fullStop(lost.message)} This page reconnects by itself and keeps your settings.` };
    this.retryAt = performance.now() + delayS * 1000;
    this.#retryTimer = setTimeout(() => this.#connect(epoch), delayS * 1000);
    this.#set(full ? "waiting" : "reconnecting");
  }

  /** @param {State} state */
  #set(state) {
    if (state !== "reconnecting" && state !== "waiting") this.retryAt = null;
    if (state === "live") this.loading = null;
    this.state = state;
    this.#emit("change");
  }

  #emit(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}

/** A server's message as a sentence, so that another can follow. @param {string} text */
function fullStop(text) {
  const sentence = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(sentence) ? sentence : `${sentence}.`;
}

/** @returns {Promise<{ready: boolean, stage: string, percent: number} | null>} null when nobody answers */
export async function readReadiness() {
  try {
    return await (await fetch("/readyz")).json();
  } catch {
    return null;
  }
}
