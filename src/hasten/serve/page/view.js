/* How an answer came to be: figures, the tokens per forward, a scrubber over the passes, and the places themselves. */

import { beforePaint, button, el, figure, fill } from "./dom.js";
import { CanvasView, paintScale, TokensView } from "./places.js";
import { Trace } from "./trace.js";

const LEAST_SCALE = 4; // tokens that the chart's height stands for at least: one per forward looks like little
const FOLLOW_PX = 60; // pixels from the end within which new tokens are followed
const REPLAY_S = 6; // a replay takes about this long, and no pass is shown for more than a third of a second

/** The live view of one answer at a time. `show(trace)` points it at a trace; `changed()` says that the trace has grown. */
export class LiveView {
  constructor({ title = "How the answer came to be", empty = "", compact = false, level = "h2" } = {}) {
    this.trace = null;
    this.sums = el("dl", { class: "sums" });
    this.bars = document.getElementById("icons").content.getElementById("bars").cloneNode(true);
    this.bars.removeAttribute("id");
    this.bars.replaceChildren();
    this.bars.addEventListener("pointermove", (event) => this.#pointAt(event, false));
    this.bars.addEventListener("click", (event) => this.#pointAt(event, true));
    this.scale = el("span", { class: "scale" });
    this.detail = el("p", { class: "detail", "aria-live": "polite" });
    this.body = el("div", { class: "places" });
    this.range = el("input", { type: "range", min: 0, max: 0, value: 0, disabled: true, "aria-label": "Forward pass to look at" });
    this.range.addEventListener("input", () => this.#scrub(Number(this.range.value)));
    this.where = el("output", { class: "where" });
    this.player = button("play", "Replay", () => this.#play());
    this.player.disabled = true;
    this.empty = el("p", { class: "empty" }, empty);
    this.colour = this.#choice("Colour", ["step", "confidence"], (value) => (this.content.dataset.colour = value));
    this.drafts = el("label", { class: "check" }, el("input", { type: "checkbox", checked: true }), "Refused drafts");
    this.drafts.firstChild.addEventListener("change", (event) => this.body.classList.toggle("no-refused", !event.target.checked));
    this.legend = el("p", { class: "legend" });
    const chart = el("figure", { class: "chart" }, el("figcaption", {}, "Tokens committed per forward", this.scale), this.bars);
    const time = el("div", { class: "time" }, this.player, this.range, this.where);
    this.tools = el("div", { class: "tools" }, this.colour, this.drafts);
    this.content = el("div", { class: "live-content", hidden: true }, this.sums, chart, time, this.tools, this.legend, this.body, this.detail);
    this.node = el("section", { class: `live${compact ? " compact" : ""}`, "aria-label": title }, el(level, {}, title), this.empty, this.content);
    this.draw = beforePaint(() => this.#draw());
    this.content.dataset.colour = "step";
  }

  /** Point the view at `trace` (null empties it). */
  show(trace) {
    this.#pause();
    this.trace = trace;
    this.f = null; // follow the last pass
    this.shown = -1;
    this.bars.replaceChildren();
    this.draw();
    if (!trace) return;
    const Places = trace.kind === "masked" ? CanvasView : TokensView;
    this.places = new Places(trace, (words) => (this.detail.textContent = words));
    fill(this.body, this.places.node);
    this.detail.textContent = "Point at a token, or walk with the arrow keys.";
    this.drafts.hidden = trace.kind === "masked";
    this.colour.querySelector("label").lastChild.data = trace.kind === "masked" ? "By step" : "By draft";
    fill(this.legend, legend(trace.kind));
    this.draw();
  }

  /** Begin a new trace of `kind` and show it. */
  begin(kind) {
    this.show(new Trace(kind));
    return this.trace;
  }

  /** The trace has grown or ended; drawn before the next paint. */
  changed() {
    this.draw();
  }

  #draw() {
    const { trace } = this;
    const nothing = !trace || (trace.ended && trace.now < 0);
    this.content.hidden = nothing;
    this.empty.hidden = !nothing;
    if (nothing) return;
    const last = trace.now;
    const f = this.f ?? last;
    this.content.toggleAttribute("data-moving", this.f !== null || !trace.ended);
    const follow = trace.kind === "causal" && this.f === null && !trace.ended && this.body.scrollHeight - this.body.scrollTop - this.body.clientHeight < FOLLOW_PX;
    this.places.show(f, this.f === null && this.shown >= 0 && this.shown <= last);
    if (follow) this.body.scrollTop = this.body.scrollHeight;
    else if (this.f !== null) this.#reveal();
    this.shown = this.f === null ? last : -1;
    this.#sum();
    this.#chart(f);
    this.range.max = Math.max(0, last);
    this.range.value = f;
    this.range.disabled = !trace.ended || last < 1;
    this.player.disabled = this.range.disabled;
    const words = last < 0 ? "waiting" : trace.forwards[f].prompt ? "prompt" : `${trace.name(f)} of ${trace.numbered()}`;
    this.where.textContent = words;
    this.range.setAttribute("aria-valuetext", `${words}, ${trace.done(f)} tokens`);
  }

  /* Bring what the shown forward has committed into sight. */
  #reveal() {
    const box = this.body.getBoundingClientRect();
    const fresh = this.body.querySelector(".fresh:not([hidden])")?.getBoundingClientRect();
    if (fresh && (fresh.top < box.top || fresh.bottom > box.bottom)) this.body.scrollTop += fresh.top - box.top - box.height / 2;
  }

  #sum() {
    const sums = this.trace.sums();
    const causal = this.trace.kind === "causal";
    const entries = [
      ["Forwards", figure.count(sums.forwards)],
      ["Tokens per forward", figure.ratio(sums.perForward)],
      ["Tokens per second", figure.rate(sums.rate)],
      causal ? ["Drafts accepted", sums.drafted ? `${sums.accepted} of ${sums.drafted}` : "no drafts"] : ["Committed", `${sums.tokens} of ${this.trace.cells.size}`],
    ];
    fill(this.sums, entries.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
  }

  #chart(f) {
    const { forwards } = this.trace;
    const most = forwards.reduce((high, entry) => Math.max(high, entry.committed), 0);
    const high = Math.max(most, LEAST_SCALE);
    this.bars.setAttribute("viewBox", `0 0 ${Math.max(forwards.length, 16)} ${high}`);
    paintScale(this.bars, this.trace);
    this.scale.textContent = `most: ${most}`;
    const sheet = document.getElementById("icons").content.getElementById("bar");
    while (this.bars.childElementCount < forwards.length * 2) {
      const bar = sheet.cloneNode();
      bar.removeAttribute("id");
      this.bars.append(bar);
    }
    forwards.forEach((entry, i) => {
      if (this.trace.kind === "causal") {
        place(this.bars.children[2 * i], i, high - entry.committed + entry.accepted, entry.committed - entry.accepted, i > f ? "later" : "own");
        place(this.bars.children[2 * i + 1], i, high - entry.committed, entry.accepted, i > f ? "later" : "kept");
      } else {
        place(this.bars.children[2 * i], i, high - entry.committed, entry.committed, i > f ? "later" : "step");
        this.bars.children[2 * i].style.setProperty("--f", i);
      }
    });
  }

  #pointAt(event, go) {
    const box = this.bars.getBoundingClientRect();
    const i = Math.floor(((event.clientX - box.left) / box.width) * Math.max(this.trace.forwards.length, 16));
    const entry = this.trace.forwards[i];
    if (!entry) return;
    const took = i > 0 ? entry.t - this.trace.forwards[i - 1].t : NaN;
    const parts = [this.trace.name(i), `${entry.committed} committed`];
    if (entry.drafted) parts.push(`${entry.accepted} of ${entry.drafted} drafted accepted`);
    parts.push(`${figure.count(entry.tokens)} query tokens`);
    if (took > 0) parts.push(`${figure.count(Math.round(took * 1000))} ms after the one before`);
    if (entry.backbone) parts.push(entry.backbone);
    this.detail.textContent = parts.join(" · ");
    if (go && this.trace.ended) this.#scrub(i);
  }

  #scrub(f) {
    this.#pause();
    this.f = f;
    this.draw();
  }

