/* The method catalog: search as you type, filters, and every method's card. */

import { el, fill } from "./dom.js";
import { kindFor, kindOf, server } from "./server.js";
import { findMethods } from "./search.js";
import { settings } from "./settings.js";

const EXACTNESS = {
  exact: "the same tokens as the plain loop",
  distribution: "the same distribution as the plain loop",
  lossy: "may change the text, at a measured price",
  model: "changes or creates weights",
};

/** The catalog panel; `use(spec, model)` is called when a person wants to try a method. */
export class Catalog {
  constructor(use) {
    this.use = use;
    this.form = document.getElementById("catalog-form");
    this.list = document.getElementById("catalog-list");
    this.count = document.getElementById("catalog-count");
    this.form.addEventListener("input", () => this.draw());
    this.form.addEventListener("submit", (event) => event.preventDefault());
    this.form.addEventListener("reset", () => setTimeout(() => this.draw()));
  }

  /** Offer the filters that the catalog has values for. */
  offer() {
    const all = [...server.methods.values()];
    for (const [name, of] of [["folder", (method) => method.folder], ["exactness", (method) => method.exactness], ["state", (method) => method.state]]) {
      const select = this.form.elements[name];
      const values = [...new Set(all.map(of))].sort();
      const chosen = select.value;
      fill(select, el("option", { value: "" }, "all"), values.map((value) => el("option", { value }, value)));
      select.value = chosen;
    }
    this.draw();
  }

  draw() {
    const { search, folder: inFolder, exactness, state } = this.form.elements;
    const fits = (method) => (!inFolder.value || method.folder === inFolder.value) && (!exactness.value || method.exactness === exactness.value) && (!state.value || method.state === state.value);
    const found = findMethods([...server.methods.values()].filter(fits), search.value, server.searched);
    const open = new Set([...this.list.querySelectorAll("details[open]")].map((node) => node.dataset.slug));
    this.count.textContent = `${found.length} of ${server.methods.size}`;
    fill(this.list, found.map((method) => this.#card(method, open.has(method.slug))), found.length ? null : el("p", { class: "empty" }, "Nothing fits. ", el("button", { type: "reset", form: "catalog-form", class: "button plain" }, "Show all")));
  }

  #card(method, open) {
    const summary = el(
      "summary",
      {},
      el("span", { class: "slug" }, method.slug),
      el("span", { class: "title" }, method.title),
      el("span", { class: "tags" }, el("span", { class: `tag ${method.exactness}`, title: EXACTNESS[method.exactness] }, method.exactness), el("span", { class: "tag" }, method.folder), method.state === "works" ? null : el("span", { class: "tag planned" }, method.state)),
    );
    const node = el("details", { class: "card", "data-slug": method.slug, open }, summary);
    const unfold = () => node.open && node.children.length === 1 && node.append(this.#body(method));
    node.addEventListener("toggle", unfold);
    unfold();
    return node;
  }

  #body(method) {
    const inputs = {};
    const knobs = Object.entries(method.knobs).map(([name, words]) => {
      const input = el("input", { type: "text", placeholder: "default", "aria-label": `${name} of ${method.slug}`, autocomplete: "off", spellcheck: "false" });
      inputs[name] = input;
      return el("tr", {}, el("th", { scope: "row" }, el("code", {}, name)), el("td", {}, words), el("td", {}, input));
    });
    const fact = (name, value) => (value ? el("div", {}, el("dt", {}, name), el("dd", {}, value)) : null);
    const from = [method.paper && `arXiv ${method.paper}`, method.venue, method.date].filter(Boolean).join(", ");
    const facts = el(
      "dl",
      {},
      fact("Claim", method.claim),
      fact("What it does", method.does !== method.claim ? method.does : ""),
      fact("Does not help when", method.no_help),
      fact("Exactness", `${method.exactness}: ${EXACTNESS[method.exactness]}`),
      fact("Plugs into", method.plugs_into),
      fact("Needs", method.needs.join(", ")),
      fact("Not together with", method.conflicts.join(", ")),
      fact("Published", from),
      fact("To be shown", method.show),
      fact("File", method.file),
    );
    const spec = () => {
      const set = Object.entries(inputs).filter(([, input]) => input.value.trim()).map(([name, input]) => `${name}=${input.value.trim()}`);
      return set.length ? `${method.slug}:${set.join(",")}` : method.slug;
    };
    const table = knobs.length ? el("div", { class: "table" }, el("table", { class: "knobs" }, el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Setting"), el("th", { scope: "col" }, "What it means"), el("th", { scope: "col" }, "Value"))), el("tbody", {}, knobs))) : null;
    return el("div", { class: "card-body" }, facts, table, this.#try(method, spec));
  }

  #try(method, spec) {
    const kind = kindFor(method);
    const current = kindOf(settings.model) === kind;
    const model = current ? settings.model : server.models.find((one) => one.kind === kind)?.id;
    let why = "";
    if (method.state !== "works") why = "Planned: not in this version.";
    else if (!kind) why = method.folder === "bench" ? "Not chosen per request: it measures or describes models." : "Not chosen per request: it changes the model itself.";
    else if (!model) why = `Needs a ${kind} model; this server has none.`;
    if (why) return el("p", { class: "hint" }, why);
    const act = el("button", { type: "button", class: "button strong", on: { click: () => this.use(spec(), model) } }, "Try it in the chat");
    return el("p", { class: "try" }, act, current ? null : el("span", { class: "hint" }, `on ${model}, a ${kind} model`));
  }
}
