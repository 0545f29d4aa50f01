// One forward pass, run by every thread at once, with a barrier where the next part reads what another thread wrote. A few
// tokens are split part by part: over rows of a matrix, tokens or heads. Many are shared out once: a thread takes its own
// through all parts but attention, so that what one part writes is in the next one's cache.
#pragma once

inline Span share(int64_t count, int thread, int threads) {
  return {(int)(count * thread / threads), (int)(count * (thread + 1) / threads)};
}

template <class Space>
inline Acts acts(const Space &s, int tokens, bool int8) {
  const int cols = (int)s.cols, width = tokens < BLOCK ? tokens : BLOCK;
  return {s.f, s.q, s.halves, s.pieces, s.scale, s.total, s.whole, cols, cols / TILE, width, int8};
}

constexpr int EACH = 64;  // tokens for every thread from which on they are shared out

// Everything a thread needs in a pass.
struct Thread {
  const Stack &stack;
  const HastenModel &m;
  const HastenPass &p;
  const Workspace &w;
  Acts normed, mixed, inner;
  int id, count;
  bool shared_out;
  Span tokens;  // whose products are this thread's
  double since;

  Thread(const Stack &s, const HastenPass &pass, int thread, int threads)
      : stack(s), m(s.model), p(pass), w(s.space), id(thread), count(threads), since(0) {
    const int all = p.queries > p.wanted_total ? p.queries : p.wanted_total;
    const bool int8 = m.activations == HASTEN_INT8;
    normed = acts(w.normed, all, int8), mixed = acts(w.mixed, all, int8), inner = acts(w.inner, all, int8);
    shared_out = count > 1 && p.queries >= EACH * count;
    tokens = {0, p.queries};
    if (shared_out) {  // whole blocks
      const Span blocks = share((p.queries + BLOCK - 1) / BLOCK, id, count);
      tokens = {blocks.from * BLOCK, blocks.to * BLOCK < p.queries ? blocks.to * BLOCK : p.queries};
    }
  }

  // Groups of rows whose products are this thread's.
  Span groups(int64_t all) const { return shared_out ? Span{0, (int)all} : share(all, id, count); }

  // f(t) for the tokens whose norms are this thread's: neighbours, as their bytes lie in the same lines of the cache.
  template <class F>
  void each(const F &f) const {
    const Span own = shared_out ? tokens : share(p.queries, id, count);
    for (int t = own.from; t < own.to; t++) f(t);
  }

  // The end of a part, after which `others` wrote what this thread will read.
  void meet(int part, bool others = true) {
    if (others) barrier();
    if (id == 0 && p.part_seconds) {
      const double here = now();
      p.part_seconds[part] += here - since;
      since = here;
    }
  }
};

// The 8-bit forms or sums of token t's columns; the tail that fills up the last tile stays zero.
inline void finish(const Acts &a, int t) {
  for (int b = 0; b < a.tiles; b++) finish_tile(a, t, b);
}

inline void embed(const Thread &T, int t) {
  float *x = T.w.x + (int64_t)t * T.m.hidden;
  if (T.p.embeds) {
    memcpy(x, T.p.embeds + (int64_t)t * T.m.hidden, (size_t)T.m.hidden * 4);
    return;
  }
  unpack_row(T.m.embed, T.p.tokens[t], x);
  if (T.m.embed_scale != 1.0f)
    for (int i = 0; i < T.m.hidden; i++) x[i] *= T.m.embed_scale;
}

// x += norm(y) where the part before was normed, then the norm of x for the next part.
inline void join_and_norm(const Thread &T, int t, const float *post, const float *weight) {
  const int n = T.m.hidden;
  float *x = T.w.x + (int64_t)t * n;
  if (post) {
    float *y = T.w.y + (int64_t)t * n;
    rms_norm(y, post, T.m.norm_eps, n, y);
    for (int i = 0; i < n; i++) x[i] += y[i];
  }
  rms_norm(x, weight, T.m.norm_eps, n, T.normed.f + (int64_t)t * T.normed.cols);
  finish(T.normed, t);
}

inline void tap(const Thread &T, int layer) {
  for (int i = 0; i < T.p.taps; i++)
    if (T.p.tap_layers[i] == layer)
      T.each([&](int t) {
        memcpy(T.p.tap_out[i] + (int64_t)t * T.m.hidden, T.w.x + (int64_t)t * T.m.hidden, (size_t)T.m.hidden * 4);
      });
}

