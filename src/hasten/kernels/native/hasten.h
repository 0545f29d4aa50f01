// The C interface of hasten's native stack: what Python sees through ctypes, and nothing else.
//
// Memory belongs to the caller: packed weights, caches and outputs are read or written in place and must outlive the call
// (weights: the model). Every function that can fail returns 0, or a negative code with a message in `hasten_error()`.
// All shapes, indices and sizes are checked here before any kernel runs; kernels themselves check nothing.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

#define HASTEN_ABI 3

// Stored types that can be repacked (`hasten_pack`); block formats are those of GGUF.
enum { HASTEN_F32, HASTEN_F16, HASTEN_BF16, HASTEN_Q4_0, HASTEN_Q4_1, HASTEN_Q5_0, HASTEN_Q8_0, HASTEN_Q4_K, HASTEN_Q6_K };

// Element types of a key/value cache. INT8: head_dim values, then their float32 scale, per slot and head.
enum { HASTEN_KV_F32, HASTEN_KV_BF16, HASTEN_KV_INT8 };

// Activations of linear layers. EXACT: float32, or whole numbers of as many digits (linear.h). INT8: 8 bits with one scale
// per 32 (quantised weights only).
enum { HASTEN_EXACT, HASTEN_INT8 };

typedef struct {  // one matrix [rows, cols] in a packed layout (layout.h)
  int32_t layout, rows, cols;
  const void *data;
  int64_t bytes;
} HastenMatrix;

typedef struct {  // one decoder layer; absent vectors are null
  HastenMatrix q, k, v, out, gate, up, down;
  const float *attn_norm, *ffn_norm, *q_norm, *k_norm, *post_attn_norm, *post_ffn_norm;
  const float *qkv_bias, *out_bias, *gate_up_bias, *down_bias;
  int32_t rope;  // index of a rotary table, -1: none
} HastenLayer;

typedef struct {  // a decoder stack; numbers as in models/config.py
  int32_t vocab, hidden, heads, kv_heads, head_dim, ffn, layers, gelu, kv_type, activations;
  float norm_eps, embed_scale, attn_scale, attn_softcap, logit_softcap;  // soft-caps: 0 = none
  const HastenLayer *layer;
  HastenMatrix embed, head;
  const float *norm;
  int32_t ropes, rope_rows;                   // rotary tables, positions in each
  const int32_t *rotated;                     // [ropes] rotated dimensions of a head
  const float *const *rope_cos, *const *rope_sin;  // [ropes] tables [rope_rows, rotated / 2]
} HastenModel;

typedef struct {  // which slots one query sees: lo..hi-1, then `extra_count` entries of `extras` from `extra_at` on
  int32_t lo, hi, extra_at, extra_count;
} HastenSight;

typedef struct {  // one pass over R rows with N queries in all
  int32_t rows, queries, kinds, extra_total, wanted_total, taps;
  const int32_t *tokens;        // [N]
  const float *embeds;          // [N, hidden] instead of tokens, or null
  const int32_t *positions;     // [N] for the rotary embedding
  const int32_t *row_of, *slots;  // [N] row of a query, and the cache slot its key goes to
  void *const *slabs;           // [R] caches [layers, 2, kv_heads, capacity, head_dim (+ 4)]
  const int32_t *capacity;      // [R] slots
  const int32_t *kind_of_layer;  // [layers] which of the `kinds` rules of sight holds there
  const HastenSight *sight;     // [kinds, N]
  const int32_t *extras;        // [extra_total]
  const int32_t *wanted;        // [wanted_total] queries whose logits are computed
  float *logits;                // [wanted_total, vocab]
  int32_t *best;                // [wanted_total] arg-max, the lowest id among equals; -1 where a logit is not finite
  float *log_sum_exp;           // [wanted_total]
  float *best_logprob;          // [wanted_total] log-probability of the arg-max
  const int32_t *tap_layers;    // [taps] layers whose input is copied out; `layers` = after the last
  float *const *tap_out;        // [taps] each [N, hidden]
  float *final_hidden;          // [N, hidden] after the final norm, or null
  double *part_seconds;         // [HASTEN_PARTS] time of each part is added here, or null
} HastenPass;

enum { HASTEN_PART_NORM, HASTEN_PART_QKV, HASTEN_PART_ATTENTION, HASTEN_PART_OUT, HASTEN_PART_FFN, HASTEN_PART_DOWN,
       HASTEN_PART_HEAD, HASTEN_PARTS };

int32_t hasten_abi(void);
int64_t hasten_sizeof(int32_t which);  // 0 matrix, 1 layer, 2 model, 3 sight, 4 pass: checked against ctypes at load
const char *hasten_error(void);        // message of the last failure on this thread

const char *hasten_isa(void);               // instruction set in use: "avx512", "avx2" or "portable"
int32_t hasten_set_isa(const char *name);   // "auto" or one of them; fails where the processor lacks it
int32_t hasten_set_threads(int32_t count);  // 1..256, the caller's included
int32_t hasten_threads(void);

int32_t hasten_layout_of(int32_t source);  // the layout a stored type is packed into
int64_t hasten_packed_bytes(int32_t layout, int64_t rows, int64_t cols);
// Repack `rows` stored rows; output row i is stored row order[i] (null: i).
int32_t hasten_pack(int32_t source, const void *from, int64_t bytes, int64_t rows, int64_t cols, const int32_t *order,
                    void *to, int64_t to_bytes);
int32_t hasten_unpack_rows(const HastenMatrix *m, const int32_t *ids, int64_t count, float *out);  // [count, cols]

// y [T, rows] = x [T, cols] W^T
int32_t hasten_linear(const HastenMatrix *m, const float *x, int32_t tokens, int32_t activations, float *y);
int32_t hasten_topk(const float *logits, int64_t rows, int64_t vocab, int32_t k, int32_t *ids, float *values);
double hasten_read_bytes(const void *data, int64_t bytes, int32_t times);  // best seconds to read them all, once

typedef struct HastenStack HastenStack;
HastenStack *hasten_open(const HastenModel *model);  // copies the description, not the weights; null on failure
int32_t hasten_run(HastenStack *stack, const HastenPass *pass);
int64_t hasten_workspace_bytes(const HastenStack *stack);
void hasten_close(HastenStack *stack);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
