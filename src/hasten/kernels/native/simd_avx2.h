// Sixteen lanes as two vectors of eight, with AVX2, FMA and F16C.
#pragma once
#include <immintrin.h>
#include <string.h>

struct vf {  // 16 floats
  __m256 a, b;
};
struct vi {  // 16 int32, or 64 bytes
  __m256i a, b;
};

inline vf load(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float *p, vf v) { _mm256_storeu_ps(p, v.a), _mm256_storeu_ps(p + 8, v.b); }
inline vf load_n(const float *p, int n) {
  float t[16] = {0};
  memcpy(t, p, (size_t)n * 4);
  return load(t);
}
inline void store_n(float *p, vf v, int n) {
  float t[16];
  store(t, v);
  memcpy(p, t, (size_t)n * 4);
}
inline vf set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline vf add(vf x, vf y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline vf sub(vf x, vf y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline vf mul(vf x, vf y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline vf div(vf x, vf y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline vf fma(vf x, vf y, vf z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline vf max(vf x, vf y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline vf abs(vf x) {
  const __m256 m = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  return {_mm256_and_ps(x.a, m), _mm256_and_ps(x.b, m)};
}
inline float sum(vf x) {  // the halves, quarters, eighths, as AVX-512's reduction adds them
  __m256 h = _mm256_add_ps(x.a, x.b);
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
inline float largest(vf x) {
  __m256 h = _mm256_max_ps(x.a, x.b);
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}
// The largest size of 32 numbers; infinite or NaN where one of them is.
inline float largest_size(vf lo, vf hi) {
  const float all = sum(add(sub(lo, lo), sub(hi, hi)));
  return all == 0.0f ? largest(max(abs(lo), abs(hi))) : all;
}
inline __m256 quarters(__m256 a, __m256 b, __m256 c, __m256 d) {
  const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
  return _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
}
// The sums of four vectors, each added up in the same order: within quarters (0 + 2) + (1 + 3), then the quarters alike.
inline void sum4(const vf *s, float *out) {
  const __m256 h = _mm256_add_ps(quarters(s[0].a, s[1].a, s[2].a, s[3].a), quarters(s[0].b, s[1].b, s[2].b, s[3].b));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1)));
}
inline vf round(vf x) {
  const int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, mode), _mm256_round_ps(x.b, mode)};
}
inline __m256 scale2_8(__m256 a, __m256 n) {
  __m256i e = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(a, _mm256_castsi256_ps(e));
}
inline vf scale2(vf x, vf n) { return {scale2_8(x.a, n.a), scale2_8(x.b, n.b)}; }  // n in [-126, 127]

inline vf from_half16(const void *p) {
  const __m128i *q = (const __m128i *)p;
  return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}
inline vf from_bfloat16(const void *p) {
  const __m128i *q = (const __m128i *)p;
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(q)), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(q + 1)), 16))};
}
inline vf even_bfloat16(const void *p) {
  const __m256i *q = (const __m256i *)p;
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(q), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(q + 1), 16))};
}
inline vf odd_bfloat16(const void *p) {
  const __m256i *q = (const __m256i *)p, high = _mm256_set1_epi32((int)0xffff0000);
  return {_mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256(q), high)),
          _mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256(q + 1), high))};
}
inline vf from_i8(const void *p) {
  const __m128i v = _mm_loadu_si128((const __m128i *)p);
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(v)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(v, 8)))};
}
inline vf from_u8(const void *p) {
  const __m128i v = _mm_loadu_si128((const __m128i *)p);
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(v)), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(v, 8)))};
}
inline void to_i8(int8_t *p, vf v) {
  __m256i w = _mm256_packs_epi32(_mm256_cvtps_epi32(v.a), _mm256_cvtps_epi32(v.b));
  w = _mm256_permute4x64_epi64(w, 0xd8);
  _mm_storeu_si128((__m128i *)p, _mm_packs_epi16(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1)));
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

inline vi zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline vi set_i(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline vi load_bytes(const void *p) {
  const __m256i *q = (const __m256i *)p;
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
inline vi low_nibbles(vi w) {
  const __m256i m = _mm256_set1_epi8(15);
  return {_mm256_and_si256(w.a, m), _mm256_and_si256(w.b, m)};
}
inline vi high_nibbles(vi w) {
  return low_nibbles({_mm256_srli_epi16(w.a, 4), _mm256_srli_epi16(w.b, 4)});
}
inline vf to_float(vi x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline __m256i four(const int8_t *x) {
  int32_t v;
  memcpy(&v, x, 4);
  return _mm256_set1_epi32(v);
}
inline __m256i pairs(__m256i acc, __m256i u, __m256i s) {  // u <= 128, |s| <= 127: pair sums fit 16 bits
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1)));
}

// acc[lane] += sum over i < 4 of w[4 lane + i] x[i], for unsigned w up to 15 (dot_u) and signed w (dot_s).
inline vi dot_u(vi acc, vi w, const int8_t *x) {
  const __m256i v = four(x);
  return {pairs(acc.a, w.a, v), pairs(acc.b, w.b, v)};
}
inline vi ready_s(vi w) { return w; }
inline vi dot_s(vi acc, vi w, const int8_t *x) {  // |w| times x with w's sign
  const __m256i v = four(x);
  return {pairs(acc.a, _mm256_abs_epi8(w.a), _mm256_sign_epi8(v, w.a)),
          pairs(acc.b, _mm256_abs_epi8(w.b), _mm256_sign_epi8(v, w.b))};
}
inline vi start_s(int32_t) { return zero(); }

inline vf nibble_of(vi w, int j) {
  const __m256i m = _mm256_set1_epi32(15);
  return to_float({_mm256_and_si256(_mm256_srli_epi32(w.a, 4 * j), m), _mm256_and_si256(_mm256_srli_epi32(w.b, 4 * j), m)});
}
inline vf byte_of(vi w, int j) {
  const int up = 24 - 8 * j;
  return to_float({_mm256_srai_epi32(_mm256_slli_epi32(w.a, up), 24), _mm256_srai_epi32(_mm256_slli_epi32(w.b, up), 24)});
}
within void prefetch(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T0); }
