/* The page's parts that need no browser: `node --test units.mjs`. */
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import test from "node:test";

const page = new URL("../../../src/hasten/serve/page/", import.meta.url);
const { EventParser } = await import(new URL("sse.js", page));
const { parse, webAddress } = await import(new URL("markdown.js", page));
const { Trace } = await import(new URL("trace.js", page));
const { difference } = await import(new URL("race.js", page));

const STREAM = ': ping\n\ndata: {"a":"ä😀"}\r\n\r\nevent: x\rdata: one\rdata: two\r\rdata:bare\n\ndata\n\nid: 7\n\ndata: [DONE]\r\r';
const EVENTS = ['{"a":"ä😀"}', "one\ntwo", "bare", "", "[DONE]"];

test("a stream gives the same events wherever it is cut", () => {
  const bytes = new TextEncoder().encode(STREAM);
  assert.deepEqual(new EventParser().push(bytes), EVENTS);
  for (let cut = 0; cut <= bytes.length; cut += 1) {
    const parser = new EventParser();
    assert.deepEqual([...parser.push(bytes.slice(0, cut)), ...parser.push(bytes.slice(cut))], EVENTS, `cut at ${cut}`);
  }
  const parser = new EventParser();
  assert.deepEqual([...bytes].flatMap((byte) => parser.push(Uint8Array.of(byte))), EVENTS);
});

const types = (blocks) => JSON.stringify(blocks);

test("nothing but http and https becomes a link", () => {
  for (const address of ["javascript:alert(1)", "JaVaScRiPt:alert(1)", "java\tscript:alert(1)", " javascript:x", "data:text/html,x", "vbscript:x", "file:///etc/passwd", "blob:http://a/x", "//host/x", "/metrics", "http://user@host/", "https://a:b@host/"]) {
    assert.equal(webAddress(address), null, address);
    assert.ok(!types(parse(`[x](${address})`)).includes('"link"'), address);
  }
  const [block] = parse("[x](https://example.org/a_b) and https://example.org/c.");
  assert.deepEqual(block.inline.filter((part) => part.type === "link").map((part) => part.address), ["https://example.org/a_b", "https://example.org/c"]);
});

test("images and markup stay text", () => {
  const text = '![a](http://evil.example/x) <img src="x" onerror="y"> <script>z</script>';
  const [block] = parse(text.replace("http://", "ftp://"));
  assert.deepEqual(block.inline, [text.replace("http://", "ftp://")]);
  assert.ok(!types(parse("![a](http://evil.example/x)")).includes('"link"'));
});

test("blocks and inline parts", () => {
  assert.deepEqual(parse("# T\n\na **b** *c* `d` e_f_g\nh"), [
    { type: "heading", level: 1, inline: ["T"] },
    { type: "p", inline: ["a ", { type: "strong", inline: ["b"] }, " ", { type: "em", inline: ["c"] }, " ", { type: "code", text: "d" }, " e_f_g\nh"] },
  ]);
  const [list] = parse("1. a\n2. b\n   - c\n   - d\n3. e");
  assert.equal(list.ordered, true);
  assert.equal(list.items.length, 3);
  assert.equal(list.items[1][1].items.length, 2);
  assert.deepEqual(parse("```py\nx = 1"), [{ type: "code", language: "py", text: "x = 1" }]);
  assert.deepEqual(parse("````\n```\n````"), [{ type: "code", language: "", text: "```" }]);
  assert.equal(parse("| a | b |\n|---|:-:|\n| 1 | 2 |")[0].rows.length, 2);
  assert.deepEqual(parse("> a\n> b"), [{ type: "quote", blocks: [{ type: "p", inline: ["a\nb"] }] }]);
});

test("hostile texts take linear time and no stack", () => {
  const start = performance.now();
  for (const text of ["*".repeat(20000), "[".repeat(20000), "> ".repeat(5000), "`".repeat(20000), "- ".repeat(5000), "**a".repeat(5000), "|-".repeat(10000), "\\".repeat(20000), "[a](".repeat(5000), "_a_".repeat(5000)]) parse(text);
  assert.ok(performance.now() - start < 4000, `${performance.now() - start} ms`);
});

