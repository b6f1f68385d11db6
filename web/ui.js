// The page's elements: what is pressed becomes a call on the session, what the session says becomes text and picture.

import { readReadiness } from "./session.js";
import { showDetails, verdict, verdictTone } from "./verdict.js";

const PROMPT_PAUSE_MS = 700;
const SLIDER_PERIOD_MS = 120;
const HOLD_MS = 350;
const REFRESH_MS = 500;
const READY_POLL_MS = 1_000;
const SEED_LIMIT = 2 ** 31;
const HERO_TILES = 8;
const NOTICE_MS = 8_000;
// Below this score a style is only the nearest there is.
const WEAK_MATCH = 0.5;
// What a person is told in passing; the rest of the server's notices show in the state and over the picture.
const NOTICES = ["rate_changed", "rung_changed", "engine_back", "model_fault", "over_socket"];
const PHONE = "(max-width: 760px)";

const STATES = {
  idle: ["Not started", "idle"],
  asking: ["Waiting for the source…", "busy"],
  connecting: ["Connecting…", "busy"],
  loading: ["Model loading", "busy"],
  live: ["Live", "live"],
  reconnecting: ["Reconnecting", "bad"],
  waiting: ["Server full", "bad"],
  stopped: ["Stopped", "idle"],
  failed: ["Not running", "bad"],
};

const $ = (id) => document.getElementById(id);

/** Binds the page to a session and keeps it up to date. */
export class Ui {
  #session;
  #styles = [];
  #promptTimer = 0;
  #sliderTimer = 0;
  #pendingSliders = {};
  #noticeTimer = 0;
  #remote = new MediaStream();
  #lastKind = "camera";
  #lastFile = null;
  #viewFollowsWidth = true;
  /** Whether two styles are being mixed; the second one, once chosen. */
  #mixing = false;
  #second = null;

