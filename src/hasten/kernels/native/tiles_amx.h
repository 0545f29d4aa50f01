// Products of many tokens by AMX: 16 rows of weights times 32 columns times 16 rows of bytes, which are tokens' digits. A
// packed chunk of 64 bytes is a row of the weights' operand as it stands.
//
//   bytes   INT8, EXACT with 8-bit quants or few tokens: one row per digit, 32 bytes long
//   halves  EXACT with nibbles: the number of 23 bits is 4096 h1 + h0, a half is 16 d1 + d0, a row is d0's 32 bytes and
//           d1's; the weights are given twice, the second time 16 times as large
//
// The sums are whole numbers, those of vectors, and are scaled by the same instructions; put together from halves they are
// rounded once, as from three digits of 4-bit quants (the two upper ones fit a float). So no bit depends on what ran.
#pragma once

struct TileShapes {  // the operand of LDTILECFG
  uint8_t palette, start, unused[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};

// Tile registers: rows of 32 and of 64 bytes.
enum Tile { SUMS, SHORT, SHORT_WEIGHTS, LONG, LONG_WEIGHTS, SUMS_2, SUMS_3, TILES };

// This thread's tiles as the kernels want them. What the thread had before, such as torch's kernels, is put back
// afterwards. Written as assembly, as the compiler's own intrinsics do not say which memory they touch.
struct Tiles {
  TileShapes before;
  const bool wanted;  // one token of bytes is for vectors, and AMX that is not woken leaves them their pace
  Tiles(int tokens, bool pieces) : wanted(tokens >= BY_TILES || pieces) {
    if (!wanted) return;
    TileShapes own;
    memset(&own, 0, sizeof own);
    own.palette = 1;
    for (int i = 0; i < TILES; i++) {
      own.rows[i] = i == SHORT_WEIGHTS ? 8 : 16;
      own.bytes[i] = i == SHORT ? 32 : 64;
    }
    asm volatile("sttilecfg %0" : "=m"(before));
    asm volatile("ldtilecfg %0" ::"m"(own));
  }
  ~Tiles() {
    if (!wanted) return;
    if (before.palette) asm volatile("ldtilecfg %0" ::"m"(before));
    else asm volatile("tilerelease");
  }
};

template <int REG>
inline void tile_load(const int8_t *p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(REG), "m"(*(const int8_t(*)[1024])p));
}

// sums [16, 16] = the rows in tile X times the weights in tile W, which are unsigned or signed.
template <int X, int W, bool SIGNED>
inline void tile_multiply(int32_t *sums) {
  if (SIGNED) asm volatile("tilezero %%tmm0\n\ttdpbssd %%tmm%c1, %%tmm%c0, %%tmm0" ::"i"(X), "i"(W));
  else asm volatile("tilezero %%tmm0\n\ttdpbsud %%tmm%c1, %%tmm%c0, %%tmm0" ::"i"(X), "i"(W));
  asm volatile("tilestored %%tmm0, (%1,%2,1)" : "=m"(*(int32_t(*)[256])sums) : "r"(sums), "r"((int64_t)64));
}

// A group of 16 rows as its places: tiles of weights with one scale and minimum per row. A layout with two scales a tile
// has two places for it, the other half of each zero.
template <int L>
struct Places {
  static constexpr int PER = L == L_Q6K ? 2 : 1;
  static constexpr bool NIBBLES = L == L_Q4 || L == L_Q4Z || L == L_Q4K, LOW = L == L_Q4 || L == L_Q4K;
  static constexpr int BYTES = L == L_Q4 ? 320 : L == L_Q4Z || L == L_Q4K ? 288 : 544, QUANTS = NIBBLES ? 256 : 512;
  const uint8_t *group;

