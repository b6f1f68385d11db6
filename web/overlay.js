// A published stream as a layer over whatever is behind it: transparent, silent, without controls, and healing itself
// (docs/obs.md). /overlay?stream=NAME&alpha=1&fit=cover&mirror=1&chroma=00ff00&bg=222222#token=TOKEN

import { WhepPlayer, iceServers } from "./whip.js";

const STREAM_NAME = /^[A-Za-z0-9_-]{1,64}$/;
const COLOUR = /^[0-9a-fA-F]{6}$/;
const FITS = ["contain", "cover", "fill"];
const KNOWN = ["stream", "alpha", "fit", "mirror", "chroma", "similarity", "smoothness", "bg"];

/**
 * What the address asks for.
 * @param {URLSearchParams} query @param {string} hash
 * @throws {Error} naming the parameter, its value and what there is
 */
export function wishes(query, hash) {
  for (const name of query.keys()) {
    if (!KNOWN.includes(name)) throw new Error(`unknown parameter ${name}; there are ${KNOWN.join(", ")}`);
  }
  const read = (name, fallback, fits, bound) => {
    const value = query.get(name) ?? fallback;
    if (!fits(value)) throw new Error(`${name}=${value}: ${bound}`);
    return value;
  };
  const share = (name, fallback) =>
    Number(read(name, fallback, (text) => text !== "" && Number(text) >= 0 && Number(text) <= 1, "a number from 0 to 1"));
  const colour = (name) => read(name, "", (text) => !text || COLOUR.test(text), "six hexadecimal digits, such as 00ff00");
  const flag = (name) => read(name, "0", (text) => text === "0" || text === "1", "0 or 1") === "1";
  const asked = {
    stream: read("stream", "", (text) => STREAM_NAME.test(text), "the stream's name: 1 to 64 letters, digits, - and _"),
    alpha: flag("alpha"),
    mirror: flag("mirror"),
    fit: read("fit", "contain", (text) => FITS.includes(text), FITS.join(", ")),
    chroma: colour("chroma"),
    similarity: share("similarity", "0.3"),
    smoothness: share("smoothness", "0.1"),
    bg: colour("bg"),
    token: new URLSearchParams(hash.replace(/^#/, "")).get("token") ?? "",
  };
  if (asked.alpha && asked.chroma) throw new Error("alpha and chroma: one of them only");
  return asked;
}

const VERTEX = `#version 300 es
out vec2 at;
void main() {
  vec2 corner = vec2(gl_VertexID & 1, gl_VertexID >> 1);
  at = vec2(corner.x, 1.0 - corner.y);
  gl_Position = vec4(2.0 * corner - 1.0, 0.0, 1.0);
}`;

// The picture above, its matte as grey below. Half a texel stays clear of the border between the two.
const UNPACK = `#version 300 es
precision highp float;
uniform sampler2D frame;
in vec2 at;
out vec4 colour;
void main() {
  float inset = 0.5 / float(textureSize(frame, 0).y);
  float y = clamp(0.5 * at.y, inset, 0.5 - inset);
  float grey = texture(frame, vec2(at.x, y + 0.5)).g;
  // Black and white come back from the codec a little off, most of all at the border.
  float alpha = clamp((grey - 0.1) / 0.8, 0.0, 1.0);
  colour = vec4(texture(frame, vec2(at.x, y)).rgb * alpha, alpha);
}`;

// Distance in the colour plane, as video editors key; what is left of the key colour in a soft edge is taken out.
const CHROMA = `#version 300 es
precision highp float;
uniform sampler2D frame;
uniform vec3 key;
uniform vec2 reach;
in vec2 at;
out vec4 colour;
vec2 plane(vec3 rgb) {
  return vec2(dot(rgb, vec3(-0.1146, -0.3854, 0.5)), dot(rgb, vec3(0.5, -0.4542, -0.0458)));
}
void main() {
  vec3 rgb = texture(frame, at).rgb;
  float apart = distance(plane(rgb), plane(key));
  float alpha = smoothstep(reach.x, reach.x + max(reach.y, 0.001), apart);
  vec3 clean = clamp((rgb - (1.0 - alpha) * key) / max(alpha, 0.001), 0.0, 1.0);
  colour = vec4(clean * alpha, alpha);
}`;

/** Draws each picture of a video, with transparency, on a canvas of the picture's own size. */
class Painter {
  #video;
  #canvas;
  #asked;
  #gl = null;

  constructor(video, asked) {
    this.#video = video;
    this.#asked = asked;
    this.#canvas = document.createElement("canvas");
    // A lost context (a driver restart, a sleep) comes back empty: everything is made anew.
    this.#canvas.addEventListener("webglcontextlost", (event) => event.preventDefault());
    this.#canvas.addEventListener("webglcontextrestored", () => this.#prepare());
    this.#prepare();
    const draw = () => {
      this.#draw();
      video.requestVideoFrameCallback(draw);
    };
    video.requestVideoFrameCallback(draw);
  }

  get element() {
    return this.#canvas;
  }

  #prepare() {
    const gl = this.#canvas.getContext("webgl2", { alpha: true, premultipliedAlpha: true, antialias: false });
    if (!gl) throw new Error("WebGL is off in this browser: alpha and chroma need it; turn on hardware acceleration");
    const program = gl.createProgram();
    for (const [kind, text] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, this.#asked.alpha ? UNPACK : CHROMA]]) {
      const shader = gl.createShader(kind);
      gl.shaderSource(shader, text);
      gl.compileShader(shader);
      gl.attachShader(program, shader);
    }
    gl.linkProgram(program);
    if (!gl.getProgramParameter(program, gl.LINK_STATUS)) throw new Error(`WebGL: ${gl.getProgramInfoLog(program)}`);
    gl.useProgram(program);
    if (this.#asked.chroma) {
      const key = [0, 2, 4].map((at) => parseInt(this.#asked.chroma.slice(at, at + 2), 16) / 255);
      gl.uniform3f(gl.getUniformLocation(program, "key"), ...key);
      gl.uniform2f(gl.getUniformLocation(program, "reach"), this.#asked.similarity, this.#asked.smoothness);
    }
    gl.bindTexture(gl.TEXTURE_2D, gl.createTexture());
    for (const [name, value] of [
      [gl.TEXTURE_MIN_FILTER, gl.LINEAR],
      [gl.TEXTURE_MAG_FILTER, gl.LINEAR],
      [gl.TEXTURE_WRAP_S, gl.CLAMP_TO_EDGE],
      [gl.TEXTURE_WRAP_T, gl.CLAMP_TO_EDGE],
    ]) {
      gl.texParameteri(gl.TEXTURE_2D, name, value);
    }
    this.#gl = gl;
  }

  #draw() {
    const { videoWidth: width, videoHeight: height } = this.#video;
    const gl = this.#gl;
    if (!width || gl.isContextLost()) return;
    const shown = this.#asked.alpha ? height / 2 : height;
    if (this.#canvas.width !== width || this.#canvas.height !== shown) {
      Object.assign(this.#canvas, { width, height: shown });
      gl.viewport(0, 0, width, shown);
    }
    gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA, gl.RGBA, gl.UNSIGNED_BYTE, this.#video);
    gl.drawArrays(gl.TRIANGLE_STRIP, 0, 4);
  }
}

function main() {
  const video = document.getElementById("video");
  const problem = document.getElementById("problem");
  let asked;
  try {
    asked = wishes(new URLSearchParams(location.search), location.hash);
    if (asked.alpha || asked.chroma) {
      document.body.dataset.paints = "canvas";
      document.body.append(new Painter(video, asked).element);
    }
  } catch (error) {
    problem.textContent = `Livebrush: ${error.message}`;
    document.body.dataset.state = "failed";
    return;
  }
  for (const element of document.querySelectorAll("video, canvas")) {
    element.style.objectFit = asked.fit;
    if (asked.mirror) element.style.transform = "scaleX(-1)";
  }
  if (asked.bg) document.body.style.background = `#${asked.bg}`;
  const player = new WhepPlayer(new URL(`/whep/${asked.stream}${asked.alpha ? "?alpha=packed" : ""}`, location.href).href, {
    token: asked.token,
    iceServers: () => iceServers(asked.token),
  });
  let hasPlayed = false;
  player.addEventListener("stream", ({ detail }) => (video.srcObject = detail));
  player.addEventListener("state", ({ detail: { state, detail, status } }) => {
    hasPlayed ||= state === "playing";
    document.body.dataset.state = state;
    if (state === "waiting") console.warn(`Livebrush: ${detail}`);
    // Words on a running broadcast help nobody: they are for who sets it up. A stream that is not there yet is no fault.
    problem.textContent = state === "waiting" && !hasPlayed && status !== 404 ? `Livebrush: ${detail}` : "";
  });
  addEventListener("pagehide", () => player.stop());
  // Back from the browser's cache the player is over.
  addEventListener("pageshow", ({ persisted }) => persisted && location.reload());
  player.start();
}

if (document.getElementById("video")) main();