// A store of 16 sums into columns of y, with a bias, cut at the matrix's rows.
inline void put_rows(float *y, int at, vf v, int rows, const float *bias) {
  const int n = rows - at < LANES ? rows - at : LANES;
  if (bias) v = add(v, load_n(bias + at, n));
  store_n(y + at, v, n);
}

inline void project(const Thread &T, const HastenLayer &l) {
  const HastenMatrix *parts[] = {&l.q, &l.k, &l.v};
  const int wide = (T.m.heads + 2 * T.m.kv_heads) * T.m.head_dim;
  int64_t all = 0;
  for (const HastenMatrix *m : parts) all += groups_of(m->rows);
  const Span mine = T.groups(all);
  int first = 0, column = 0;
  for (const HastenMatrix *m : parts) {
    const int groups = (int)groups_of(m->rows);
    const int from = mine.from > first ? mine.from - first : 0, to = mine.to - first < groups ? mine.to - first : groups;
    const float *bias = l.qkv_bias ? l.qkv_bias + column : nullptr;
    if (from < to)
      multiply(*m, T.normed, T.tokens, from, to, [&](int g, int t, vf v) {
        put_rows(T.w.qkv + (int64_t)t * wide + column, g * LANES, v, m->rows, bias);
      });
    first += groups;
    column += m->rows;
  }
}

inline int64_t entry_bytes(const HastenModel &m) {
  return m.kv_type == HASTEN_KV_F32 ? m.head_dim * 4 : m.kv_type == HASTEN_KV_BF16 ? m.head_dim * 2 : m.head_dim + 4;
}

// Slab of layer l, keys (0) or values (1), of one head of a query's row.
inline uint8_t *head_slab(const Thread &T, int t, int l, int which, int head) {
  const int row = T.p.row_of[t];
  const int64_t bytes = (int64_t)T.p.capacity[row] * entry_bytes(T.m);
  return (uint8_t *)T.p.slabs[row] + (((int64_t)l * 2 + which) * T.m.kv_heads + head) * bytes;
}

// Norm, rotation and scale of every head of the queries' q and k; k and v go to their slots.
inline void place(const Thread &T, const HastenLayer &l, int layer) {
  const int dim = T.m.head_dim, heads = T.m.heads, kv = T.m.kv_heads, wide = (heads + 2 * kv) * dim;
  const auto one = [&](int t, int h) {
    float *x = T.w.qkv + (int64_t)t * wide + h * dim;
    const float *norm = h < heads ? l.q_norm : l.k_norm;
    if (norm) rms_norm(x, norm, T.m.norm_eps, dim, x);
    if (l.rope >= 0) {
      const int rotated = T.m.rotated[l.rope];
      const int64_t at = (int64_t)T.p.positions[t] * (rotated / 2);
      rotate(x, T.m.rope_cos[l.rope] + at, T.m.rope_sin[l.rope] + at, rotated);
    }
    if (h < heads) {
      for (int i = 0; i < dim; i++) x[i] *= T.m.attn_scale;
    } else {
      const int64_t at = T.p.slots[t] * entry_bytes(T.m);
      store_entry(head_slab(T, t, layer, 0, h - heads) + at, T.m.kv_type, x, dim);
      store_entry(head_slab(T, t, layer, 1, h - heads) + at, T.m.kv_type, x + kv * dim, dim);
    }
  };
  if (T.shared_out) {
    for (int t = T.tokens.from; t < T.tokens.to; t++)
      for (int h = 0; h < heads + kv; h++) one(t, h);
  } else {
    for (int j = T.id; j < T.p.queries * (heads + kv); j += T.count) one(j / (heads + kv), j % (heads + kv));
  }
}

