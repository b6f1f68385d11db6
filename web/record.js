// Recording on the server's disk, where its operator lets sessions be recorded: a button, what to record, how it goes.

import { authorizedFetch } from "./access.js";

const CHOICES = [
  ["Painted picture", ["output"]],
  ["Camera", ["input"]],
  ["Painted picture and camera", ["output", "input"]],
  ["For an exact replay", ["session"]],
];

/** Whether the server records at all. */
export async function recordingIsOffered() {
  try {
    const response = await authorizedFetch("/api/v1/version");
    return response.ok && (await response.json()).recordings === true;
  } catch {
    return false;
  }
}

/** The control; hidden where nothing can be recorded. */
export class RecordControl {
  #live;
  #button = document.createElement("button");
  #what = document.createElement("select");
  #note = document.createElement("p");
  #running = false;

  /** @param {HTMLElement} root @param {import("./livebrush.js").Livebrush} live */
  constructor(root, live) {
    this.#live = live;
    Object.assign(this.#button, { type: "button", id: "record", className: "button quiet grow" });
    this.#button.addEventListener("click", () => this.#press());
    this.#what.className = "button quiet";
    this.#what.setAttribute("aria-label", "What to record");
    for (const [text] of CHOICES) this.#what.append(Object.assign(document.createElement("option"), { textContent: text }));
    this.#note.className = "note";
    this.#note.setAttribute("role", "status");
    const row = Object.assign(document.createElement("div"), { className: "row" });
    row.append(this.#button, this.#what);
    root.append(row, this.#note);
    live.on("notice", (notice) => notice.code === "recording" && this.#onNotice(notice));
    // The server tells a page that comes back whether its session is still being recorded.
    live.on("connection", () => this.#show(false));
    live.on("change", () => this.#show(this.#running));
    this.#show(false);
    recordingIsOffered().then((offered) => (root.hidden = !offered));
  }

  async #press() {
    this.#button.disabled = true;
    try {
      if (this.#running) await this.#live.stopRecording();
      else await this.#live.record(CHOICES[this.#what.selectedIndex][1]);
    } catch (error) {
      this.#note.textContent = error.message;
    } finally {
      this.#show(this.#running);
    }
  }

  #onNotice({ message, recording, name, bytes, pictures_dropped: dropped }) {
    const size = recording ? "" : ` ${name ?? ""}, ${(bytes / 1e6).toFixed(1)} MB`;
    const lost = dropped ? `, ${dropped} pictures left out` : "";
    this.#note.textContent = name ? `${message}${size}${lost}` : message;
    this.#show(recording);
  }

  #show(running) {
    this.#running = running;
    this.#button.textContent = running ? "Stop recording" : "Record";
    this.#button.setAttribute("aria-pressed", String(running));
    this.#button.disabled = !this.#live.session.connection;
    this.#what.disabled = running;
  }
}
