/* What a trace says about one answer, as plain values: the state of every place after any forward pass. */

/** Collects the trace of one choice. `kind` is "masked" (a canvas) or "causal" (left to right). */
export class Trace {
  constructor(kind) {
    this.kind = kind;
    this.forwards = []; // {step, t, tokens, backbone, committed, accepted, drafted, prompt}
    this.cells = new Map(); // masked: place -> {commits: [{f, token, piece, confidence}], guesses: Map(f -> ...)}
    this.tokens = []; // causal: {position, token, piece, confidence, f, drafted}
    this.refused = new Map(); // causal: place -> [{f, pieces, size}] drafts that were proposed there and not kept
    this.prompt = 0;
    this.windows = []; // masked: {f, from, to} of the blocks planned
    this.place = { from: Infinity, to: 0 };
    this.first = NaN;
    this.last = NaN;
    this.ended = false;
    this.facts = null; // the server's own sums, once the answer has ended
    this.draft = null;
    this.kept = [];
    this.dirty = new Set(); // places changed since the view last looked
  }

  /** The forward pass that is running or was the last: an index into `forwards`, -1 before the first. */
  get now() {
    return this.forwards.length - 1;
  }

  add(event) {
    if (Number.isFinite(event.t)) this.last = event.t;
    const take = this[`_${event.kind}`];
    if (take) take.call(this, event);
  }

  _prefill(event) {
    this.prompt = event.total ?? this.prompt;
    this.reading = event.step;
  }

  _block(event) {
    this.windows.push({ f: this.forwards.length, from: event.position, to: event.total });
    for (let at = event.position; at < event.total; at += 1) this.#cell(at);
  }

  _draft(event) {
    this.draft = { pieces: event.pieces ?? event.tokens.map(String), tokens: event.tokens, parents: event.parents ?? chain(event.tokens.length) };
    this.kept = [];
  }

  _forward(event) {
    const drafted = this.draft?.tokens.length ?? 0;
    const prompt = this.kind === "causal" && this.reading === event.step;
    const entry = { step: event.step, t: event.t, tokens: event.total, backbone: event.backbone, committed: 0, accepted: 0, drafted, prompt };
    this.forwards.push(entry);
    for (const [at, cell] of this.cells) if (cell.guesses.has(this.now - 1)) this.dirty.add(at);
  }

  _accept(event) {
    this.kept = event.tokens ?? [];
    if (this.now >= 0) this.forwards[this.now].accepted = this.kept.length;
  }

  _propose(event) {
    this.#cell(event.position).guesses.set(this.now, { ...pick(event), f: this.now });
    this.dirty.add(event.position);
  }

  _commit(event) {
    if (!Number.isFinite(this.first)) this.first = event.t;
    const entry = { ...pick(event), f: this.now, t: event.t };
    const forward = this.forwards[this.now];
    if (this.kind === "masked") {
      const { commits } = this.#cell(event.position);
      const known = commits.at(-1);
      if (known && known.token === entry.token) return; // told again because its text was held back
      commits.push(entry);
      if (forward && entry.token >= 0) forward.committed += 1;
    } else {
      if (this.draft) this.#judge(event.position);
      entry.drafted = this.left > 0;
      this.left -= 1;
      this.tokens.push({ ...entry, position: event.position });
      if (forward) forward.committed += 1;
    }
    this.dirty.add(event.position);
  }

  _stop() {
    this.ended = true;
  }

