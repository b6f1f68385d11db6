// The scene list: styles with the time they stay and the time they take over in. The server plays it (docs/steering.md);
// this panel writes it, keeps it in the browser, and shows where it is.

const STORED_AS = "livebrush.scenes";
const MAX_SCENES = 64;
const MAX_FILE_BYTES = 200_000;
const FIRST_HOLD_S = 20;
const FIRST_TRANSITION_S = 2;
const TICK_MS = 500;

/** @typedef {{name?: string, prompt?: string, hold_s?: number, transition_s?: number}} Scene and any other parameter */

/**
 * A scene list from the text of a file. What the server would refuse is its to say; here it must be a list.
 * @param {string} text @returns {{scenes: Scene[], loop: boolean}}
 */
export function readSceneList(text) {
  let read;
  try {
    read = JSON.parse(text);
  } catch (error) {
    throw new Error(`This file is no JSON: ${error.message}`, { cause: error });
  }
  const { scenes, loop = false } = Array.isArray(read) ? { scenes: read } : read ?? {};
  const isScene = (scene) => scene !== null && typeof scene === "object" && !Array.isArray(scene);
  if (!Array.isArray(scenes) || !scenes.length || scenes.length > MAX_SCENES || !scenes.every(isScene)) {
    throw new Error(`This file has no scenes: it needs {"scenes": [1 to ${MAX_SCENES} scenes], "loop": false}.`);
  }
  return { scenes, loop: Boolean(loop) };
}

/** The panel. */
export class ScenePanel {
  #live;
  #list = stored();
  /** What the server was given, as text: an edited list has to be given anew. */
  #loaded = "";
  /** The server's word on where the list stands, and when it said so. */
  #scene = null;
  #heardAt = 0;
  #rows = document.createElement("ol");
  #status = document.createElement("p");
  #loop = document.createElement("input");

