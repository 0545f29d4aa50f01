/* The two drawings of an answer's tokens: a canvas of cells, and running text with its drafts. */

import { el, figure } from "./dom.js";
import { visible } from "./trace.js";

/** Arrow keys move among the children of `node`; only one of them is in the tab order. */
class Walk {
  constructor(node, onfocus) {
    this.node = node;
    node.addEventListener("keydown", (event) => this.#key(event));
    node.addEventListener("focusin", (event) => {
      this.#take(event.target);
      onfocus(event.target);
    });
    node.addEventListener("pointerover", (event) => {
      const child = event.target.closest("[tabindex]");
      if (child && node.contains(child)) onfocus(child);
    });
  }

  add(child) {
    child.tabIndex = this.current?.isConnected ? -1 : 0;
    if (child.tabIndex === 0) this.current = child;
  }

  #take(child) {
    if (this.current) this.current.tabIndex = -1;
    this.current = child;
    child.tabIndex = 0;
  }

  #key(event) {
    const step = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
    let next = null;
    if (step) for (next = event.target[step]; next && (next.hidden || !next.hasAttribute("tabindex")); ) next = next[step];
    else if (event.key === "ArrowDown" || event.key === "ArrowUp") next = this.#line(event.target, event.key === "ArrowDown");
    else if (event.key === "Home") next = this.node.firstElementChild;
    else if (event.key === "End") next = this.node.lastElementChild;
    else return;
    event.preventDefault();
    if (next?.hasAttribute("tabindex") && !next.hidden) next.focus();
  }

  /* The nearest child of the line below or above. */
  #line(from, down) {
    const mine = from.getBoundingClientRect();
    let best = null;
    for (let next = from; next; next = down ? next.nextElementSibling : next.previousElementSibling) {
      const box = next.getBoundingClientRect();
      if (!next.hasAttribute("tabindex") || next.hidden || Math.abs(box.top - mine.top) < mine.height / 2) continue;
      if (best && Math.abs(box.top - best.top) > mine.height / 2) break;
      const far = Math.abs(box.left - mine.left);
      if (!best || far < best.far) best = { next, far, top: box.top };
    }
    return best?.next ?? null;
  }
}

/** The canvas of a masked model: one cell per place, coloured by the forward it was committed in. */
export class CanvasView {
  constructor(trace, tell) {
    this.trace = trace;
    this.node = el("div", { class: "cells", role: "listbox", "aria-label": "Canvas, one cell per token" });
    this.cells = new Map();
    this.fresh = []; // cells committed in the forward that is shown
    this.walk = new Walk(this.node, (cell) => {
      const words = this.#words(Number(cell.dataset.at));
      cell.setAttribute("aria-label", words); // only now: words for 512 cells in every frame would be too slow
      tell(words, cell);
    });
    this.f = -1;
  }

  /** Show the canvas after forward `f`; `live` looks only at the places that changed. */
  show(f, live) {
    this.f = f;
    paintScale(this.node, this.trace);
    const { from, to } = this.trace.place;
    if (this.cells.size < to - from) this.#grow(from, to);
    if (live) {
      for (const cell of this.fresh) {
        cell.classList.remove("fresh");
        cell.drawn = "";
      }
    }
    this.fresh = [];
    for (const at of live ? this.trace.dirty : this.cells.keys()) this.#draw(at);
    this.trace.dirty.clear();
  }

  #grow(from, to) {
    const made = [];
    for (let at = from; at < to; at += 1) {
      let cell = this.cells.get(at);
      if (!cell) {
        cell = el("span", { class: "cell", "data-at": at, "data-state": "masked", role: "option", "aria-label": "masked" });
        this.cells.set(at, cell);
        this.walk.add(cell);
      }
      made.push(cell);
    }
    this.node.replaceChildren(...made);
  }

  #draw(at) {
    const cell = this.cells.get(at);
    const place = this.trace.at(at, this.f);
    const text = place.state === "masked" ? "" : visible(place.piece).trimStart();
    const sure = Number.isFinite(place.confidence) ? place.confidence.toFixed(2) : "1";
    const fresh = place.state === "final" && place.f === this.f;
    if (fresh) this.fresh.push(cell);
    const drawn = `${place.state} ${place.state === "final" ? place.f : 0} ${sure} ${fresh} ${text}`;
    if (cell.drawn === drawn) return; // a guess that stays the same costs no style
    cell.drawn = drawn;
    cell.textContent = text;
    cell.dataset.state = place.state;
    cell.classList.toggle("end", text === "■");
    cell.classList.toggle("fresh", fresh);
    if (text.length > 2 && text !== "■") this.node.classList.add("words");
    cell.style.setProperty("--f", place.f ?? 0);
    cell.style.setProperty("--c", sure);
    if (place.state === "masked") cell.setAttribute("aria-label", "masked");
    else cell.removeAttribute("aria-label"); // its text names it
  }

  #words(at) {
    const place = this.trace.at(at, this.f);
    const where = `place ${at - this.trace.place.from + 1} of ${this.trace.place.to - this.trace.place.from}`;
    if (place.state === "masked") return `masked · ${where}`;
    const sure = `confidence ${figure.share(place.confidence)}`;
    const how = place.state === "final" ? `committed in ${this.trace.name(place.f)}${place.again ? ", after a revision" : ""}` : "a guess, may still change";
    return `${quote(place.piece)} · ${where} · ${how} · ${sure}`;
  }
}

