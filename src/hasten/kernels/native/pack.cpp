// Repacking: from stored rows (GGUF blocks, float32, float16, bfloat16) into the layouts of layout.h, and back to rows.
// Plain scalar code: it runs once per model, and its result is the same on every machine.
#include "pack.h"

#include <string.h>

namespace hasten {

float from_half(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 1023, bits;
  if (exponent == 31) {
    bits = sign | 0x7f800000u | (fraction << 13);
  } else if (exponent) {
    bits = sign | ((exponent + 112) << 23) | (fraction << 13);
  } else {  // zero or subnormal: fraction * 2^-24, exactly
    float value = (float)fraction * 5.9604644775390625e-08f;
    memcpy(&bits, &value, 4);
    bits |= sign;
  }
  float out;
  memcpy(&out, &bits, 4);
  return out;
}

static float from_bfloat(uint16_t h) {
  uint32_t bits = (uint32_t)h << 16;
  float out;
  memcpy(&out, &bits, 4);
  return out;
}

static uint16_t u16(const uint8_t *p) {
  uint16_t v;
  memcpy(&v, p, 2);
  return v;
}

struct Stored {
  int layout, columns, bytes;  // layout it goes to; columns and bytes of one stored block
};

static const Stored STORED[] = {
    {L_F32, 1, 4},   {L_F32, 1, 2},    {L_BF16, 1, 2},    {L_Q4Z, 32, 18},   {L_Q4, 32, 20},
    {L_Q8, 32, 22},  {L_Q8, 32, 34},   {L_Q4K, 256, 144}, {L_Q6K, 256, 210},
};

int layout_of(int source) { return source >= HASTEN_F32 && source <= HASTEN_Q6_K ? STORED[source].layout : -1; }
int64_t stored_row_bytes(int source, int64_t cols) { return cols / STORED[source].columns * STORED[source].bytes; }
int stored_columns(int source) { return STORED[source].columns; }

// Lane r of a tile of 4-bit quants: stored as in GGUF, 16 bytes with columns j low and 16 + j high.
static void put_nibbles(uint8_t *tile, int r, const uint8_t *quants) {
  for (int c = 0; c < 4; c++) memcpy(tile + c * 64 + r * 4, quants + 4 * c, 4);
}

static void put_bytes(uint8_t *tile, int r, const int8_t *quants) {
  for (int c = 0; c < 8; c++) memcpy(tile + c * 64 + r * 4, quants + 4 * c, 4);
}

static void put_q5_0(uint8_t *tile, int r, const uint8_t *block) {  // f16 d, 32 high bits, 16 bytes of nibbles
  int8_t q[32];
  uint32_t high;
  memcpy(&high, block + 2, 4);
  for (int j = 0; j < 16; j++) {
    q[j] = (int8_t)(((block[6 + j] & 15) | (((high >> j) & 1) << 4)) - 16);
    q[16 + j] = (int8_t)(((block[6 + j] >> 4) | (((high >> (16 + j)) & 1) << 4)) - 16);
  }
  put_bytes(tile, r, q);
  memcpy(tile + 512 + 2 * r, block, 2);
}

// The 6-bit scale and minimum of sub-block j of a Q4_K block (12 packed bytes).
static void scale_min(const uint8_t *packed, int j, uint8_t *scale, uint8_t *minimum) {
  if (j < 4) {
    *scale = packed[j] & 63;
    *minimum = packed[j + 4] & 63;
  } else {
    *scale = (packed[j + 4] & 15) | ((packed[j - 4] >> 6) << 4);
    *minimum = (packed[j + 4] >> 4) | ((packed[j] >> 6) << 4);
  }
}

static void put_q4_k(uint8_t *super, int r, const uint8_t *block) {  // f16 d, f16 dmin, 12 bytes of scales, 128 of nibbles
  memcpy(super + 2 * r, block, 2);
  memcpy(super + 32 + 2 * r, block + 2, 2);
  for (int s = 0; s < 8; s++) {
    uint8_t *tile = super + 64 + s * 288, quants[16];
    const uint8_t *from = block + 16 + (s / 2) * 32;  // 32 bytes: even sub-block in the low nibbles, odd in the high ones
    for (int j = 0; j < 16; j++) {
      uint8_t low = s & 1 ? from[j] >> 4 : from[j] & 15, high = s & 1 ? from[16 + j] >> 4 : from[16 + j] & 15;
      quants[j] = (uint8_t)(low | (high << 4));
    }
    put_nibbles(tile, r, quants);
    scale_min(block + 4, s, tile + 256 + r, tile + 272 + r);
  }
}

static void put_q6_k(uint8_t *super, int r, const uint8_t *block) {  // 128 low nibbles, 64 high pairs, 16 scales, f16 d
  const uint8_t *low = block, *high = block + 128;
  int8_t q[256];
  for (int half = 0; half < 2; half++, low += 64, high += 32)
    for (int j = 0; j < 32; j++) {
      int8_t *to = q + 128 * half + j;
      to[0] = (int8_t)(((low[j] & 15) | ((high[j] & 3) << 4)) - 32);
      to[32] = (int8_t)(((low[j + 32] & 15) | (((high[j] >> 2) & 3) << 4)) - 32);
      to[64] = (int8_t)(((low[j] >> 4) | (((high[j] >> 4) & 3) << 4)) - 32);
      to[96] = (int8_t)(((low[j + 32] >> 4) | (((high[j] >> 6) & 3) << 4)) - 32);
    }
  memcpy(super + 2 * r, block + 208, 2);
  for (int s = 0; s < 8; s++) {
    uint8_t *tile = super + 32 + s * 544;
    put_bytes(tile, r, q + 32 * s);
    tile[512 + r] = block[192 + 2 * s];
    tile[528 + r] = block[192 + 2 * s + 1];
  }
}

static void pack_row(int source, const uint8_t *from, int64_t cols, int r, uint8_t *group) {
  switch (source) {
    case HASTEN_F32:
      for (int64_t k = 0; k < cols; k++) memcpy(group + k * 64 + r * 4, from + k * 4, 4);
      return;
    case HASTEN_F16:
      for (int64_t k = 0; k < cols; k++) {
        float value = from_half(u16(from + k * 2));
        memcpy(group + k * 64 + r * 4, &value, 4);
      }
      return;
    case HASTEN_BF16:
      for (int64_t k = 0; k < cols; k += 2) memcpy(group + k * 32 + r * 4, from + k * 2, k + 1 < cols ? 4 : 2);
      return;
    case HASTEN_Q4_K:
      for (int64_t b = 0; b < cols / 256; b++) put_q4_k(group + b * 2368, r, from + b * 144);
      return;
    case HASTEN_Q6_K:
      for (int64_t b = 0; b < cols / 256; b++) put_q6_k(group + b * 4384, r, from + b * 210);
      return;
  }
  for (int64_t b = 0; b < cols / TILE; b++) {
    if (source == HASTEN_Q4_0) {
      uint8_t *tile = group + b * 288;
      put_nibbles(tile, r, from + b * 18 + 2);
      memcpy(tile + 256 + 2 * r, from + b * 18, 2);
    } else if (source == HASTEN_Q4_1) {
      uint8_t *tile = group + b * 320;
      put_nibbles(tile, r, from + b * 20 + 4);
      memcpy(tile + 256 + 2 * r, from + b * 20, 2);
      memcpy(tile + 288 + 2 * r, from + b * 20 + 2, 2);
    } else if (source == HASTEN_Q8_0) {
      uint8_t *tile = group + b * 544;
      put_bytes(tile, r, (const int8_t *)from + b * 34 + 2);
      memcpy(tile + 512 + 2 * r, from + b * 34, 2);
    } else {
      put_q5_0(group + b * 544, r, from + b * 22);
    }
  }
}

void pack_groups(int source, const uint8_t *from, int64_t rows, int64_t cols, const int32_t *order, uint8_t *to,
                 int64_t first, int64_t last) {
  const int64_t bytes = group_bytes(layout_of(source), cols), stored = stored_row_bytes(source, cols);
  for (int64_t g = first; g < last; g++) {
    if ((g + 1) * LANES > rows || cols % TILE) memset(to + g * bytes, 0, bytes);
    for (int r = 0; r < LANES && g * LANES + r < rows; r++) {
      int64_t row = order ? order[g * LANES + r] : g * LANES + r;
      pack_row(source, from + row * stored, cols, r, to + g * bytes);
    }
  }
}

static float nibble(const uint8_t *tile, int r, int k) {
  uint8_t byte = tile[(k % 16 / 4) * 64 + r * 4 + k % 4];
  return (float)(k < 16 ? byte & 15 : byte >> 4);
}

static float byte_at(const uint8_t *tile, int r, int k) { return (float)(int8_t)tile[(k / 4) * 64 + r * 4 + k % 4]; }

void unpack_row(const HastenMatrix &m, int64_t row, float *out) {
  const int r = (int)(row % LANES);
  const uint8_t *group = (const uint8_t *)m.data + row / LANES * group_bytes(m.layout, m.cols);
  for (int64_t at = 0; at < m.cols; at++) {
    const int k = (int)(at % TILE);
    const uint8_t *tile, *super;
    switch (m.layout) {
      case L_F32: memcpy(out + at, group + at * 64 + r * 4, 4); break;
      case L_BF16: out[at] = from_bfloat(u16(group + at / 2 * 64 + r * 4 + at % 2 * 2)); break;
      case L_Q8:
        tile = group + at / TILE * 544;
        out[at] = from_half(u16(tile + 512 + 2 * r)) * byte_at(tile, r, k);
        break;
      case L_Q4:
        tile = group + at / TILE * 320;
        out[at] = from_half(u16(tile + 256 + 2 * r)) * nibble(tile, r, k) + from_half(u16(tile + 288 + 2 * r));
        break;
      case L_Q4Z:
        tile = group + at / TILE * 288;
        out[at] = from_half(u16(tile + 256 + 2 * r)) * (nibble(tile, r, k) - 8.0f);
        break;
      case L_Q4K:
        super = group + at / 256 * 2368, tile = super + 64 + at % 256 / TILE * 288;
        out[at] = from_half(u16(super + 2 * r)) * tile[256 + r] * nibble(tile, r, k) -
                  from_half(u16(super + 32 + 2 * r)) * tile[272 + r];
        break;
      default:
        super = group + at / 256 * 4384, tile = super + 32 + at % 256 / TILE * 544;
        out[at] = from_half(u16(super + 2 * r)) * (float)(int8_t)tile[512 + 16 * (k / 16) + r] * byte_at(tile, r, k);
    }
  }
}

}  // namespace hasten
