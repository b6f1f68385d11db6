// Where the picture comes from: camera, screen, the bundled clip, a file. Every refusal is told in plain words.

const CAPTURE = { width: 640, height: 480 };
const CAPTURE_FPS = { ideal: 30, max: 30 };
const MICROPHONE = { echoCancellation: true, noiseSuppression: true, autoGainControl: true };
const CLIPS = [
  ["demo/people.mp4", 'video/mp4; codecs="avc1.42E01E"'],
  ["demo/people.webm", "video/webm"],
];
const FALLBACK_FPS = 30;

/** A source that cannot be used. `title` says what happened, the message what to do about it. */
export class SourceError extends Error {
  /** @param {string} code @param {string} title @param {string} cure */
  constructor(code, title, cure) {
    super(cure);
    this.code = code;
    this.title = title;
  }
}

const CAMERA_ERRORS = {
  NotAllowedError: [
    "permission_denied",
    "The camera is blocked",
    "Allow it with the camera symbol in the address bar (or in the browser's site settings), then try again. "
      + "Or look at the demo clip first.",
  ],
  NotFoundError: [
    "no_camera",
    "No camera found",
    "Plug one in, or check that the system lets this browser see it, then try again. The demo clip needs no camera.",
  ],
  NotReadableError: [
    "camera_busy",
    "The camera is in use",
    "Another program holds it. Close video calls and other camera pages, then try again.",
  ],
  OverconstrainedError: ["camera_unfit", "The camera cannot do this", "Choose another camera, then try again."],
};

/**
 * A running source.
 * @typedef {{kind: string, stream: MediaStream, hasSound: boolean, stop: () => void, onended: (() => void) | null}} Source
 */

/** Whether the camera can be opened without asking, so that connecting may begin before it is open. */
export async function cameraIsGranted() {
  try {
    return (await navigator.permissions.query({ name: "camera" })).state === "granted";
  } catch {
    return false; // Firefox and Safari do not know the name: ask first, connect then.
  }
}

/**
 * Opens a source. Raises SourceError.
 * @param {string} kind camera, screen, clip, file or stream
 * @param {{microphone?: boolean, file?: File, stream?: MediaStream, size?: {width: number, height: number}}} options size: of the model's
 *   picture; a camera is asked for at least that
 * @returns {Promise<Source>}
 */
export async function openSource(kind, { microphone = false, file, stream, size = CAPTURE } = {}) {
  if (kind === "camera") return fromStream("camera", await openCamera(microphone, size));
  if (kind === "screen") return fromStream("screen", await openScreen());
  if (kind === "clip") return openVideo("clip", CLIPS.find(([, type]) => canPlay(type))?.[0] ?? CLIPS[0][0]);
  if (kind === "file" && file) return openFile(file);
  // A clone, for stopping the session must not stop what is not ours.
  if (kind === "stream" && stream) return fromStream("stream", stream.clone());
  throw new SourceError("unknown_source", `There is no source “${kind}”`, "Use camera, screen, clip, file or stream.");
}

/** The microphone alone, for switching it on while the picture runs. @returns {Promise<MediaStreamTrack>} */
export async function openMicrophone() {
  requireMediaDevices("microphone");
  try {
    return (await navigator.mediaDevices.getUserMedia({ audio: MICROPHONE })).getAudioTracks()[0];
  } catch (error) {
    throw new SourceError("no_microphone", "The microphone cannot be used", `Allow it in the address bar. (${error.message})`);
  }
}

function requireMediaDevices(what) {
  if (navigator.mediaDevices) return;
  const port = location.port || "8080";
  throw new SourceError(
    "insecure_context",
    `Browsers give the ${what} to secure pages only`,
    `Open this page as http://localhost:${port} (from another machine: ssh -L ${port}:localhost:${port} SERVER) `
      + "or put HTTPS in front of the server. The demo clip works here as it is.",
  );
}

async function openCamera(microphone, size) {
  requireMediaDevices("camera");
  try {
    const width = { ideal: Math.max(CAPTURE.width, size.width) };
    const height = { ideal: Math.max(CAPTURE.height, size.height) };
    const video = { width, height, frameRate: CAPTURE_FPS };
    return await navigator.mediaDevices.getUserMedia({ video, audio: microphone ? MICROPHONE : false });
  } catch (error) {
    const known = CAMERA_ERRORS[error.name];
    throw new SourceError(...(known ?? ["camera_failed", "The camera did not start", `${error.message || error.name}. Try again.`]));
  }
}

async function openScreen() {
  requireMediaDevices("screen");
  if (!navigator.mediaDevices.getDisplayMedia) {
    throw new SourceError("no_screen", "This browser cannot share a screen", "Use a desktop browser, or the camera.");
  }
  try {
    const video = { frameRate: { ideal: 30, max: 30 }, width: { max: 1280 }, height: { max: 1280 } };
    return await navigator.mediaDevices.getDisplayMedia({ video, audio: true });
  } catch (error) {
    const cure = "Press Screen again and choose a window or a screen.";
    throw new SourceError("screen_refused", "No screen was shared", error.name === "NotAllowedError" ? cure : error.message);
  }
}

/** @param {string} kind @param {MediaStream} stream @returns {Source} */
function fromStream(kind, stream) {
  const source = { kind, stream, hasSound: stream.getAudioTracks().length > 0, onended: null, stop: () => stopTracks(stream) };
  stream.getVideoTracks()[0].addEventListener("ended", () => source.onended?.());
  return source;
}

async function openFile(file) {
  const url = URL.createObjectURL(file);
  try {
    const source = await openVideo("file", url);
    const { stop } = source;
    source.stop = () => {
      stop();
      URL.revokeObjectURL(url);
    };
    return source;
  } catch (error) {
    URL.revokeObjectURL(url);
    if (!(error instanceof SourceError)) throw error;
    throw new SourceError("no_video", `“${file.name}” is not a video this browser can play`, "Choose an MP4 (H.264) or WebM file.");
  }
}

/** Plays a video in a loop, unseen, and captures it. */
async function openVideo(kind, url) {
  const video = document.createElement("video");
  Object.assign(video, { src: url, loop: true, muted: true, playsInline: true });
  try {
    await video.play();
    if (!video.videoWidth) throw new Error("no picture");
  } catch (error) {
    video.removeAttribute("src");
    throw new SourceError("no_video", "The clip cannot be played", `Try another browser, or use the camera. (${error.message})`);
  }
  const { stream, stopDrawing } = capture(video);
  return {
    kind,
    stream,
    hasSound: stream.getAudioTracks().length > 0,
    onended: null,
    stop: () => {
      stopDrawing();
      stopTracks(stream);
      video.pause();
      video.removeAttribute("src");
      video.load();
    },
  };
}

/** @param {HTMLVideoElement} video */
function capture(video) {
  const direct = video.captureStream ?? video.mozCaptureStream;
  if (direct) return { stream: direct.call(video), stopDrawing: () => {} };
  // Safari has no captureStream on media elements: draw the pictures, without sound.
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
  const timer = setInterval(() => canvas.getContext("2d").drawImage(video, 0, 0), 1000 / FALLBACK_FPS);
  return { stream: canvas.captureStream(FALLBACK_FPS), stopDrawing: () => clearInterval(timer) };
}

function canPlay(type) {
  return document.createElement("video").canPlayType(type) !== "";
}

function stopTracks(stream) {
  for (const track of stream.getTracks()) track.stop();
}