  /** @param {import("./session.js").LiveSession} session */
  constructor(session) {
    this.#session = session;
    this.#bindSession();
    this.#bindSources();
    this.#bindStyle();
    this.#bindPicture();
    setInterval(() => this.#refresh(), REFRESH_MS);
    this.setView(matchMedia(PHONE).matches ? "split" : "side");
    this.#render();
  }

  // --- what the session says

  #bindSession() {
    const session = this.#session;
    session.addEventListener("change", () => this.#render());
    session.addEventListener("track", ({ detail: track }) => this.#showRemote(track));
    session.addEventListener("source", ({ detail: source }) => this.#showSource(source));
    session.addEventListener("ack", ({ detail: ack }) => this.#showAck(ack));
    session.addEventListener("notice", ({ detail: notice }) => this.#showNotice(notice));
  }

  #showRemote(track) {
    if (track.kind === "audio") {
      $("audio").srcObject = new MediaStream([track]);
      this.#applySound();
      return;
    }
    for (const old of this.#remote.getTracks()) this.#remote.removeTrack(old);
    this.#remote.addTrack(track);
    // Not before there is a track: an empty stream would hold back the page's load event.
    $("restyled").srcObject = this.#remote;
    this.#watchFrames();
  }

  /** Every shown frame goes to the meter of the connection it came over. */
  #watchFrames() {
    const video = $("restyled");
    const { connection } = this.#session;
    if (!video.requestVideoFrameCallback || !connection) return;
    const onFrame = (now, metadata) => {
      if (connection !== this.#session.connection) return;
      connection.meter.onFrame(now, metadata);
      document.body.dataset.picture = "yes";
      video.requestVideoFrameCallback(onFrame);
    };
    video.requestVideoFrameCallback(onFrame);
  }

  #showSource(source) {
    $("original").srcObject = source ? new MediaStream(source.stream.getVideoTracks()) : null;
    for (const button of document.querySelectorAll(".source")) {
      button.setAttribute("aria-pressed", String(button.dataset.source === source?.kind));
    }
    if (source) this.#lastKind = source.kind;
    $("microphone-switch").hidden = Boolean(source) && source.kind !== "camera";
    $("sound-switch").hidden = !source || source.kind === "camera" || !source.hasSound;
    this.#applyMirror();
    this.#applySound();
  }

  #showAck(ack) {
    const { params, first_frame: frame } = ack;
    const words = params.blend?.length ? params.blend.map(({ text }) => text).join(" + ") : params.prompt || "unstyled";
    this.#note(frame === null ? "Noted." : `“${words}” since frame ${frame}.`);
    const understood = understoodAs(ack);
    // An ack without a picture says nothing new.
    if (frame !== null) {
      setText($("understood"), understood);
      $("understood").hidden = !understood;
    }
  }

  #showNotice(notice) {
    if (notice.type === "error") this.#note(notice.message);
    if (!NOTICES.includes(notice.code)) return;
    clearTimeout(this.#noticeTimer);
    setText($("notice"), notice.message);
    this.#noticeTimer = setTimeout(() => setText($("notice"), ""), NOTICE_MS);
  }

  #note(text) {
    $("prompt-note").textContent = text;
  }

  // --- rendering

  #render() {
    const session = this.#session;
    const { state, problem, settings } = session;
    document.body.dataset.state = state;
    if (!session.active || state === "asking") delete document.body.dataset.picture;
    $("hero").hidden = session.active || Boolean(problem);
    $("stop").hidden = !session.active;
    $("problem").hidden = !problem;
    if (problem) {
      setText($("problem-title"), problem.title);
      setText($("problem-text"), problem.message);
      $("problem-retry").textContent = session.active ? "Try now" : "Try again";
      $("problem-clip").hidden = session.active || problem.code === "no_video" && this.#lastKind === "clip";
    }
    $("problem").classList.toggle("slim", Boolean(problem) && session.active);
    if (document.activeElement !== $("prompt")) $("prompt").value = settings.prompt;
    if (!this.#sliderTimer) {
      $("strength").value = settings.strength;
      $("steps").value = settings.steps;
      $("transition").value = settings.transition_s;
    }
    this.#showSliders();
    this.#showLoading();
    this.#showMix();
    $("bypass").setAttribute("aria-pressed", String(session.bypass));
    setText($("restyled-caption"), this.#caption());
    this.#keepMoving();
    for (const tile of $("styles").children) {
      tile.setAttribute("aria-pressed", String(tile.dataset.prompt === settings.prompt));
      tile.toggleAttribute("data-second", this.#second !== null && tile.dataset.prompt === this.#second);
    }
    this.#refresh();
  }

  /** Over the camera while the model loads; it fades away with the last text it had. */
  #showLoading() {
    const { state, loading } = this.#session;
    const shown = state === "loading" && loading !== null;
    $("loading").classList.toggle("on", shown);
    if (!shown) return;
    $("loading").classList.toggle("trouble", loading.percent === null);
    setText($("loading-text"), loading.message.split(";")[0]);
    setText($("loading-percent"), loading.percent === null ? "" : `${loading.percent} %`);
    $("loading-bar").style.width = `${loading.percent ?? 0}%`;
  }

  #showSliders() {
    setText($("strength-value"), `${Math.round($("strength").value * 100)} %`);
    setText($("steps-value"), $("steps").value);
    const seconds = Number($("transition").value);
    setText($("transition-value"), seconds ? `in ${seconds} s` : "at once");
  }

  #showMix() {
    $("mix").setAttribute("aria-pressed", String(this.#mixing));
    $("mix-row").hidden = this.#second === null;
    const share = Number($("mix-share").value);
    setText($("mix-value"), `${Math.round(share * 100)} %`);
    if (this.#second !== null) {
      const [one, two] = [this.#session.settings.prompt, this.#second].map((prompt) => this.#nameOf(prompt));
      setText($("mix-names"), `${one} with ${two}`);
    }
  }

  #nameOf(prompt) {
    return this.#styles.find((style) => style.prompt === prompt)?.name ?? (prompt || "unstyled");
  }

  #caption() {
    const { state, bypass, connection, source, server } = this.#session;
    if (bypass) return "Original (painting is off)";
    if (state === "loading" || (connection && server?.state === "withheld")) return "Camera";
    return !connection && source ? "Camera, until the server is back" : "Painted";
  }

  /** Where the server is gone, the source itself stands in: the picture never freezes. */
  #keepMoving() {
    const { connection, source } = this.#session;
    const video = $("restyled");
    if (connection || !source || video.srcObject === $("original").srcObject) return;
    video.srcObject = $("original").srcObject;
  }

