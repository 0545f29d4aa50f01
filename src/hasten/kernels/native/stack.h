// A decoder stack in memory: the model's description, the workspace of a pass, and the kernels that run it.
#pragma once
#include "hasten.h"
#include "layout.h"

namespace hasten {

// Workspace of a pass over up to `tokens` queries; all arrays are zeroed when they are made.
struct Workspace {
  int64_t tokens = 0, room = 0, threads = 0;  // queries, keys whose scores fit (whole vectors), threads with such scores
  float *x = nullptr;            // [T, hidden] residual stream
  float *y = nullptr;            // [T, hidden] output of a part that is normed before it is added
  float *qkv = nullptr;          // [T, (heads + 2 kv_heads) head_dim]
  float *scores = nullptr;       // [threads, score_numbers(room)]
  float *part = nullptr;         // [T, slices of the vocabulary, 3] best logit, its id, sum of exponentials
  struct {
    float *f;
    int8_t *q, *halves;  // null where no weights are quants
    uint16_t *pieces;    // null where none are bfloat16
    float *scale, *total;
    int32_t *whole;
    int64_t cols;
  } normed = {}, mixed = {}, inner = {};  // activations of the linear layers: hidden, heads * head_dim, ffn
};

// Scores that a thread keeps: of some heads of one query, and of as many queries as fit a few hundred kB.
constexpr int HEADS_AT_ONCE = 4, QUERIES_AT_ONCE = 8;

inline int queries_at_once(int64_t room) {
  int n = QUERIES_AT_ONCE;
  while (n > 1 && n * HEADS_AT_ONCE * room > (1 << 16)) n /= 2;
  return n;
}
inline int64_t score_numbers(int64_t room) { return queries_at_once(room) * HEADS_AT_ONCE * room; }

struct Stack {
  HastenModel model;
  HastenLayer *layers = nullptr;
  Workspace space;
  int64_t bytes = 0;
};

// One set per instruction set.
struct Kernels {
  const char *name;
  void (*pass)(const Stack &stack, const HastenPass &pass, int thread, int threads);
  void (*linear)(const HastenMatrix &m, const float *x, int tokens, bool int8, float *y, const Workspace &space, int thread,
                 int threads);
  void (*topk)(const float *logits, int64_t vocab, int k, int32_t *ids, float *values);
  double (*read)(const void *data, int64_t bytes, int thread, int threads);
};

const Kernels *kernels_amx();  // not in every build
const Kernels *kernels_avx512();
const Kernels *kernels_avx2();
const Kernels *kernels_portable();

constexpr int SLICE = 4096;  // columns of the vocabulary whose log-sum-exp is added up together, by whichever thread

}  // namespace hasten
