/* The chat: messages, streaming, stop, edit and regenerate. */

import { errorCard, stream } from "./api.js";
import { announce, beforePaint, button, copy, el, figure, fill } from "./dom.js";
import { MarkdownView } from "./markdown.js";
import { kindOf, server } from "./server.js";
import { body, keep, settings } from "./settings.js";
import { Trace } from "./trace.js";

const EXAMPLES = {
  masked: ["records: 21 bob 31;22 eve 25", "sort: k a d b", "reverse: a d k s", "copy: cat sun pen"],
  causal: ["Explain how a rainbow forms, in four sentences.", "Write a Python function that says whether a number is prime.", "Write out a poem in which every line begins with 'I love'."],
};
const NEAR_END = 80; // pixels from the end within which the view keeps following

/** The chat panel; `view` is the live view beside it. */
export class Chat {
  constructor(view, kept) {
    this.view = view;
    this.root = document.getElementById("chat");
    this.list = document.getElementById("messages");
    this.scroller = document.getElementById("scroller");
    this.input = document.getElementById("input");
    this.sender = document.getElementById("send");
    this.messages = kept;
    this.running = null;
    document.getElementById("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.running) this.stop();
      else this.send();
    });
    this.input.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this.send();
      }
    });
    this.input.addEventListener("input", () => this.#size());
    document.getElementById("new-chat").addEventListener("click", () => this.clear());
    for (const pane of document.querySelectorAll("[name=pane]")) pane.addEventListener("change", () => (this.root.dataset.pane = pane.value));
    this.redraw();
  }

  /** Draw every message anew, or the examples when there is none. */
  redraw() {
    if (!this.messages.length) return this.#welcome();
    this.sender.disabled = !server.models.length;
    fill(this.list, this.messages.map((message, i) => this.#message(message, i)));
    this.#latest();
    this.#end();
    return undefined;
  }

  clear() {
    this.stop();
    this.messages = [];
    this.view.show(null);
    keep(this.messages);
    this.redraw();
    this.input.focus();
  }

  send() {
    const text = this.input.value.trim();
    if (!text || this.running || !server.models.length) return;
    this.input.value = "";
    this.#size();
    this.messages.push({ role: "user", content: text });
    this.answer();
  }

  stop() {
    this.running?.abort();
  }

  /** Answer the messages so far. */
  async answer() {
    const asked = this.messages.filter((message) => message.content && !message.error).map(({ role, content }) => ({ role, content }));
    const trace = new Trace(kindOf(settings.model));
    const message = { role: "assistant", content: "", trace, model: settings.model, pending: true };
    this.messages.push(message);
    this.redraw();
    this.view.show(trace);
    const running = new AbortController();
    this.running = running;
    this.#busy(true);
    const draw = beforePaint(() => this.#grow(message));
    try {
      await stream(body(asked), running.signal, (chunk) => {
        const choice = chunk.choices?.[0];
        if (choice?.delta?.content) message.content += choice.delta.content;
        if (choice?.finish_reason) message.finish = choice.finish_reason;
        for (const event of chunk.hasten?.events ?? []) trace.add(event);
        if (chunk.hasten?.usage) trace.facts = chunk.hasten;
        draw();
      });
    } catch (error) {
      if (running.signal.aborted) message.finish = "stopped by you";
      else message.error = error;
    }
    message.pending = false;
    trace.ended = true;
    this.running = null;
    this.#busy(false);
    if (this.messages.includes(message)) {
      keep(this.messages.filter((one) => one.content));
      this.redraw();
      if (this.view.trace === trace) this.view.changed();
    }
    announce(message.error ? "The answer failed" : "The answer has ended");
  }

  /** Answer the last question once more. */
  again() {
    if (this.running) return;
    while (this.messages.at(-1)?.role === "assistant") this.messages.pop();
    if (this.messages.length) this.answer();
  }

  #welcome() {
    this.sender.disabled = !server.models.length;
    if (this.sender.disabled) return fill(this.list);
    const kind = kindOf(settings.model);
    const examples = EXAMPLES[kind].map((text) => {
      const take = () => {
        this.input.value = text;
        this.send();
      };
      return el("button", { type: "button", class: "button example", on: { click: take } }, text);
    });
    const words = kind === "masked" ? "This model fills a whole canvas at once. Watch which places it settles first." : "This model writes from left to right. Watch which tokens a draft gave it for free.";
    fill(this.list, el("li", { class: "welcome" }, el("h2", {}, "What shall it write?"), el("p", {}, words), el("div", { class: "examples" }, examples)));
    return undefined;
  }

  #message(message, i) {
    const node = el("li", { class: `message ${message.role}`, "aria-label": message.role === "user" ? "You" : "Answer" });
    const text = el("div", { class: "text" });
    node.append(text);
    if (message.role === "user") {
      text.textContent = message.content;
      const editable = !this.running && i === this.messages.findLastIndex((one) => one.role === "user");
      node.prepend(el("div", { class: "acts" }, editable ? button("edit", "Edit", () => this.#edit(node, i)) : null, button("copy", "Copy", (event) => copy(message.content, event.currentTarget))));
      return node;
    }
    message.node = node;
    message.markdown = new MarkdownView(text);
    message.markdown.update(message.content);
    message.facts = el("p", { class: "facts" });
    node.append(message.facts);
    if (message.pending) node.classList.add("pending");
    else this.#close(message, i);
    this.#facts(message);
    return node;
  }

  #close(message, i) {
    if (message.error) message.node.append(errorCard(message.error, () => this.again()));
    const last = i === this.messages.length - 1;
    const look = () => {
      this.view.show(message.trace);
      this.#latest();
      this.#pane("trace");
    };
    const looking = message.trace?.forwards.length ? button("layers", "How it came to be", look, { quiet: false, kind: "look" }) : null;
    const acts = [looking, message.content ? button("copy", "Copy", (event) => copy(message.content, event.currentTarget)) : null, last && !message.error ? button("again", "Answer again", () => this.again()) : null];
    message.node.append(el("div", { class: "acts" }, acts));
  }

  #grow(message) {
    message.markdown.update(message.content);
    this.#facts(message);
    if (this.view.trace === message.trace) this.view.changed();
    this.#end(true);
  }

  #facts(message) {
    if (!message.trace) return;
    const sums = message.trace.sums();
    message.facts.hidden = !!message.error && !message.content;
    const parts = [message.model];
    if (message.trace.facts?.method) parts.push(message.trace.facts.method.join(" + "));
    if (sums.tokens) parts.push(`${figure.rate(sums.rate)} tokens/s`, `${figure.ratio(sums.perForward)} tokens per forward`);
    if (message.finish && message.finish !== "stop") parts.push(message.finish === "length" ? "reached the token limit" : message.finish);
    if (message.pending && !sums.tokens) parts.push("waiting for the first token");
    message.facts.textContent = parts.join(" · ");
  }

  #latest() {
    for (const message of this.messages) message.node?.classList.toggle("looked-at", message.trace === this.view.trace && !!message.trace);
  }

  #edit(node, i) {
    const field = el("textarea", { "aria-label": "Edit the message", rows: 3 });
    field.value = this.messages[i].content;
    const save = () => {
      if (!field.value.trim()) return;
      this.messages = [...this.messages.slice(0, i), { role: "user", content: field.value.trim() }];
      this.answer();
    };
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        save();
      } else if (event.key === "Escape") {
        event.stopPropagation();
        this.redraw();
        this.input.focus();
      }
    });
    const acts = el("div", { class: "acts" }, el("button", { type: "button", class: "button strong", on: { click: save } }, "Send again"), el("button", { type: "button", class: "button plain", on: { click: () => this.redraw() } }, "Cancel"));
    fill(node, field, acts);
    node.classList.add("editing");
    field.focus();
  }

  #pane(name) {
    this.root.dataset.pane = name;
    for (const pane of document.querySelectorAll("[name=pane]")) pane.checked = pane.value === name;
  }

  #busy(busy) {
    this.root.toggleAttribute("data-busy", busy);
    this.list.setAttribute("aria-busy", String(busy));
    const fresh = button(busy ? "stop" : "send", busy ? "Stop" : "Send", () => {}, { quiet: false });
    this.sender.replaceChildren(...fresh.childNodes);
    this.sender.title = busy ? "Stop (Escape)" : "Send (Enter)";
  }

  #size() {
    this.input.style.setProperty("height", "auto");
    this.input.style.setProperty("height", `${Math.min(this.input.scrollHeight + 2, 220)}px`);
  }

  #end(soft = false) {
    const { scroller } = this;
    const away = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight;
    if (!soft || away < NEAR_END) scroller.scrollTop = scroller.scrollHeight;
  }
}
