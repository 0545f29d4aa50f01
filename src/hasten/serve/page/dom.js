/* Building blocks of the page's elements. Text only ever becomes text nodes: nothing here parses markup. */

/** Make an element: `props` are attributes, `on` maps event names to listeners, false and null leave an attribute out. */
export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name === "on") for (const [event, listener] of Object.entries(value)) node.addEventListener(event, listener);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** A copy of one of the drawings in the document's icon sheet. */
export function icon(name) {
  const drawing = document.getElementById("icons").content.getElementById(`icon-${name}`).cloneNode(true);
  drawing.removeAttribute("id");
  drawing.setAttribute("aria-hidden", "true");
  return drawing;
}

/** A button with a drawing and a name; `label` is spoken, and shown unless `quiet`. */
export function button(drawing, label, onclick, { quiet = true, kind = "plain" } = {}) {
  const node = el("button", { type: "button", class: `button ${kind}${quiet ? " quiet" : ""}`, title: label, on: { click: onclick } });
  node.append(icon(drawing), quiet ? el("span", { class: "unseen" }, label) : label);
  return node;
}

/** Put new children in place of the old ones. */
export function fill(node, ...children) {
  node.replaceChildren(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** Copy text and say so on the button that asked for it. */
export async function copy(text, node) {
  const say = (word) => {
    announce(word);
    node.dataset.said = word;
    setTimeout(() => delete node.dataset.said, 1400);
  };
  try {
    await navigator.clipboard.writeText(text);
    say("Copied");
  } catch {
    say("The browser refused to copy");
  }
}

/** Tell a screen reader, in a few words, what has happened. */
export function announce(words) {
  document.getElementById("announcer").textContent = words;
}

/** Run `work` once before the next paint, however often it is asked for. */
export function beforePaint(work) {
  let asked = false;
  return () => {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => {
      asked = false;
      work();
    });
  };
}

const round = (value, digits) => value.toLocaleString("en", { maximumFractionDigits: digits, minimumFractionDigits: digits });

/** Numbers as people read them; anything that is not a number is a dash. */
export const figure = {
  count: (value) => (Number.isFinite(value) ? value.toLocaleString("en") : "–"),
  ratio: (value) => (Number.isFinite(value) ? round(value, 2) : "–"),
  rate: (value) => (Number.isFinite(value) ? round(value, value < 10 ? 1 : 0) : "–"),
  share: (value) => (!Number.isFinite(value) ? "–" : value < 1 && value > 0.9999 ? "> 99.99 %" : `${round(value * 100, value > 0.99 && value < 1 ? 2 : 0)} %`),
  seconds: (value) => (Number.isFinite(value) ? `${round(value, value < 10 ? 2 : 1)} s` : "–"),
  millions: (value) => (Number.isFinite(value) ? (value >= 1e9 ? `${round(value / 1e9, 1)} B` : `${round(value / 1e6, value < 1e7 ? 1 : 0)} M`) : ""),
};
