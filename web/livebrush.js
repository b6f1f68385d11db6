// Livebrush for other pages: `connect` opens a session that reconnects by itself (docs/steering.md has examples).
// The page of Livebrush is its first user. Served by the same server; it asks for no other origin.

import { authorizedFetch } from "./access.js";
import { LiveSession } from "./session.js";

// A message of the data channel ends at 8 KiB; longer lists go by REST.
const MAX_LIST_BYTES = 8_000;

/**
 * One person's session, over as many connections as it takes.
 *
 * Events, by `on`: "telemetry" (the server's `stats`, twice a second), "notice" and "params" (docs/protocol.md; params:
 * somebody else changed what is painted: REST, OSC or the scene list), "track" (a MediaStreamTrack to show), "change"
 * (the state), "connection" (a new one).
 */
export class Livebrush {
  #connection = null;

  /** @param {LiveSession} session */
  constructor(session = new LiveSession()) {
    this.session = session;
    session.addEventListener("notice", ({ detail }) => detail.code === "params_changed" && this.#onParams(detail));
    session.addEventListener("answer", ({ detail }) => detail.resumed || this.#reload());
    session.addEventListener("change", () => this.#onChange());
  }

  /** idle, asking, connecting, loading, live, reconnecting, waiting, stopped or failed. */
  get state() {
    return this.session.state;
  }

  /** What is wrong, and the cure, or null. */
  get problem() {
    return this.session.problem;
  }

  /** What is wished: prompt, blend, transition_s, strength, steps, seed. */
  get settings() {
    return { ...this.session.settings };
  }

  /**
   * Starts, or changes the source of the running session.
   * @param {"camera" | "screen" | "clip" | "file" | "stream"} kind
   * @param {{microphone?: boolean, file?: File, stream?: MediaStream}} options stream: your own, with "stream"
   */
  start(kind = "camera", options = {}) {
    return this.session.start(kind, options);
  }

  /** Ends the session and frees its seat. */
  stop() {
    this.session.stop();
  }

  /** Changes what is given; resolves with the server's ack, rejects with what it refused. */
  set(change) {
    return this.session.set(change);
  }

  /** @param {string} prompt @param {number} transitionS seconds over which it takes over; without: as before */
  setPrompt(prompt, transitionS) {
    return this.set({ prompt, ...(transitionS === undefined ? {} : { transition_s: transitionS }) });
  }

  /** @param {boolean} on show the camera as it is */
  bypass(on) {
    return this.session.setBypass(on);
  }

  /**
   * Loads a scene list, which the server plays from then on.
   * @param {object[]} scenes each with what it sets, and hold_s @param {{loop?: boolean, begin?: number}} options
   * @returns {Promise<object>} `params` and more, once it has begun
   */
  async loadScenes(scenes, { loop = false, begin = 0 } = {}) {
    const list = { scenes, loop, begin };
    const body = JSON.stringify(list);
    this.#list = { scenes, loop, scene: null };
    if (new TextEncoder().encode(body).length <= MAX_LIST_BYTES) return this.#request("scenes", list);
    const url = `/api/v1/sessions/${this.#connected.session}/scenes`;
    const response = await authorizedFetch(url, { method: "PUT", headers: { "Content-Type": "application/json" }, body });
    const answer = await response.json();
    if (!response.ok) throw new Error(answer.message);
    return answer;
  }

  /** @param {number | "next" | "previous" | "play" | "stop"} where a number counts from 0 */
  goToScene(where) {
    return this.#request("scene", { go: where });
  }

  /**
   * Begins a recording on the server's disk; how it goes comes as notices with the code "recording".
   * @param {("input" | "output" | "session")[]} what
   */
  record(what = ["output"]) {
    return this.#request("record", { on: true, what });
  }

  /** Ends the recording. */
  stopRecording() {
    return this.#request("record", { on: false });
  }

  /** The figures of picture, delay and deadlines. */
  stats(options) {
    return this.session.stats(options);
  }

  /** Calls `listener` with every such event; returns a function that ends that. */
  on(type, listener) {
    const target = ["track", "notice"].includes(type) ? this.session : this.#events;
    const handle = ({ detail }) => listener(detail);
    target.addEventListener(type, handle);
    return () => target.removeEventListener(type, handle);
  }

  #events = new EventTarget();
  /** The scene list loaded here and the scene that stands. @type {{scenes: object[], loop: boolean, scene: object | null} | null} */
  #list = null;

  #onParams(notice) {
    if (this.#list && "scene" in notice) this.#list.scene = notice.scene;
    this.#emit("params", notice);
  }

  /** A session that was moved to another server begins without its list: it goes on with the scene that stood. */
  async #reload() {
    const { scenes, loop, scene } = this.#list ?? {};
    if (scene?.count !== scenes?.length || !scene) return;
    try {
      await this.loadScenes(scenes, { loop, begin: scene.index });
      if (scene.left_s === null) await this.goToScene("stop");
    } catch {
      // What the scene had set was in the offer; the list can be loaded by hand.
    }
  }

  async #request(type, fields) {
    return this.#connected.request(type, fields);
  }

  get #connected() {
    if (!this.session.connection) throw new Error("There is no connection: start a source first.");
    return this.session.connection;
  }

  #onChange() {
    const { connection, active } = this.session;
    if (!active) this.#list = null;
    if (connection !== this.#connection) {
      this.#connection = connection;
      connection?.addEventListener("stats", ({ detail }) => this.#emit("telemetry", detail));
      this.#emit("connection", connection);
    }
    this.#emit("change", this.state);
  }

  #emit(type, detail) {
    this.#events.dispatchEvent(new CustomEvent(type, { detail }));
  }
}

/**
 * Opens a session.
 * @param {object} options
 * @param {string} options.source camera, screen, clip, file or stream
 * @param {MediaStream} options.stream your own pictures, with source "stream"
 * @param {HTMLVideoElement} options.video shows the painted picture
 * @param {object} options.params what to paint: prompt, strength, seed, ... (docs/protocol.md)
 * @returns {Promise<Livebrush>} once the source is open and the offer is on its way; `problem` says what went wrong
 */
export async function connect({ source = "camera", stream, video, params = {} } = {}) {
  const live = new Livebrush();
  if (video) {
    const shown = new MediaStream();
    live.on("track", (track) => {
      if (track.kind !== "video") return;
      for (const old of shown.getTracks()) shown.removeTrack(old);
      shown.addTrack(track);
      video.srcObject = shown;
    });
  }
  await live.set(params);
  await live.start(source, { stream });
  return live;
}
