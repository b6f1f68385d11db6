// The panel "Use it": addresses to copy for OBS, players, overlays and calls, with tokens where the server asks for them.

import { authorization } from "./access.js";

const STREAM_NAME = /^[A-Za-z0-9_-]{1,64}$/;
// As long as a link can live: an OBS scene is set up once.
const LINK_HOURS = 720;
const COPIED_MS = 1_500;

/**
 * The addresses of a stream.
 * @param {{ origin: string, stream: string, prompt: string, cut: boolean, mirror: boolean,
 *   viewToken: string, publishToken: string }} wanted
 */
export function addresses({ origin, stream, prompt, cut, mirror, viewToken, publishToken }) {
  const overlay = new URLSearchParams({ stream, ...(cut && { alpha: "1" }), ...(mirror && { mirror: "1" }) });
  const style = prompt ? `?${new URLSearchParams({ prompt })}` : "";
  const fragment = (token) => token && `#token=${encodeURIComponent(token)}`;
  const words = (text) => (/^[\w./:-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);
  return {
    whip: `${origin}/whip/${stream}${style}`,
    page: `${origin}/publish.html?${new URLSearchParams({ stream, ...(prompt && { prompt }) })}${fragment(publishToken)}`,
    whep: `${origin}/whep/${stream}`,
    overlay: `${origin}/overlay?${overlay}${fragment(viewToken)}`,
    camera: `${viewToken && `LIVEBRUSH_TOKEN=${viewToken} `}livebrush camera --stream ${stream} --url ${words(origin)}`,
  };
}

/**
 * A link for one stream and role.
 * @returns {Promise<{ token: string, note: string }>} both empty where the server has no tokens; a note says what is wrong
 */
async function link(role, stream) {
  const headers = { "Content-Type": "application/json", ...authorization() };
  const body = JSON.stringify({ role, stream, hours: LINK_HOURS });
  try {
    const response = await fetch("/api/v1/links", { method: "POST", headers, body, signal: AbortSignal.timeout(5_000) });
    const answer = await response.json();
    if (response.ok) {
      const until = new Date(1000 * answer.expires_at_unix_s).toLocaleDateString();
      return { token: answer.token, note: `works until ${until}` };
    }
    if (answer.code === "no_tokens") return { token: "", note: "" };
    return { token: "", note: answer.detail ?? `the server answered ${response.status}` };
  } catch {
    return { token: "", note: "the server does not answer" };
  }
}

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

async function copy(field, button) {
  try {
    await navigator.clipboard.writeText(field.value);
  } catch {
    // Without HTTPS a browser keeps its clipboard from pages, but for this old way.
    field.select();
    document.execCommand("copy");
  }
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = "Copy"), COPIED_MS);
}

class Panel {
  #rows = {};
  #name = element("input", { type: "text", value: "studio", maxLength: 64, spellcheck: false, autocomplete: "off", id: "use-stream" });
  #cut = element("input", { type: "checkbox", id: "use-cut" });
  #mirror = element("input", { type: "checkbox", id: "use-mirror" });
  #note = element("p", { className: "note", role: "status", id: "use-note" });
  #size = element("span", { textContent: "the model's size" });
  #sizes;
  #links = { stream: "", view: { token: "", note: "" }, publish: { token: "", note: "" } };
  #turn = 0;

