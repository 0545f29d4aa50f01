/* The server's routes. Every request stays on this origin. */

import { el } from "./dom.js";
import { EventParser } from "./sse.js";
import { tab } from "./store.js";

const KEY = "hasten.key"; // in the tab's session storage only

/** An answer that is an error: the server's message, the field it is about, its code, the HTTP status. */
export class ApiError extends Error {
  constructor(status, body, retry) {
    super(body?.error?.message ?? `The server answered with status ${status}.`);
    this.status = status;
    this.param = body?.error?.param ?? "";
    this.code = body?.error?.code ?? "";
    this.type = body?.error?.type ?? "";
    this.retry = retry;
  }
}

/* What the browser raises when nothing answers is a TypeError, as a slip in this code would be: tell them apart here. */
async function reach(work, words) {
  try {
    return await work();
  } catch (error) {
    if (!(error instanceof TypeError)) throw error;
    throw Object.assign(new ApiError(0, { error: { message: words } }, 0), { unreachable: true });
  }
}

export const key = {
  get: () => tab.get(KEY) ?? "",
  set: (value) => (value ? tab.set(KEY, value) : tab.remove(KEY)),
};

/** The headers that carry the key, if the person gave one here; else the browser's own sign-in goes along. */
export const authorization = () => (key.get() ? { Authorization: `Bearer ${key.get()}` } : {});

let asking = null;

/* Ask for a key once, however many requests wait for it; resolves to false when the person declines. */
function ask() {
  asking ??= new Promise((resolve) => {
    const dialog = document.getElementById("key-dialog");
    const field = dialog.querySelector("input");
    field.value = key.get();
    dialog.returnValue = "";
    dialog.addEventListener(
      "close",
      () => {
        asking = null;
        if (dialog.returnValue === "use") key.set(field.value.trim());
        field.value = "";
        resolve(dialog.returnValue === "use");
      },
      { once: true },
    );
    dialog.showModal();
  });
  return asking;
}

/** Fetch `path`; asks for a key when the server wants one. Raises ApiError, `unreachable` when nothing answers. */
export async function request(path, { body, signal } = {}) {
  for (;;) {
    const headers = { ...authorization(), ...(body ? { "Content-Type": "application/json" } : {}) };
    const options = { method: body ? "POST" : "GET", headers, signal, credentials: "same-origin", cache: "no-store", redirect: "error" };
    const answer = await reach(() => fetch(path, body ? { ...options, body: JSON.stringify(body) } : options), "The server cannot be reached.");
    if (answer.ok) return answer;
    if (answer.status === 401 && (await ask())) continue;
    const read = await answer.json().catch(() => null);
    throw new ApiError(answer.status, read, Number(answer.headers.get("Retry-After")) || 0);
  }
}

/** Stream a chat completion: `take(chunk)` gets every chunk as it comes. */
export async function stream(body, signal, take) {
  const answer = await request("/v1/chat/completions", { body, signal });
  const reader = answer.body.getReader();
  const parser = new EventParser();
  let finished = false;
  for (;;) {
    const { done, value } = await reach(() => reader.read(), "The connection broke before the answer was complete.");
    if (done) break;
    for (const data of parser.push(value)) {
      if (data === "[DONE]") {
        finished = true;
        continue;
      }
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(answer.status, chunk, 0);
      take(chunk);
    }
  }
  if (!finished) throw new ApiError(answer.status, { error: { message: "The stream ended before the answer was complete." } }, 0);
}

/** The error as a card that is put where the answer would have been; `again` tries once more. */
export function errorCard(error, again) {
  const facts = [];
  if (error.param) facts.push(el("span", {}, "field ", el("code", {}, error.param)));
  if (error.code) facts.push(el("span", {}, "code ", el("code", {}, String(error.code))));
  if (error.status >= 400) facts.push(el("span", {}, `status ${error.status}`));
  if (error.retry) facts.push(el("span", {}, `try again in ${error.retry} s`));
  const retry = again && el("button", { type: "button", class: "button plain", on: { click: again } }, "Try again");
  return el("div", { class: "error", role: "alert" }, el("p", {}, error.message), facts.length ? el("p", { class: "facts" }, facts) : null, retry);
}
