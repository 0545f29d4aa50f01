/* The part of Markdown that chat answers use, as a tree of plain values and then as elements.

Images and raw HTML stay text. A link is kept only if its address is http or https, and shows the host it leads to. */

import { button, copy, el } from "./dom.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const RULE = /^ {0,3}([-*_])\s*(\1\s*){2,}$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*$/;
const DIVIDER = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const DEEPEST = 6;

/** The blocks of a text: {type, ...} with inline parts already taken apart. */
export function parse(text, depth = 0) {
  const lines = text.replace(/\r\n?/g, "\n").split("\n");
  const blocks = [];
  let at = 0;
  const paragraph = [];
  const flush = () => {
    if (paragraph.length) blocks.push({ type: "p", inline: inline(paragraph.join("\n")) });
    paragraph.length = 0;
  };
  while (at < lines.length) {
    const line = lines[at];
    const fence = FENCE.exec(line);
    const heading = HEADING.exec(line);
    if (fence) {
      flush();
      const code = [];
      const close = new RegExp(`^ {0,3}${fence[1][0]}{${fence[1].length},}\\s*$`);
      for (at += 1; at < lines.length && !close.test(lines[at]); at += 1) code.push(lines[at]);
      blocks.push({ type: "code", language: fence[2].trim().split(/\s/)[0].slice(0, 24), text: code.join("\n") });
    } else if (heading) {
      flush();
      blocks.push({ type: "heading", level: heading[1].length, inline: inline(heading[2]) });
    } else if (RULE.test(line)) {
      flush();
      blocks.push({ type: "rule" });
    } else if (/^ {0,3}>/.test(line) && depth < DEEPEST) {
      flush();
      const quoted = [];
      for (; at < lines.length && /^ {0,3}>/.test(lines[at]); at += 1) quoted.push(lines[at].replace(/^ {0,3}> ?/, ""));
      at -= 1;
      blocks.push({ type: "quote", blocks: parse(quoted.join("\n"), depth + 1) });
    } else if (ITEM.test(line) && depth < DEEPEST && (!paragraph.length || ITEM.exec(line)[1] === "")) {
      flush();
      const [list, next] = listAt(lines, at, depth);
      blocks.push(list);
      at = next - 1;
    } else if (line.includes("|") && at + 1 < lines.length && lines[at + 1].includes("-") && DIVIDER.test(lines[at + 1])) {
      flush();
      const rows = [cells(line)];
      for (at += 2; at < lines.length && lines[at].includes("|"); at += 1) rows.push(cells(lines[at]));
      at -= 1;
      blocks.push({ type: "table", rows });
    } else if (line.trim() === "") flush();
    else paragraph.push(line.trimStart());
    at += 1;
  }
  flush();
  return blocks;
}

function listAt(lines, at, depth) {
  const [, indent, marker] = ITEM.exec(lines[at]);
  const ordered = /\d/.test(marker);
  const items = [];
  let start = at;
  while (start < lines.length) {
    const found = ITEM.exec(lines[start]);
    if (!found || found[1].length > indent.length + 1 || found[1].length < indent.length || /\d/.test(found[2]) !== ordered) break;
    const body = [found[3]];
    const inner = found[1].length + found[2].length + 1;
    let next = start + 1;
    for (; next < lines.length; next += 1) {
      const line = lines[next];
      const deeper = line.length - line.trimStart().length > indent.length + 1;
      if (line.trim() === "") {
        const after = lines[next + 1] ?? "";
        if (!(after.length - after.trimStart().length > indent.length + 1) && !ITEM.test(after)) break;
        body.push("");
      } else if (deeper) body.push(line.slice(Math.min(inner, line.length - line.trimStart().length)));
      else break;
    }
    items.push(parse(body.join("\n").trimEnd(), depth + 1));
    start = next;
  }
  return [{ type: "list", ordered, start: ordered ? parseInt(marker, 10) : 1, items }, start];
}

function cells(line) {
  const parts = line.trim().replace(/^\|/, "").replace(/\|$/, "").split("|");
  return parts.map((part) => inline(part.trim()));
}

