// The resume token of this tab's session: with it a reloaded or cut off page finds its session again for half a minute.

const KEY = "livebrush.resume";

/** Where the tab has no storage (a sandboxed frame), the token lives as long as the page. */
export class Ticket {
  #token = null;

  constructor() {
    try {
      this.#token = sessionStorage.getItem(KEY);
    } catch {
      // No storage: nothing to come back to.
    }
  }

  get token() {
    return this.#token;
  }

  /** @param {string | null} token null forgets it */
  set token(token) {
    this.#token = token;
    try {
      if (token) sessionStorage.setItem(KEY, token);
      else sessionStorage.removeItem(KEY);
    } catch {
      // Kept in the page alone.
    }
  }
}
