/* Drives the page in a headless Chromium: `node browser.mjs URL [SHOTS]` prints one JSON object, scenario -> "ok" or what failed.

playwright-core is taken from the folder in HASTEN_PLAYWRIGHT or found as Node finds modules; the browser from
HASTEN_CHROMIUM or /usr/bin/chromium. With SHOTS, pictures of the page are written into that folder. */
import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { join } from "node:path";

const from = process.env.HASTEN_PLAYWRIGHT ? join(process.env.HASTEN_PLAYWRIGHT, "_") : import.meta.url;
const { chromium } = createRequire(from)("playwright-core");
const [, , url, shots] = process.argv;
const origin = new URL(url).origin;
const browser = await chromium.launch({ executablePath: process.env.HASTEN_CHROMIUM ?? "/usr/bin/chromium", args: ["--no-sandbox"] });
const EXPECTED = /status of (400|401|503)|INCOMPLETE_CHUNKED/; // what the browser logs for the answers that scenarios ask for

/** A fresh page with everything that must not happen written down. */
async function open({ width = 1360, height = 860, scheme = "light", motion = "no-preference", before = null } = {}) {
  const context = await browser.newContext({ viewport: { width, height }, colorScheme: scheme, reducedMotion: motion });
  await context.grantPermissions(["clipboard-read", "clipboard-write"]);
  const page = await context.newPage();
  const faults = [];
  page.on("pageerror", (error) => faults.push(`error: ${error.message}`));
  page.on("console", (message) => ["error", "warning"].includes(message.type()) && !EXPECTED.test(message.text()) && faults.push(`console: ${message.text()}`));
  context.on("request", (request) => !request.url().startsWith(origin) && !request.url().startsWith("data:") && faults.push(`request: ${request.url()}`));
  context.on("page", () => faults.push("a window was opened"));
  if (before) await page.addInitScript(before);
  await page.goto(url);
  page.faults = faults;
  return page;
}

const ready = (page) => page.waitForSelector("#send:not([disabled])", { state: "attached" });
const ended = (page) => page.waitForSelector("#chat:not([data-busy])", { state: "attached" });
async function ask(page, text, wait = true) {
  await page.fill("#input", text);
  await page.press("#input", "Enter");
  if (wait) await ended(page);
}
const answer = (page) => page.locator(".assistant .text").last();
const masked = (page) => page.selectOption("#composer [data-setting=model]", "mini-dlm");
const picture = (page, name) => shots && page.screenshot({ path: join(shots, `${name}.png`) });
const frames = (page) => page.evaluate(() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done))));

