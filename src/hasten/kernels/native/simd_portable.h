// Sixteen lanes in plain C++: any processor with a compiler, ARM included, which turns these loops into its own vectors.
#pragma once
#include <math.h>
#include <string.h>

struct vf {  // 16 floats
  float v[16];
};
struct vi {  // 16 int32, or 64 bytes
  union {
    int32_t v[16];
    uint8_t u[64];
    int8_t s[64];
  };
};

#define LANEWISE(expression)                            \
  vf out;                                               \
  for (int i = 0; i < 16; i++) out.v[i] = (expression); \
  return out

inline vf load(const float *p) {
  vf out;
  memcpy(out.v, p, 64);
  return out;
}
inline void store(float *p, const vf &x) { memcpy(p, x.v, 64); }
inline vf load_n(const float *p, int n) { LANEWISE(i < n ? p[i] : 0.0f); }
inline void store_n(float *p, const vf &x, int n) { memcpy(p, x.v, (size_t)n * 4); }
inline vf set(float x) { LANEWISE(x); }
inline vf add(const vf &a, const vf &b) { LANEWISE(a.v[i] + b.v[i]); }
inline vf sub(const vf &a, const vf &b) { LANEWISE(a.v[i] - b.v[i]); }
inline vf mul(const vf &a, const vf &b) { LANEWISE(a.v[i] * b.v[i]); }
inline vf div(const vf &a, const vf &b) { LANEWISE(a.v[i] / b.v[i]); }
#if defined(__FMA__) || defined(__aarch64__)
inline vf fma(const vf &a, const vf &b, const vf &c) { LANEWISE(__builtin_fmaf(a.v[i], b.v[i], c.v[i])); }
#else
inline vf fma(const vf &a, const vf &b, const vf &c) { LANEWISE(a.v[i] * b.v[i] + c.v[i]); }  // rounds twice
#endif
inline vf max(const vf &a, const vf &b) { LANEWISE(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
inline vf abs(const vf &a) { LANEWISE(__builtin_fabsf(a.v[i])); }
inline float sum(const vf &x) {
  float t[16];
  memcpy(t, x.v, 64);
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; i++) t[i] += t[i + half];
  return t[0];
}
inline float largest(const vf &x) {
  float m = x.v[0];
  for (int i = 1; i < 16; i++) m = x.v[i] > m ? x.v[i] : m;
  return m;
}
// The largest size of 32 numbers; infinite or NaN where one of them is.
inline float largest_size(vf lo, vf hi) {
  const float all = sum(add(sub(lo, lo), sub(hi, hi)));
  return all == 0.0f ? largest(max(abs(lo), abs(hi))) : all;
}
// The sums of four vectors, each added up in the same order: within quarters (0 + 2) + (1 + 3), then the quarters alike.
inline void sum4(const vf *s, float *out) {
  for (int j = 0; j < 4; j++) {
    float q[4];
    for (int i = 0; i < 4; i++) {
      const float *x = s[j].v + 4 * i;
      q[i] = (x[0] + x[2]) + (x[1] + x[3]);
    }
    out[j] = (q[0] + q[2]) + (q[1] + q[3]);
  }
}
inline vf round(const vf &a) { LANEWISE((a.v[i] + 12582912.0f) - 12582912.0f); }  // to even, for |a| < 2^22
inline vf scale2(const vf &a, const vf &n) {
  vf out;
  for (int i = 0; i < 16; i++) {
    int32_t bits = ((int32_t)n.v[i] + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    out.v[i] = a.v[i] * power;
  }
  return out;
}

inline float half_to_float(uint16_t h) {
  uint32_t bits = (uint32_t)(h & 0x7fff) << 13;
  float value;
  memcpy(&value, &bits, 4);
  value *= 5.192296858534828e33f;  // 2^112: moves the exponent's bias, subnormal numbers included
  if ((h & 0x7c00) == 0x7c00) {    // infinity and NaN
    bits = 0x7f800000u | ((uint32_t)(h & 1023) << 13);
    memcpy(&value, &bits, 4);
  }
  return h & 0x8000 ? -value : value;
}
inline vf from_half16(const void *p) {
  uint16_t h[16];
  memcpy(h, p, 32);
  LANEWISE(half_to_float(h[i]));
}
inline vf from_bfloat16(const void *p) {
  uint16_t h[16];
  memcpy(h, p, 32);
  vf out;
  for (int i = 0; i < 16; i++) {
    uint32_t bits = (uint32_t)h[i] << 16;
    memcpy(out.v + i, &bits, 4);
  }
  return out;
}
inline vf even_bfloat16(const void *p) {
  uint16_t h[32];
  memcpy(h, p, 64);
  for (int i = 0; i < 16; i++) h[i] = h[2 * i];
  return from_bfloat16(h);
}
inline vf odd_bfloat16(const void *p) {
  uint16_t h[32];
  memcpy(h, p, 64);
  for (int i = 0; i < 16; i++) h[i] = h[2 * i + 1];
  return from_bfloat16(h);
}
inline vf from_i8(const void *p) { LANEWISE((float)((const int8_t *)p)[i]); }
inline vf from_u8(const void *p) { LANEWISE((float)((const uint8_t *)p)[i]); }
inline void to_i8(int8_t *p, const vf &x) {
  vf whole = round(x);
  for (int i = 0; i < 16; i++) p[i] = (int8_t)whole.v[i];
}

inline vi set_i(int32_t x) {
  vi out;
  for (int i = 0; i < 16; i++) out.v[i] = x;
  return out;
}

constexpr int DIGITS = 1;  // EXACT activations stay float32: products of bytes are no faster here
template <int D>
inline void put_digits(int8_t *p, int32_t *halves, vf lo, vf hi) {
  to_i8(p, lo), to_i8(p + 16, hi);
  for (int half = 0; half < 2; half++) {
    halves[half] = 0;
    for (int k = 0; k < 16; k++) halves[half] += p[16 * half + k];
  }
}

inline vi zero() { return set_i(0); }
inline vi load_bytes(const void *p) {
  vi out;
  memcpy(out.u, p, 64);
  return out;
}
inline vi low_nibbles(const vi &w) {
  vi out;
  for (int i = 0; i < 64; i++) out.u[i] = w.u[i] & 15;
  return out;
}
inline vi high_nibbles(const vi &w) {
  vi out;
  for (int i = 0; i < 64; i++) out.u[i] = w.u[i] >> 4;
  return out;
}
inline vf to_float(const vi &a) { LANEWISE((float)a.v[i]); }

// acc[lane] += sum over i < 4 of w[4 lane + i] x[i], for unsigned w up to 15 (dot_u) and signed w (dot_s).
inline vi dot_u(vi acc, const vi &w, const int8_t *x) {
  for (int i = 0; i < 16; i++)
    acc.v[i] += w.u[4 * i] * x[0] + w.u[4 * i + 1] * x[1] + w.u[4 * i + 2] * x[2] + w.u[4 * i + 3] * x[3];
  return acc;
}
inline vi ready_s(const vi &w) { return w; }
inline vi dot_s(vi acc, const vi &w, const int8_t *x) {
  for (int i = 0; i < 16; i++)
    acc.v[i] += w.s[4 * i] * x[0] + w.s[4 * i + 1] * x[1] + w.s[4 * i + 2] * x[2] + w.s[4 * i + 3] * x[3];
  return acc;
}
inline vi start_s(int32_t) { return zero(); }

inline vf nibble_of(const vi &w, int j) { LANEWISE((float)(((uint32_t)w.v[i] >> (4 * j)) & 15)); }
inline vf byte_of(const vi &w, int j) { LANEWISE((float)w.s[4 * i + j]); }
within void prefetch(const void *p) { __builtin_prefetch(p); }
