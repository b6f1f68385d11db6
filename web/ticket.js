// What this tab knows of its session over a reload: the resume token, with which it finds the session again for half a
// minute, and whether only the WebSocket got through here.

const TOKEN = "livebrush.resume";
const OVER_SOCKET = "livebrush.over-socket";

/** Where the tab has no storage (a sandboxed frame), all this lives as long as the page. */
export class Ticket {
  #values = new Map();

  constructor() {
    try {
      for (const key of [TOKEN, OVER_SOCKET]) this.#values.set(key, sessionStorage.getItem(key));
    } catch {
      // No storage: nothing to come back to.
    }
  }

  /** @returns {string | null} */
  get token() {
    return this.#values.get(TOKEN) ?? null;
  }

  /** @param {string | null} token null forgets it */
  set token(token) {
    this.#keep(TOKEN, token);
  }

  get overSocket() {
    return Boolean(this.#values.get(OVER_SOCKET));
  }

  set overSocket(is) {
    this.#keep(OVER_SOCKET, is ? "yes" : null);
  }

  #keep(key, value) {
    this.#values.set(key, value);
    try {
      if (value) sessionStorage.setItem(key, value);
      else sessionStorage.removeItem(key);
    } catch {
      // Kept in the page alone.
    }
  }
}
