// A camera or screen as a published stream, so that the OBS on the same desk can show its painting as a layer
// (docs/obs.md). /publish.html?stream=NAME&prompt=WORDS&audio=1#token=TOKEN

import { authorizedFetch, token } from "./access.js";
import { WhipPublisher, iceServers } from "./whip.js";

const STREAM_NAME = /^[A-Za-z0-9_-]{1,64}$/;
// The model sees a small picture; a larger one would only cost line.
const PICTURE = { width: { ideal: 640 }, height: { ideal: 480 }, frameRate: { ideal: 30 } };
const SAYS = { connecting: ["Connecting", "busy"], playing: ["Live", "live"], waiting: ["Trying again", "bad"] };

const [state, note, prompt, preview, camera, screen, stop] = ["state", "note", "prompt", "preview", "camera", "screen", "stop"].map(
  (id) => document.getElementById(id),
);
const query = new URLSearchParams(location.search);
const stream = query.get("stream") ?? "studio";
let publisher = null;
let source = null;

function say(text, tone, words = "") {
  state.textContent = text;
  state.dataset.tone = tone;
  note.textContent = words;
}

async function begin(kind) {
  end();
  const media = { video: PICTURE, audio: query.get("audio") === "1" };
  try {
    source = await (kind === "screen" ? navigator.mediaDevices.getDisplayMedia(media) : navigator.mediaDevices.getUserMedia(media));
  } catch (error) {
    // Without HTTPS there are no mediaDevices at all, but for this machine's own address.
    say("Not started", "bad", navigator.mediaDevices ? `No picture: ${error.message}` : "Browsers give cameras to HTTPS pages and 127.0.0.1 only.");
    return;
  }
  preview.srcObject = source;
  source.getVideoTracks()[0].addEventListener("ended", end);
  const url = new URL(`/whip/${stream}`, location.href);
  if (prompt.value.trim()) url.searchParams.set("prompt", prompt.value.trim());
  publisher = new WhipPublisher(url.href, source, { token: token(), iceServers: () => iceServers(token()) });
  publisher.addEventListener("state", ({ detail }) => say(...SAYS[detail.state], detail.detail));
  publisher.start();
  for (const button of [camera, screen]) button.hidden = true;
  stop.hidden = false;
}

function end() {
  publisher?.stop();
  for (const track of source?.getTracks() ?? []) track.stop();
  publisher = source = preview.srcObject = null;
  for (const button of [camera, screen]) button.hidden = false;
  stop.hidden = true;
  say("Not started", "idle");
}

/** Change the style of what runs; a later connection begins with it. */
async function paint() {
  if (!publisher) return;
  const words = prompt.value.trim();
  publisher.url = Object.assign(new URL(publisher.url), { search: words ? `?${new URLSearchParams({ prompt: words })}` : "" }).href;
  const headers = { "Content-Type": "application/json" };
  const body = JSON.stringify({ prompt: words });
  const response = await authorizedFetch(`/api/v1/streams/${stream}`, { method: "PATCH", headers, body }).catch(() => null);
  const problem = response && !response.ok ? await response.json().catch(() => ({})) : {};
  note.textContent = response?.ok ? "" : (problem.detail ?? "The server does not answer; the style follows when it is back.");
}

prompt.value = query.get("prompt") ?? "oil painting";
const overlay = document.getElementById("overlay");
overlay.href = overlay.textContent = `${location.origin}/overlay?stream=${encodeURIComponent(stream)}`;
// A publisher's token is not for viewers.
if (token()) document.getElementById("watch").textContent = "Its overlay's address, with a viewer's token, stands in the panel of the start page.";
if (STREAM_NAME.test(stream)) {
  camera.addEventListener("click", () => begin("camera"));
  screen.addEventListener("click", () => begin("screen"));
} else {
  for (const button of [camera, screen]) button.disabled = true;
  say("Not started", "bad", `stream=${stream}: a stream's name has 1 to 64 letters, digits, - and _.`);
}
stop.addEventListener("click", end);
document.getElementById("style").addEventListener("submit", (event) => {
  event.preventDefault();
  paint();
});
addEventListener("pagehide", end);
