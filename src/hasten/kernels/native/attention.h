// Attention of the query heads that share one key/value head, over cached keys, for a few queries at a time: those of one
// row see much the same keys, and a part of them that fits the first cache is read once for all.
//
// A query's visible slots are gone through as one list (a range, then single slots), so that a key's place in every sum
// depends on how many visible keys come before it and not on where it is stored: a branch of a draft tree gives bit for
// bit the numbers that plain decoding gives later, when the same keys lie side by side.
#pragma once
#include "hasten.h"

struct Keys {  // one head's slab: [capacity] entries of `stride` bytes
  const uint8_t *at;
  int64_t stride;
  int type;
};

struct Visible {
  int lo, range;
  const int32_t *extra;
  int count;  // range + single slots
  int slot(int j) const { return j < range ? lo + j : extra[j - range]; }
};

inline vf load_entry(const uint8_t *p, int type, int i, int n) {
  if (type == HASTEN_KV_F32) return n >= LANES ? load((const float *)p + i) : load_n((const float *)p + i, n);
  uint8_t whole[32] = {0};  // a last part of fewer than 16 numbers
  const int bytes = type == HASTEN_KV_BF16 ? 2 : 1;
  const uint8_t *from = p + i * bytes;
  if (n < LANES) {
    memcpy(whole, from, (size_t)(n * bytes));
    from = whole;
  }
  return type == HASTEN_KV_BF16 ? from_bfloat16(from) : from_i8(from);
}

inline float entry_scale(const uint8_t *p, int type, int dim) {
  float scale = 1.0f;
  if (type == HASTEN_KV_INT8) memcpy(&scale, p + dim, 4);
  return scale;
}

inline void store_entry(uint8_t *p, int type, const float *x, int dim) {
  if (type == HASTEN_KV_F32) {
    memcpy(p, x, (size_t)dim * 4);
  } else if (type == HASTEN_KV_BF16) {
    for (int i = 0; i < dim; i++) {
      uint32_t bits;
      memcpy(&bits, x + i, 4);
      const uint32_t even = bits + 0x7fffu + ((bits >> 16) & 1);
      const uint16_t top = (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 64 : even >> 16);
      memcpy(p + 2 * i, &top, 2);
    }
  } else {
    float peak = 0.0f, all = 0.0f;
    for (int i = 0; i < dim; i++) {
      const float size = __builtin_fabsf(x[i]);
      peak = size > peak ? size : peak;
      all += x[i];
    }
    const float up = peak > 0 && all - all == 0.0f ? 127.0f / peak : 0.0f;
    const float scale = peak / 127.0f + (all - all);  // NaN where a value is not finite
    for (int i = 0; i < dim; i++) p[i] = up > 0 ? (uint8_t)(int8_t)__builtin_rintf(x[i] * up) : 0;
    memcpy(p + dim, &scale, 4);
  }
}

constexpr int KEYS_AHEAD = 16;

// Asks for entry j of the list, which will be wanted soon; single slots are not worth it.
inline void entry_ahead(const Keys &keys, const Visible &seen, int j) {
  if (j >= seen.range) return;
  const uint8_t *at = keys.at + (int64_t)(seen.lo + j) * keys.stride;
  for (int64_t i = 0; i < keys.stride; i += 64) prefetch(at + i);
}

constexpr int KEYS = 4;  // keys whose scores are added up together

// Scores of G query heads q [G, dim] against visible keys first..last - 1, into scores [G, room]; `first` is a multiple of
// KEYS.
template <int G, int TYPE>
within void score_keys(const float *q, int dim, const Keys &keys, const Visible &seen, int first, int last, float *scores,
                       int64_t room) {
  for (int j = first; j < last; j += KEYS) {
    const int n = last - j < KEYS ? last - j : KEYS;
    const uint8_t *k[KEYS];
    for (int i = 0; i < KEYS; i++) k[i] = keys.at + seen.slot(i < n ? j + i : j) * keys.stride;
    for (int i = 0; i < KEYS; i++) entry_ahead(keys, seen, j + KEYS_AHEAD + i);
    vf s[G][KEYS];
    for (int g = 0; g < G; g++)
      for (int i = 0; i < KEYS; i++) s[g][i] = set(0.0f);
    int d = 0;
    for (; d + LANES <= dim; d += LANES) {
      vf key[KEYS];
      for (int i = 0; i < KEYS; i++) key[i] = load_entry(k[i], TYPE, d, LANES);
      for (int g = 0; g < G; g++) {
        const vf query = load(q + g * dim + d);
        for (int i = 0; i < KEYS; i++) s[g][i] = fma(query, key[i], s[g][i]);
      }
    }
    if (d < dim) {
      for (int i = 0; i < KEYS; i++) {
        const vf key = load_entry(k[i], TYPE, d, dim - d);
        for (int g = 0; g < G; g++) s[g][i] = fma(load_n(q + g * dim + d, dim - d), key, s[g][i]);
      }
    }
    for (int g = 0; g < G; g++) {
      float *to = scores + g * room + j;  // room is whole vectors: what lies beyond the last key is overwritten later
      sum4(s[g], to);
      if (TYPE == HASTEN_KV_INT8)
        for (int i = 0; i < n; i++) to[i] *= entry_scale(k[i], TYPE, dim);
    }
  }
}

