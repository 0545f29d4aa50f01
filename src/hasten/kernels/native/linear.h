// Linear operators: y = x W^T for T query tokens over one group of 16 rows at a time.
//
// Every token's sum runs over the columns in the same order whatever T is, with the same instructions, so that a row's
// result never depends on its neighbours. A template takes TT tokens through one reading of the weights.
#pragma once
#include "layout.h"

// Activations of T tokens with `cols` columns: floats, and for INT8 their 8-bit form, one scale and sum per 32 columns.
struct Acts {
  float *f;        // [T, cols]
  int8_t *q;       // [T, cols]
  float *scale;    // [T, cols / 32]
  float *total;    // [T, cols / 32] sum of the values (INT8: of the quantised ones)
  int32_t *whole;  // [T, cols / 32] sum of q
  int cols, tiles;
  bool int8;
};

// The 8-bit form (INT8) or the sum (EXACT) of columns 32 b .. 32 b + 31 of token t.
inline void finish_tile(const Acts &a, int t, int b) {
  const float *x = a.f + (int64_t)t * a.cols + b * TILE;
  const int at = t * a.tiles + b;
  const vf lo = load(x), hi = load(x + 16);
  if (!a.int8) {
    a.total[at] = sum(add(lo, hi));
    return;
  }
  const float peak = largest(max(abs(lo), abs(hi)));
  const float up = peak > 0 ? 127.0f / peak : 0.0f;
  int8_t *q = a.q + (int64_t)t * a.cols + b * TILE;
  const vf wl = round(mul(lo, set(up))), wh = round(mul(hi, set(up)));
  to_i8(q, wl);
  to_i8(q + 16, wh);
  const int32_t whole = (int32_t)sum(add(wl, wh));  // at most 32 * 127: exact
  const float all = sum(add(lo, hi));
  a.scale[at] = peak / 127.0f + (all - all);  // NaN where a value is not finite: it must not be lost in rounding
  a.whole[at] = whole;
  a.total[at] = a.scale[at] * (float)whole;
}

constexpr int AHEAD = 2560;  // bytes read ahead of the multiplication

inline void read_ahead(const uint8_t *p, int bytes) {
  for (int at = 0; at < bytes; at += 64) prefetch(p + AHEAD + at);
}

// --- tiles of 4-bit quants: sums of q x over 32 columns, as numbers ---

template <int TT>
inline void nibbles_int8(const uint8_t *tile, const Acts &a, int t0, int b, vf *out, bool centred) {
  vi acc[TT];
  for (int t = 0; t < TT; t++) acc[t] = centred ? set_i(-8 * a.whole[(t0 + t) * a.tiles + b]) : zero();
  for (int c = 0; c < 4; c++) {
    const vi w = load_bytes(tile + 64 * c), lo = low_nibbles(w), hi = high_nibbles(w);
    for (int t = 0; t < TT; t++) {
      const int8_t *x = a.q + (int64_t)(t0 + t) * a.cols + b * TILE + 4 * c;
      acc[t] = dot_u(dot_u(acc[t], lo, x), hi, x + 16);
    }
  }
  for (int t = 0; t < TT; t++) out[t] = to_float(acc[t]);
}

template <int TT>
inline void nibbles_exact(const uint8_t *tile, const Acts &a, int t0, int b, vf *out, bool centred) {
  vf even[TT], odd[TT];
  for (int t = 0; t < TT; t++) even[t] = odd[t] = set(0.0f);
  for (int c = 0; c < 4; c++) {
    const vi w = load_bytes(tile + 64 * c);
    const float *x = a.f + (int64_t)t0 * a.cols + b * TILE + 4 * c;
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) {  // nibble j is column 4 c + j / 2, plus 16 for odd j
      vf q = nibble_of(w, j);
      if (centred) q = sub(q, set(8.0f));
      const int k = (j & 1) * 16 + j / 2;
      for (int t = 0; t < TT; t++) {
        vf &sum = j / 2 & 1 ? odd[t] : even[t];
        sum = fma(q, set(x[(int64_t)t * a.cols + k]), sum);
      }
    }
  }
  for (int t = 0; t < TT; t++) out[t] = add(even[t], odd[t]);
}

// --- tiles of 8-bit quants; chunks first..last-1 of four columns each ---