/** Everything an audit can compute: names of controls, unique ids, contrast of every visible text, no sideways scrolling. */
async function audit(page) {
  await page.waitForTimeout(300); // transitions
  const found = await page.evaluate(() => {
    const out = [];
    const seen = (node) => node.checkVisibility({ visibilityProperty: true }) && !node.closest(".unseen, .skip") && node.getBoundingClientRect().width > 1;
    for (const node of document.querySelectorAll("button, input, select, textarea, a[href], summary")) {
      const name = node.getAttribute("aria-label") || node.labels?.[0]?.textContent || node.textContent || node.title;
      if (!name?.trim()) out.push(`no name: ${node.outerHTML.slice(0, 90)}`);
    }
    for (const node of document.querySelectorAll("[role=img], [role=option]")) if (!node.getAttribute("aria-label") && !node.textContent) out.push(`no name: ${node.outerHTML.slice(0, 90)}`);
    for (const node of document.querySelectorAll("[role=listbox] > *")) if (node.getAttribute("role") !== "option") out.push("a listbox holds more than options");
    const ids = [...document.querySelectorAll("[id]")].map((node) => node.id);
    for (const id of ids) if (ids.indexOf(id) !== ids.lastIndexOf(id)) out.push(`id twice: ${id}`);
    for (const node of document.querySelectorAll("[aria-controls], [aria-labelledby]")) for (const name of ["aria-controls", "aria-labelledby"]) if (node.hasAttribute(name) && !document.getElementById(node.getAttribute(name))) out.push(`${name} leads nowhere: ${node.getAttribute(name)}`);
    const pen = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d", { willReadFrequently: true });
    const over = (colours) => {
      pen.clearRect(0, 0, 1, 1);
      for (const colour of colours) {
        pen.fillStyle = colour;
        pen.fillRect(0, 0, 1, 1);
      }
      return [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3);
    };
    const light = (rgb) => rgb.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)).reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    for (const node of document.querySelectorAll("body *")) {
      if (![...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim()) || !seen(node) || node.closest("[disabled], template, option")) continue;
      const layers = [];
      for (let up = node; up; up = up.parentElement) layers.unshift(getComputedStyle(up).backgroundColor);
      const style = getComputedStyle(node);
      const [ink, paper] = [light(over([...layers, style.color])), light(over(layers))];
      const ratio = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
      const large = parseFloat(style.fontSize) >= 24 || (parseFloat(style.fontSize) >= 18.66 && style.fontWeight >= 700);
      if (ratio < (large ? 3 : 4.5)) out.push(`contrast ${ratio.toFixed(2)}: ${node.className || node.tagName} "${node.textContent.slice(0, 20)}" ${style.color} on ${layers.filter((l) => l !== "rgba(0, 0, 0, 0)").at(-1)}`);
    }
    if (document.documentElement.scrollWidth > innerWidth) out.push(`${document.documentElement.scrollWidth} px wide`);
    for (const node of document.querySelectorAll("#chat, #race, #methods, #scroller, #trace, .live, .places, dialog[open]")) if (seen(node) && node.scrollWidth > node.clientWidth + 1) out.push(`${node.id || node.className} scrolls sideways: ${node.scrollWidth} in ${node.clientWidth}`);
    return [...new Set(out)];
  });
  assert.deepEqual(found, []);
}

