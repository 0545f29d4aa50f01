// Linear operators: y = x W^T for T query tokens over one group of 16 rows at a time.
//
// Every token's sum runs over the columns in the same order whatever T is, with the same instructions, so that a row's
// result never depends on its neighbours. A template takes TT tokens through one reading of the weights.
//
// Where the processor multiplies bytes fast (DIGITS > 1), EXACT activations are taken as whole numbers of 23 bits, one
// power of two as scale per 32 columns, in three digits of 8 bits: their products with quants are exact, and what is
// rounded away is no more than float32 sums lose. Elsewhere they stay float32.
#pragma once
#include "layout.h"

// Activations of T tokens with `cols` columns: floats, and their form in bytes. Tokens go in blocks of 16; a block's tiles
// of 32 columns follow one another, within a tile token after token its digits (INT8: one) of 32 bytes, lowest digit first.
// A token's tile has one scale and one sum, a digit the sums of its halves.
constexpr int BLOCK = 16;

struct Acts {
  float *f;        // [T, cols]
  int8_t *q;       // [T / 16, cols / 32, width, digits, 32], or null where no weights are quants
  int8_t *halves;  // [T / 16, cols / 32, width, 2, 64] of EXACT ones for AMX: see tiles_amx.h
  uint16_t *pieces;  // [T / 16, cols / 32, width, 3, 32] for AMX, or null: see tiles_bfloat16.h
  float *scale;    // [T / 16, cols / 32, width]
  float *total;    // [T / 16, cols / 32, width] sum of the values (in bytes: of the rounded ones)
  int32_t *whole;  // [T / 16, cols / 32, width, digits, 2] sums of 16 columns of q
  int cols, tiles;
  int width;  // 16, or T where there are fewer: what one token reads lies close together
  bool int8;
  int64_t at(int t, int b) const { return (int64_t)(t / BLOCK) * BLOCK * tiles + b * width + t % BLOCK; }
};