template <int TT>
inline void bytes_int8(const uint8_t *tile, const Acts &a, int t0, int b, vf *out, int first, int last) {
  vi acc[TT];
  for (int t = 0; t < TT; t++) {
    int32_t whole = a.whole[(t0 + t) * a.tiles + b];
    if (last - first < 8) {
      const int8_t *x = a.q + (int64_t)(t0 + t) * a.cols + b * TILE;
      whole = 0;
      for (int k = 4 * first; k < 4 * last; k++) whole += x[k];
    }
    acc[t] = start_s(whole);
  }
  for (int c = first; c < last; c++) {
    const vi w = ready_s(load_bytes(tile + 64 * c));
    for (int t = 0; t < TT; t++) acc[t] = dot_s(acc[t], w, a.q + (int64_t)(t0 + t) * a.cols + b * TILE + 4 * c);
  }
  for (int t = 0; t < TT; t++) out[t] = to_float(acc[t]);
}

template <int TT>
inline void bytes_exact(const uint8_t *tile, const Acts &a, int t0, int b, vf *out, int first, int last) {
  vf even[TT], odd[TT];
  for (int t = 0; t < TT; t++) even[t] = odd[t] = set(0.0f);
  for (int c = first; c < last; c++) {
    const vi w = load_bytes(tile + 64 * c);
    const float *x = a.f + (int64_t)t0 * a.cols + b * TILE + 4 * c;
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      const vf q = byte_of(w, j);
      for (int t = 0; t < TT; t++) {
        vf &sum = j & 1 ? odd[t] : even[t];
        sum = fma(q, set(x[(int64_t)t * a.cols + j]), sum);
      }
    }
  }
  for (int t = 0; t < TT; t++) out[t] = add(even[t], odd[t]);
}

template <int TT, bool INT8>
inline void nibbles(const uint8_t *tile, const Acts &a, int t0, int b, vf *out, bool centred) {
  if (INT8) nibbles_int8<TT>(tile, a, t0, b, out, centred);
  else nibbles_exact<TT>(tile, a, t0, b, out, centred);
}

template <int TT, bool INT8>
inline void bytes(const uint8_t *tile, const Acts &a, int t0, int b, vf *out, int first, int last) {
  if (INT8) bytes_int8<TT>(tile, a, t0, b, out, first, last);
  else bytes_exact<TT>(tile, a, t0, b, out, first, last);
}

// acc += scale x (the tile's sum), the activations' own scale included.
template <int TT, bool INT8>
inline void scaled(vf *acc, vf scale, const vf *part, const Acts &a, int t0, int b) {
  for (int t = 0; t < TT; t++) {
    const vf s = INT8 ? mul(scale, set(a.scale[(t0 + t) * a.tiles + b])) : scale;
    acc[t] = fma(s, part[t], acc[t]);
  }
}

template <int TT>
inline void lowest(vf *acc, vf minimum, const Acts &a, int t0, int b) {
  for (int t = 0; t < TT; t++) acc[t] = fma(minimum, set(a.total[(t0 + t) * a.tiles + b]), acc[t]);
}

// --- one group of 16 rows, one function per layout ---

template <int TT, bool INT8>
inline void group_quantised(int layout, const uint8_t *p, const Acts &a, int t0, vf *acc) {
  vf part[TT];
  const int tiles = a.tiles;
  if (layout == L_Q8) {
    for (int b = 0; b < tiles; b++, p += 544) {
      read_ahead(p, 544);
      bytes<TT, INT8>(p, a, t0, b, part, 0, 8);
      scaled<TT, INT8>(acc, from_half16(p + 512), part, a, t0, b);
    }
  } else if (layout == L_Q4) {
    for (int b = 0; b < tiles; b++, p += 320) {
      read_ahead(p, 320);
      nibbles<TT, INT8>(p, a, t0, b, part, false);
      scaled<TT, INT8>(acc, from_half16(p + 256), part, a, t0, b);
      lowest<TT>(acc, from_half16(p + 288), a, t0, b);
    }
  } else if (layout == L_Q4Z) {
    for (int b = 0; b < tiles; b++, p += 288) {
      read_ahead(p, 288);
      nibbles<TT, INT8>(p, a, t0, b, part, true);
      scaled<TT, INT8>(acc, from_half16(p + 256), part, a, t0, b);
    }
  } else if (layout == L_Q4K) {
    for (int b = 0; b < tiles;) {
      const vf d = from_half16(p), low = sub(set(0.0f), from_half16(p + 32));
      p += 64;
      for (int s = 0; s < 8; s++, b++, p += 288) {
        read_ahead(p, 288);
        nibbles<TT, INT8>(p, a, t0, b, part, false);
        scaled<TT, INT8>(acc, mul(d, from_u8(p + 256)), part, a, t0, b);
        lowest<TT>(acc, mul(low, from_u8(p + 272)), a, t0, b);
      }
    }
  } else {  // L_Q6K: two scales a tile
    for (int b = 0; b < tiles;) {
      const vf d = from_half16(p);
      p += 32;
      for (int s = 0; s < 8; s++, b++, p += 544) {
        read_ahead(p, 544);
        for (int half = 0; half < 2; half++) {
          bytes<TT, INT8>(p, a, t0, b, part, 4 * half, 4 * half + 4);
          scaled<TT, INT8>(acc, mul(d, from_i8(p + 512 + 16 * half)), part, a, t0, b);
        }
      }
    }
  }
}

