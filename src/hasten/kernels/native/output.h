// What is read from logits without a softmax over the vocabulary in memory: arg-max, log-sum-exp, the k best.
#pragma once

constexpr float LOWEST = -3.402823466e38f;

// Best logit, its lowest id, and the sum of e^(logit - best) over columns [from, to); a sum that is not finite tells of a
// logit that is not.
inline void slice_of(const float *logits, int64_t from, int64_t to, float *out) {
  vf top = set(LOWEST);
  int64_t i = from;
  for (; i + LANES <= to; i += LANES) top = max(load(logits + i), top);
  float best = largest(top);
  for (; i < to; i++) best = logits[i] > best ? logits[i] : best;
  vf total = set(0.0f), broken = set(0.0f);
  for (i = from; i + LANES <= to; i += LANES) {
    const vf z = load(logits + i);
    total = add(total, exp(sub(z, set(best))));
    broken = add(broken, sub(z, z));  // 0, or NaN where z is infinite or NaN
  }
  float rest = sum(total), bad = sum(broken);
  for (; i < to; i++) {
    rest += __builtin_expf(logits[i] - best);
    bad += logits[i] - logits[i];
  }
  int64_t id = from;
  while (id < to && logits[id] != best) id++;
  out[0] = best;
  out[1] = (float)(id - from);  // below SLICE: exact
  out[2] = rest + bad;
}

// From the slices of one row: arg-max (-1 where a logit is not finite), its log-probability, and log-sum-exp, added up in
// the slices' order.
inline void combine(const float *part, int64_t slices, int32_t *best, float *log_sum_exp, float *best_logprob) {
  float top = LOWEST;
  int64_t id = 0;
  for (int64_t s = 0; s < slices; s++)
    if (part[3 * s] > top) top = part[3 * s], id = s * SLICE + (int64_t)part[3 * s + 1];
  float total = 0.0f;
  for (int64_t s = 0; s < slices; s++) total += part[3 * s + 2] * __builtin_expf(part[3 * s] - top);
  const bool finite = total - total == 0.0f;
  *best = finite ? (int32_t)id : -1;
  *best_logprob = -__builtin_logf(total);
  *log_sum_exp = top - *best_logprob;
}

// The k largest of a row, largest first, lower ids first among equals. Four vectors together are looked at closely only
// where one of their logits exceeds the smallest that is kept.
inline void top_k(const float *logits, int64_t vocab, int k, int32_t *ids, float *values) {
  constexpr int FOUR = 4 * LANES;
  int have = 0;
  for (int64_t from = 0; from < vocab; from += FOUR) {
    const int n = vocab - from < FOUR ? (int)(vocab - from) : FOUR;
    if (have == k && n == FOUR) {
      const float *z = logits + from;
      const vf first = max(load(z), load(z + LANES)), second = max(load(z + 2 * LANES), load(z + 3 * LANES));
      if (!(largest(max(first, second)) > values[k - 1])) continue;
    }
    for (int i = 0; i < n; i++) {
      const float z = logits[from + i];
      if (have == k && !(z > values[k - 1])) continue;
      int at = have < k ? have++ : k - 1;
      for (; at > 0 && z > values[at - 1]; at--) values[at] = values[at - 1], ids[at] = ids[at - 1];
      values[at] = z;
      ids[at] = (int32_t)(from + i);
    }
  }
}

// Reads every byte of this thread's share; the seconds it took.
inline double read_all(const void *data, int64_t bytes, int thread, int threads) {
  const int64_t lines = bytes / 64, from = lines * thread / threads, to = lines * (thread + 1) / threads;
  const uint8_t *p = (const uint8_t *)data;
  const double start = now();
  vf a = set(0.0f), b = a;
  for (int64_t i = from; i + 1 < to; i += 2) {
    prefetch(p + (i + 64) * 64);
    prefetch(p + (i + 65) * 64);
    a = max(a, load((const float *)(p + i * 64)));
    b = max(b, load((const float *)(p + (i + 1) * 64)));
  }
  volatile float kept = sum(max(a, b));
  (void)kept;
  return now() - start;
}