inline int exponent(float x) {  // of a number that is not negative
  int32_t bits;
  memcpy(&bits, &x, 4);
  return (bits >> 23) - 127;
}
inline float power_of_two(int e) {
  const int32_t bits = (e + 127) << 23;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

constexpr int BY_TILES = 3, BY_TILES_INT8 = 9;  // fewer tokens are faster by vectors than by AMX
constexpr int ONE_TILE = 5;                     // tokens whose digits fill no more than one of AMX's tiles
constexpr int PIECES = 3;  // in bfloat16 of a float: see tiles_bfloat16.h
constexpr float MOST = 127 * 65536 + 127 * 256 + 127;  // of three digits

// Columns 32 b .. 32 b + 31 of token t as D digits per number.
template <int D>
inline void finish_bytes(const Acts &a, int t, int b) {
  const float *x = a.f + (int64_t)t * a.cols + b * TILE;
  const int64_t at = a.at(t, b);
  const vf lo = load(x), hi = load(x + 16);
  const float peak = largest_size(lo, hi);
  int8_t *q = a.q + at * D * TILE;
  int32_t *whole = a.whole + at * D * 2;
  if (peak - peak != 0.0f) {  // a value is not finite: it must not be lost in rounding
    memset(q, 0, D * TILE);
    if (D > 1) memset(a.halves + at * 4 * TILE, 0, 4 * TILE);
    memset(whole, 0, D * 2 * sizeof(int32_t));
    a.scale[at] = a.total[at] = peak - peak;
    return;
  }
  float up = peak > 0 ? 127.0f / peak : 0.0f, scale = peak / 127.0f;
  if (D > 1) {
    const int e = exponent(peak);
    up = e < -100 ? 0.0f : power_of_two(22 - e);  // what is smaller counts as nothing
    if (peak * up > MOST) up *= 0.5f;
    scale = up > 0 ? 1.0f / up : 0.0f;
  }
  const vf wl = round(mul(lo, set(up))), wh = round(mul(hi, set(up)));
  put_digits<D>(q, whole, wl, wh);
#if defined(HASTEN_AMX)
  if (D > 1 && a.width > ONE_TILE) put_halves(a.halves + at * 4 * TILE, wl, wh);
#endif
  float sums = 0.0f;
  for (int d = D; d-- > 0;) sums = 256.0f * sums + (float)(whole[2 * d] + whole[2 * d + 1]);
  a.scale[at] = scale;
  a.total[at] = scale * sums;
}

// The form of columns 32 b .. 32 b + 31 of token t that products want.
inline void finish_tile(const Acts &a, int t, int b) {
#if defined(HASTEN_AMX)
  const float *own = a.f + (int64_t)t * a.cols + b * TILE;
  if (a.pieces) put_pieces(a.pieces + a.at(t, b) * PIECES * TILE, load(own), load(own + 16));
#endif
  if (!a.q) return;
  if (a.int8) finish_bytes<1>(a, t, b);
  else if (DIGITS > 1) finish_bytes<DIGITS>(a, t, b);
  else {
    const float *x = a.f + (int64_t)t * a.cols + b * TILE;
    a.total[a.at(t, b)] = sum(add(load(x), load(x + 16)));
  }
}

constexpr int AHEAD = 2560;  // bytes read ahead of the multiplication

inline void read_ahead(const uint8_t *p, int bytes) {
  for (int at = 0; at < bytes; at += 64) prefetch(p + AHEAD + at);
}

// --- tiles of 4-bit quants: sums of q x over 32 columns, as numbers ---

// The number whose digits are sums d[0], d[1], ...
template <int D>
within vf number(const vi *d) {
  vf out = to_float(d[D - 1]);
  for (int i = D - 1; i-- > 0;) out = fma(out, set(256.0f), to_float(d[i]));
  return out;
}

template <int TT, int D>
within void nibbles_bytes(const uint8_t *tile, const Acts &a, int t0, int b, vf *out, bool centred) {
  vi acc[TT][D];
  const int64_t at = a.at(t0, b) * D;
  const int32_t *whole = a.whole + at * 2;
  for (int t = 0; t < TT; t++)
    for (int d = 0; d < D; d++, whole += 2) acc[t][d] = centred ? set_i(-8 * (whole[0] + whole[1])) : zero();
  for (int c = 0; c < 4; c++) {
    const vi w = load_bytes(tile + 64 * c), lo = low_nibbles(w), hi = high_nibbles(w);
    const int8_t *x = a.q + at * TILE + 4 * c;
    for (int t = 0; t < TT; t++)
      for (int d = 0; d < D; d++, x += TILE) acc[t][d] = dot_u(dot_u(acc[t][d], lo, x), hi, x + 16);
  }
  for (int t = 0; t < TT; t++) out[t] = number<D>(acc[t]);
}

template <int TT>
within void nibbles_exact(const uint8_t *tile, const Acts &a, int t0, int b, vf *out, bool centred) {
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

template <int TT, int D>
within void bytes_bytes(const uint8_t *tile, const Acts &a, int t0, int b, vf *out, int first, int last) {
  vi acc[TT][D];
  const int64_t at = a.at(t0, b) * D;
  const int32_t *whole = a.whole + at * 2;
  for (int t = 0; t < TT; t++)
    for (int d = 0; d < D; d++, whole += 2) acc[t][d] = start_s((first ? 0 : whole[0]) + (last == 8 ? whole[1] : 0));
  for (int c = first; c < last; c++) {
    const vi w = ready_s(load_bytes(tile + 64 * c));
    const int8_t *x = a.q + at * TILE + 4 * c;
    for (int t = 0; t < TT; t++)
      for (int d = 0; d < D; d++, x += TILE) acc[t][d] = dot_s(acc[t][d], w, x);
  }
  for (int t = 0; t < TT; t++) out[t] = number<D>(acc[t]);
}

template <int TT>
within void bytes_exact(const uint8_t *tile, const Acts &a, int t0, int b, vf *out, int first, int last) {
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
within void nibbles(const uint8_t *tile, const Acts &a, int t0, int b, vf *out, bool centred) {
  if (INT8) nibbles_bytes<TT, 1>(tile, a, t0, b, out, centred);
  else if (DIGITS > 1) nibbles_bytes<TT, DIGITS>(tile, a, t0, b, out, centred);
  else nibbles_exact<TT>(tile, a, t0, b, out, centred);
}

template <int TT, bool INT8>
within void bytes(const uint8_t *tile, const Acts &a, int t0, int b, vf *out, int first, int last) {
  if (INT8) bytes_bytes<TT, 1>(tile, a, t0, b, out, first, last);
  else if (DIGITS > 1) bytes_bytes<TT, DIGITS>(tile, a, t0, b, out, first, last);
  else bytes_exact<TT>(tile, a, t0, b, out, first, last);
}

// acc += scale x (the tile's sum), the activations' own scale included.
template <int TT, bool INT8>
within void scaled(vf *acc, vf scale, const vf *part, const Acts &a, int t0, int b) {
  const float *own = a.scale + a.at(t0, b);
  for (int t = 0; t < TT; t++) acc[t] = fma(INT8 || DIGITS > 1 ? mul(scale, set(own[t])) : scale, part[t], acc[t]);
}

template <int TT>
within void lowest(vf *acc, vf minimum, const Acts &a, int t0, int b) {
  const float *total = a.total + a.at(t0, b);
  for (int t = 0; t < TT; t++) acc[t] = fma(minimum, set(total[t]), acc[t]);
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

// Columns of even and of odd number have sums of their own, which meet at the end.
template <int TT, bool BF16>
within void group_float(int cols, const uint8_t *p, const Acts &a, int t0, vf *acc) {
  const float *x[TT];
  vf even[TT], odd[TT];
  for (int t = 0; t < TT; t++) {
    x[t] = a.f + (int64_t)(t0 + t) * a.cols;
    even[t] = odd[t] = set(0.0f);
  }
  for (int k = 0; k + 1 < cols; k += 2, p += BF16 ? 64 : 128) {
    prefetch(p + AHEAD);
    if (!BF16) prefetch(p + AHEAD + 64);
    const vf w = BF16 ? even_bfloat16(p) : load((const float *)p);
    const vf w_odd = BF16 ? odd_bfloat16(p) : load((const float *)(p + 64));
    for (int t = 0; t < TT; t++) {
      even[t] = fma(w, set(x[t][k]), even[t]);
      odd[t] = fma(w_odd, set(x[t][k + 1]), odd[t]);
    }
  }
  if (cols % 2)
    for (int t = 0; t < TT; t++) even[t] = fma(load((const float *)p), set(x[t][cols - 1]), even[t]);
  for (int t = 0; t < TT; t++) acc[t] = add(even[t], odd[t]);
}

template <int TT>
inline void group_of(const HastenMatrix &m, int g, const Acts &a, int t0, vf *acc) {
  const uint8_t *p = (const uint8_t *)m.data + g * group_bytes(m.layout, m.cols);
  vf own[TT];  // nobody else's: it can stay in registers
  for (int t = 0; t < TT; t++) own[t] = set(0.0f);
  if (m.layout == L_F32) group_float<TT, false>(m.cols, p, a, t0, own);
  else if (!quantised(m.layout)) group_float<TT, true>(a.cols, p, a, t0, own);
  else if (a.int8) group_quantised<TT, true>(m.layout, p, a, t0, own);
  else group_quantised<TT, false>(m.layout, p, a, t0, own);
  for (int t = 0; t < TT; t++) acc[t] = own[t];
}

constexpr int AT_ONCE = 8;   // most tokens that one reading of the weights serves by vectors
constexpr int IN_DIGITS = 4; // and of those in digits: the sums of more do not fit the registers

inline void sums_by_vectors(const HastenMatrix &m, int g, const Acts &a, int t0, int n, vf *acc) {
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

// TOKENS: as many as keep their activations in the cache while all rows pass over them.
#if defined(HASTEN_AMX)
#include "tiles_amx.h"
#include "tiles_bfloat16.h"
constexpr int TOKENS = 256;
#else
constexpr int TOKENS = 64;
struct Tiles {
  Tiles(int, bool) {}
};
#endif

// Sums of rows 16 g .. 16 g + 15 for tokens t0 .. t0 + n - 1 into acc; t0 begins a block, n <= TOKENS.
inline void group_sums(const HastenMatrix &m, int g, const Acts &a, int t0, int n, vf *acc) {
#if defined(HASTEN_AMX)
  if (m.layout == L_BF16) return sums_of_pieces(m, g, a, t0, n, acc);
  if (quantised(m.layout) && n >= (a.int8 ? BY_TILES_INT8 : BY_TILES)) return sums_by_tiles(m, g, a, t0, n, acc);
#endif
  const int most = DIGITS > 1 && !a.int8 && quantised(m.layout) ? IN_DIGITS : AT_ONCE;
  for (int t = 0; t < n; t += most) sums_by_vectors(m, g, a, t0 + t, n - t < most ? n - t : most, acc + t);
}

struct Span {
  int from, to;
};

// put(group, token, 16 sums) for groups first..last-1 of m and tokens that begin a block.
template <class Put>
inline void multiply(const HastenMatrix &m, const Acts &a, Span tokens, int first, int last, const Put &put) {
  vf acc[TOKENS];
  for (int at = tokens.from; at < tokens.to; at += TOKENS) {
    const int n = tokens.to - at < TOKENS ? tokens.to - at : TOKENS;
    for (int g = first; g < last; g++) {
      group_sums(m, g, a, at, n, acc);
      for (int i = 0; i < n; i++) put(g, at + i, acc[i]);
    }
  }
}