  const uint8_t *super(int b) const { return group + (int64_t)(b / 8) * group_bytes(L, 256); }
  within const uint8_t *tile(int b) const {
    if (L == L_Q4K) return super(b) + 64 + b % 8 * BYTES;
    if (L == L_Q6K) return super(b) + 32 + b % 8 * BYTES;
    return group + (int64_t)b * BYTES;
  }
  within vf scale(int i) const {
    const int b = i / PER;
    const uint8_t *p = tile(b) + QUANTS;
    if (L == L_Q4K) return mul(from_half16(super(b)), from_u8(p));
    if (L == L_Q6K) return mul(from_half16(super(b)), from_i8(p + 16 * (i & 1)));
    return from_half16(p);
  }
  within vf low(int i) const {
    if (L == L_Q4K) return mul(sub(set(0.0f), from_half16(super(i) + 32)), from_u8(tile(i) + QUANTS + 16));
    return from_half16(tile(i) + QUANTS + 32);
  }
  // Place i's weights as signed bytes; `twice`: as unsigned ones if they have a minimum, then 16 times as large.
  template <bool TWICE>
  within void spread(int i, int8_t *to) const {
    const uint8_t *p = tile(i / PER);
    if (L == L_Q6K) {
      memset(to, 0, 512);
      memcpy(to + 256 * (i & 1), p + 256 * (i & 1), 256);
    } else if (L == L_Q8) {
      memcpy(to, p, 512);
    } else {
      const vi off = _mm512_set1_epi8(8), high = _mm512_set1_epi8((char)0xf0), off16 = _mm512_set1_epi8((char)128);
      for (int c = 0; c < 4; c++, to += 64) {
        const vi both = load_bytes(p + 64 * c);
        const vi lo = low_nibbles(both), hi = high_nibbles(both);
        _mm512_store_si512(to, LOW ? lo : _mm512_sub_epi8(lo, off));
        _mm512_store_si512(to + 256, LOW ? hi : _mm512_sub_epi8(hi, off));
        if (!TWICE) continue;
        const vi lo16 = _mm512_slli_epi16(lo, 4), hi16 = _mm512_and_si512(both, high);
        _mm512_store_si512(to + 512, LOW ? lo16 : _mm512_sub_epi8(lo16, off16));
        _mm512_store_si512(to + 768, LOW ? hi16 : _mm512_sub_epi8(hi16, off16));
      }
    }
  }
};

constexpr int STRIP = 32;  // places that are unpacked at a time for many tokens: they stay in the first cache

struct Strip {
  alignas(64) int8_t w[STRIP][32 * TILE];
  alignas(64) float scale[STRIP][LANES], low[STRIP][LANES];
};

// The rows of a token's tile, and what its sums are as numbers.
template <int D>
struct ByBytes {
  static constexpr int ROWS = D, BYTES = TILE, X = SHORT, W = SHORT_WEIGHTS;
  static constexpr bool TWICE = false;
  static const int8_t *rows(const Acts &a) { return a.q; }
  static vf value(const int32_t *sums) {
    vi digits[D];
    for (int d = 0; d < D; d++) digits[d] = load_bytes(sums + d * LANES);
    return number<D>(digits);
  }
};
struct ByHalves {
  static constexpr int ROWS = 2, BYTES = 2 * TILE, X = LONG, W = LONG_WEIGHTS;
  static constexpr bool TWICE = true;
  static const int8_t *rows(const Acts &a) { return a.halves; }
  static vf value(const int32_t *sums) {
    return fma(to_float(load_bytes(sums + LANES)), set(4096.0f), to_float(load_bytes(sums)));
  }
};

// Sums of TT tokens' rows with one place's weights, which are unsigned where they are nibbles with a minimum, given twice.
template <int TT, class Form, class P>
within void multiply_place(const int8_t *x, const int8_t *w, int32_t *sums) {
  tile_load<Form::W>(w, 64);
  for (int row = 0; row < TT * Form::ROWS; row += 16) {
    tile_load<Form::X>(x + row * Form::BYTES, Form::BYTES);
    tile_multiply<Form::X, Form::W, !(Form::TWICE && P::LOW)>(sums + row * LANES);
  }
}