const replay = (name) => {
  const stored = JSON.parse(readFileSync(new URL(`traces/${name}.json`, import.meta.url)));
  const trace = new Trace(stored.model === "mini-dlm" ? "masked" : "causal");
  for (const step of stored.steps) for (const event of step) trace.add(event);
  return { trace, stored };
};

test("a drafted answer: counts are the server's, refused drafts stand where they were proposed", () => {
  const { trace, stored } = replay("smollm2-135m_auto");
  const sums = trace.sums();
  for (const [own, theirs] of [["forwards", "forwards"], ["drafted", "drafted_tokens"], ["accepted", "accepted_tokens"]]) assert.equal(sums[own], stored.hasten.usage[theirs], own);
  assert.ok(Math.abs(sums.perForward - stored.hasten.usage.tokens_per_forward) < 1e-9);
  assert.equal(trace.tokens.map((token) => token.piece).join(""), stored.text + (stored.finish_reason === "stop" ? trace.tokens.at(-1).piece : ""));
  assert.equal(trace.tokens.filter((token) => token.drafted).length, stored.hasten.usage.accepted_tokens);
  const size = [...trace.refused.values()].flat().reduce((sum, draft) => sum + draft.size, 0);
  assert.equal(size, stored.hasten.usage.drafted_tokens - stored.hasten.usage.accepted_tokens);
});

test("a tree of drafts is judged along the accepted path", () => {
  const trace = new Trace("causal");
  for (const event of [
    { kind: "forward", step: 1, total: 9 },
    { kind: "commit", step: 1, position: 9, token: 1, piece: "a" },
    { kind: "draft", step: 2, tokens: [2, 3, 4, 5], pieces: ["b", "c", "d", "e"], parents: [-1, 0, 0, -1] },
    { kind: "forward", step: 2, total: 5 },
    { kind: "accept", step: 2, tokens: [2, 4] },
    { kind: "commit", step: 2, position: 10, token: 2, piece: "b" },
    { kind: "commit", step: 2, position: 11, token: 4, piece: "d" },
    { kind: "commit", step: 2, position: 12, token: 6, piece: "f" },
  ]) trace.add(event);
  assert.deepEqual(trace.tokens.map((token) => token.drafted), [false, true, true, false]);
  assert.deepEqual([...trace.refused], [[10, [{ f: 1, pieces: ["e"], size: 1 }]], [11, [{ f: 1, pieces: ["c"], size: 1 }]]]);
});

test("a canvas: every pass can be looked at again, guesses and revisions included", () => {
  const { trace, stored } = replay("mini-dlm_plain");
  assert.equal(trace.forwards.length, stored.hasten.usage.forwards);
  const text = [...trace.cells.keys()].sort((a, b) => a - b).map((at) => trace.at(at, trace.now).piece).join("");
  assert.ok(text.startsWith(stored.text));
  for (let f = 0, before = 0; f <= trace.now; f += 1) {
    const done = trace.done(f);
    assert.equal(done - before, trace.forwards[f].committed);
    before = done;
  }
  assert.ok([...trace.cells.keys()].some((at) => trace.at(at, 3).state === "guess"));
  const first = trace.place.from;
  trace.add({ kind: "forward", step: 999 });
  trace.add({ kind: "commit", step: 999, position: first });
  assert.equal(trace.at(first, trace.now).state, "masked");
  assert.equal(trace.at(first, trace.now - 1).state, "final");
});

test("the first difference of two texts", () => {
  assert.equal(difference("abc", "abc"), null);
  assert.deepEqual(difference("abc", "abd"), { at: 2, before: "ab", a: "c", b: "d" });
  assert.deepEqual(difference("ab", "abd"), { at: 2, before: "ab", a: "(the end)", b: "d" });
});
