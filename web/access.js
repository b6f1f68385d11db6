// The bearer token of this tab, where the server asks for one: from the address's fragment (/#token=...), or typed in a
// dialog. It is kept until the tab is closed, goes into a header and never into an address.

const KEY = "livebrush.token";

let current = "";
/** The one open question, so that ten refused requests ask once. @type {Promise<boolean> | null} */
let asking = null;

function remember(token) {
  current = token;
  try {
    sessionStorage.setItem(KEY, token);
  } catch {
    // No storage (a sandboxed frame): it lasts as long as the page.
  }
}

function start() {
  try {
    current = sessionStorage.getItem(KEY) ?? "";
  } catch {
    current = "";
  }
  const fragment = new URLSearchParams(location.hash.slice(1));
  const given = fragment.get("token");
  if (given === null) return;
  remember(given);
  // Out of the address bar: it is copied, bookmarked and shown on streams.
  fragment.delete("token");
  const rest = fragment.toString();
  history.replaceState(history.state, "", location.pathname + location.search + (rest && `#${rest}`));
}

/** @returns {string} empty where there is none */
export function token() {
  return current;
}

/** @returns {Record<string, string>} the header to send, if there is a token */
export function authorization() {
  return current ? { Authorization: `Bearer ${current}` } : {};
}

/** @returns {string[]} subprotocols for a WebSocket, which takes no headers */
export function protocols() {
  if (!current) return ["livebrush"];
  const text = btoa(String.fromCharCode(...new TextEncoder().encode(current)));
  return ["livebrush", `bearer.${text.replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "")}`];
}

/**
 * fetch with the token. Refused with 401 it asks for another one, and tries again with what was typed.
 * @param {string} url @param {RequestInit} options
 */
export async function authorizedFetch(url, options = {}) {
  for (;;) {
    const sent = current;
    const response = await fetch(url, { ...options, headers: { ...options.headers, ...authorization() } });
    if (response.status !== 401 || options.keepalive) return response;
    if (sent !== current) continue; // another request has asked meanwhile
    const { detail } = await response.clone().json().catch(() => ({ detail: "" }));
    asking ??= ask(sent ? detail : "").finally(() => (asking = null));
    if (!(await asking)) return response;
  }
}

/** @param {string} refusal what was wrong with the last one @returns {Promise<boolean>} whether one was given */
function ask(refusal) {
  const make = (name, properties, ...children) => {
    const element = Object.assign(document.createElement(name), properties);
    element.append(...children);
    return element;
  };
  const field = make("input", { type: "password", name: "token", required: true, autocomplete: "current-password", maxLength: 512 });
  const form = make(
    "form",
    { method: "dialog" },
    make("h2", { textContent: "This server asks for a token" }),
    make("p", { textContent: refusal || "Who runs it gave you one, or a link that holds it." }),
    make("p", {}, make("label", { textContent: "Token " }, field)),
    make("button", { className: "button", value: "ok", textContent: "Go on" }),
  );
  const dialog = make("dialog", { id: "token" }, form);
  document.body.append(dialog);
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      const given = dialog.returnValue === "ok" ? field.value.trim() : "";
      if (given) remember(given);
      dialog.remove();
      resolve(given !== "");
    });
  });
}

start();
