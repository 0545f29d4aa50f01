/* Puts the page together: tabs, theme, status line, keys. */

import { errorCard } from "./api.js";
import { Catalog } from "./catalog.js";
import { Chat } from "./chat.js";
import { button, el, fill } from "./dom.js";
import { Race } from "./race.js";
import { load, modelOf, statusLine } from "./server.js";
import { bind, keep, recall, settings } from "./settings.js";
import { device } from "./store.js";
import { LiveView } from "./view.js";

const AGAIN_S = 3; // until the server is asked once more when it could not tell its models

const tabs = [...document.querySelectorAll("[role=tab]")];

function open(name, focus = false) {
  const tab = tabs.find((one) => one.getAttribute("aria-controls") === name) ?? tabs[0];
  for (const one of tabs) {
    const chosen = one === tab;
    one.setAttribute("aria-selected", String(chosen));
    one.tabIndex = chosen ? 0 : -1;
    document.getElementById(one.getAttribute("aria-controls")).hidden = !chosen;
  }
  if (location.hash || tab !== tabs[0]) history.replaceState(null, "", `#${tab.getAttribute("aria-controls")}`);
  if (focus) tab.focus();
}

for (const [i, tab] of tabs.entries()) {
  tab.addEventListener("click", () => open(tab.getAttribute("aria-controls")));
  tab.addEventListener("keydown", (event) => {
    const to = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: tabs.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    open(tabs[(to + tabs.length) % tabs.length].getAttribute("aria-controls"), true);
  });
}

const root = document.documentElement;
const prefersDark = matchMedia("(prefers-color-scheme: dark)");
const toggle = document.getElementById("theme");
function drawTheme() {
  const dark = (root.dataset.theme ?? (prefersDark.matches ? "dark" : "light")) === "dark";
  const label = dark ? "Light theme" : "Dark theme";
  toggle.replaceChildren(...button(dark ? "sun" : "moon", label, () => {}).childNodes);
  toggle.title = label;
  return dark;
}
toggle.addEventListener("click", () => {
  root.dataset.theme = drawTheme() ? "light" : "dark";
  device.set("hasten.theme", root.dataset.theme);
  drawTheme();
});
prefersDark.addEventListener("change", drawTheme);
drawTheme();

const view = new LiveView({ empty: "Ask something: every forward pass of the answer is drawn here as it happens." });
document.getElementById("trace").append(view.node);
const kept = recall();
const chat = new Chat(view, kept);
const race = new Race();
const redraw = bind((name) => {
  if (name === "model" && !chat.messages.length) chat.redraw();
  if (name === "model") catalog.draw();
  keep(chat.messages);
  drawStatus();
});
const drawStatus = statusLine(document.getElementById("status"), () => settings.model);
const catalog = new Catalog((spec, model) => {
  Object.assign(settings, { method: spec, model });
  redraw();
  drawStatus();
  if (!chat.messages.length) chat.redraw();
  open("chat");
  chat.input.focus();
});

document.addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]")) return;
  const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName);
  if (event.key === "Escape") {
    chat.stop();
    race.stop();
  } else if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
    event.preventDefault();
    const field = [chat.input, race.prompt, document.getElementById("search")].find((one) => one.offsetParent !== null);
    field?.focus();
  }
});
for (const closer of document.querySelectorAll("dialog [data-closes]")) closer.addEventListener("click", () => closer.closest("dialog").close(closer.value));
for (const dialog of document.querySelectorAll("dialog")) dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());

let waiting = 0;

async function begin() {
  const trouble = document.getElementById("trouble");
  clearTimeout(waiting);
  try {
    if (!(await load())) {
      fill(trouble, el("p", { class: "hint", role: "status" }, "The server is loading its models…"));
      waiting = setTimeout(begin, AGAIN_S * 1000);
      return;
    }
  } catch (error) {
    fill(trouble, errorCard(error, begin));
    if (error.unreachable || error.status === 503) waiting = setTimeout(begin, AGAIN_S * 1000);
    return;
  }
  fill(trouble);
  settings.model = modelOf(settings.model)?.id ?? "";
  redraw();
  drawStatus();
  chat.redraw();
  race.offer(settings.model);
  catalog.offer();
}

open(location.hash.slice(1));
begin();
