// Web MIDI: controllers move sliders, notes choose scenes. What controls what is learned by touching it.

const STORED_AS = "livebrush.midi";
const NOTE_ON = 0x90;
const CONTROL_CHANGE = 0xb0;
const MOST = 127;
// The lowest pad of most pad controllers.
const FIRST_SCENE_NOTE = 36;
const SCENE_NOTES = 16;

/**
 * @typedef {{kind: "cc" | "note", number: number}} Touch what was moved or pressed, on whatever channel
 * @typedef {{name: string, text: string, follow: (value: number) => void, fader: boolean}} Target
 *   follow: takes 0 to 1. fader: moved; else pressed, by a note or by a controller that passes the half
 */

/** What a message touches, and how far; null for everything else. @param {Uint8Array} bytes */
export function parseMidi([status, number, value]) {
  const kind = { [CONTROL_CHANGE]: "cc", [NOTE_ON]: "note" }[status & 0xf0];
  // A note on without velocity is a note off.
  if (!kind || value === undefined || (kind === "note" && value === 0)) return null;
  return { kind, number, value: value / MOST };
}

/** Which touch moves which target. No I/O: a test needs no device. */
export class MidiMap {
  /** The target that the next touch is for, or null. @type {string | null} */
  learning = null;
  /** @type {Record<string, Touch>} */
  touches;
  #targets;
  #last = new Map();

  /** @param {Target[]} targets @param {Record<string, Touch>} touches by target name */
  constructor(targets, touches) {
    this.#targets = targets;
    this.touches = { ...touches };
  }

  /** Follows a message, or learns it; returns whether the map has changed. @param {Uint8Array} bytes */
  take(bytes) {
    const touch = parseMidi(bytes);
    if (!touch) return false;
    const { kind, number, value } = touch;
    if (this.learning !== null) {
      const free = Object.entries(this.touches).filter(([, old]) => old.kind !== kind || old.number !== number);
      this.touches = { ...Object.fromEntries(free), [this.learning]: { kind, number } };
      this.learning = null;
      return true;
    }
    const id = `${kind} ${number}`;
    const before = this.#last.get(id) ?? 0;
    this.#last.set(id, value);
    for (const target of this.#targets) {
      const mapped = this.touches[target.name];
      if (mapped?.kind !== kind || mapped.number !== number) continue;
      if (target.fader || kind === "note" || (before < 0.5 && value >= 0.5)) target.follow(value);
    }
    return false;
  }
}

/** What is mapped before anything is learned: modulation wheel, breath, and sixteen pads. */
export function firstTouches() {
  const scenes = Array.from({ length: SCENE_NOTES }, (_, n) => [`scene ${n}`, { kind: "note", number: FIRST_SCENE_NOTE + n }]);
  return { strength: { kind: "cc", number: 1 }, mix: { kind: "cc", number: 2 }, ...Object.fromEntries(scenes) };
}

/** The panel: a button that asks for the devices, and a row with "Learn" for each target. */
export class MidiPanel {
  #map;
  #root;
  #targets;
  #status = document.createElement("p");
  #rows = document.createElement("div");

  /**
   * @param {HTMLElement} root
   * @param {Target[]} targets
   * @param {(index: number) => void} goToScene
   */
  constructor(root, targets, goToScene) {
    const scenes = Array.from({ length: SCENE_NOTES }, (_, n) => ({
      name: `scene ${n}`,
      text: `Scene ${n + 1}`,
      fader: false,
      follow: () => goToScene(n),
    }));
    this.#root = root;
    this.#targets = [...targets, ...scenes];
    this.#map = new MidiMap(this.#targets, stored() ?? firstTouches());
    const connect = button("Connect MIDI", () => this.#connect(connect));
    this.#status.className = "note";
    this.#status.setAttribute("role", "status");
    this.#rows.className = "midi-rows";
    root.append(connect, this.#status, this.#rows);
    if (!navigator.requestMIDIAccess) {
      connect.disabled = true;
      this.#status.textContent = "This browser has no Web MIDI; Chrome, Edge and Firefox have.";
    }
  }

  async #connect(connect) {
    let access;
    try {
      access = await navigator.requestMIDIAccess({ sysex: false });
    } catch (error) {
      this.#status.textContent = `MIDI cannot be used: allow it in the address bar. (${error.message})`;
      return;
    }
    connect.remove();
    const listen = () => {
      const inputs = [...access.inputs.values()];
      for (const input of inputs) input.onmidimessage = ({ data }) => this.#take(data);
      this.#status.textContent = inputs.length
        ? `Listening to ${inputs.map(({ name }) => name ?? "a device").join(", ")}.`
        : "No MIDI device is here; plug one in.";
    };
    access.onstatechange = listen;
    listen();
    this.#render();
  }

  #take(data) {
    if (!this.#map.take(data)) return;
    localStorage.setItem(STORED_AS, JSON.stringify(this.#map.touches));
    this.#render();
  }

  #render() {
    this.#rows.replaceChildren(...this.#targets.map(({ name, text, fader }) => {
      const row = document.createElement("p");
      const touch = this.#map.touches[name];
      const isLearning = this.#map.learning === name;
      const learn = button(isLearning ? (fader ? "Move it…" : "Press it…") : "Learn", () => {
        this.#map.learning = isLearning ? null : name;
        this.#render();
      });
      learn.setAttribute("aria-pressed", String(isLearning));
      learn.setAttribute("aria-label", `Learn ${text}`);
      const label = document.createElement("span");
      label.textContent = text;
      const mapped = document.createElement("output");
      mapped.textContent = touch ? `${touch.kind === "cc" ? "CC" : "note"} ${touch.number}` : "";
      row.append(label, mapped, learn);
      return row;
    }));
  }
}

function button(text, onclick) {
  return Object.assign(document.createElement("button"), { type: "button", className: "button quiet", textContent: text, onclick });
}

function stored() {
  try {
    const touches = JSON.parse(localStorage.getItem(STORED_AS));
    const sound = ({ kind, number }) => ["cc", "note"].includes(kind) && Number.isInteger(number);
    return touches && Object.values(touches).every(sound) ? touches : null;
  } catch {
    return null;
  }
}
