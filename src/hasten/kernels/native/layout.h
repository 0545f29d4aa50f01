// Packed layouts of weight matrices. Rows go in groups of 16, one lane of a vector each, so that an inner loop needs no
// horizontal sums; a group's columns follow one another, so that a thread reads its rows as one stream.
//
//   tile = 16 rows x 32 columns; quants are interleaved by four columns, as 8-bit dot products want them:
//     chunk c (64 bytes), byte b:  row b / 4, column 4 c + b % 4
//
//   Q8    8 chunks of signed bytes | 16 x f16 scale                                   544 bytes per tile
//   Q4    4 chunks of nibbles      | 16 x f16 scale | 16 x f16 minimum                320
//   Q4Z   4 chunks of nibbles      | 16 x f16 scale         value = scale (q - 8)     288
//           nibbles: low = columns 4 c + b % 4, high = columns 16 + 4 c + b % 4
//   Q4K   16 x f16 d | 16 x f16 dmin | 8 tiles of (4 chunks | 16 x u8 scale | 16 x u8 minimum)        2368 per 8 tiles
//   Q6K   16 x f16 d | 8 tiles of (8 chunks of signed bytes | 2 x 16 x i8 scale, one per 16 columns)  4384 per 8 tiles
//   F32   one column of 16 rows after another                                          64 per column
//   BF16  tiles of 16 lines of 64 bytes: columns 2 j and 2 j + 1 of row 0, of row 1, ..           1024
//
// A last group of fewer than 16 rows is filled up with zeros. F32 and BF16 take any number of columns,
// the last tile of BF16 is filled up with zeros.
#pragma once
#include <stdint.h>

// Parts of an inner loop: a call for each tile would cost as much as what it does, and compilers run out of patience.
// Prefetches too: called from such a part, g++ 12 takes one for a function without effect and drops it.
#if defined(__GNUC__)
#define within inline __attribute__((always_inline))
#else
#define within inline
#endif

enum Layout : int32_t { L_F32, L_BF16, L_Q8, L_Q4, L_Q4Z, L_Q4K, L_Q6K, LAYOUTS };

constexpr int LANES = 16, TILE = 32;

constexpr bool quantised(int layout) { return layout >= L_Q8; }

// Columns must be a multiple of this.
constexpr int column_step(int layout) { return layout >= L_Q4K ? 256 : layout >= L_Q8 ? TILE : 1; }

// Bytes of one group of 16 rows.
constexpr int64_t group_bytes(int layout, int64_t cols) {
  switch (layout) {
    case L_F32: return cols * 64;
    case L_BF16: return (cols + TILE - 1) / TILE * 1024;
    case L_Q8: return cols / TILE * 544;
    case L_Q4: return cols / TILE * 320;
    case L_Q4Z: return cols / TILE * 288;
    case L_Q4K: return cols / 256 * 2368;
    default: return cols / 256 * 4384;
  }
}

constexpr int64_t groups_of(int64_t rows) { return (rows + LANES - 1) / LANES; }
