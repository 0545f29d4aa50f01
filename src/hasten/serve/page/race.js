/* Two methods, or two models, on one prompt: each with its clock and its live view, and a summary of the outcome. */

import { errorCard, stream } from "./api.js";
import { announce, beforePaint, el, figure, fill } from "./dom.js";
import { fillMethods, fillModels, kindOf, server } from "./server.js";
import { body } from "./settings.js";
import { LiveView } from "./view.js";

class Lane {
  constructor(name, method) {
    this.name = name;
    this.method = method;
    this.model = el("select", { "aria-label": `Model of lane ${name}` });
    this.methods = el("select", { "aria-label": `Method of lane ${name}` });
    this.clock = el("output", { class: "clock" }, "0.00 s");
    this.badge = el("span", { class: "badge", hidden: true }, "first");
    this.text = el("div", { class: "lane-text" });
    this.trouble = el("div");
    this.view = new LiveView({ title: `How ${name} came to be`, compact: true, level: "h3" });
    this.model.addEventListener("change", () => this.offer());
    this.methods.addEventListener("change", () => (this.method = this.methods.value));
    const head = el("header", {}, el("h3", { class: "lane-name" }, name), this.model, this.methods, this.badge, this.clock);
    this.node = el("article", { class: "lane", "aria-label": `Lane ${name}` }, head, this.text, this.trouble, this.view.node);
    this.draw = beforePaint(() => {
      this.text.textContent = this.content;
      this.text.scrollTop = this.took ? 0 : this.text.scrollHeight;
      this.view.changed();
      this.#tick();
    });
  }

  /** Offer what the server has; a method that does not fit the model's kind gives way. */
  offer(model = this.model.value) {
    fillModels(this.model, model);
    const kind = kindOf(this.model.value);
    if (this.kind && this.kind !== kind) this.method = this.name === "A" ? "auto" : "plain";
    this.kind = kind;
    fillMethods(this.methods, kind, this.method, false);
  }

  #tick() {
    this.clock.textContent = figure.seconds(((this.took ?? performance.now() - this.began) || 0) / 1000);
  }

  /** Run the prompt; resolves when the answer has ended, failed or was stopped. */
  async run(prompt, seed, signal) {
    const trace = this.view.begin(kindOf(this.model.value));
    Object.assign(this, { content: "", took: null, failed: null, finish: "", first: NaN, began: performance.now() });
    fill(this.trouble);
    this.badge.hidden = true;
    this.node.dataset.state = "running";
    const ticking = setInterval(() => this.#tick(), 50);
    try {
      const sent = body([{ role: "user", content: prompt }], { model: this.model.value, method: this.method });
      sent.seed ??= seed;
      await stream(sent, signal, (chunk) => {
        const choice = chunk.choices?.[0];
        if (choice?.delta?.content) {
          this.content += choice.delta.content;
          if (!Number.isFinite(this.first)) this.first = performance.now() - this.began;
        }
        if (choice?.finish_reason) this.finish = choice.finish_reason;
        for (const event of chunk.hasten?.events ?? []) trace.add(event);
        if (chunk.hasten?.usage) trace.facts = chunk.hasten;
        this.draw();
      });
    } catch (error) {
      this.failed = error;
      if (!signal.aborted) fill(this.trouble, errorCard(error));
    }
    this.took = performance.now() - this.began;
    clearInterval(ticking);
    trace.ended = true;
    this.node.dataset.state = this.failed ? "failed" : "done";
    this.draw();
  }
}

/** The place where two texts part, as a sentence's facts: null when they are the same. */
export function difference(a, b) {
  if (a === b) return null;
  let at = 0;
  while (at < a.length && a[at] === b[at]) at += 1;
  const part = (text) => text.slice(at, at + 24) || "(the end)";
  return { at, before: a.slice(Math.max(0, at - 24), at), a: part(a), b: part(b) };
}