inline void attention(const Thread &T, int layer) {
  const int dim = T.m.head_dim, kv = T.m.kv_heads, group = T.m.heads / kv, wide = (T.m.heads + 2 * kv) * dim;
  const HastenSight *sight = T.p.sight + (int64_t)T.p.kind_of_layer[layer] * T.p.queries;
  float *scores = T.w.scores + T.id * score_numbers(T.w.room);
  // a few queries: each for itself, or the heads of a group are shared out too, or a thread would idle
  const int least = 3 * T.count;  // tasks, so that one too many weighs little
  int together = queries_at_once(T.w.room);
  const auto blocks = [&] { return (T.p.queries + together - 1) / together; };
  while (together > 1 && blocks() * kv < least) together /= 2;
  const int pieces = blocks() * kv >= least ? 1 : group, heads = group / pieces;
  const int per_head = blocks() * pieces, tasks = kv * per_head;
  // head after head, so that a thread reads few of them; many queries in turns, as later ones see more
  const Span mine = T.shared_out ? Span{T.id, tasks} : share(tasks, T.id, T.count);
  for (int j = mine.from; j < mine.to; j += T.shared_out ? T.count : 1) {
    const int h = j / per_head, at = j % per_head / pieces * together, first = (h * group + j % pieces * heads) * dim;
    const int end = at + together < T.p.queries ? at + together : T.p.queries;
    Query of[QUERIES_AT_ONCE];
    int n = 0;
    for (int t = at; t < end; t++) {
      const HastenSight &s = sight[t];
      float *out = T.mixed.f + (int64_t)t * T.mixed.cols + first;
      if (s.hi - s.lo + s.extra_count == 0) {
        memset(out, 0, (size_t)(heads * dim) * 4);
        continue;
      }
      of[n++] = {T.w.qkv + (int64_t)t * wide + first, out, {head_slab(T, t, layer, 0, h), entry_bytes(T.m), T.m.kv_type},
                 {head_slab(T, t, layer, 1, h), entry_bytes(T.m), T.m.kv_type},
                 {s.lo, s.hi - s.lo, T.p.extras + s.extra_at, s.hi - s.lo + s.extra_count}};
    }
    if (n) attend(of, n, heads, dim, T.m.attn_softcap, scores, T.w.room);
    if (dim % TILE == 0)  // a head is whole tiles, which nobody else writes to
      for (int t = at; t < end; t++)
        for (int b = first / TILE; b < (first + heads * dim) / TILE; b++) finish_tile(T.mixed, t, b);
  }
  if (dim % TILE == 0) return;
  barrier();
  for (int t = T.id; t < T.p.queries; t += T.count) finish(T.mixed, t);
}

// y = W a, added to the residual stream, or kept apart where a norm comes first.
inline void add_output(const Thread &T, const HastenMatrix &m, const Acts &a, const float *bias, bool apart) {
  const Span mine = T.groups(groups_of(m.rows));
  const int n = T.m.hidden;
  multiply(m, a, T.tokens, mine.from, mine.to, [&](int g, int t, vf v) {
    float *to = (apart ? T.w.y : T.w.x) + (int64_t)t * n;
    if (!apart) v = add(v, load_n(to + g * LANES, n - g * LANES < LANES ? n - g * LANES : LANES));
    put_rows(to, g * LANES, v, n, bias);
  });
}

// The gated part: act(gate) * up, in pairs of groups so that a thread finishes whole tiles.
inline void gate_and_up(const Thread &T, const HastenLayer &l) {
  const int ffn = T.m.ffn, groups = (int)groups_of(ffn), pairs = (groups + 1) / 2;
  const Span mine = T.groups(pairs);
  const float *gate_bias = l.gate_up_bias, *up_bias = gate_bias ? gate_bias + ffn : nullptr;
  vf gate[TOKENS], up[TOKENS];
  for (int at = T.tokens.from; at < T.tokens.to; at += TOKENS) {
    const int n = T.tokens.to - at < TOKENS ? T.tokens.to - at : TOKENS;
    for (int pair = mine.from; pair < mine.to; pair++) {
      for (int g = 2 * pair; g < 2 * pair + 2 && g < groups; g++) {
        group_sums(l.gate, g, T.normed, at, n, gate);
        group_sums(l.up, g, T.normed, at, n, up);
        const int wide = ffn - g * LANES < LANES ? ffn - g * LANES : LANES;
        for (int i = 0; i < n; i++) {
          if (gate_bias) {
            gate[i] = add(gate[i], load_n(gate_bias + g * LANES, wide));
            up[i] = add(up[i], load_n(up_bias + g * LANES, wide));
          }
          const vf act = T.m.gelu ? gelu(gate[i]) : silu(gate[i]);
          store_n(T.inner.f + (int64_t)(at + i) * T.inner.cols + g * LANES, mul(act, up[i]), wide);
        }
      }
      for (int i = 0; i < n; i++) finish_tile(T.inner, at + i, pair);
    }
  }
}

