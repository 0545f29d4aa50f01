// Sixteen lanes with AVX-512 (F, BW, DQ, VL) and VNNI.
#pragma once
#include <immintrin.h>
#include <string.h>

typedef __m512 vf;   // 16 floats
typedef __m512i vi;  // 16 int32, or 64 bytes

inline vf load(const float *p) { return _mm512_loadu_ps(p); }
inline void store(float *p, vf v) { _mm512_storeu_ps(p, v); }
inline __mmask16 first(int n) { return (__mmask16)((1u << n) - 1); }
inline vf load_n(const float *p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }  // lanes n.. are 0
inline void store_n(float *p, vf v, int n) { _mm512_mask_storeu_ps(p, first(n), v); }
inline vf set(float x) { return _mm512_set1_ps(x); }
inline vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
inline vf sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
inline vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
inline vf div(vf a, vf b) { return _mm512_div_ps(a, b); }
inline vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
inline vf max(vf a, vf b) { return _mm512_max_ps(a, b); }
inline vf abs(vf a) { return _mm512_abs_ps(a); }
inline float sum(vf a) { return _mm512_reduce_add_ps(a); }
inline float largest(vf a) { return _mm512_reduce_max_ps(a); }
// The largest size of 32 numbers; infinite or NaN where one of them is: as whole numbers, those are the largest.
inline float largest_size(vf lo, vf hi) {
  const __m512i m = _mm512_max_epi32(_mm512_castps_si512(abs(lo)), _mm512_castps_si512(abs(hi)));
  const int32_t bits = _mm512_reduce_max_epi32(m);
  float size;
  memcpy(&size, &bits, 4);
  return size;
}
// The sums of four vectors, each added up in the same order: within quarters (0 + 2) + (1 + 3), then the quarters alike.
inline void sum4(const vf *s, float *out) {
  const vf ab = add(_mm512_unpacklo_ps(s[0], s[1]), _mm512_unpackhi_ps(s[0], s[1]));
  const vf cd = add(_mm512_unpacklo_ps(s[2], s[3]), _mm512_unpackhi_ps(s[2], s[3]));
  const vf lo = _mm512_shuffle_ps(ab, cd, 0x44), hi = _mm512_shuffle_ps(ab, cd, 0xee), q = add(lo, hi);
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(q), _mm512_extractf32x8_ps(q, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1)));
}
inline vf round(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline vf scale2(vf a, vf n) { return _mm512_scalef_ps(a, n); }  // a 2^n for whole n

inline vf from_half16(const void *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
inline vf from_bfloat16(const void *p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
// Columns of even and of odd number of 16 rows of bfloat16, which lie in pairs.
inline vf even_bfloat16(const void *p) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16)); }
inline vf odd_bfloat16(const void *p) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32((int)0xffff0000)));
}
inline vf from_i8(const void *p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p))); }
inline vf from_u8(const void *p) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p))); }

constexpr int DIGITS = 3;  // of an EXACT activation in bytes
// Digits of whole numbers of up to 23 bits, 32 bytes from one digit to the next, lowest first, each -128..127, and the sums
// of every 16 of them.
template <int D>
inline void put_digits(int8_t *p, int32_t *halves, vf lo, vf hi) {
  vi a = _mm512_cvtps_epi32(lo), b = _mm512_cvtps_epi32(hi);
  for (int d = 0; d < D; d++) {
    const __m256i low = _mm256_castsi128_si256(_mm512_cvtepi32_epi8(a));
    const __m256i bytes = _mm256_inserti128_si256(low, _mm512_cvtepi32_epi8(b), 1);
    _mm256_storeu_si256((__m256i *)(p + 32 * d), bytes);
    __m256i s = _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(1), bytes);
    s = _mm256_add_epi32(s, _mm256_shuffle_epi32(s, 0xb1));
    s = _mm256_add_epi32(s, _mm256_shuffle_epi32(s, 0x4e));
    halves[2 * d] = _mm256_cvtsi256_si32(s);
    halves[2 * d + 1] = _mm_cvtsi128_si32(_mm256_extracti128_si256(s, 1));
    a = _mm512_srai_epi32(_mm512_add_epi32(a, _mm512_set1_epi32(128)), 8);
    b = _mm512_srai_epi32(_mm512_add_epi32(b, _mm512_set1_epi32(128)), 8);
  }
}

