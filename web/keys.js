// Keyboard shortcuts: one table, for the keys and for the help that lists them. Never while somebody types.

/** @typedef {{keys: string[], shown: string, text: string, run: (key: string) => void}} Shortcut */

/** Whether key presses are words of somebody. @param {EventTarget | null} target */
export function isTyping(target) {
  if (!(target instanceof Element)) return false;
  if (target.closest("[contenteditable]:not([contenteditable=false])")) return true;
  const wordless = ["range", "checkbox", "radio", "button", "submit", "file", "color"];
  return target.matches("textarea, select") || (target.matches("input") && !wordless.includes(target.type));
}

/**
 * Follows the shortcuts, and "?" with the dialog that lists them.
 * @param {Shortcut[]} shortcuts keys: as in KeyboardEvent.key, letters small
 * @param {HTMLDialogElement} help
 */
export function bindKeys(shortcuts, help) {
  const all = [...shortcuts, { keys: ["?"], shown: "?", text: "this help", run: () => help.showModal() }];
  help.querySelector("dl").replaceChildren(...all.flatMap(({ shown, text }) => [term(shown), detail(text)]));
  document.addEventListener("keydown", (event) => {
    if (isTyping(event.target)) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
    const key = event.key.toLowerCase();
    const shortcut = all.find(({ keys }) => keys.includes(key));
    if (!shortcut) return;
    event.preventDefault();
    shortcut.run(key);
  });
}

function term(shown) {
  const dt = document.createElement("dt");
  const parts = shown.split(" ").map((part) => {
    if (part === "to" || part === "and") return ` ${part} `;
    const kbd = document.createElement("kbd");
    kbd.textContent = part;
    return kbd;
  });
  dt.append(...parts);
  return dt;
}

function detail(text) {
  const dd = document.createElement("dd");
  dd.textContent = text;
  return dd;
}