  #cell(at) {
    let cell = this.cells.get(at);
    if (!cell) {
      cell = { commits: [], guesses: new Map() };
      this.cells.set(at, cell);
      this.place = { from: Math.min(this.place.from, at), to: Math.max(this.place.to, at + 1) };
      this.dirty.add(at);
    }
    return cell;
  }

  /* The draft that began at place `base` has been verified: its first kept tokens stay, the others were refused where
  they were proposed. A refused node brings its best continuation along and counts everything that hung on it. */
  #judge(base) {
    const { pieces, tokens, parents } = this.draft;
    const children = new Map();
    parents.forEach((parent, node) => children.set(parent, [...(children.get(parent) ?? []), node]));
    const below = (node) => 1 + (children.get(node) ?? []).reduce((sum, child) => sum + below(child), 0);
    let at = -1;
    for (let depth = 0; ; depth += 1) {
      const here = children.get(at) ?? [];
      const next = depth < this.kept.length ? here.find((node) => tokens[node] === this.kept[depth]) : undefined;
      for (const node of here) {
        if (node === next) continue;
        const line = [];
        for (let one = node; one !== undefined; one = (children.get(one) ?? [])[0]) line.push(pieces[one]);
        const list = this.refused.get(base + depth) ?? [];
        list.push({ f: this.now, pieces: line, size: below(node) });
        this.refused.set(base + depth, list);
      }
      if (next === undefined) break;
      at = next;
    }
    this.left = this.kept.length;
    this.draft = null;
  }

  /** The state of a canvas place after forward `f`: {state: "masked" | "guess" | "final", and the token's facts}. */
  at(place, f) {
    const cell = this.cells.get(place);
    for (let i = (cell?.commits.length ?? 0) - 1; i >= 0; i -= 1) {
      const entry = cell.commits[i];
      if (entry.f > f) continue;
      if (entry.token < 0) break; // taken back
      return { state: "final", ...entry, again: i > 0 };
    }
    const guess = cell?.guesses.get(f);
    return guess ? { state: "guess", ...guess } : { state: "masked" };
  }

  /** What forward `f` is called: those that read the prompt come first and have no number. */
  name(f) {
    return this.forwards[f]?.prompt ? "prompt" : `forward ${f + 1 - this.#prompts()}`;
  }

  /** How many forwards have a number. */
  numbered() {
    return this.forwards.length - this.#prompts();
  }

  #prompts() {
    let count = 0;
    while (this.forwards[count]?.prompt) count += 1;
    return count;
  }

  /** How many places are final after forward `f`. */
  done(f) {
    if (this.kind === "causal") return this.tokens.filter((token) => token.f <= f).length;
    let count = 0;
    for (const place of this.cells.keys()) if (this.at(place, f).state === "final") count += 1;
    return count;
  }

  /** Sums so far; the server's own once they are there. Tokens per forward leave out the pass that read the
  prompt; for a canvas they are what was committed, end tokens included. */
  sums() {
    const passes = this.forwards.filter((forward) => !forward.prompt);
    const total = (list, key) => list.reduce((sum, entry) => sum + entry[key], 0);
    const usage = this.facts?.usage;
    const time = this.last - this.first;
    const committed = total(passes, "committed");
    return {
      forwards: usage?.forwards ?? passes.length,
      tokens: this.kind === "causal" ? this.tokens.length : total(this.forwards, "committed"),
      perForward: (this.kind === "causal" && usage?.tokens_per_forward) || (passes.length ? committed / passes.length : NaN),
      drafted: usage?.drafted_tokens ?? total(passes, "drafted"),
      accepted: usage?.accepted_tokens ?? total(passes, "accepted"),
      rate: usage?.tokens_per_s ?? (time > 0 ? committed / time : NaN),
      seconds: this.last,
    };
  }
}

const chain = (count) => Array.from({ length: count }, (_, i) => i - 1);
const pick = (event) => ({ token: event.token ?? -1, piece: event.piece ?? "", confidence: event.confidence ?? NaN });

/** A token's text as shown in a cell: what cannot be seen gets a sign. */
export function visible(piece) {
  if (piece === "") return "∅";
  if (/^<[^<>\s]+>$/.test(piece)) return "■"; // an end token or another special one
  const bytes = /^bytes:((?:\\x[0-9a-f]{2})+)$/.exec(piece); // part of a character
  if (bytes) return `‹${bytes[1].replaceAll("\\x", " ").trim()}›`;
  return piece.replace(/\r?\n/g, "↵").replace(/\t/g, "⇥").replace(/^ +$/, (spaces) => "␣".repeat(spaces.length));
}