// own += one place's sums, scaled.
template <int TT, class Form, bool LOW>
within void scale_place(const int32_t *sums, vf scale, vf low, const float *scales, const float *totals, vf *own) {
  for (int t = 0; t < TT; t++) {
    own[t] = fma(mul(scale, set(scales[t])), Form::value(sums + t * Form::ROWS * LANES), own[t]);
    if (LOW) own[t] = fma(low, set(totals[t]), own[t]);
  }
}

// What TT tokens from t0 on have at every place.
template <int TT, class Form, class P>
struct Columns {
  const int8_t *x;
  const float *scales, *totals;
  int64_t wide;
  Columns(const Acts &a, int t0, int b) : wide(a.width) {
    const int64_t at = a.at(t0, b);
    x = Form::rows(a) + at * Form::ROWS * Form::BYTES;
    scales = a.scale + at, totals = a.total + at;
  }
  within void multiply(int i, const int8_t *w, int32_t *sums) const {
    multiply_place<TT, Form, P>(x + i / P::PER * wide * Form::ROWS * Form::BYTES, w, sums);
  }
  within void scale(int i, const int32_t *sums, vf scale, vf low, vf *own) const {
    scale_place<TT, Form, P::LOW>(sums, scale, low, scales + i / P::PER * wide, totals + i / P::PER * wide, own);
  }
};

template <int TT, class Form, int RING>
using Sums = int32_t[RING][(TT * Form::ROWS + 15) / 16 * 256];

// acc = a group's sums for up to TT tokens from t0 on: a place is unpacked, two places later multiplied, and two later
// scaled, as what is written to memory for the tiles, and by them, had better be in the cache when it is read.
template <int TT, class Form, class P>
inline void few_tokens(const P &group, const Acts &a, int t0, int n, vf *acc) {
  constexpr int RING = 4;
  alignas(64) Sums<TT, Form, RING> sums;
  alignas(64) int8_t w[RING][32 * TILE];
  const Columns<TT, Form, P> columns(a, t0, 0);
  const int places = a.tiles * P::PER;
  vf own[TT];
  for (int t = 0; t < TT; t++) own[t] = set(0.0f);
  for (int i = -4; i < places; i++) {
    if (i >= -2 && i + 2 < places) columns.multiply(i + 2, w[(i + 2) % RING], sums[(i + 2) % RING]);
    if (i + 4 < places) {
      read_ahead(group.tile((i + 4) / P::PER), P::BYTES);
      group.template spread<Form::TWICE>(i + 4, w[(i + 4) % RING]);
    }
    if (i >= 0) columns.scale(i, sums[i % RING], group.scale(i), P::LOW ? group.low(i) : set(0.0f), own);
  }
  for (int t = 0; t < n; t++) acc[t] = own[t];
}

// acc += places first.. of a group, which lie in a strip, times TT tokens from t0 on. From `ahead` on lies what will be
// wanted next, if it is not there yet.
template <int TT, class Form, class P>
inline void strip_sums(const Strip &s, int first, int places, const Acts &a, int t0, const uint8_t *ahead, vf *acc) {
  alignas(64) Sums<TT, Form, 2> sums;
  const Columns<TT, Form, P> columns(a, t0, first / P::PER);
  const int64_t wide = a.width, more = wide * Form::ROWS * Form::BYTES;
  const int8_t *x = columns.x;  // moved on, not reckoned from the place: a tenth faster
  const float *scales = columns.scales, *totals = columns.totals;
  vf own[TT];
  for (int t = 0; t < TT; t++) own[t] = acc[t];
  multiply_place<TT, Form, P>(x, s.w[0], sums[0]);
  for (int i = 0; i < places; i += 2) {  // while one place's sums are scaled, the next is multiplied
    if (ahead)
      for (int k = 0; k < 2 * P::BYTES / P::PER; k += 64, ahead += 64) prefetch(ahead);
    if (P::PER == 1) x += more;
    if (i + 1 < places) multiply_place<TT, Form, P>(x, s.w[i + 1], sums[1]);
    scale_place<TT, Form, P::LOW>(sums[0], load(s.scale[i]), load(s.low[i]), scales, totals, own);
    if (P::PER == 1) scales += wide, totals += wide;
    x += more;
    if (i + 2 < places) multiply_place<TT, Form, P>(x, s.w[i + 2], sums[0]);
    if (i + 1 < places)
      scale_place<TT, Form, P::LOW>(sums[1], load(s.scale[i + 1]), load(s.low[i + 1]), scales, totals, own);
    scales += wide, totals += wide;
  }
  for (int t = 0; t < TT; t++) acc[t] = own[t];
}