// Scores become weights that sum to one over n keys; the row is filled up to whole vectors.
inline void soften(float *scores, int n, float cap) {
  const int end = (n + LANES - 1) / LANES * LANES;
  for (int j = n; j < end; j++) scores[j] = -1e30f;
  vf top = set(-1e30f);
  for (int j = 0; j < end; j += LANES) {
    vf s = load(scores + j);
    if (cap > 0) {
      s = mul(set(cap), tanh(div(s, set(cap))));
      store_n(scores + j, s, n - j < LANES ? n - j : LANES);
      s = load(scores + j);
    }
    top = max(s, top);
  }
  const vf peak = set(largest(top));
  vf total = set(0.0f);
  for (int j = 0; j < end; j += LANES) {
    vf e = exp(sub(load(scores + j), peak));
    store(scores + j, e);
    if (j + LANES > n) e = load_n(scores + j, n - j);
    total = add(total, e);
  }
  const vf share = set(1.0f / sum(total));
  for (int j = 0; j < end; j += LANES) store(scores + j, mul(load(scores + j), share));
}

// Numbers from .. from + 16 WIDE - 1 of every head's mix (fewer, `n`, when WIDE is 1) over values first..last - 1, added to
// what those before gave; sums stay in registers.
template <int G, int TYPE, int WIDE>
within void mix_strip(const float *weights, int64_t room, int dim, const Keys &values, const Visible &seen, int first,
                      int last, int from, int n, float *out) {
  vf sums[G][WIDE];
  for (int g = 0; g < G; g++)
    for (int i = 0; i < WIDE; i++)
      sums[g][i] = first ? load_n(out + g * dim + from + i * LANES, WIDE > 1 ? LANES : n) : set(0.0f);
  for (int j = first; j < last; j++) {
    const uint8_t *v = values.at + seen.slot(j) * values.stride;
    if (from == 0) entry_ahead(values, seen, j + KEYS_AHEAD);
    const float scale = entry_scale(v, TYPE, dim);
    vf value[WIDE];
    for (int i = 0; i < WIDE; i++) value[i] = load_entry(v, TYPE, from + i * LANES, WIDE > 1 ? LANES : n);
    for (int g = 0; g < G; g++) {
      const vf w = set(TYPE == HASTEN_KV_INT8 ? weights[g * room + j] * scale : weights[g * room + j]);
      for (int i = 0; i < WIDE; i++) sums[g][i] = fma(w, value[i], sums[g][i]);
    }
  }
  for (int g = 0; g < G; g++)
    for (int i = 0; i < WIDE; i++) store_n(out + g * dim + from + i * LANES, sums[g][i], WIDE > 1 ? LANES : n);
}

// out [G, dim] = weights times values first..last - 1, added to what those before gave.
template <int G, int TYPE>
inline void mix_values(const float *weights, int64_t room, int dim, const Keys &values, const Visible &seen, int first,
                       int last, float *out) {
  int from = 0;
  for (; from + 4 * LANES <= dim; from += 4 * LANES)
    mix_strip<G, TYPE, 4>(weights, room, dim, values, seen, first, last, from, LANES, out);
  for (; from < dim; from += LANES) {
    const int n = dim - from < LANES ? dim - from : LANES;
    mix_strip<G, TYPE, 1>(weights, room, dim, values, seen, first, last, from, n, out);
  }
}

struct Query {
  const float *q;  // [heads, dim], scaled
  float *out;      // [heads, dim]
  Keys keys, values;
  Visible seen;
};

// Bytes of keys or values that several queries read together.
constexpr int64_t CHUNK = 16384;

template <int G, int TYPE>
inline void attend_typed(const Query *of, int n, int at, int dim, float cap, float *scores, int64_t room) {
  int most = 0;
  for (int i = 0; i < n; i++) most = of[i].seen.count > most ? of[i].seen.count : most;
  const int64_t fit = CHUNK / of[0].keys.stride / KEYS * KEYS;
  const int step = n == 1 ? (most + KEYS) / KEYS * KEYS : fit > KEYS ? (int)fit : KEYS;
  const auto chunks = [&](const auto &f) {  // f(query, first key, last + 1, the query's scores)
    for (int first = 0; first < most; first += step)
      for (int i = 0; i < n; i++) {
        const int count = of[i].seen.count, last = count < first + step ? count : first + step;
        if (first < last) f(of[i], first, last, scores + i * G * room);
      }
  };
  chunks([&](const Query &q, int first, int last, float *own) {
    score_keys<G, TYPE>(q.q + at, dim, q.keys, q.seen, first, last, own, room);
  });
  for (int i = 0; i < n; i++)
    for (int g = 0; g < G; g++) soften(scores + (i * G + g) * room, of[i].seen.count, cap);
  chunks([&](const Query &q, int first, int last, float *own) {
    mix_values<G, TYPE>(own, room, dim, q.values, q.seen, first, last, q.out + at);
  });
}

template <int G>
inline void attend_heads(const Query *of, int n, int at, int dim, float cap, float *scores, int64_t room) {
  const int type = of[0].keys.type;
  if (type == HASTEN_KV_F32) attend_typed<G, HASTEN_KV_F32>(of, n, at, dim, cap, scores, room);
  else if (type == HASTEN_KV_BF16) attend_typed<G, HASTEN_KV_BF16>(of, n, at, dim, cap, scores, room);
  else attend_typed<G, HASTEN_KV_INT8>(of, n, at, dim, cap, scores, room);
}

// For `n` queries, all of which see something; scores has room for HEADS_AT_ONCE rows of `room` numbers (whole vectors)
// each.
inline void attend(const Query *of, int n, int heads, int dim, float cap, float *scores, int64_t room) {
  for (int h = 0; h < heads;) {
    const int left = heads - h;
    if (left >= 4) attend_heads<4>(of, n, h * dim, dim, cap, scores, room), h += 4;
    else if (left == 3) attend_heads<3>(of, n, h * dim, dim, cap, scores, room), h += 3;
    else if (left == 2) attend_heads<2>(of, n, h * dim, dim, cap, scores, room), h += 2;
    else attend_heads<1>(of, n, h * dim, dim, cap, scores, room), h += 1;
  }
}