  /** @param {HTMLElement} body where it goes @param {HTMLInputElement} prompt the page's own words */
  constructor(body, prompt) {
    this.prompt = prompt;
    const choice = (input, words) => element("label", { className: "use-choice" }, input, words);
    body.append(
      element(
        "div",
        { className: "use-choices" },
        element("label", { className: "use-name" }, "Stream", this.#name),
        choice(this.#cut, "Person alone, no background"),
        choice(this.#mirror, "Mirrored"),
      ),
      this.#note,
      this.#section("1. Send your picture from OBS", [["whip", "Server (WHIP)"], ["publish", "Bearer Token"]], [
        "Settings, Stream: Service WHIP, and what stands above.",
        "Settings, Output, Streaming: Video Encoder H.264 (x264, NVENC H.264, ...), not HEVC or AV1; Rate Control CBR, 2500 Kbps; Keyframe Interval 1 s; B-frames 0; x264: Tune zerolatency.",
        ["Settings, Video: Output Resolution near ", this.#size, ", 30 FPS. More is scaled down anyway."],
        "Then Start Streaming. The painting begins within a second or two.",
      ]),
      this.#section("or from a browser, so that OBS stays free for your broadcast", [["page", "Page to open"]], [
        "It sends this machine's camera or screen and can stay in the background.",
      ]),
      this.#section("2. Show the painting in OBS", [["overlay", "URL of a Browser source"]], [
        ["Sources, +, Browser: paste the URL; Width and Height in the shape of ", this.#size.cloneNode(true), ", say twice as large."],
        "Leave Shutdown source when not visible and Refresh browser when scene becomes active off: the picture stays ready. Custom CSS may stay as it is.",
        "In the OBS that also sends its programme here, show the overlay in a second instance or scene that is not sent: it would paint its own painting. Or send from a browser.",
      ]),
      this.#section("3. Elsewhere", [["whep", "Any WHEP player"], ["view", "Its Bearer Token"], ["camera", "As a webcam in calls"]], [
        "The webcam needs livebrush[camera] and a virtual camera device on the machine where it is to appear.",
      ]),
    );
    this.#sizes = body.querySelectorAll("span");
    for (const input of [this.#cut, this.#mirror]) input.addEventListener("change", () => this.refresh());
    this.#name.addEventListener("input", () => this.refresh());
    this.#name.addEventListener("change", () => this.refresh({ links: true }));
    // The style's tiles set the words by program, which makes no event.
    document.addEventListener("click", () => setTimeout(() => this.refresh()));
    prompt.addEventListener("input", () => this.refresh());
    this.#showSize();
    this.refresh({ links: true });
  }

  #section(title, rows, steps) {
    const section = element("section", { className: "use-section" }, element("h3", { textContent: title }));
    for (const [key, label] of rows) {
      const field = element("input", { type: "text", readOnly: true, id: `use-${key}` });
      field.addEventListener("focus", () => field.select());
      const button = element("button", { type: "button", className: "button quiet", textContent: "Copy" });
      button.addEventListener("click", () => copy(field, button));
      button.setAttribute("aria-label", `Copy: ${label}`);
      const row = element("div", { className: "use-row" }, element("label", { htmlFor: field.id, textContent: label }), field, button);
      this.#rows[key] = { row, field };
      section.append(row);
    }
    const list = element("ul", { className: "note" });
    for (const step of steps) list.append(element("li", {}, ...[step].flat()));
    section.append(list);
    return section;
  }

  async #showSize() {
    const response = await fetch("/api/v1/models", { headers: authorization() }).catch(() => null);
    const size = response?.ok ? (await response.json()).models[0]?.size : null;
    if (size) for (const span of this.#sizes) span.textContent = size;
  }

  async #ask(stream) {
    const turn = (this.#turn += 1);
    const [view, publish] = await Promise.all(["view", "publish"].map((role) => link(role, stream)));
    if (turn !== this.#turn) return;
    this.#links = { stream, view, publish };
    this.refresh();
  }

  /** Show what is chosen now; with `links`, ask for tokens for it, which are shown when they come. */
  refresh({ links = false } = {}) {
    const stream = this.#name.value.trim();
    const isName = STREAM_NAME.test(stream);
    this.#name.setCustomValidity(isName ? "" : "1 to 64 letters, digits, - and _");
    if (!isName) {
      this.#note.textContent = "A stream's name has 1 to 64 letters, digits, - and _.";
      return;
    }
    if (links && this.#links.stream !== stream) this.#ask(stream);
    const isCurrent = this.#links.stream === stream;
    const { view, publish } = isCurrent ? this.#links : { view: { token: "", note: "" }, publish: { token: "", note: "" } };
    const shown = addresses({
      origin: location.origin,
      stream,
      prompt: this.prompt.value.trim(),
      cut: this.#cut.checked,
      mirror: this.#mirror.checked,
      viewToken: view.token,
      publishToken: publish.token,
    });
    const fields = { ...shown, publish: publish.token, view: view.token };
    for (const [key, value] of Object.entries(fields)) {
      if (this.#rows[key].field.value !== value) this.#rows[key].field.value = value;
    }
    this.#rows.publish.row.hidden = !publish.token;
    this.#rows.view.row.hidden = !view.token;
    this.#note.textContent = [...new Set([view.note, publish.note].filter(Boolean))].map((note) => `Tokens: ${note}.`).join(" ");
  }
}

const details = document.getElementById("use");
const open = () => new Panel(document.getElementById("use-body"), document.getElementById("prompt"));
// It may have been opened before this module was here.
if (details.open) open();
else details.addEventListener("toggle", open, { once: true });