template <class Form, class P>
inline void many_tokens(const P &group, const Acts &a, int t0, int n, vf *acc) {
  const int places = a.tiles * P::PER;
  Strip strip;
  for (int t = 0; t < n; t++) acc[t] = set(0.0f);
  for (int first = 0; first < places; first += STRIP) {
    const int last = first + STRIP < places ? first + STRIP : places;
    for (int i = first; i < last; i++) {
      group.template spread<Form::TWICE>(i, strip.w[i - first]);
      store(strip.scale[i - first], group.scale(i));
      if (P::LOW) store(strip.low[i - first], group.low(i));
    }
    for (int t = 0; t < n; t += BLOCK) {
      vf own[BLOCK];
      const int some = n - t < BLOCK ? n - t : BLOCK;
      for (int i = 0; i < some; i++) own[i] = acc[t + i];
      const uint8_t *ahead = t ? nullptr : group.tile(last / P::PER);
      if (some > 8) strip_sums<16, Form, P>(strip, first, last - first, a, t0 + t, ahead, own);
      else strip_sums<8, Form, P>(strip, first, last - first, a, t0 + t, ahead, own);
      for (int i = 0; i < some; i++) acc[t + i] = own[i];
    }
  }
}

constexpr int TWO_BLOCKS = 2 * BLOCK;  // up to so many tokens, unpacking once for each block is faster than for all

template <int L, class Exact>
inline void tiles_of(const HastenMatrix &m, int g, const Acts &a, int t0, int n, vf *acc) {
  const Places<L> group = {(const uint8_t *)m.data + g * group_bytes(L, m.cols)};
  if (n > TWO_BLOCKS) {
    if (a.int8) many_tokens<ByBytes<1>>(group, a, t0, n, acc);
    else many_tokens<Exact>(group, a, t0, n, acc);
    return;
  }
  for (int t = 0; t < n; t += BLOCK) {
    const int some = n - t < BLOCK ? n - t : BLOCK, at = t0 + t;
    if (some < (a.int8 ? BY_TILES_INT8 : BY_TILES)) sums_by_vectors(m, g, a, at, some, acc + t);
    else if (a.int8) few_tokens<16, ByBytes<1>>(group, a, at, some, acc + t);
    else if (some > 8) few_tokens<16, Exact>(group, a, at, some, acc + t);
    else if (some > ONE_TILE) few_tokens<8, Exact>(group, a, at, some, acc + t);
    else if (some > 4) few_tokens<ONE_TILE, ByBytes<DIGITS>>(group, a, at, some, acc + t);
    else few_tokens<4, ByBytes<DIGITS>>(group, a, at, some, acc + t);
  }
}

// Sums of rows 16 g .. 16 g + 15 for tokens t0 .. t0 + n - 1, which begin a block.
inline void sums_by_tiles(const HastenMatrix &m, int g, const Acts &a, int t0, int n, vf *acc) {
  switch (m.layout) {
    case L_Q8: return tiles_of<L_Q8, ByBytes<DIGITS>>(m, g, a, t0, n, acc);
    case L_Q4: return tiles_of<L_Q4, ByHalves>(m, g, a, t0, n, acc);
    case L_Q4Z: return tiles_of<L_Q4Z, ByHalves>(m, g, a, t0, n, acc);
    case L_Q4K: return tiles_of<L_Q4K, ByHalves>(m, g, a, t0, n, acc);
    default: return tiles_of<L_Q6K, ByBytes<DIGITS>>(m, g, a, t0, n, acc);
  }
}