  #play() {
    if (this.timer) return this.#pause();
    const count = this.trace.forwards.length;
    const pause = Math.min(333, (REPLAY_S * 1000) / count);
    let began = null;
    const from = this.f === null || this.f >= count - 1 ? 0 : this.f;
    const frame = (now) => {
      began ??= now;
      this.f = Math.min(count - 1, from + Math.floor((now - began) / pause));
      this.#draw();
      this.timer = this.f < count - 1 ? requestAnimationFrame(frame) : null;
      if (!this.timer) this.#pause();
    };
    this.timer = requestAnimationFrame(frame);
    this.#label("pause", "Pause");
    return undefined;
  }

  #pause() {
    if (this.timer) cancelAnimationFrame(this.timer);
    this.timer = null;
    this.#label("play", "Replay");
  }

  #label(drawing, label) {
    const fresh = button(drawing, label, () => this.#play());
    this.player.title = label;
    this.player.replaceChildren(...fresh.childNodes);
  }

  #choice(name, values, onchange) {
    const group = el("fieldset", { class: "choice" }, el("legend", { class: "unseen" }, name));
    values.forEach((value, i) => {
      const input = el("input", { type: "radio", name: `colour-${++radios}`, value, checked: i === 0, on: { change: () => onchange(value) } });
      if (i > 0) input.name = group.querySelector("input").name;
      group.append(el("label", {}, input, `By ${value}`));
    });
    return group;
  }
}

let radios = 0;

function place(bar, x, y, height, kind) {
  bar.setAttribute("x", x + 0.08);
  bar.setAttribute("y", y);
  bar.setAttribute("height", Math.max(0, height));
  bar.setAttribute("class", kind);
}

function legend(kind) {
  const sample = (name, text, words, when = "") => el("span", { class: when }, el("span", { class: `sample ${name}`, "aria-hidden": "true" }, text), words);
  if (kind === "masked") return [sample("masked", "", "masked"), sample("guess", "a", "guess"), sample("early", "a", "committed early", "by-step"), sample("late", "a", "late", "by-step"), sample("sure", "a", "sure", "by-confidence"), sample("unsure", "a", "unsure", "by-confidence"), sample("end", "■", "end token")];
  return [sample("own", "a", "the model's own", "by-step"), sample("unsure", "a", "unsure", "by-confidence"), sample("kept", "a", "drafted, accepted"), sample("refused", "a", "drafted, refused")];
}