const scenarios = {
  async "the chat streams and says what it cost"(page) {
    await ready(page);
    await page.fill("#input", "Write out a poem");
    await page.press("#input", "Enter");
    const lengths = new Set();
    while (await page.locator("#chat[data-busy]").count()) {
      lengths.add((await answer(page).textContent()).length);
      await page.waitForTimeout(40);
    }
    assert.ok(lengths.size > 5, `text came in ${lengths.size} sizes`);
    assert.match(await page.locator(".assistant .facts").innerText(), /prompt-lookup \+ aded · 116 tokens\/s · 1\.35 tokens per forward · reached the token limit/);
    assert.match(await page.locator("#trace .sums").innerText(), /Forwards\s+103[^]*Drafts accepted\s+36 of 169/);
    assert.equal(await page.locator(".chip.kept").count(), 36);
    await page.locator(".assistant .acts .button", { hasText: "Copy" }).click();
    assert.match(await page.evaluate(() => navigator.clipboard.readText()), /^In the heart of the earth/);
    await picture(page, "chat-light");
  },

  async "Escape stops an answer, and the button does"(page) {
    await ready(page);
    for (const stop of [() => page.keyboard.press("Escape"), () => page.click("#send")]) {
      await ask(page, "slowly", false);
      await page.waitForFunction(() => [...document.querySelectorAll(".assistant .text")].at(-1)?.textContent.length > 3);
      assert.equal(await page.locator("#send").innerText(), "Stop");
      await stop();
      await page.waitForSelector("#chat:not([data-busy])", { timeout: 1000 });
      const text = await answer(page).textContent();
      await page.waitForTimeout(400);
      assert.equal(await answer(page).textContent(), text);
      assert.match(await page.locator(".assistant .facts").last().innerText(), /stopped by you/);
    }
  },

  async "regenerate, edit, new chat"(page) {
    await ready(page);
    await ask(page, "first");
    await page.locator(".button", { hasText: "Answer again" }).click();
    await ended(page);
    assert.equal(await page.locator(".message").count(), 2);
    await page.locator(".user").hover();
    await page.locator(".user .button", { hasText: "Edit" }).click();
    await page.fill(".editing textarea", "second");
    await page.press(".editing textarea", "Enter");
    await ended(page);
    assert.equal(await page.locator(".user .text").innerText(), "second");
    assert.equal(await page.locator(".message").count(), 2);
    await ask(page, "third");
    assert.equal(await page.locator(".message").count(), 4);
    await page.click("#new-chat");
    assert.equal(await page.locator(".message").count(), 0);
    assert.ok(await page.locator(".example").count());
  },

  async "hostile answers stay text"(page) {
    await ready(page);
    await ask(page, "markdown");
    assert.equal(await page.evaluate(() => window.hacked), undefined);
    assert.equal(await page.locator(":is(.assistant, #trace) :is(img, script, iframe, object, embed, style, link)").count(), 0);
    assert.deepEqual(await page.locator(".assistant a").evaluateAll((all) => all.map((a) => [a.protocol, a.rel])), Array(3).fill(["https:", "noopener noreferrer nofollow"]).with(0, ["http:", "noopener noreferrer nofollow"]));
    assert.match(await answer(page).innerText(), /Häßlich — 図書館 😀[^]*<script>[^]*!\[a picture\]\([^]*\[bad\]\(javascript:/);
    await page.locator(".assistant .code .button").click();
    assert.match(await page.evaluate(() => navigator.clipboard.readText()), /^<iframe/);
    await audit(page);
  },

  async "errors stand where the answer would"(page) {
    await ready(page);
    await ask(page, "fail");
    assert.match(await page.locator(".error").innerText(), /temperature must be a number[^]*field temperature[^]*code out_of_range[^]*status 400/);
    await audit(page);
    await page.click("#new-chat");
    await ask(page, "busy");
    assert.match(await page.locator(".error").innerText(), /try again in 2 s/);
    await page.click("#new-chat");
    await ask(page, "break");
    assert.match(await page.locator(".error").innerText(), /The connection broke before|ended before the answer was complete/);
    assert.ok((await answer(page).textContent()).length > 0, "the part that came stays");
  },

  async "settings reach the server"(page) {
    await ready(page);
    await page.click("[data-opens=drawer]");
    await audit(page);
    await page.fill("[data-setting=system]", "Be brief.");
    await page.fill("[data-setting=max_tokens]", "77");
    await page.fill("[data-setting=seed]", "5");
    await page.fill("[data-setting=temperature]", "0.7");
    await page.fill("#method-field", "prompt-lookup:nodes=4 aded");
    await page.selectOption("[data-setting=format]", "json_schema");
    await page.fill("[data-setting=schema]", '{"type": "object"}');
    await page.keyboard.press("Escape");
    const sent = page.waitForRequest((request) => request.method() === "POST");
    await ask(page, "hello");
    const { messages, hasten, ...rest } = (await sent).postDataJSON();
    assert.deepEqual(messages, [{ role: "system", content: "Be brief." }, { role: "user", content: "hello" }]);
    assert.deepEqual(hasten, { method: ["prompt-lookup:nodes=4", "aded"], trace: true });
    assert.deepEqual(rest, { model: "smollm2-135m", stream: true, stream_options: { include_usage: true }, max_tokens: 77, temperature: 0.7, top_p: 1, seed: 5, response_format: { type: "json_schema", json_schema: { name: "answer", schema: { type: "object" }, strict: true } } });
    assert.deepEqual(await page.evaluate(() => Object.keys(localStorage)), [], "nothing is kept unasked");
    await page.click("[data-opens=drawer]");
    await page.check("[data-setting=keep]");
    await page.keyboard.press("Escape");
    await page.reload();
    await ready(page);
    assert.equal(await page.locator(".user .text").innerText(), "hello");
    await page.click("[data-opens=drawer]");
    assert.equal(await page.inputValue("[data-setting=max_tokens]"), "77");
    await page.uncheck("[data-setting=keep]");
    assert.deepEqual(await page.evaluate(() => Object.keys(localStorage)), []);
  },

  async "the canvas fills, and every pass can be replayed"(page) {
    await ready(page);
    await masked(page);
    await page.selectOption("#composer [data-setting=method]", "plain");
    await ask(page, "records", false);
    await page.waitForSelector(".cell[data-state=final]");
    const states = await page.locator(".cell").evaluateAll((all) => new Set(all.map((cell) => cell.dataset.state)).size);
    assert.ok(states >= 2);
    await page.waitForTimeout(700);
    await picture(page, "canvas-midway");
    await ended(page);
    await frames(page);
    const final = () => page.locator(".cell[data-state=final]").count();
    assert.equal(await final(), 64);
    assert.equal(await page.locator(".cell").evaluateAll((all) => all.map((cell) => cell.textContent).join("")), '[{"id":21,"who":"bob","age":31},{"id":22,"who":"eve","age":25}]■');
    await page.focus("#trace [type=range]");
    await page.keyboard.press("Home");
    await frames(page);
    assert.equal(await final(), 1);
    assert.match(await page.locator(".where").first().innerText(), /forward 1 of 64/);
    for (let i = 0; i < 9; i += 1) await page.keyboard.press("ArrowRight");
    await frames(page);
    assert.equal(await final(), 10);
    await page.focus(".cell >> nth=0");
    await page.keyboard.press("ArrowRight");
    await page.keyboard.press("ArrowDown");
    assert.match(await page.locator("#trace .detail").innerText(), /place \d\d of 64 · (committed in forward \d+|a guess|masked)/);
    await page.locator("#trace .button", { hasText: "Replay" }).click();
    await page.waitForFunction(() => document.querySelectorAll(".cell[data-state=final]").length > 20 && document.querySelectorAll(".cell[data-state=final]").length < 64);
    await page.waitForFunction(() => document.querySelectorAll(".cell[data-state=final]").length === 64, null, { timeout: 15000 });
    await page.locator("#trace label", { hasText: "By confidence" }).click();
    await audit(page);
  },

  async "a canvas of 512 places stays smooth"(page) {
    await ready(page);
    await masked(page);
    await page.evaluate(() => {
      window.gaps = [];
      let last = performance.now();
      const tick = (now) => {
        window.gaps.push(now - last);
        last = now;
        requestAnimationFrame(tick);
      };
      requestAnimationFrame(tick);
    });
    await ask(page, "large");
    await frames(page);
    const gaps = (await page.evaluate(() => window.gaps)).sort((a, b) => a - b);
    const at = (share) => gaps[Math.floor(gaps.length * share)];
    assert.ok(at(0.5) < 70 && at(0.95) < 250, `frames: ${gaps.length}, median ${at(0.5)}, 95 % ${at(0.95)} ms`);
    assert.equal(await page.locator(".cell[data-state=final]").count(), 512);
    console.error(`512 places: ${gaps.length} frames, median ${at(0.5).toFixed(0)} ms, 95 % ${at(0.95).toFixed(0)} ms, worst ${gaps.at(-1).toFixed(0)} ms`);
    await picture(page, "canvas-512");
  },

  async "a race ends with a summary"(page) {
    await page.click("#tab-race");
    await page.waitForFunction(() => document.querySelector(".lane select").value);
    await page.fill("#race-prompt", "Write out a poem");
    await page.click("#race-start");
    await page.waitForSelector("#race-result h3");
    assert.match(await page.locator("#race-result").innerText(), /Lane [AB] \((auto|plain)\) was first[^]*The texts are the same[^]*Forwards\s+103\s+139/);
    assert.equal(await page.locator(".badge:not([hidden])").count(), 1);
    await audit(page);
    await picture(page, "race");
    await page.locator(".lane select[aria-label='Model of lane B']").selectOption("mini-dlm");
    await page.locator("label", { hasText: "One after the other" }).click();
    await page.click("#race-start");
    await page.waitForSelector("#race-result h3");
    assert.match(await page.locator("#race-result").innerText(), /The texts part at character 1/);
    await page.fill("#race-prompt", "slowly");
    await page.press("#race-prompt", "Enter");
    await page.waitForTimeout(300);
    await page.keyboard.press("Escape");
    await page.waitForFunction(() => document.getElementById("race-start").textContent === "Start the race", null, { timeout: 2000 });
  },

  async "the catalog is searched as one types, and a method is tried"(page) {
    await page.click("#tab-methods");
    await page.waitForSelector(".card");
    const all = await page.locator(".card").count();
    assert.ok(all > 50);
    await page.fill("#search", "token recycling");
    assert.ok((await page.locator(".card").count()) < 5);
    await page.fill("#search", "");
    await page.selectOption("[name=exactness]", "exact");
    await page.selectOption("[name=folder]", "draft");
    await page.selectOption("[name=state]", "works");
    const some = await page.locator(".card .slug").allInnerTexts();
    assert.ok(some.includes("prompt-lookup") && some.length < all / 2, some.join());
    await page.locator(".card[data-slug=prompt-lookup] summary").press("Enter");
    await page.waitForSelector(".card[open] .card-body");
    assert.match(await page.locator(".card[open]").innerText(), /Claim[^]*Does not help when/);
    await audit(page);
    await picture(page, "catalog");
    await page.locator(".card[open] .knobs input").first().fill("4");
    const knob = (await page.locator(".card[open] .knobs th code").first().innerText()).trim();
    await page.locator(".card[open] .button", { hasText: "Try it" }).click();
    assert.equal(await page.inputValue("#composer [data-setting=method]"), `prompt-lookup:${knob}=4`);
    await page.click("#tab-methods");
    await page.locator("#catalog-form").evaluate((form) => form.reset());
    await page.fill("#search", "adablock");
    await page.click(".card summary");
    await page.locator(".card[open] .button", { hasText: "Try it" }).click();
    assert.equal(await page.inputValue("#composer [data-setting=model]"), "mini-dlm");
    await page.click("#tab-methods");
    await page.fill("#search", "no such method anywhere");
    await page.locator(".button", { hasText: "Show all" }).click();
    await page.waitForFunction((count) => document.querySelectorAll(".card").length === count, all, { timeout: 2000 });
  },

  async "the keyboard is enough"(page) {
    await ready(page);
    const on = () => page.evaluate(() => document.activeElement.id || document.activeElement.title || document.activeElement.getAttribute("aria-label") || document.activeElement.textContent);
    await page.keyboard.press("Tab");
    assert.equal(await on(), "Skip to content");
    await page.keyboard.press("Tab");
    assert.equal(await on(), "tab-chat");
    await page.keyboard.press("ArrowRight");
    assert.equal(await on(), "tab-race");
    assert.ok(await page.isVisible("#race"));
    await page.keyboard.press("ArrowLeft");
    const ring = await page.evaluate(() => getComputedStyle(document.activeElement).outlineStyle);
    assert.equal(ring, "solid");
    await page.keyboard.press("Tab");
    await page.keyboard.press("Tab");
    await page.keyboard.press("Enter");
    assert.ok(await page.isVisible("#drawer"));
    await page.keyboard.press("Escape");
    assert.ok(!(await page.isVisible("#drawer")));
    assert.equal(await on(), "Settings");
    await page.keyboard.press("/");
    assert.equal(await on(), "input");
    await page.keyboard.type("a poem");
    await page.keyboard.press("Shift+Enter");
    await page.keyboard.type("please");
    await page.keyboard.press("Enter");
    await ended(page);
    assert.equal(await page.locator(".user .text").innerText(), "a poem\nplease");
    const path = [];
    for (let i = 0; i < 30; i += 1) {
      await page.keyboard.press("Tab");
      path.push(await page.evaluate(() => document.activeElement.className || document.activeElement.type || document.activeElement.tagName));
      if (path.at(-1).startsWith("chip")) break;
    }
    assert.ok(path.at(-1).startsWith("chip"), path.join(" > "));
    const before = await page.locator("#trace .detail").innerText();
    await page.keyboard.press("ArrowRight");
    assert.notEqual(await page.locator("#trace .detail").innerText(), before);
    await page.keyboard.press("End");
    assert.match(await page.locator("#trace .detail").innerText(), /forward 103/);
  },

  async "the theme follows the system until it is chosen, and is remembered"(page) {
    await ready(page);
    const paper = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
    const light = await paper();
    await page.emulateMedia({ colorScheme: "dark" });
    const dark = await paper();
    assert.notEqual(dark, light);
    await page.click("#theme");
    assert.equal(await paper(), light);
    await page.reload();
    assert.equal(await paper(), light);
    await ready(page);
    await page.click("#theme");
    assert.equal(await paper(), dark);
    await ask(page, "poem");
    await page.hover(".chip.kept .ink >> nth=8");
    await audit(page);
    await picture(page, "speculation-dark");
    await page.locator("#trace label", { hasText: "By confidence" }).click();
    await audit(page);
    await masked(page);
    await ask(page, "records");
    await audit(page);
    await page.click("#tab-methods");
    await page.click(".card summary");
    await audit(page);
  },

  async "without storage nothing is remembered and nothing breaks"() {
    const page = await open({ before: () => {
      for (const name of ["localStorage", "sessionStorage"]) Object.defineProperty(window, name, { get: () => { throw new DOMException("denied", "SecurityError"); } });
    } });
    await ready(page);
    await page.click("#theme");
    await page.click("[data-opens=drawer]");
    await page.check("[data-setting=keep]");
    await page.keyboard.press("Escape");
    await ask(page, "poem");
    assert.match(await answer(page).textContent(), /heart of the earth/);
    return page;
  },

  async "360 px are wide enough"() {
    const page = await open({ width: 360, height: 740, motion: "reduce" });
    await ready(page);
    await audit(page);
    await ask(page, "poem");
    await audit(page);
    await picture(page, "phone-chat");
    await page.locator(".look").click();
    assert.ok(await page.isVisible("#trace .sums"));
    await audit(page);
    await picture(page, "phone-trace");
    await page.click("#tab-race");
    await page.click("#race-start");
    await page.waitForSelector("#race-result h3");
    await audit(page);
    await page.click("#tab-methods");
    await page.click(".card summary");
    await audit(page);
    await page.click("[data-opens=drawer]");
    await audit(page);
    const moving = await page.evaluate(() => document.getAnimations().length);
    assert.equal(moving, 0, "motion is reduced");
    return page;
  },
};

/** With a key set: the dialog asks, the key goes along as Bearer, is kept for the tab only, and a wrong one asks again. */
async function withKey(key) {
  const page = await open();
  await page.waitForSelector("#key-dialog[open]");
  await audit(page);
  await page.fill("#key-dialog input", "wrong");
  await page.keyboard.press("Enter");
  await page.waitForFunction(() => document.querySelector("#key-dialog[open] input")?.value === "wrong");
  await page.fill("#key-dialog input", key);
  await page.click("#key-dialog .strong");
  await ready(page);
  await ask(page, "poem");
  assert.match(await answer(page).textContent(), /heart of the earth/);
  assert.deepEqual(await page.evaluate(() => [localStorage.length, sessionStorage.length, location.href.includes("key")]), [0, 1, false]);
  return page;
}

/** Against hasten's own server, models mini-dlm and tiny-chat: what the page reads is what the server sends. */
const real = {
  async "the real server: a canvas fills"(page) {
    await ready(page);
    await masked(page);
    await page.selectOption("#composer [data-setting=method]", "fast");
    await ask(page, "reverse: k d b a");
    assert.equal(await answer(page).innerText(), "a b d k");
    await frames(page);
    assert.equal((await page.locator(".cell[data-state=final]").evaluateAll((all) => all.map((cell) => cell.textContent || "␣").join(""))).slice(0, 8), "a␣b␣d␣k■");
    assert.match(await page.locator(".assistant .facts").innerText(), /threshold \+ canvas-cache · .* tokens\/s/);
    assert.match(await page.locator("#trace .sums").innerText(), /Forwards\s+[1-9]/);
    await page.waitForSelector(".state[data-state=ready]");
    assert.match(await page.locator("#status").innerText(), /\d running, 0 waiting[^]*mini-dlm masked diffusion · \w+ backbone · float32 · 3\.2 M parameters/);
    const metrics = await page.request.get(`${origin}/metrics`);
    assert.equal(metrics.status(), 200, await metrics.text());
    await page.click("[data-opens=drawer]");
    await page.selectOption("[data-setting=format]", "json_object");
    await page.keyboard.press("Escape");
    await ask(page, "sort: k a d b");
    assert.match(await page.locator(".error").innerText(), /field response_format[^]*status 400/);
  },

  async "the real server: drafts are shown where they fell"(page) {
    await ready(page);
    await page.selectOption("#composer [data-setting=model]", "tiny-chat");
    await page.selectOption("#composer [data-setting=method]", "prompt-lookup");
    await page.click("[data-opens=drawer]");
    await page.fill("[data-setting=max_tokens]", "60");
    await page.keyboard.press("Escape");
    await ask(page, "Why does the quick brown fox jump over the lazy dog?");
    await frames(page);
    assert.equal(await page.locator(".chip:not(.refused)").count(), 60);
    const [, accepted, drafted] = /Drafts accepted\s+(?:(\d+) of (\d+)|no drafts)/.exec(await page.locator("#trace .sums").innerText());
    assert.ok(Number(drafted) > 0, "a tiny model repeats itself, so prompt lookup drafts");
    assert.equal(await page.locator(".chip.kept").count(), Number(accepted));
    assert.match(await page.locator(".where").first().innerText(), /^forward (\d+) of \1$/);
  },

  async "the real server: a race, and an answer that is stopped"(page) {
    await page.click("#tab-race");
    await page.waitForFunction(() => document.querySelector(".lane select").value);
    for (const lane of ["A", "B"]) await page.selectOption(`[aria-label="Model of lane ${lane}"]`, "mini-dlm");
    await page.selectOption('[aria-label="Method of lane A"]', "fast");
    await page.fill("#race-prompt", "sort: k a d b");
    await page.click("#race-start");
    await page.waitForSelector("#race-result h3");
    assert.match(await page.locator("#race-result").innerText(), /The texts are the same/);
    await page.click("#tab-chat");
    await page.selectOption("#composer [data-setting=model]", "tiny-chat");
    await page.click("[data-opens=drawer]");
    await page.fill("[data-setting=max_tokens]", "400");
    await page.keyboard.press("Escape");
    await ask(page, "go on", false);
    await page.waitForSelector(".chip");
    await page.keyboard.press("Escape");
    await ended(page);
    await page.waitForFunction(async () => (await (await fetch("/ready")).json()).running === 0, null, { timeout: 5000 });
  },
};

const chosen = process.env.HASTEN_PAGE_REAL ? real : process.env.HASTEN_PAGE_KEY ? { "a key is asked for": () => withKey(process.env.HASTEN_PAGE_KEY) } : scenarios;
const results = {};
for (const [name, scenario] of Object.entries(chosen)) {
  let page = null;
  try {
    page = scenario.length ? await open() : null;
    page = (await scenario(page)) ?? page;
    assert.deepEqual(page.faults, []);
    results[name] = "ok";
  } catch (error) {
    results[name] = String(error.message).slice(0, 1500);
    if (page) await picture(page, `failed-${Object.keys(results).length}`);
  }
  await page?.context().close();
}
await browser.close();
console.log(JSON.stringify(results));