// Whole numbers as 4096 h1 + h0, and each h as 16 d1 + d0: the 32 digits d0 of h0, those d1, then the same of h1.
inline void put_halves(int8_t *p, vf lo, vf hi) {
  vi v[2] = {_mm512_cvtps_epi32(lo), _mm512_cvtps_epi32(hi)};
  for (int half = 0; half < 2; half++, p += 64)
    for (int i = 0; i < 2; i++) {
      const vi up = half ? _mm512_setzero_si512() : _mm512_srai_epi32(_mm512_add_epi32(v[i], _mm512_set1_epi32(2048)), 12);
      const vi h = _mm512_sub_epi32(v[i], _mm512_slli_epi32(up, 12));
      const vi nearest = _mm512_srai_epi32(_mm512_add_epi32(h, _mm512_set1_epi32(8)), 4);
      const vi high = _mm512_min_epi32(nearest, _mm512_set1_epi32(127));
      _mm_storeu_si128((__m128i *)(p + 16 * i), _mm512_cvtepi32_epi8(_mm512_sub_epi32(h, _mm512_slli_epi32(high, 4))));
      _mm_storeu_si128((__m128i *)(p + 32 + 16 * i), _mm512_cvtepi32_epi8(high));
      v[i] = up;
    }
}

// Three pieces of 32 numbers in bfloat16, 64 bytes from one to the next, upper first, whose sums are the numbers.
inline void put_pieces(uint16_t *p, vf lo, vf hi) {
  const vi high = _mm512_set1_epi32((int)0xffff0000);
  vf v[2] = {lo, hi};
  for (int piece = 0; piece < 3; piece++, p += 32)
    for (int i = 0; i < 2; i++) {
      const vi bits = _mm512_and_si512(_mm512_castps_si512(v[i]), high);
      _mm256_storeu_si256((__m256i *)(p + 16 * i), _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
      v[i] = sub(v[i], _mm512_castsi512_ps(bits));
    }
}

inline vi zero() { return _mm512_setzero_si512(); }
inline vi set_i(int32_t x) { return _mm512_set1_epi32(x); }
inline vi load_bytes(const void *p) { return _mm512_loadu_si512(p); }
inline vi low_nibbles(vi w) { return _mm512_and_si512(w, _mm512_set1_epi8(15)); }
inline vi high_nibbles(vi w) { return _mm512_and_si512(_mm512_srli_epi16(w, 4), _mm512_set1_epi8(15)); }
inline vf to_float(vi a) { return _mm512_cvtepi32_ps(a); }
inline int32_t four(const int8_t *x) {
  int32_t v;
  memcpy(&v, x, 4);
  return v;
}

// acc[lane] += sum over i < 4 of w[4 lane + i] x[i], for unsigned w (dot_u) and signed w (dot_s).
inline vi dot_u(vi acc, vi w, const int8_t *x) { return _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(four(x))); }
// The instruction wants unsigned weights: they are moved up by 128, and 128 sum(x) is taken off beforehand.
inline vi ready_s(vi w) { return _mm512_xor_si512(w, _mm512_set1_epi8((char)0x80)); }
inline vi dot_s(vi acc, vi ready, const int8_t *x) { return dot_u(acc, ready, x); }
inline vi start_s(int32_t sum_x) { return _mm512_set1_epi32(-128 * sum_x); }

// The nibble `j` (0..7) of every 32-bit lane as a number 0..15.
inline vf nibble_of(vi w, int j) {
  const vf table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_permutexvar_ps(_mm512_srli_epi32(w, (unsigned)(4 * j)), table);
}
// The signed byte `j` (0..3) of every 32-bit lane.
inline vf byte_of(vi w, int j) {
  return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(w, (unsigned)(24 - 8 * j)), 24));
}
within void prefetch(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T0); }