  /** What changes by itself: state text, verdict, details. */
  #refresh() {
    const session = this.#session;
    const [text, tone] = STATES[session.state];
    const chip = $("state");
    setText(chip, this.#stateText(text));
    chip.dataset.tone = session.state === "loading" && session.loading?.percent == null ? "bad" : tone;
    const stats = session.stats();
    setText($("verdict-text"), verdict(stats));
    $("verdict").dataset.tone = verdictTone(stats);
    if ($("details").open) showDetails(stats, session.connection, session.server);
  }

  #stateText(text) {
    const { state, loading, retryAt, bypass, server } = this.#session;
    if (state === "loading") return loading?.percent == null ? "Model not running" : `${text} ${loading.percent} %`;
    if (retryAt !== null) return `${text} · again in ${Math.max(0, Math.ceil((retryAt - performance.now()) / 1000))} s`;
    if (state === "live" && bypass) return "Live, showing the original";
    if (state === "live" && server?.state === "fading") return "Live, fading in";
    if (state === "live" && server?.state === "withheld") {
      return server.rung?.camera ? "Live, camera until the server has room" : "Live, showing the camera";
    }
    return text;
  }

  // --- sources

  #bindSources() {
    for (const button of document.querySelectorAll("[data-source]")) {
      button.addEventListener("click", () => this.#choose(button.dataset.source));
    }
    $("file").addEventListener("change", () => {
      const [file] = $("file").files;
      $("file").value = "";
      if (file) this.#start("file", file);
    });
    $("stop").addEventListener("click", () => this.#session.stop());
    $("problem-retry").addEventListener("click", () => this.#choose(this.#lastKind, this.#lastFile));
    $("problem-clip").addEventListener("click", () => this.#choose("clip"));
    $("microphone").addEventListener("change", () => this.#setMicrophone($("microphone").checked));
    $("sound").addEventListener("change", () => this.#applySound());
  }

  #choose(kind) {
    if (kind === "file") $("file").click();
    else this.#start(kind);
  }

  #start(kind, file) {
    this.#lastKind = kind;
    this.#lastFile = file ?? null;
    this.#session.start(kind, { file, microphone: $("microphone").checked });
  }

  async #setMicrophone(on) {
    this.#applySound();
    try {
      await this.#session.setMicrophone(on);
    } catch (error) {
      $("microphone").checked = false;
      this.#applySound();
      this.#note(`${error.title}. ${error.message}`);
    }
  }

  /** What comes back is heard only where sound was chosen: a camera's own microphone would howl. */
  #applySound() {
    const kind = this.#session.source?.kind;
    const wanted = kind === "camera" ? $("microphone").checked : $("sound").checked && Boolean(this.#session.source?.hasSound);
    $("audio").muted = !wanted;
    if (wanted && $("audio").srcObject) $("audio").play().catch(() => this.#note("Press anywhere on the page to hear the sound."));
  }

  // --- style

  /** @param {{id: string, name: string, prompt: string, thumbnail?: string}[]} styles */
  setStyles(styles, stepsMax, seedShows = true) {
    this.#styles = styles;
    $("seed").hidden = !seedShows;
    $("styles-field").hidden = !styles.length;
    $("styles").replaceChildren(...styles.map((style, index) => this.#tile(style, index)));
    $("hero-tiles").replaceChildren(...styles.slice(0, HERO_TILES).map((style) => picture(style)));
    $("steps").max = stepsMax;
    this.#render();
  }

  /** The shape of the model's picture is the shape of both panes. */
  setShape(width, height) {
    document.documentElement.style.setProperty("--aspect", String(width / height));
  }

  #tile(style, index) {
    const tile = document.createElement("button");
    tile.type = "button";
    tile.className = "tile";
    tile.dataset.prompt = style.prompt;
    if (index < 9) tile.title = `${style.prompt} (${index + 1})`;
    const name = document.createElement("span");
    name.textContent = style.name;
    tile.append(picture(style), name);
    tile.addEventListener("click", () => this.#choosePrompt(style.prompt));
    return tile;
  }

  #bindStyle() {
    $("prompt-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#applyPrompt();
    });
    $("prompt").addEventListener("input", () => {
      clearTimeout(this.#promptTimer);
      this.#promptTimer = setTimeout(() => this.#applyPrompt(), PROMPT_PAUSE_MS);
    });
    $("strength").addEventListener("input", () => this.#slide({ strength: Number($("strength").value) }));
    $("steps").addEventListener("input", () => this.#slide({ steps: Number($("steps").value) }));
    $("transition").addEventListener("input", () => this.#slide({ transition_s: Number($("transition").value) }));
    $("mix").addEventListener("click", () => this.#toggleMix());
    $("mix-share").addEventListener("input", () => this.#slide({ blend: this.#blend(this.#session.settings.prompt) }));
    $("seed").addEventListener("click", () => this.#apply({ seed: Math.floor(Math.random() * SEED_LIMIT) }));
    this.#bindBypass();
  }

  #applyPrompt() {
    clearTimeout(this.#promptTimer);
    const prompt = $("prompt").value.trim();
    if (prompt !== this.#session.settings.prompt) this.#apply({ prompt, blend: this.#blend(prompt) });
  }

  /** A style is chosen: the one style, or the second of a mix. */
  #choosePrompt(prompt) {
    const { settings } = this.#session;
    if (!this.#mixing) {
      this.#apply({ prompt });
      return;
    }
    this.#second = prompt === settings.prompt ? null : prompt;
    this.#apply({ blend: this.#blend(settings.prompt) });
  }

  #toggleMix() {
    this.#mixing = !this.#mixing;
    const mixed = this.#second !== null;
    this.#second = null;
    if (mixed) this.#apply({ blend: [] });
    this.#note(this.#mixing ? "Choose a second style." : "Enter applies it, so does a pause.");
    this.#render();
  }

  /** What is mixed when `prompt` is the first style; empty where there is no second. */
  #blend(prompt) {
    if (this.#second === null) return [];
    const share = Number($("mix-share").value);
    return [{ text: prompt, weight: 1 - share }, { text: this.#second, weight: share }];
  }

  /** At most one message in SLIDER_PERIOD_MS, and always the last position. */
  #slide(change) {
    Object.assign(this.#pendingSliders, change);
    this.#showSliders();
    this.#showMix();
    this.#sliderTimer ||= setTimeout(() => {
      this.#sliderTimer = 0;
      this.#apply(this.#pendingSliders);
      this.#pendingSliders = {};
    }, SLIDER_PERIOD_MS);
  }

  async #apply(change) {
    if ("prompt" in change) {
      $("prompt").value = change.prompt;
      if (this.#session.active) this.#note("Painting it…");
    }
    try {
      await this.#session.set(change);
    } catch (error) {
      this.#note(error.message);
    }
  }

  /** A short press toggles, a long one shows the original while it lasts. */
  #bindBypass() {
    const button = $("bypass");
    let pressedAt = null;
    button.addEventListener("pointerdown", () => {
      pressedAt = performance.now();
      if (!this.#session.bypass) this.#session.setBypass(true);
      else pressedAt = -Infinity;
    });
    const release = () => {
      if (pressedAt === null) return;
      if (performance.now() - pressedAt > HOLD_MS) this.#session.setBypass(false);
      pressedAt = null;
    };
    button.addEventListener("pointerup", release);
    button.addEventListener("pointercancel", release);
    button.addEventListener("pointerleave", release);
    // A key press comes as a click without a pointer.
    button.addEventListener("click", (event) => event.detail === 0 && this.#toggleBypass());
  }

  #toggleBypass() {
    this.#session.setBypass(!this.#session.bypass);
  }

  // --- picture

  #bindPicture() {
    for (const button of document.querySelectorAll("[data-set-view]")) {
      button.addEventListener("click", () => {
        this.#viewFollowsWidth = false;
        this.setView(button.dataset.setView);
      });
    }
    matchMedia(PHONE).addEventListener("change", ({ matches }) => {
      if (this.#viewFollowsWidth) this.setView(matches ? "split" : "side");
    });
    const split = $("split");
    split.addEventListener("input", () => $("stage").style.setProperty("--split", `${split.value}%`));
    $("mirror").addEventListener("change", () => this.#applyMirror());
    $("snapshot").addEventListener("click", () => this.#snapshot());
    $("fullscreen").addEventListener("click", () => this.#fullscreen());
  }

  /** @param {"side" | "split" | "only"} view */
  setView(view) {
    document.body.dataset.view = view;
    for (const button of document.querySelectorAll("[data-set-view]")) {
      button.setAttribute("aria-pressed", String(button.dataset.setView === view));
    }
  }

  /** A person expects a mirror, a screen or a film its own way round. */
  #applyMirror() {
    const kind = this.#session.source?.kind ?? "camera";
    $("stage").classList.toggle("mirrored", kind === "camera" && $("mirror").checked);
    $("mirror").closest(".switch").hidden = kind !== "camera";
  }

  #snapshot() {
    const video = $("restyled");
    if (!video.videoWidth) return;
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
    const pen = canvas.getContext("2d");
    if ($("stage").classList.contains("mirrored")) pen.setTransform(-1, 0, 0, 1, canvas.width, 0);
    pen.drawImage(video, 0, 0);
    const link = document.createElement("a");
    link.download = `livebrush-${new Date().toISOString().slice(0, 19).replaceAll(":", "-")}.png`;
    link.href = canvas.toDataURL("image/png");
    link.click();
  }

  #fullscreen() {
    if (document.fullscreenElement) document.exitFullscreen();
    else $("stage").requestFullscreen?.();
  }

  // --- for keys.js and midi.js

  toggleBypass() {
    this.#toggleBypass();
  }

  fullscreen() {
    this.#fullscreen();
  }

  snapshot() {
    this.#snapshot();
  }

  /** Another random start for the same style, where the model has seeds. */
  vary() {
    if (!$("seed").hidden) $("seed").click();
  }

  editPrompt() {
    $("prompt").focus();
    $("prompt").select();
  }

  /** @param {number} index of the style's tile, from 0 */
  chooseStyle(index) {
    const style = this.#styles[index];
    if (style) this.#choosePrompt(style.prompt);
  }

  /** Moves the strength slider. @param {number} value 0 to 1 */
  setStrength(value) {
    $("strength").value = Math.min(1, Math.max(0, value));
    this.#slide({ strength: Number($("strength").value) });
  }

  /** @param {number} step added to the strength */
  nudgeStrength(step) {
    this.setStrength(Number($("strength").value) + step);
  }

  /** Moves the slider between two mixed styles, where two are chosen. @param {number} value 0 to 1 */
  setMixShare(value) {
    if (this.#second === null) return;
    const { min, max } = $("mix-share");
    $("mix-share").value = Number(min) + value * (max - min);
    this.#slide({ blend: this.#blend(this.#session.settings.prompt) });
  }

  /** Before the start: whether the model is ready, so that nobody waits without knowing. */
  async showReadiness() {
    const readiness = await readReadiness();
    const text = !readiness ? "The server does not answer." : readiness.ready ? "The model is ready."
      : readiness.stage === "failed" ? `The model failed to load: ${readiness.detail}`
        : `The model is loading: ${readiness.percent} %. You can start already.`;
    setText($("ready"), text);
    if (!readiness?.ready) setTimeout(() => this.showReadiness(), READY_POLL_MS);
  }
}

/** Text is only touched where it changes: screen readers announce every touch of a live region. */
function setText(element, text) {
  if (element.textContent !== String(text)) element.textContent = text;
}

/** What the server took the prompts for, in words; empty where it does not say. */
function understoodAs({ style, styles = style ? [style] : [] }) {
  const words = styles.map(({ name, second, modifiers }) => [second ? `${name} with ${second.name}` : name, ...modifiers].join(", "));
  const weak = styles.map(({ score }) => score < WEAK_MATCH);
  if (!words.length) return "";
  if (words.length === 1) return weak[0] ? `Nearest style: ${words[0]} (weak match)` : `Understood as: ${words[0]}`;
  return `Understood as: ${words.map((text, i) => weak[i] ? `${text} (weak match)` : text).join(" + ")}`;
}

/** A style's thumbnail; a colour of its own where there is none. */
function picture(style) {
  const swatch = document.createElement("i");
  swatch.className = "swatch";
  const hue = [...style.id].reduce((sum, letter) => (sum * 31 + letter.charCodeAt(0)) % 360, 7);
  swatch.style.setProperty("--hue", hue);
  if (!style.thumbnail) return swatch;
  const image = document.createElement("img");
  Object.assign(image, { alt: "", width: 256, height: 256, decoding: "async", src: style.thumbnail });
  image.addEventListener("error", () => image.replaceWith(swatch));
  return image;
}