inline void output(Thread &T, const float *post) {
  const int n = T.m.hidden;
  if (T.p.final_hidden) {  // the norm of every query is wanted as it is
    T.each([&](int t) {
      join_and_norm(T, t, post, T.m.norm);
      memcpy(T.p.final_hidden + (int64_t)t * n, T.normed.f + (int64_t)t * T.normed.cols, (size_t)n * 4);
    });
    T.meet(HASTEN_PART_NORM);
    post = nullptr;
  } else if (post) {
    T.each([&](int t) { join_and_norm(T, t, post, T.m.norm); });
    T.meet(HASTEN_PART_NORM);
  }
  tap(T, T.m.layers);
  if (!T.p.wanted_total) return;
  for (int i = T.id; i < T.p.wanted_total; i += T.count) {
    rms_norm(T.w.x + (int64_t)T.p.wanted[i] * n, T.m.norm, T.m.norm_eps, n, T.normed.f + (int64_t)i * T.normed.cols);
    finish(T.normed, i);
  }
  T.meet(HASTEN_PART_NORM);
  const int64_t vocab = T.m.vocab, slices = (vocab + SLICE - 1) / SLICE;
  const Span mine = share(groups_of(vocab), T.id, T.count);
  const float cap = T.m.logit_softcap;
  multiply(T.m.head, T.normed, {0, T.p.wanted_total}, mine.from, mine.to, [&](int g, int t, vf v) {
    if (cap > 0) v = mul(set(cap), tanh(div(v, set(cap))));
    put_rows(T.p.logits + t * vocab, g * LANES, v, (int)vocab, nullptr);
  });
  barrier();
  for (int64_t j = T.id; j < T.p.wanted_total * slices; j += T.count) {
    const int64_t t = j / slices, s = j % slices, to = (s + 1) * SLICE < vocab ? (s + 1) * SLICE : vocab;
    slice_of(T.p.logits + t * vocab, s * SLICE, to, T.w.part + j * 3);
  }
  barrier();
  for (int t = T.id; t < T.p.wanted_total; t += T.count)
    combine(T.w.part + t * slices * 3, slices, T.p.best + t, T.p.log_sum_exp + t, T.p.best_logprob + t);
  T.meet(HASTEN_PART_HEAD);
}

inline void run_pass(const Stack &stack, const HastenPass &pass, int thread, int threads) {
  const Workspace &w = stack.space;
  const bool pieces = w.normed.pieces || w.mixed.pieces || w.inner.pieces;
  const Tiles tiles(pass.queries > pass.wanted_total ? pass.queries : pass.wanted_total, pieces);
  (void)tiles;
  Thread T(stack, pass, thread, threads);
  T.since = now();
  const float *post = nullptr;  // the norm that the last part's output still has to pass
  const bool others = !T.shared_out;  // write what this thread reads next
  T.each([&](int t) { embed(T, t); });
  for (int i = 0; i < T.m.layers; i++) {
    const HastenLayer &l = stack.layers[i];
    T.each([&](int t) { join_and_norm(T, t, post, l.attn_norm); });
    T.meet(HASTEN_PART_NORM, others);
    tap(T, i);
    project(T, l);
    T.meet(HASTEN_PART_QKV, others);
    place(T, l, i);
    barrier();
    attention(T, i);
    T.meet(HASTEN_PART_ATTENTION);
    add_output(T, l.out, T.mixed, l.out_bias, l.post_attn_norm != nullptr);
    T.meet(HASTEN_PART_OUT, others);
    T.each([&](int t) { join_and_norm(T, t, l.post_attn_norm, l.ffn_norm); });
    T.meet(HASTEN_PART_NORM, others);
    gate_and_up(T, l);
    T.meet(HASTEN_PART_FFN, others);
    add_output(T, l.down, T.inner, l.down_bias, l.post_ffn_norm != nullptr);
    T.meet(HASTEN_PART_DOWN, others || i == T.m.layers - 1);
    post = l.post_ffn_norm;
  }
  output(T, post);
}

inline void run_linear(const HastenMatrix &m, const float *x, int tokens, bool int8, float *y, const Workspace &space,
                       int thread, int threads) {
  const Tiles tiles(tokens, space.normed.pieces != nullptr);
  (void)tiles;
  const Acts a = acts(space.normed, tokens, int8);
  for (int t = thread; t < tokens; t += threads) {
    memcpy(a.f + (int64_t)t * a.cols, x + (int64_t)t * m.cols, (size_t)m.cols * 4);
    finish(a, t);
  }
  barrier();
  const Span mine = share(groups_of(m.rows), thread, threads);
  multiply(m, a, {0, tokens}, mine.from, mine.to,
           [&](int g, int t, vf v) { put_rows(y + (int64_t)t * m.rows, g * LANES, v, m.rows, nullptr); });
}