template <int TT>
inline void group_float(int layout, int cols, const uint8_t *p, const Acts &a, int t0, vf *acc) {
  const float *x = a.f + (int64_t)t0 * a.cols;
  const int step = layout == L_F32 ? 64 : 32;
  vf odd[TT];
  for (int t = 0; t < TT; t++) odd[t] = set(0.0f);
  for (int k = 0; k < cols; k++, p += step) {
    if (k % 2 == 0) prefetch(p + AHEAD);
    const vf w = layout == L_F32 ? load((const float *)p) : from_bfloat16(p);
    for (int t = 0; t < TT; t++) {
      vf &sum = k & 1 ? odd[t] : acc[t];
      sum = fma(w, set(x[(int64_t)t * a.cols + k]), sum);
    }
  }
  for (int t = 0; t < TT; t++) acc[t] = add(acc[t], odd[t]);
}

template <int TT>
inline void group_of(const HastenMatrix &m, int g, const Acts &a, int t0, vf *acc) {
  const uint8_t *p = (const uint8_t *)m.data + g * group_bytes(m.layout, m.cols);
  for (int t = 0; t < TT; t++) acc[t] = set(0.0f);
  if (!quantised(m.layout)) group_float<TT>(m.layout, m.cols, p, a, t0, acc);
  else if (a.int8) group_quantised<TT, true>(m.layout, p, a, t0, acc);
  else group_quantised<TT, false>(m.layout, p, a, t0, acc);
}

constexpr int AT_ONCE = 8;   // most tokens that one reading of the weights serves
constexpr int TOKENS = 64;   // tokens whose activations stay in the cache while all rows pass over them

// Sums of rows 16 g .. 16 g + 15 for tokens t0 .. t0 + n - 1, n <= AT_ONCE, into acc.
inline void group_sums(const HastenMatrix &m, int g, const Acts &a, int t0, int n, vf *acc) {
  switch (n) {
    case 8: return group_of<8>(m, g, a, t0, acc);
    case 7: return group_of<7>(m, g, a, t0, acc);
    case 6: return group_of<6>(m, g, a, t0, acc);
    case 5: return group_of<5>(m, g, a, t0, acc);
    case 4: return group_of<4>(m, g, a, t0, acc);
    case 3: return group_of<3>(m, g, a, t0, acc);
    case 2: return group_of<2>(m, g, a, t0, acc);
    default: return group_of<1>(m, g, a, t0, acc);
  }
}

// put(group, token, 16 sums) for groups first..last-1 of m and T tokens.
template <class Put>
inline void multiply(const HastenMatrix &m, const Acts &a, int T, int first, int last, const Put &put) {
  for (int at = 0; at < T; at += TOKENS) {
    const int end = at + TOKENS < T ? at + TOKENS : T;
    for (int g = first; g < last; g++) {
      for (int t = at; t < end;) {
        const int n = end - t < AT_ONCE ? end - t : AT_ONCE;
        vf acc[AT_ONCE];
        group_sums(m, g, a, t, n, acc);
        for (int i = 0; i < n; i++) put(g, t + i, acc[i]);
        t += n;
      }
    }
  }
}
