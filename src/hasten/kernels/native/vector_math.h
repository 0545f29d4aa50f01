// Functions of sixteen lanes that both attention and the feed-forward part use.
#pragma once

// e^x to about 1e-7 relative, 0 below -87: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2].
inline vf exp(vf x) {
  x = max(x, set(-87.0f));
  const vf n = round(mul(x, set(1.44269504f)));
  vf r = fma(n, set(-0.693359375f), x);
  r = fma(n, set(2.12194440e-4f), r);  // ln 2 in two parts, so that x - n ln 2 keeps its digits
  vf p = set(1.0f / 720);
  const float c[] = {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
#pragma GCC unroll 6
  for (int i = 0; i < 6; i++) p = fma(p, r, set(c[i]));
  return scale2(p, n);
}

inline vf least(vf a, vf b) { return sub(set(0.0f), max(sub(set(0.0f), a), sub(set(0.0f), b))); }

inline vf tanh(vf x) {  // 1 - 2 / (1 + e^2x)
  const vf e = exp(least(mul(x, set(2.0f)), set(80.0f)));
  return sub(set(1.0f), div(set(2.0f), add(set(1.0f), e)));
}

inline vf silu(vf x) { return div(x, add(set(1.0f), exp(least(sub(set(0.0f), x), set(80.0f))))); }

inline vf gelu(vf x) {  // the tanh form
  const vf cube = mul(mul(x, x), x), inner = mul(set(0.7978845608f), fma(set(0.044715f), cube, x));
  return mul(mul(set(0.5f), x), add(set(1.0f), tanh(inner)));
}

// Sum of products of two arrays of n floats.
inline float dot(const float *a, const float *b, int n) {
  vf s = set(0.0f);
  int i = 0;
  for (; i + LANES <= n; i += LANES) s = fma(load(a + i), load(b + i), s);
  if (i < n) s = fma(load_n(a + i, n - i), load_n(b + i, n - i), s);
  return sum(s);
}

// y = x / rms(x) * weight over n numbers; y may be x.
inline void rms_norm(const float *x, const float *weight, float eps, int n, float *y) {
  const vf scale = set(1.0f / __builtin_sqrtf(dot(x, x, n) / (float)n + eps));
  int i = 0;
  for (; i + LANES <= n; i += LANES) store(y + i, mul(mul(load(x + i), scale), load(weight + i)));
  if (i < n) store_n(y + i, mul(mul(load_n(x + i, n - i), scale), load_n(weight + i, n - i)), n - i);
}

// x[0..rotated) turned in place: the pair (i, i + rotated / 2) by the angle of (cos[i], sin[i]).
inline void rotate(float *x, const float *cos, const float *sin, int rotated) {
  const int half = rotated / 2;
  int i = 0;
  for (; i + LANES <= half; i += LANES) {
    const vf a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
    store(x + i, sub(mul(a, c), mul(b, s)));
    store(x + half + i, add(mul(b, c), mul(a, s)));
  }
  for (; i < half; i++) {
    const float a = x[i], b = x[half + i];
    x[i] = a * cos[i] - b * sin[i];
    x[half + i] = b * cos[i] + a * sin[i];
  }
}