  /** @param {HTMLElement} root @param {import("./livebrush.js").Livebrush} live */
  constructor(root, live) {
    this.#live = live;
    this.#rows.className = "scene-rows";
    this.#status.className = "note";
    this.#status.setAttribute("role", "status");
    const file = Object.assign(document.createElement("input"), { type: "file", accept: ".json,application/json", hidden: true });
    file.addEventListener("change", () => this.#import(file));
    Object.assign(this.#loop, { type: "checkbox", checked: this.#list.loop });
    this.#loop.addEventListener("change", () => this.#change({ loop: this.#loop.checked }));
    const loop = document.createElement("label");
    loop.append(this.#loop, " Loop");
    root.append(
      row(button("Play", () => this.play()), button("Stop", () => this.stop()), button("Previous", () => this.go("previous")),
        button("Next", () => this.go("next")), loop),
      this.#rows,
      row(button("Add this style", () => this.add()), button("Import", () => file.click()), button("Export", () => this.#export())),
      this.#status, file,
    );
    live.on("params", (notice) => this.#onParams(notice));
    // A session that goes on over another connection tells again where its list stands.
    live.on("connection", () => this.#onParams({ scene: null }));
    setInterval(() => this.#show(), TICK_MS);
    this.#render();
  }

  /** Adds what is painted now as a scene. */
  add() {
    const { prompt, blend, strength } = this.#live.session.settings;
    const words = blend.length ? { blend } : { prompt };
    const scene = { ...words, strength, hold_s: FIRST_HOLD_S, transition_s: FIRST_TRANSITION_S };
    this.#change({ scenes: [...this.#list.scenes, scene].slice(0, MAX_SCENES) });
    this.#render();
  }

  /** Goes on from the scene that stands, or begins with the first. */
  async play() {
    if (this.#isLoaded) await this.#ask(() => this.#live.goToScene("play"));
    else await this.go(0);
  }

  async stop() {
    if (this.#scene) await this.#ask(() => this.#live.goToScene("stop"));
  }

  /** @param {number | "next" | "previous"} where a number counts from 0 */
  async go(where) {
    const { scenes } = this.#list;
    if (!scenes.length) return this.#say("There are no scenes yet: choose a style, then Add this style.");
    if (this.#isLoaded) return this.#ask(() => this.#live.goToScene(where));
    const step = { next: 1, previous: -1 }[where];
    const begin = step === undefined ? where : this.#scene ? this.#scene.index + step : 0;
    if (begin < 0 || begin >= scenes.length) return this.#say(`There is no scene ${begin + 1}.`);
    const text = JSON.stringify(this.#list);
    await this.#ask(async () => {
      await this.#live.loadScenes(scenes, { loop: this.#list.loop, begin });
      this.#loaded = text;
    });
    return undefined;
  }

  get #isLoaded() {
    const stands = this.#scene?.count === this.#list.scenes.length;
    return stands && this.#loaded === JSON.stringify(this.#list);
  }

  async #ask(call) {
    if (!this.#live.session.connection) return this.#say("Start a source first.");
    try {
      await call();
      this.#say("");
    } catch (error) {
      this.#say(error.message);
    }
    return undefined;
  }

  #say(text) {
    this.#status.textContent = text;
  }

  #onParams({ scene }) {
    this.#scene = scene ?? null;
    this.#heardAt = performance.now();
    this.#show();
  }

  /** Which row stands, and for how long still. */
  #show() {
    const left = this.#scene?.left_s;
    const rest = left == null ? null : Math.max(0, Math.round(left - (performance.now() - this.#heardAt) / 1000));
    [...this.#rows.children].forEach((item, index) => {
      const stands = index === this.#scene?.index;
      item.toggleAttribute("data-stands", stands);
      item.querySelector("output").textContent = stands && rest !== null ? `${rest} s` : "";
    });
  }

  // --- the list itself

  #change(part) {
    this.#list = { ...this.#list, ...part };
    localStorage.setItem(STORED_AS, JSON.stringify(this.#list));
  }

  #edit(index, part) {
    this.#change({ scenes: this.#list.scenes.map((scene, n) => (n === index ? without({ ...scene, ...part }) : scene)) });
  }

  #render() {
    this.#rows.replaceChildren(...this.#list.scenes.map((scene, index) => this.#row(scene, index)));
    this.#show();
  }

  #row(scene, index) {
    const item = document.createElement("li");
    const words = scene.blend ? scene.blend.map(({ text }) => text).join(" + ") : scene.prompt ?? "";
    const prompt = input("text", words, `Style of scene ${index + 1}`, (text) => this.#edit(index, { prompt: text, blend: undefined }));
    const number = (name, label) => {
      const edit = (text) => this.#edit(index, { [name]: text === "" ? undefined : Number(text) });
      const made = input("number", scene[name] ?? "", `${label} of scene ${index + 1}, in seconds`, edit);
      Object.assign(made, { min: 0, step: "any", title: label });
      return made;
    };
    const remove = button("×", () => {
      this.#change({ scenes: this.#list.scenes.filter((_, n) => n !== index) });
      this.#render();
    });
    remove.setAttribute("aria-label", `Remove scene ${index + 1}`);
    const go = button(String(index + 1), () => this.go(index));
    go.setAttribute("aria-label", `Go to scene ${index + 1}`);
    if (scene.name) go.title = scene.name;
    const times = document.createElement("p");
    times.append("fades in", number("transition_s", "Takes over in"), "s, stays", number("hold_s", "Stays"), "s",
      document.createElement("output"));
    item.append(go, prompt, remove, times);
    return item;
  }

  async #import(file) {
    const [chosen] = file.files;
    file.value = "";
    if (!chosen) return;
    try {
      if (chosen.size > MAX_FILE_BYTES) throw new Error(`This file is over ${MAX_FILE_BYTES / 1000} kB, too large for scenes.`);
      this.#change(readSceneList(await chosen.text()));
      this.#loop.checked = this.#list.loop;
      this.#render();
      this.#say(`${this.#list.scenes.length} scenes imported.`);
    } catch (error) {
      this.#say(error.message);
    }
  }

  #export() {
    const text = JSON.stringify(this.#list, null, 2);
    const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    Object.assign(document.createElement("a"), { href: url, download: "livebrush-scenes.json" }).click();
    setTimeout(() => URL.revokeObjectURL(url));
  }
}

/** Without the fields that are undefined. */
function without(scene) {
  return Object.fromEntries(Object.entries(scene).filter(([, value]) => value !== undefined));
}

function stored() {
  try {
    return readSceneList(localStorage.getItem(STORED_AS));
  } catch {
    return { scenes: [], loop: false };
  }
}

function input(type, value, label, onchange) {
  const made = Object.assign(document.createElement("input"), { type, value });
  made.setAttribute("aria-label", label);
  made.addEventListener("change", () => onchange(made.value));
  return made;
}

function button(text, onclick) {
  return Object.assign(document.createElement("button"), { type: "button", className: "button quiet", textContent: text, onclick });
}

function row(...parts) {
  const made = document.createElement("p");
  made.className = "row";
  made.append(...parts);
  return made;
}