/** The race panel. */
export class Race {
  constructor() {
    this.lanes = [new Lane("A", "auto"), new Lane("B", "plain")];
    this.form = document.getElementById("race-form");
    this.prompt = document.getElementById("race-prompt");
    this.start = document.getElementById("race-start");
    this.result = document.getElementById("race-result");
    document.getElementById("lanes").append(...this.lanes.map((lane) => lane.node));
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.running) this.stop();
      else this.go();
    });
    this.prompt.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        if (!this.running) this.go();
      }
    });
  }

  /** Offer the server's models and methods in both lanes. */
  offer(model) {
    for (const lane of this.lanes) lane.offer(model);
    const masked = kindOf(model) === "masked";
    if (!this.prompt.value) this.prompt.value = masked ? "records: 21 bob 31;22 eve 25" : "Write out a poem in which every line begins with 'I love'.";
  }

  stop() {
    this.running?.abort();
  }

  async go() {
    const prompt = this.prompt.value.trim();
    if (!prompt || !server.models.length) return;
    const running = new AbortController();
    this.running = running;
    this.#button(true);
    fill(this.result);
    const together = this.form.elements.when.value === "together";
    const seed = Math.floor(Math.random() * 2 ** 31);
    if (together) await Promise.all(this.lanes.map((lane) => lane.run(prompt, seed, running.signal)));
    else for (const lane of this.lanes) if (!running.signal.aborted) await lane.run(prompt, seed, running.signal);
    this.running = null;
    this.#button(false);
    if (!running.signal.aborted) this.#summary(together);
  }

  #button(busy) {
    this.start.textContent = busy ? "Stop" : "Start the race";
    this.start.classList.toggle("strong", !busy);
    this.start.classList.toggle("plain", busy);
  }

  #summary(together) {
    const [a, b] = this.lanes;
    if (a.failed || b.failed) {
      announce("The race has no winner");
      fill(this.result, el("p", {}, `No winner: ${[a, b].filter((lane) => lane.failed).map((lane) => `lane ${lane.name} failed`).join(" and ")}.`));
      return;
    }
    const sums = this.lanes.map((lane) => lane.view.trace.sums());
    const rows = [
      ["Time", this.lanes.map((lane) => lane.took / 1000), figure.seconds, -1],
      ["First text after", this.lanes.map((lane) => lane.first / 1000), figure.seconds, -1],
      ["Tokens per second", sums.map((sum) => sum.rate), figure.rate, 1],
      ["Forwards", sums.map((sum) => sum.forwards), figure.count, -1],
      ["Tokens per forward", sums.map((sum) => sum.perForward), figure.ratio, 1],
      ["Drafts accepted", sums.map((sum) => (sum.drafted ? sum.accepted / sum.drafted : NaN)), figure.share, 0],
    ].filter(([, values]) => values.some(Number.isFinite));
    const [first, second] = a.took <= b.took ? [a, b] : [b, a];
    first.badge.hidden = false;
    const times = second.took / first.took;
    const title = (lane) => [`${lane.name}: ${lane.method}`, a.model.value === b.model.value ? null : el("small", {}, lane.model.value)];
    const better = (values, sign, i) => sign && values[i] !== values[1 - i] && sign * (values[i] - values[1 - i]) > 0;
    const head = el("tr", {}, el("th", { scope: "col" }, el("span", { class: "unseen" }, "Figure")), this.lanes.map((lane) => el("th", { scope: "col" }, title(lane))));
    const lines = rows.map(([name, values, show, sign]) => el("tr", {}, el("th", { scope: "row" }, name), values.map((value, i) => el("td", { class: better(values, sign, i) ? "better" : "" }, show(value)))));
    const words = times < 1.02 ? "A dead heat." : `Lane ${first.name} (${first.method}) was first, ${figure.ratio(times)} times as fast.`;
    announce(words);
    fill(
      this.result,
      el(
        "div",
        {},
        el("h3", {}, words),
        same(difference(a.content, b.content)),
        together ? el("p", { class: "hint" }, "Both shared this machine, often within the same forward pass: run them one after the other for times that compare.") : null,
      ),
      el("div", { class: "table" }, el("table", {}, el("thead", {}, head), el("tbody", {}, lines))),
    );
  }
}

function same(apart) {
  if (!apart) return el("p", {}, "The texts are the same, character for character.");
  const at = el("span", {}, `The texts part at character ${apart.at + 1}, after “${apart.before}”: `);
  return el("p", {}, at, "A goes on ", el("q", {}, apart.a), ", B ", el("q", {}, apart.b), ".");
}