/** Set the number of forwards that colours are spread over; while it grows, in leaps, since each recolours every cell. */
export function paintScale(node, trace) {
  const last = Math.max(1, trace.forwards.length - 1);
  const leaps = trace.ended ? last : Math.ceil(last / 16) * 16;
  if (node.dataset.n === String(leaps)) return;
  node.dataset.n = leaps;
  node.style.setProperty("--n", leaps);
}

const MOST_REFUSED = 2; // drafts shown at one place; the others are counted

/** The text of a causal model as tokens: drafted and kept, the model's own, and refused drafts where they were proposed. */
export class TokensView {
  constructor(trace, tell) {
    this.trace = trace;
    this.node = el("div", { class: "tokens", role: "listbox", "aria-label": "Answer, token by token" });
    this.walk = new Walk(this.node, (chip) => chip.dataset.words && tell(chip.dataset.words, chip));
    this.made = [];
    this.f = Infinity;
  }

  show(f, live) {
    const { tokens } = this.trace;
    for (let i = this.made.length; i < tokens.length; i += 1) this.#make(tokens[i]);
    if (!(live && this.f >= f - 1)) for (const entry of this.made) for (const node of entry.nodes) node.hidden = entry.f > f;
    for (let i = this.made.length - 1; i >= 0 && this.made[i].f >= Math.min(f, this.f) - 1; i -= 1) {
      for (const node of this.made[i].nodes) {
        node.hidden = this.made[i].f > f;
        node.classList.toggle("fresh", this.made[i].f === f);
      }
    }
    if (this.f !== f) for (const node of this.node.querySelectorAll(".fresh")) node.classList.toggle("fresh", Number(node.dataset.f) === f);
    this.f = f;
    this.trace.dirty.clear();
  }

  #make(token) {
    const nodes = [];
    const refused = this.trace.refused.get(token.position) ?? [];
    for (const draft of refused.slice(0, MOST_REFUSED)) {
      const text = draft.pieces.slice(0, 3).map(shown).join("");
      const more = draft.size > 1 ? `, ${draft.size} nodes` : "";
      nodes.push(this.#chip("refused", text, draft.f, NaN, `${quote(draft.pieces.join(""))} · draft refused in ${this.trace.name(draft.f)}${more}`));
    }
    if (refused.length > MOST_REFUSED) {
      const rest = refused.slice(MOST_REFUSED);
      const all = rest.map((draft) => quote(draft.pieces.join(""))).join(", ");
      nodes.push(this.#chip("refused more", `+${rest.length}`, rest[0].f, NaN, `${rest.length} more drafts refused here: ${all.slice(0, 300)}`));
    }
    const how = token.drafted ? "drafted and accepted" : "the model's own";
    const words = `${quote(token.piece)} · position ${token.position} · ${this.trace.name(token.f)} · ${how} · confidence ${figure.share(token.confidence)}`;
    nodes.push(this.#chip(token.drafted ? "kept" : "own", shown(token.piece).replace(/↵/g, "↵\n"), token.f, token.confidence, words));
    this.node.append(...nodes);
    this.made.push({ f: token.f, nodes });
  }

  #chip(kind, text, f, confidence, words) {
    const tag = kind.startsWith("refused") ? "del" : "span";
    const chip = el(tag, { class: `chip ${kind}`, "data-words": words, "data-f": f, "aria-label": words, role: "option" });
    const bare = text.trimStart(); // a token's leading space is not part of its mark
    const space = tag === "del" ? "" : text.slice(0, text.length - bare.length);
    chip.append(...(bare ? [space, el("span", { class: "ink" }, bare)] : [el("span", { class: "ink" }, text)]));
    if (Number.isFinite(confidence)) chip.style.setProperty("--c", confidence);
    chip.style.setProperty("--f", f);
    this.walk.add(chip);
    return chip;
  }
}

/* A token's text within a line: as it is, with signs for line breaks and special tokens. */
const shown = (piece) => (/^ +\S/.test(piece) || /^ +$/.test(piece) ? piece : visible(piece));

/** A piece of text in quotes, short, with its line breaks visible. */
export function quote(piece) {
  const text = piece.replace(/\r?\n/g, "↵");
  return `“${text.length > 60 ? `${text.slice(0, 60)}…` : text}”`;
}
