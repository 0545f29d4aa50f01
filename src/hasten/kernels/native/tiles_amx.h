// Products of many tokens by AMX: 16 rows of weights times 32 columns times as many rows of bytes as a tile holds, where a
// row is one digit of one token. A packed chunk of 64 bytes is a row of the B operand as it stands. Sums are whole numbers,
// the same as those of vectors, and are scaled by the same instructions, so that no bit depends on which of both ran.
#pragma once

struct TileShapes {  // the operand of LDTILECFG
  uint8_t palette, start, unused[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};

// Written as assembly, as the compiler's own intrinsics do not say which memory they touch.

// This thread's tiles as the kernels want them: sums (0..3), bytes of tokens (4, 5), weights (6, 7). What the thread had
// before, such as torch's kernels, is put back afterwards.
struct Tiles {
  TileShapes before;
  Tiles() {
    TileShapes own;
    memset(&own, 0, sizeof own);
    own.palette = 1;
    const int rows[] = {16, 16, 16, 16, 16, 16, 8, 8}, bytes[] = {64, 64, 64, 64, 32, 32, 64, 64};
    for (int i = 0; i < 8; i++) own.rows[i] = (uint8_t)rows[i], own.bytes[i] = (uint16_t)bytes[i];
    asm volatile("sttilecfg %0" : "=m"(before));
    asm volatile("ldtilecfg %0" ::"m"(own));
  }
  ~Tiles() {
    if (before.palette) asm volatile("ldtilecfg %0" ::"m"(before));
    else asm volatile("tilerelease");
  }
};

template <int REG>
inline void tile_load(const void *p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(REG), "m"(*(const uint8_t(*)[1024])p));
}
template <int REG>
inline void tile_store(int32_t *p) {
  asm volatile("tilestored %%tmm%c2, (%1,%3,1)" : "=m"(*(int32_t(*)[256])p) : "r"(p), "i"(REG), "r"((int64_t)64));
}
template <int SUMS, int X, int W>
inline void tile_multiply() {
  asm volatile("tilezero %%tmm%c0\n\ttdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(X), "i"(W));
}

constexpr int STRIP = 32;  // tiles of weights that are unpacked at a time: they stay in the first cache

// Part of a group's columns, ready to be multiplied: signed bytes, one scale and minimum per row. A layout with two scales a
// tile takes two places, the other half of each zero.
struct Strip {
  alignas(64) int8_t w[STRIP][16 * TILE];
  alignas(64) float scale[STRIP][LANES], low[STRIP][LANES];
};

inline void spread_nibbles(const uint8_t *chunks, int8_t *to, int less) {
  const vi off = _mm512_set1_epi8((char)less);
  for (int c = 0; c < 4; c++) {
    const vi both = load_bytes(chunks + 64 * c);
    _mm512_store_si512(to + 64 * c, _mm512_sub_epi8(low_nibbles(both), off));
    _mm512_store_si512(to + 64 * (4 + c), _mm512_sub_epi8(high_nibbles(both), off));
  }
}

// Tiles b..b + n - 1 of a group into places 0.. of the strip; n is a multiple of 8 for layouts of 256 columns.
inline void unpack(int layout, const uint8_t *group, int b, int n, Strip &s) {
  if (layout == L_Q8 || layout == L_Q4 || layout == L_Q4Z) {
    const int bytes = layout == L_Q8 ? 544 : layout == L_Q4 ? 320 : 288, quants = layout == L_Q8 ? 512 : 256;
    const uint8_t *p = group + (int64_t)b * bytes;
    for (int i = 0; i < n; i++, p += bytes) {
      read_ahead(p, bytes);
      if (layout == L_Q8) memcpy(s.w[i], p, 512);
      else spread_nibbles(p, s.w[i], layout == L_Q4Z ? 8 : 0);
      store(s.scale[i], from_half16(p + quants));
      if (layout == L_Q4) store(s.low[i], from_half16(p + 288));
    }
  } else if (layout == L_Q4K) {
    const uint8_t *p = group + (int64_t)(b / 8) * 2368;
    for (int i = 0; i < n;) {
      const vf d = from_half16(p), low = sub(set(0.0f), from_half16(p + 32));
      p += 64;
      for (int k = 0; k < 8; k++, i++, p += 288) {
        read_ahead(p, 288);
        spread_nibbles(p, s.w[i], 0);
        store(s.scale[i], mul(d, from_u8(p + 256)));
        store(s.low[i], mul(low, from_u8(p + 272)));
      }
    }
  } else {  // L_Q6K
    const uint8_t *p = group + (int64_t)(b / 8) * 4384;
    for (int i = 0; i < 2 * n;) {
      const vf d = from_half16(p);
      p += 32;
      for (int k = 0; k < 8; k++, p += 544) {
        read_ahead(p, 544);
        for (int half = 0; half < 2; half++, i++) {
          memset(s.w[i], 0, 512);
          memcpy(s.w[i] + 256 * half, p + 256 * half, 256);
          store(s.scale[i], mul(d, from_i8(p + 512 + 16 * half)));
        }
      }
    }
  }
}

// Sums of TT tokens' digits with one place of a strip, in tile registers and scratch that the place before does not use.
template <int ROUND, int ROWS>
inline void multiply_place(const int8_t *x, const int8_t *w, int32_t *sums) {
  constexpr int X = 4 + ROUND, W = 6 + ROUND;
  tile_load<W>(w, 64);
  tile_load<X>(x, TILE);
  tile_multiply<ROUND ? 3 : 0, X, W>();
  if (ROWS > 16) {
    tile_load<X>(x + 16 * TILE, TILE);
    tile_multiply<1, X, W>();
  }
  if (ROWS > 32) {
    tile_load<X>(x + 32 * TILE, TILE);
    tile_multiply<2, X, W>();
  }
  tile_store<ROUND ? 3 : 0>(sums);
  if (ROWS > 16) tile_store<1>(sums + 256);
  if (ROWS > 32) tile_store<2>(sums + 512);
}

// own += one place's sums, scaled.
template <int TT, int D, bool LOW>
inline void scale_place(const int32_t *sums, const float *scale, const float *low, const float *scales, const float *totals,
                        vf *own) {
  const vf s = load(scale), l = LOW ? load(low) : set(0.0f);
  for (int t = 0; t < TT; t++) {
    vi digits[D];
    for (int d = 0; d < D; d++) digits[d] = load_bytes(sums + (t * D + d) * LANES);
    own[t] = fma(mul(s, set(scales[t])), number<D>(digits), own[t]);
    if (LOW) own[t] = fma(l, set(totals[t]), own[t]);
  }
}

// acc += `places` places of a strip times tokens t0..t0 + TT - 1, whose tiles begin with b; PER places share a tile.
template <int TT, int D, int PER, bool LOW>
inline void strip_sums(const Strip &s, int places, const Acts &a, int t0, int b, vf *acc) {
  constexpr int ROWS = (TT * D + 15) / 16 * 16;
  alignas(64) int32_t sums[2][ROWS * LANES];
  vf own[TT];
  for (int t = 0; t < TT; t++) own[t] = acc[t];
  const int64_t at = a.at(t0, b), wide = a.width;
  const int8_t *x = a.q + at * D * TILE;
  const float *scales = a.scale + at, *totals = a.total + at;
  multiply_place<0, ROWS>(x, s.w[0], sums[0]);
  for (int i = 0; i < places; i += 2) {  // while one place's sums are scaled, the next is multiplied
    if (PER == 1) x += wide * D * TILE;
    if (i + 1 < places) multiply_place<1, ROWS>(x, s.w[i + 1], sums[1]);
    scale_place<TT, D, LOW>(sums[0], s.scale[i], s.low[i], scales, totals, own);
    if (PER == 1) scales += wide, totals += wide;
    x += wide * D * TILE;
    if (i + 2 < places) multiply_place<0, ROWS>(x, s.w[i + 2], sums[0]);
    if (i + 1 < places) scale_place<TT, D, LOW>(sums[1], s.scale[i + 1], s.low[i + 1], scales, totals, own);
    scales += wide, totals += wide;
  }
  for (int t = 0; t < TT; t++) acc[t] = own[t];
}

template <int D, int PER, bool LOW>
inline void group_by_tiles(const HastenMatrix &m, int g, const Acts &a, int t0, int n, vf *acc) {
  const uint8_t *group = (const uint8_t *)m.data + g * group_bytes(m.layout, m.cols);
  constexpr int step = STRIP / PER;
  Strip strip;
  for (int t = 0; t < n; t++) acc[t] = set(0.0f);
  for (int b = 0; b < a.tiles; b += step) {
    const int count = a.tiles - b < step ? a.tiles - b : step;
    unpack(m.layout, group, b, count, strip);
    for (int t = 0; t < n; t += BLOCK) {
      vf own[BLOCK];
      const int some = n - t < BLOCK ? n - t : BLOCK;
      for (int i = 0; i < some; i++) own[i] = acc[t + i];
      if (some > 8) strip_sums<16, D, PER, LOW>(strip, count * PER, a, t0 + t, b, own);
      else if (some > 5 || D == 1) strip_sums<8, D, PER, LOW>(strip, count * PER, a, t0 + t, b, own);
      else strip_sums<5, D, PER, LOW>(strip, count * PER, a, t0 + t, b, own);
      for (int i = 0; i < some; i++) acc[t + i] = own[i];
    }
  }
}

template <int D>
inline void tiles_of(const HastenMatrix &m, int g, const Acts &a, int t0, int n, vf *acc) {
  if (m.layout == L_Q6K) group_by_tiles<D, 2, false>(m, g, a, t0, n, acc);
  else if (m.layout == L_Q4 || m.layout == L_Q4K) group_by_tiles<D, 1, true>(m, g, a, t0, n, acc);
  else group_by_tiles<D, 1, false>(m, g, a, t0, n, acc);
}

// Sums of rows 16 g .. 16 g + 15 for tokens t0 .. t0 + n - 1, which begin a block.
inline void sums_by_tiles(const HastenMatrix &m, int g, const Acts &a, int t0, int n, vf *acc) {
  if (a.int8) tiles_of<1>(m, g, a, t0, n, acc);
  else tiles_of<DIGITS>(m, g, a, t0, n, acc);
}
