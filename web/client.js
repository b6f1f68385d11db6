// The page's entry: builds the session and what binds it to elements, keys and MIDI; window.livebrush is for scripts.

import { authorizedFetch } from "./access.js";
import { bindKeys } from "./keys.js";
import { Livebrush } from "./livebrush.js";
import { MidiPanel } from "./midi.js";
import { RecordControl } from "./record.js";
import { ScenePanel } from "./scenes.js";
import { Ui } from "./ui.js";

// What a first visit shows, where the model has it: plainly a painting, and kind to faces.
const FIRST_STYLE = "watercolor";
const STRENGTH_STEP = 0.1;

async function getJson(url) {
  const response = await authorizedFetch(url);
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
  const overSocket = query.get("transport") === "socket";
  return { settings, overSocket, autostart: query.get("autostart") === "1", source: query.get("source") ?? "camera" };
}

/** Keys and MIDI, over what the page and the scene list can do. */
function steerByHand(ui, scenes) {
  bindKeys([
    { keys: ["o"], shown: "O", text: "show the original, and the painting again", run: () => ui.toggleBypass() },
    { keys: [..."123456789"], shown: "1 to 9", text: "a style", run: (key) => ui.chooseStyle(Number(key) - 1) },
    { keys: ["/"], shown: "/", text: "write a style; Escape leaves", run: () => ui.editPrompt() },
    { keys: ["["], shown: "[", text: "less strength", run: () => ui.nudgeStrength(-STRENGTH_STEP) },
    { keys: ["]"], shown: "]", text: "more strength", run: () => ui.nudgeStrength(STRENGTH_STEP) },
    { keys: ["v"], shown: "V", text: "new variation", run: () => ui.vary() },
    { keys: ["n"], shown: "N", text: "next scene", run: () => scenes.go("next") },
    { keys: ["p"], shown: "P", text: "previous scene", run: () => scenes.go("previous") },
    { keys: ["s"], shown: "S", text: "save this picture", run: () => ui.snapshot() },
    { keys: ["f"], shown: "F", text: "full screen", run: () => ui.fullscreen() },
  ], document.getElementById("help"));
  new MidiPanel(document.getElementById("midi"), [
    { name: "strength", text: "Strength", fader: true, follow: (value) => ui.setStrength(value) },
    { name: "mix", text: "Share of the second style", fader: true, follow: (value) => ui.setMixShare(value) },
    { name: "original", text: "Original on and off", fader: false, follow: () => ui.toggleBypass() },
    { name: "next", text: "Next scene", fader: false, follow: () => scenes.go("next") },
    { name: "previous", text: "Previous scene", fader: false, follow: () => scenes.go("previous") },
  ], (index) => scenes.go(index));
}

async function main() {
  const live = new Livebrush();
  const { session } = live;
  const ui = new Ui(session);
  const { settings, overSocket, autostart, source } = wishes();
  session.overSocket ||= overSocket;
  window.livebrush = live;
  steerByHand(ui, new ScenePanel(document.getElementById("scenes"), live));
  new RecordControl(document.getElementById("record-field"), live);
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
  session.begin({ prompt: first?.prompt ?? "", steps: model?.steps ?? 1, ...settings });
  ui.setStyles(styles, model?.steps_max ?? 1, model?.seed ?? true);
  if (autostart) await session.start(source);
}

main();
