/* What a person has set, and the drawer where most of it is set. */

import { key } from "./api.js";
import { fillMethods, fillModels, kindOf, methodList } from "./server.js";
import { device } from "./store.js";

const STORE = "hasten.kept"; // the chat and its settings, only while the person has asked to keep them
const DEFAULTS = { model: "", method: "auto", system: "", temperature: "0", top_p: "1", max_tokens: "", seed: "", format: "text", schema: "" };
const USUAL = { causal: 512, masked: 128 }; // max_tokens when the field is empty; a canvas costs its whole length

export const settings = { ...DEFAULTS, keep: false };

/** What was kept on this device: the messages, with the settings taken over; [] when nothing was. */
export function recall() {
  try {
    const stored = JSON.parse(device.get(STORE) ?? "null");
    if (!stored) return [];
    for (const name of Object.keys(DEFAULTS)) if (typeof stored.settings?.[name] === "string") settings[name] = stored.settings[name];
    settings.keep = true;
    return (stored.messages ?? []).filter((m) => ["user", "assistant"].includes(m.role) && typeof m.content === "string");
  } catch {
    device.remove(STORE);
    return [];
  }
}

/** Keep the chat on this device if the person has asked for it; otherwise see that nothing is kept. */
export function keep(messages) {
  const { keep: wanted, ...rest } = settings;
  const stored = { settings: rest, messages: messages.map(({ role, content }) => ({ role, content })) };
  if (!wanted || !device.set(STORE, JSON.stringify(stored))) device.remove(STORE);
}

/** The body of a chat request with these settings; `over` replaces model or method. Raises Error with a plain sentence. */
export function body(messages, over = {}) {
  const chosen = { ...settings, ...over };
  const kind = kindOf(chosen.model);
  const sent = {
    model: chosen.model,
    messages: [...(settings.system.trim() ? [{ role: "system", content: settings.system }] : []), ...messages],
    stream: true,
    stream_options: { include_usage: true },
    max_tokens: settings.max_tokens === "" ? USUAL[kind] : Number(settings.max_tokens),
    temperature: Number(settings.temperature),
    top_p: Number(settings.top_p),
    hasten: { method: methodList(chosen.method), trace: true },
  };
  if (settings.seed !== "") sent.seed = Number(settings.seed);
  if (kind === "masked") sent.hasten.provisional = true;
  if (settings.format === "json_object") sent.response_format = { type: "json_object" };
  if (settings.format === "json_schema") {
    let schema;
    try {
      schema = JSON.parse(settings.schema);
    } catch (error) {
      throw new Error(`The JSON schema in the settings is not JSON: ${error.message}`);
    }
    sent.response_format = { type: "json_schema", json_schema: { name: "answer", schema, strict: true } };
  }
  return sent;
}

/** Bind every control with `data-setting` on the page, in the drawer and beside the composer; returns a redraw function. */
export function bind(changed) {
  const controls = [...document.querySelectorAll("[data-setting]")];
  const drawer = document.getElementById("drawer");
  const keyField = document.getElementById("key-field");
  const redraw = () => {
    for (const control of controls) {
      const name = control.dataset.setting;
      if (control.dataset.fill === "models") fillModels(control, settings[name]);
      else if (control.dataset.fill === "methods") fillMethods(control, kindOf(settings.model), settings[name]);
      else if (control.type === "checkbox") control.checked = settings[name];
      else if (control !== document.activeElement) control.value = settings[name];
      if (control.type === "range") control.closest("label").querySelector(".value").textContent = settings[name];
    }
    document.getElementById("schema-row").hidden = settings.format !== "json_schema";
    document.getElementById("max-tokens").placeholder = String(USUAL[kindOf(settings.model)]);
  };
  const take = (control) => {
    const name = control.dataset.setting;
    if (control.value === "…") {
      redraw();
      drawer.showModal();
      document.getElementById("method-field").focus();
      return;
    }
    const before = kindOf(settings.model);
    settings[name] = control.type === "checkbox" ? control.checked : control.value;
    if (name === "model" && kindOf(settings.model) !== before) settings.method = "auto";
    redraw();
    changed(name);
  };
  for (const control of controls) control.addEventListener(control.tagName === "SELECT" || control.type === "checkbox" ? "change" : "input", () => take(control));
  drawer.addEventListener("close", () => key.set(keyField.value.trim()));
  document.getElementById("reset").addEventListener("click", () => {
    Object.assign(settings, DEFAULTS, { model: settings.model, keep: settings.keep });
    redraw();
    changed("all");
  });
  for (const opener of document.querySelectorAll("[data-opens=drawer]")) {
    opener.addEventListener("click", () => {
      keyField.value = key.get();
      redraw();
      drawer.showModal();
    });
  }
  return redraw;
}
