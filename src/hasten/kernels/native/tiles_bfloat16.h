// Products of any number of tokens with weights in bfloat16 by AMX: 16 rows of weights times 32 columns times 16 rows of
// bfloat16, which are tokens' pieces. A float's 24 bits are three pieces of 8, so nothing of it is lost:
//
//   row 3 t + 0, 1, 2   upper, middle and lower piece of token t
//
// A piece's sums stay in a tile register over all columns; those of a token are added in float32 at the end. A row's sums
// do not depend on the other rows, and one token goes this way too, so no bit depends on how many share a pass.
#pragma once

template <int SUM>
within void add_product(const uint16_t *rows) {
  tile_load<LONG>((const int8_t *)rows, 64);
  asm volatile("tdpbf16ps %%tmm%c1, %%tmm%c2, %%tmm%c0" ::"i"(SUM), "i"(LONG_WEIGHTS), "i"(LONG));
}

template <int SUM>
within void tile_clear() {
  asm volatile("tilezero %%tmm%c0" ::"i"(SUM));
}

template <int SUM>
within void tile_store(float *sums) {
  asm volatile("tilestored %%tmm%c3, (%1,%2,1)" : "=m"(*(float(*)[256])sums) : "r"(sums), "r"((int64_t)64), "i"(SUM));
}

// acc = a group's sums for n tokens of the block that t0 begins, whose pieces fill R tiles.
template <int R>
inline void block_of_pieces(const uint8_t *p, const Acts &a, int t0, int n, bool ahead, vf *acc) {
  alignas(64) float sums[R * 16][LANES];
  const uint16_t *rows = a.pieces + a.at(t0, 0) * PIECES * TILE;
  const int64_t more = (int64_t)a.width * PIECES * TILE;
  tile_clear<SUMS>();
  if constexpr (R > 1) tile_clear<SUMS_2>();
  if constexpr (R > 2) tile_clear<SUMS_3>();
  for (int b = 0; b < a.tiles; b++, p += 1024, rows += more) {
    if (ahead)
      for (int line = 0; line < 1024; line += 64) prefetch(p + AHEAD + line);
    tile_load<LONG_WEIGHTS>((const int8_t *)p, 64);
    add_product<SUMS>(rows);
    if constexpr (R > 1) add_product<SUMS_2>(rows + 16 * TILE);
    if constexpr (R > 2) add_product<SUMS_3>(rows + 32 * TILE);
  }
  tile_store<SUMS>(sums[0]);
  if constexpr (R > 1) tile_store<SUMS_2>(sums[16]);
  if constexpr (R > 2) tile_store<SUMS_3>(sums[32]);
  for (int t = 0; t < n; t++) {
    const float *own = sums[PIECES * t];
    acc[t] = add(add(load(own + 2 * LANES), load(own + LANES)), load(own));
  }
}

// Sums of rows 16 g .. 16 g + 15 for tokens t0 .. t0 + n - 1, which begin a block.
inline void sums_of_pieces(const HastenMatrix &m, int g, const Acts &a, int t0, int n, vf *acc) {
  const uint8_t *p = (const uint8_t *)m.data + g * group_bytes(L_BF16, m.cols);
  for (int t = 0; t < n; t += BLOCK) {
    const int some = n - t < BLOCK ? n - t : BLOCK, rows = PIECES * some;
    if (rows > 32) block_of_pieces<3>(p, a, t0 + t, some, t == 0, acc + t);
    else if (rows > 16) block_of_pieces<2>(p, a, t0 + t, some, t == 0, acc + t);
    else block_of_pieces<1>(p, a, t0 + t, some, t == 0, acc + t);
  }
}
