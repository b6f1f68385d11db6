// What the figures say: the verdict in one line, and where the time goes from camera to screen.

const LIMITS = { cpu: "CPU", gpu: "GPU", camera: "the camera", network: "the network" };
const LEGS = [
  ["uplink", "To the server", "encoding here and half the round trip"],
  ["queue", "Waiting for the engine", "until it takes the chunk up"],
  ["engine", "Painting", "encode, denoise, decode"],
  ["spread", "Chunk and pacing", "collecting frames, spreading them evenly"],
  ["downlink", "Back to the page", "encoding there and the network"],
  ["display", "To the screen", "decoding here and the display"],
];
const WINDOW_S = 10;

/** "24 fps · 310 ms camera to screen · 99.8 % on time · limited by: CPU" */
export function verdict(stats) {
  if (["idle", "stopped", "failed"].includes(stats.state)) return "No picture yet";
  if (stats.fps === null) return "Measuring…";
  const parts = [`${Math.round(stats.fps)} fps`];
  if (stats.latency_p50_ms !== null) parts.push(`${Math.round(stats.latency_p50_ms)} ms camera to screen`);
  if (stats.on_time !== null) parts.push(`${percent(stats.on_time)} on time`);
  if (LIMITS[stats.limited_by]) parts.push(`limited by: ${LIMITS[stats.limited_by]}${lowered(stats.server)}`);
  return parts.join(" · ");
}

/** good: as agreed; bad: slow, late or not painted; idle: nothing to judge. */
export function verdictTone(stats) {
  if (stats.fps === null || stats.state !== "live") return "idle";
  const slow = stats.agreed_fps && stats.fps < 0.85 * stats.agreed_fps;
  return slow || stats.on_time < 0.95 || stats.server?.rung?.camera ? "bad" : "good";
}

/** " (camera only)", " (smaller picture)" or " (coarser details)": what a lower rung shows; fewer steps and frames show in figures of their own. */
function lowered(server) {
  if (server?.rung?.camera) return " (camera only)";
  if (server?.rung?.small) return " (smaller picture)";
  return server?.rung?.light ? " (coarser details)" : "";
}

function percent(share) {
  const value = share * 100;
  return `${value >= 99.95 ? "100" : value.toFixed(1)} %`;
}

/**
 * Fills the fold-out.
 * @param {object} stats the page's figures @param {import("./connection.js").Connection | null} connection
 * @param {object | null} server its last `stats`
 */
export function showDetails(stats, connection, server) {
  const legs = connection && legsOf(connection.meter.budget(performance.now(), WINDOW_S), server);
  document.getElementById("budget").replaceChildren(...(legs ?? []).map(([name, ms]) => {
    const bar = document.createElement("span");
    bar.className = `leg ${name}`;
    bar.style.flexGrow = String(Math.max(0, ms));
    return bar;
  }));
  document.getElementById("budget-rows").replaceChildren(...budgetRows(legs));
  document.getElementById("facts").replaceChildren(...facts(stats, connection, server));
}

/** The legs of a frame's way in order, in ms; they add up to the mean from camera to screen. */
function legsOf(budget, server) {
  if (!budget) return null;
  const engine = Math.min(server?.engine_ms_p50 ?? 0, budget.server);
  const queue = Math.min(server?.queue_ms_p50 ?? 0, budget.server - engine);
  const legs = { ...budget, engine, queue, spread: budget.server - engine - queue };
  return LEGS.map(([name, title, what]) => [name, legs[name], title, what]);
}

function budgetRows(legs) {
  if (!legs) return [row("", "Nothing measured yet", "", "")];
  const total = legs.reduce((sum, [, ms]) => sum + ms, 0);
  const rows = legs.map(([name, ms, title, what]) => row(name, title, what, `${Math.round(ms)} ms`));
  return [...rows, row("total", "Camera to screen", "mean of the last 10 s", `${Math.round(total)} ms`)];
}

function row(name, title, what, value) {
  const line = document.createElement("tr");
  line.className = name;
  const head = document.createElement("th");
  head.scope = "row";
  head.append(Object.assign(document.createElement("i"), { className: `leg ${name}` }), title);
  const cells = [what, value].map((text) => Object.assign(document.createElement("td"), { textContent: text }));
  line.append(head, ...cells);
  return line;
}

function facts(stats, connection, server) {
  const ms = (value) => (value === null || value === undefined ? "–" : `${Math.round(value)} ms`);
  const counted = (counts) => Object.entries(counts ?? {}).map(([reason, count]) => `${reason} ${count}`).join(", ");
  const dropped = counted(server?.dropped);
  const withheld = counted(server?.withheld);
  const media = connection?.media;
  const list = [
    ["95 of 100 frames within", ms(stats.latency_p95_ms)],
    ["Click to first painted picture", ms(stats.click_to_picture_ms)],
    ["Offer to first painted frame", ms(stats.ttff_ms)],
    ["Agreed rate", stats.agreed_fps ? `${stats.agreed_fps} fps` : "–"],
    ["Steps in force", server?.rung?.steps ?? "–"],
    ["Gap between pictures, 99 of 100 within", ms(server?.interval_ms_p99)],
    ...(server?.freezes ? [["Stood still", `${server.freezes} times, ${server.frozen_s} s`]] : []),
    ["Frames shown", stats.frames_shown],
    ["Frames dropped", dropped || "none"],
    ...(withheld ? [["Camera shown instead", withheld]] : []),
    ...(server?.reanchored ? [["Begun anew after a drift", server.reanchored]] : []),
    ["Camera sent as", media?.sent ? `${media.sent} ${media.codec}` : "–"],
    ["Held back by", media?.heldBy && media.heldBy !== "none" ? media.heldBy : "nothing"],
    ["Round trip", ms(connection?.clock.rttMs)],
    ["Sessions on this server", server?.sessions ?? "–"],
  ];
  return list.flatMap(([name, value]) => [
    Object.assign(document.createElement("dt"), { textContent: name }),
    Object.assign(document.createElement("dd"), { textContent: String(value) }),
  ]);
}
