// The page's entry: builds the session and the elements' binding, and offers window.livebrush for scripts and tests.

import { LiveSession } from "./session.js";
import { Ui } from "./ui.js";

// What a first visit shows, where the model has it: plainly a painting, and kind to faces.
const FIRST_STYLE = "watercolor";

async function getJson(url) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url}: ${response.status}`);
  return response.json();
}

/** What the address asks for: settings, source, and whether to begin by itself. */
function wishes() {
  const query = new URLSearchParams(location.search);
  const settings = {};
  if (query.has("prompt")) settings.prompt = query.get("prompt");
  for (const name of ["strength", "steps", "seed", "transition_s"]) {
    const value = Number(query.get(name));
    if (query.has(name) && Number.isFinite(value)) settings[name] = value;
  }
  return { settings, autostart: query.get("autostart") === "1", source: query.get("source") ?? "camera" };
}

async function main() {
  const session = new LiveSession();
  const ui = new Ui(session);
  const { settings, autostart, source } = wishes();
  window.livebrush = Object.freeze({
    start: (kind = "camera", options = {}) => session.start(kind, options),
    stop: () => session.stop(),
    set: (change) => session.set(change),
    bypass: (on) => session.setBypass(on),
    stats: (options) => session.stats(options),
  });
  // Back from the browser's cache the page begins anew: its connection did not survive.
  addEventListener("pagehide", () => session.stop({ leaving: true }));
  ui.showReadiness();
  const [model] = (await getJson("/api/v1/models").catch(() => ({ models: [] }))).models;
  const styles = model?.styles ?? [];
  if (model) {
    const [width, height] = model.size.split("x").map(Number);
    session.size = { width, height };
    ui.setShape(width, height);
  }
  const first = styles.find((style) => style.id === FIRST_STYLE) ?? styles[0];
  await session.set({ prompt: first?.prompt ?? "", steps: model?.steps ?? 1, ...settings });
  ui.setStyles(styles, model?.steps_max ?? 1, model?.seed ?? true);
  if (autostart) await session.start(source);
}

main();