const INLINE = [
  ["escape", /^\\([!-/:-@[-`{-~])/],
  ["code", /^(`+)([^]*?[^`])\1(?!`)/],
  ["strong", /^(\*\*|__)(?=\S)([^]*?\S)\1/],
  ["em", /^(\*|_)(?=[^\s*_])([^]*?[^\s*_])\1(?![\w*])/],
  ["image", /^!\[[^\]\n]*\]\([^)\n]*\)/],
  ["link", /^\[([^\]\n]+)\]\(\s*<?([^)\s>]+)>?(?:\s+"[^"]*")?\s*\)/],
  ["bare", /^https?:\/\/[^\s<>"'`)\]]*[^\s<>"'`)\].,;:!?]/i],
];

/** The inline parts of a text: strings, and {type, ...} for code, strong, em and link. */
export function inline(text, depth = 0) {
  const parts = [];
  let plain = "";
  const push = (part) => {
    if (plain) parts.push(plain);
    plain = "";
    parts.push(part);
  };
  for (let at = 0; at < text.length; ) {
    const rest = text.slice(at, at + 4000);
    const inWord = at > 0 && /\w/.test(text[at - 1]);
    let found = null;
    let kind = "";
    if ("\\`*_![hH".includes(text[at])) {
      for (const [name, pattern] of INLINE) {
        found = pattern.exec(rest);
        if (found && inWord && (name === "bare" || found[1]?.[0] === "_")) found = null;
        if (found && (depth < DEEPEST || name === "escape")) {
          kind = name;
          break;
        }
        found = null;
      }
    }
    if (!found) plain += text[at];
    else if (kind === "escape") plain += found[1];
    else if (kind === "image") plain += found[0];
    else if (kind === "code") push({ type: "code", text: found[2].replace(/\n/g, " ").replace(/^ (.+) $/, "$1") });
    else if (kind === "bare") pushLink(found[0], [found[0]]);
    else if (kind === "link") pushLink(found[2], inline(found[1], depth + 1), found[0]);
    else push({ type: kind, inline: inline(found[2], depth + 1) });
    at += found ? found[0].length : 1;
  }
  if (plain) parts.push(plain);
  return parts;

  function pushLink(address, words, whole = address) {
    const safe = webAddress(address);
    if (safe) push({ type: "link", address: safe.href, host: safe.host, inline: words });
    else plain += whole;
  }
}

/** The URL of an address on the web; null for every other scheme, for credentials and for what is no address. */
export function webAddress(text) {
  try {
    const url = new URL(text);
    return ["http:", "https:"].includes(url.protocol) && !url.username && !url.password ? url : null;
  } catch {
    return null;
  }
}

function words(parts) {
  return parts.map((part) => {
    if (typeof part === "string") return part;
    if (part.type === "code") return el("code", {}, part.text);
    if (part.type !== "link") return el(part.type, {}, words(part.inline));
    const shown = part.inline.length === 1 && part.inline[0] === part.address;
    const link = el("a", { href: part.address, rel: "noopener noreferrer nofollow", target: "_blank", title: part.address }, words(part.inline));
    return shown ? link : el("span", {}, link, el("span", { class: "host" }, ` (${part.host})`));
  });
}

function element(block) {
  if (block.type === "p") return el("p", {}, words(block.inline));
  if (block.type === "heading") return el(`h${Math.min(6, block.level + 2)}`, {}, words(block.inline));
  if (block.type === "rule") return el("hr");
  if (block.type === "quote") return el("blockquote", {}, block.blocks.map(element));
  if (block.type === "code") {
    const copying = button("copy", "Copy code", (event) => copy(block.text, event.currentTarget));
    const head = el("div", { class: "code-head" }, el("span", {}, block.language || "text"), copying);
    return el("div", { class: "code" }, head, el("pre", { tabindex: "0", "aria-label": "Code" }, el("code", {}, block.text)));
  }
  if (block.type === "table") {
    const [head, ...rows] = block.rows;
    const row = (tag) => (entry) => el("tr", {}, entry.map((cell) => el(tag, {}, words(cell))));
    const table = el("table", {}, el("thead", {}, row("th")(head)), el("tbody", {}, rows.map(row("td"))));
    return el("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Table" }, table);
  }
  const items = block.items.map((item) => {
    const tight = item.length && item[0].type === "p" ? [...words(item[0].inline), ...item.slice(1).map(element)] : item.map(element);
    return el("li", {}, tight);
  });
  return block.ordered ? el("ol", { start: block.start === 1 ? null : block.start }, items) : el("ul", {}, items);
}

/** Shows a growing text in `node`: only the blocks that changed since the last `update` are made anew. */
export class MarkdownView {
  #keys = [];

  constructor(node) {
    this.node = node;
  }

  update(text) {
    const blocks = parse(text);
    const keys = blocks.map((block) => JSON.stringify(block));
    let same = 0;
    while (same < keys.length && keys[same] === this.#keys[same]) same += 1;
    while (this.node.childNodes.length > same) this.node.lastChild.remove();
    this.node.append(...blocks.slice(same).map(element));
    this.#keys = keys;
  }
}
