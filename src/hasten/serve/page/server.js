/* What the server offers - models and methods - and how it is doing. */

import { authorization, request } from "./api.js";
import { el, figure, fill } from "./dom.js";

const EVERY_S = 3; // between two looks at the server's state, while the page is in sight

/** Filled by `load`: models as {id, kind, backbone, ...}, methods by slug, the fields in which they are searched. */
export const server = { models: [], methods: new Map(), searched: {}, presets: {}, state: "loading" };

/** Ask the server for its models and methods; false while it still loads them. Raises what `request` raises. */
export async function load() {
  const listed = await (await request("/v1/models")).json();
  if (listed.data.some((model) => !model.hasten)) return false;
  server.models = listed.data.filter((model) => !model.hasten?.alias_of).map((model) => ({ ...model.hasten, id: model.id }));
  const catalog = await (await request("/hasten/methods")).json();
  server.methods = new Map(catalog.methods.map((method) => [method.slug, method]));
  server.searched = catalog.searched;
  server.presets = catalog.presets;
  return true;
}

export const modelOf = (id) => server.models.find((model) => model.id === id) ?? server.models[0];
export const kindOf = (id) => modelOf(id)?.kind ?? "causal";

/** The kind of model a method is for: "causal", "masked", or "" for what no request can choose. */
export function kindFor(method) {
  if (method.state !== "works") return "";
  if (method.plugs_into.startsWith("unmask")) return "masked";
  return /^(draft|logits)/.test(method.plugs_into) ? "causal" : "";
}

/** [group, [[spec, label], ...]] of the methods to choose from for a kind of model. */
export function choices(kind) {
  const presets = kind === "masked" ? Object.keys(server.presets) : ["auto", "plain"];
  const words = { auto: "auto (exact)", plain: "plain", exact: "exact", fast: "fast", "few-step": "few-step" };
  const fitting = [...server.methods.values()].filter((method) => kindFor(method) === kind).map((method) => [method.slug, method.slug]);
  return [
    ["Presets", presets.map((name) => [name, words[name] ?? name])],
    ["Methods", fitting.sort()],
  ];
}

/** Put the models into a select; `chosen` is kept when the server still has it. */
export function fillModels(select, chosen) {
  fill(select, server.models.map((model) => el("option", { value: model.id }, model.id)));
  select.value = modelOf(chosen)?.id ?? "";
}

/** Put the methods for `kind` into a select, with `chosen` as an entry of its own if it is none of them. */
export function fillMethods(select, kind, chosen, custom = true) {
  const groups = choices(kind);
  const known = groups.some(([, list]) => list.some(([spec]) => spec === chosen));
  fill(
    select,
    known ? null : el("option", { value: chosen }, chosen),
    groups.map(([name, list]) => el("optgroup", { label: name }, list.map(([spec, label]) => el("option", { value: spec }, label)))),
    custom ? el("option", { value: "…" }, "Others, with settings…") : null,
  );
  select.value = chosen;
}

/** The methods of a request out of what a person wrote: names separated by spaces. */
export function methodList(text) {
  const names = text.split(/\s+/).filter(Boolean);
  return names.length > 1 ? names : (names[0] ?? "auto");
}

async function look() {
  try {
    const answer = await fetch("/ready", { cache: "no-store", credentials: "same-origin", headers: authorization() });
    const { status, running, waiting } = await answer.json();
    server.state = status ?? (answer.status === 401 ? "locked" : "loading");
    return Number.isFinite(running) ? `${running} running, ${waiting} waiting` : "";
  } catch {
    server.state = "unreachable";
    return "";
  }
}

/** Keep the status line true: the chosen model's facts, the server's state and queue. Returns a function that redraws it. */
export function statusLine(node, chosen) {
  let queue = "";
  const draw = () => {
    const model = modelOf(chosen());
    const facts = model ? [model.kind === "masked" ? "masked diffusion" : "autoregressive", model.backbone && `${model.backbone} backbone`, model.dtype, model.parameters && `${figure.millions(model.parameters)} parameters`, model.window && `window ${figure.count(model.window)}`] : [];
    fill(
      node,
      el("span", { class: "state", "data-state": server.state }, el("span", { class: "dot", "aria-hidden": "true" }), server.state),
      queue ? el("span", {}, queue) : null,
      model ? el("span", { class: "model" }, el("strong", {}, model.id), ` ${facts.filter(Boolean).join(" · ")}`) : null,
      el("a", { href: "/metrics" }, "Metrics"),
    );
  };
  const again = async () => {
    if (document.visibilityState === "visible") {
      queue = await look();
      draw();
    }
    setTimeout(again, EVERY_S * 1000);
  };
  again();
  return draw;
}
