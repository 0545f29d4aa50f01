// The C interface: everything that crosses it is checked here, before a kernel sees it.
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(HASTEN_HAS_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <mutex>

#include "hasten.h"
#include "pack.h"
#include "stack.h"
#include "threads.h"

using namespace hasten;

struct HastenStack {
  Stack stack;
  std::mutex lock;
};

namespace {

thread_local char message[256] = "";

int fail(const char *format, ...) {
  va_list args;
  va_start(args, format);
  vsnprintf(message, sizeof message, format, args);
  va_end(args);
  return -1;
}

#if defined(HASTEN_HAS_AMX)
// AMX with products of bytes and of bfloat16: the processor has it, and the system lets this process use its large state.
bool has_amx() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const unsigned all = 1u << 22 | 1u << 24 | 1u << 25;  // bfloat16, tiles, bytes
  if ((d & all) != all) return false;
  constexpr int ASK = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, ASK, TILE_DATA) == 0;
}
#endif

const Kernels *offered(const char *name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni");
  (void)avx512;
#if defined(HASTEN_HAS_AMX)
  static const bool amx = avx512 && has_amx();
#endif
#endif
  const bool any = !strcmp(name, "auto");
#if defined(HASTEN_HAS_AMX)
  if (amx && (any || !strcmp(name, "amx"))) return kernels_amx();
#endif
#if defined(HASTEN_HAS_AVX512)
  if (avx512 && (any || !strcmp(name, "avx512"))) return kernels_avx512();
#endif
#if defined(HASTEN_HAS_AVX2)
  if (avx2 && (any || !strcmp(name, "avx2"))) return kernels_avx2();
#endif
  if (any || !strcmp(name, "portable")) return kernels_portable();
  return nullptr;
}

std::atomic<const Kernels *> chosen{nullptr};

const Kernels &kernels() {
  const Kernels *k = chosen.load();
  if (!k) chosen.store(k = offered("auto"));
  return *k;
}

int check_matrix(const char *name, const HastenMatrix &m, int64_t rows, int64_t cols) {
  if (!m.data) return fail("%s: no data", name);
  if (m.layout < 0 || m.layout >= LAYOUTS) return fail("%s: layout %d is unknown", name, m.layout);
  if (m.rows != rows || m.cols != cols)
    return fail("%s: %d x %d, not %lld x %lld", name, m.rows, m.cols, (long long)rows, (long long)cols);
  const int step = column_step(m.layout);
  if (m.cols % step) return fail("%s: %d columns, not a multiple of %d", name, m.cols, step);
  const int64_t need = groups_of(rows) * group_bytes(m.layout, cols);
  if (m.bytes < need) return fail("%s: %lld bytes, %lld needed", name, (long long)m.bytes, (long long)need);
  return 0;
}

int check_range(const char *name, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high)
    return fail("%s is %lld, not in %lld..%lld", name, (long long)value, (long long)low, (long long)high);
  return 0;
}

// --- workspace ---

template <class T>
int grow(T *&p, int64_t count, int64_t &bytes) {
  free(p);
  const size_t size = (size_t)((count * (int64_t)sizeof(T) + 127) / 64 * 64);
  p = (T *)aligned_alloc(64, size);
  if (!p) return fail("no memory for a workspace of %lld bytes", (long long)size);
  memset(p, 0, size);
  bytes += (int64_t)size;
  return 0;
}

// The forms of activations that products with a matrix want.
enum Form : unsigned { FLOATS = 0, PIECES_OF_FLOATS = 1, BYTES = 2 };
unsigned form(const HastenMatrix &m) {
  return quantised(m.layout) ? BYTES : m.layout == L_BF16 ? PIECES_OF_FLOATS : FLOATS;
}

template <class A>
int grow_acts(A &a, int64_t tokens, int64_t cols, unsigned forms, int64_t &bytes) {
  a.cols = (cols + TILE - 1) / TILE * TILE;
  tokens = tokens / 16 * 16 + 32;  // whole blocks, and one more: products of a whole block look behind the last token
  const int64_t tiles = tokens * (a.cols / TILE);
  if (grow(a.f, tokens * a.cols, bytes)) return -1;
  if (forms & PIECES_OF_FLOATS && grow(a.pieces, 3 * tokens * a.cols, bytes)) return -1;
  return forms & BYTES && (grow(a.q, 3 * tokens * a.cols, bytes) || grow(a.halves, 4 * tokens * a.cols, bytes) ||
                           grow(a.scale, tiles, bytes) || grow(a.total, tiles, bytes) ||
                           grow(a.whole, 6 * tiles, bytes));  // up to three digits
}

template <class A>
void drop_acts(A &a) {
  free(a.f), free(a.q), free(a.halves), free(a.pieces), free(a.scale), free(a.total), free(a.whole);
}

int reserve(Stack &s, int64_t tokens, int64_t keys) {
  const HastenModel &m = s.model;
  Workspace &w = s.space;
  const int64_t room = (keys + LANES - 1) / LANES * LANES, threads = thread_count();
  if (tokens > w.tokens) {
    const int64_t want = tokens < 16 ? 16 : tokens, slices = (m.vocab + SLICE - 1) / SLICE;
    unsigned normed = form(m.head), mixed = 0, inner = 0;
    for (int i = 0; i < m.layers; i++) {
      const HastenLayer &l = m.layer[i];
      for (const HastenMatrix *one : {&l.q, &l.k, &l.v, &l.gate, &l.up}) normed |= form(*one);
      mixed |= form(l.out), inner |= form(l.down);
    }
    s.bytes = 0;
    w.tokens = 0;
    if (grow(w.x, want * m.hidden, s.bytes) || grow(w.y, want * m.hidden, s.bytes) ||
        grow(w.qkv, want * (m.heads + 2 * m.kv_heads) * m.head_dim, s.bytes) || grow(w.part, want * slices * 3, s.bytes) ||
        grow_acts(w.normed, want, m.hidden, normed, s.bytes) ||
        grow_acts(w.mixed, want, m.heads * m.head_dim, mixed, s.bytes) || grow_acts(w.inner, want, m.ffn, inner, s.bytes))
      return -1;
    w.tokens = want;
  }
  if (room > w.room || threads > w.threads) {
    const int64_t more = room + room / 4 / LANES * LANES, want = more > w.room ? more : w.room;
    int64_t bytes = 0;
    w.room = 0;
    if (grow(w.scores, threads * score_numbers(want), bytes)) return -1;
    w.room = want;
    w.threads = threads;
  }
  return 0;
}

// --- checks of a model and of a pass ---

int check_layer(const HastenModel &m, const HastenLayer &l) {
  const int64_t q = (int64_t)m.heads * m.head_dim, kv = (int64_t)m.kv_heads * m.head_dim;
  if (check_matrix("q", l.q, q, m.hidden) || check_matrix("k", l.k, kv, m.hidden) || check_matrix("v", l.v, kv, m.hidden) ||
      check_matrix("out", l.out, m.hidden, q) || check_matrix("gate", l.gate, m.ffn, m.hidden) ||
      check_matrix("up", l.up, m.ffn, m.hidden) || check_matrix("down", l.down, m.hidden, m.ffn))
    return -1;
  if (!l.attn_norm || !l.ffn_norm) return fail("a layer lacks a norm");
  if (!l.q_norm != !l.k_norm) return fail("a layer has one of q_norm and k_norm");
  return check_range("rope", l.rope, -1, m.ropes - 1);
}

int check_model(const HastenModel &m) {
  const int64_t most = 1 << 24;
  if (check_range("vocab", m.vocab, 1, most) || check_range("hidden", m.hidden, 1, most) ||
      check_range("heads", m.heads, 1, 4096) || check_range("kv_heads", m.kv_heads, 1, m.heads) ||
      check_range("head_dim", m.head_dim, 2, 4096) || check_range("ffn", m.ffn, 1, most) ||
      check_range("layers", m.layers, 1, 1024) || check_range("kv_type", m.kv_type, HASTEN_KV_F32, HASTEN_KV_INT8) ||
      check_range("activations", m.activations, HASTEN_EXACT, HASTEN_INT8) || check_range("ropes", m.ropes, 0, 64) ||
      check_range("rope_rows", m.rope_rows, 0, 1 << 26))
    return -1;
  if (m.heads % m.kv_heads) return fail("heads = %d is no multiple of kv_heads = %d", m.heads, m.kv_heads);
  if (!m.layer || !m.norm) return fail("the model lacks layers or the final norm");
  for (int i = 0; i < m.ropes; i++)
    if (check_range("rotated", m.rotated[i], 0, m.head_dim) || m.rotated[i] % 2)
      return fail("rotated[%d] = %d", i, m.rotated[i]);
  for (int i = 0; i < m.layers; i++)
    if (check_layer(m, m.layer[i])) return -1;
  return check_matrix("embed", m.embed, m.vocab, m.hidden) || check_matrix("head", m.head, m.vocab, m.hidden) ? -1 : 0;
}

int check_pass(const HastenModel &m, const HastenPass &p, int64_t *keys) {
  if (check_range("rows", p.rows, 1, 1 << 20) || check_range("queries", p.queries, 1, 1 << 24) ||
      check_range("kinds", p.kinds, 1, 1024) || check_range("wanted_total", p.wanted_total, 0, 1 << 24) ||
      check_range("taps", p.taps, 0, 1025))
    return -1;
  for (int r = 0; r < p.rows; r++)
    if (!p.slabs[r] || check_range("capacity", p.capacity[r], 1, 1 << 28)) return fail("row %d has no cache", r);
  for (int i = 0; i < p.queries; i++) {
    if (check_range("row_of", p.row_of[i], 0, p.rows - 1) ||
        check_range("slots", p.slots[i], 0, p.capacity[p.row_of[i]] - 1) ||
        (!p.embeds && check_range("tokens", p.tokens[i], 0, m.vocab - 1)) ||
        (m.ropes && check_range("positions", p.positions[i], 0, m.rope_rows - 1)))
      return -1;
  }
  for (int l = 0; l < m.layers; l++)
    if (check_range("kind_of_layer", p.kind_of_layer[l], 0, p.kinds - 1)) return -1;
  for (int64_t i = 0; i < (int64_t)p.kinds * p.queries; i++) {
    const HastenSight &s = p.sight[i];
    const int64_t capacity = p.capacity[p.row_of[i % p.queries]];
    if (s.lo < 0 || s.hi < s.lo || s.hi > capacity)
      return fail("a query sees slots %d..%d of %lld", s.lo, s.hi, (long long)capacity);
    if (s.extra_at < 0 || s.extra_count < 0 || (int64_t)s.extra_at + s.extra_count > p.extra_total)
      return fail("a query's single slots %d..+%d exceed %d", s.extra_at, s.extra_count, p.extra_total);
    for (int j = 0; j < s.extra_count; j++)
      if (check_range("extras", p.extras[s.extra_at + j], 0, capacity - 1)) return -1;
    const int64_t count = (int64_t)s.hi - s.lo + s.extra_count;
    if (count > *keys) *keys = count;
  }
  for (int i = 0; i < p.wanted_total; i++)
    if (check_range("wanted", p.wanted[i], 0, p.queries - 1)) return -1;
  if (p.wanted_total && (!p.logits || !p.best || !p.log_sum_exp || !p.best_logprob))
    return fail("logits are wanted and have no place");
  for (int i = 0; i < p.taps; i++)
    if (check_range("tap_layers", p.tap_layers[i], 0, m.layers) || !p.tap_out[i]) return fail("tap %d has no place", i);
  return 0;
}

}  // namespace

extern "C" {

int32_t hasten_abi(void) { return HASTEN_ABI; }

int64_t hasten_sizeof(int32_t which) {
  const int64_t sizes[] = {sizeof(HastenMatrix), sizeof(HastenLayer), sizeof(HastenModel), sizeof(HastenSight),
                           sizeof(HastenPass)};
  return which >= 0 && which < 5 ? sizes[which] : -1;
}

const char *hasten_error(void) { return message; }
const char *hasten_isa(void) { return kernels().name; }

int32_t hasten_set_isa(const char *name) {
  const Kernels *k = name ? offered(name) : nullptr;
  if (!k) return fail("instruction set %.40s is not to be had here", name ? name : "(none)");
  chosen.store(k);
  return 0;
}

int32_t hasten_set_threads(int32_t count) {
  if (check_range("threads", count, 1, 256)) return -1;
  set_threads(count);
  return 0;
}

int32_t hasten_threads(void) { return thread_count(); }

int32_t hasten_layout_of(int32_t source) { return layout_of(source); }

int64_t hasten_packed_bytes(int32_t layout, int64_t rows, int64_t cols) {
  if (layout < 0 || layout >= LAYOUTS) return fail("layout %d is unknown", layout);
  if (check_range("rows", rows, 1, 1 << 24) || check_range("cols", cols, 1, 1 << 24)) return -1;
  if (cols % column_step(layout)) return fail("%lld columns, not a multiple of %d", (long long)cols, column_step(layout));
  return groups_of(rows) * group_bytes(layout, cols);
}

int32_t hasten_pack(int32_t source, const void *from, int64_t bytes, int64_t rows, int64_t cols, const int32_t *order,
                    void *to, int64_t to_bytes) {
  const int layout = layout_of(source);
  if (layout < 0) return fail("stored type %d is unknown", source);
  const int64_t need = hasten_packed_bytes(layout, rows, cols);
  if (need < 0) return -1;
  if (cols % stored_columns(source))
    return fail("%lld columns, not a multiple of %d", (long long)cols, stored_columns(source));
  const int64_t stored = stored_row_bytes(source, cols);
  if (!from || !to || bytes < 0 || bytes % stored) return fail("%lld bytes are no whole rows", (long long)bytes);
  for (int64_t i = 0; order && i < rows; i++)
    if (check_range("order", order[i], 0, bytes / stored - 1)) return -1;
  if (!order && bytes / stored < rows)
    return fail("%lld stored rows, %lld wanted", (long long)(bytes / stored), (long long)rows);
  if (to_bytes < need) return fail("%lld bytes of room, %lld needed", (long long)to_bytes, (long long)need);
  struct Job {
    int32_t source;
    const uint8_t *from;
    int64_t rows, cols;
    const int32_t *order;
    uint8_t *to;
  } job = {source, (const uint8_t *)from, rows, cols, order, (uint8_t *)to};
  run_on_all(
      [](void *context, int thread, int threads) {
        const Job &j = *(const Job *)context;
        const int64_t groups = groups_of(j.rows), first = groups * thread / threads, last = groups * (thread + 1) / threads;
        pack_groups(j.source, j.from, j.rows, j.cols, j.order, j.to, first, last);
      },
      &job);
  return 0;
}

int32_t hasten_unpack_rows(const HastenMatrix *m, const int32_t *ids, int64_t count, float *out) {
  if (!m || check_matrix("matrix", *m, m->rows, m->cols)) return -1;
  for (int64_t i = 0; i < count; i++)
    if (check_range("ids", ids[i], 0, m->rows - 1)) return -1;
  for (int64_t i = 0; i < count; i++) unpack_row(*m, ids[i], out + i * m->cols);
  return 0;
}

int32_t hasten_linear(const HastenMatrix *m, const float *x, int32_t tokens, int32_t activations, float *y) {
  if (!m || check_matrix("matrix", *m, m->rows, m->cols) || check_range("tokens", tokens, 0, 1 << 20) ||
      check_range("activations", activations, HASTEN_EXACT, HASTEN_INT8))
    return -1;
  if (!tokens) return 0;
  if (!x || !y) return fail("x or y is null");
  struct Job {
    const HastenMatrix *m;
    const float *x;
    int32_t tokens, activations;
    float *y;
    Workspace space;
  } job = {m, x, tokens, activations, y, {}};
  int64_t bytes = 0;
  const int failed = grow_acts(job.space.normed, tokens, m->cols, form(*m), bytes);
  if (!failed)
    run_on_all(
        [](void *context, int thread, int threads) {
          const Job &j = *(const Job *)context;
          kernels().linear(*j.m, j.x, j.tokens, j.activations == HASTEN_INT8, j.y, j.space, thread, threads);
        },
        &job);
  drop_acts(job.space.normed);
  return failed ? -1 : 0;
}

int32_t hasten_topk(const float *logits, int64_t rows, int64_t vocab, int32_t k, int32_t *ids, float *values) {
  if (check_range("rows", rows, 0, 1 << 24) || check_range("vocab", vocab, 1, 1 << 24) || check_range("k", k, 1, vocab))
    return -1;
  struct Job {
    const float *logits;
    int64_t rows, vocab;
    int32_t k, *ids;
    float *values;
  } job = {logits, rows, vocab, k, ids, values};
  run_on_all(
      [](void *context, int thread, int threads) {
        const Job &j = *(const Job *)context;
        for (int64_t r = thread; r < j.rows; r += threads)
          kernels().topk(j.logits + r * j.vocab, j.vocab, j.k, j.ids + r * j.k, j.values + r * j.k);
      },
      &job);
  return 0;
}

double hasten_read_bytes(const void *data, int64_t bytes, int32_t times) {
  if (!data || bytes < 64 || times < 1) return -1.0;
  struct Job {
    const void *data;
    int64_t bytes;
  } job = {data, bytes};
  double best = 1e30;
  for (int i = 0; i < times; i++) {
    const double start = now();
    run_on_all(
        [](void *context, int thread, int threads) {
          const Job &j = *(const Job *)context;
          kernels().read(j.data, j.bytes, thread, threads);
        },
        &job);
    const double took = now() - start;
    if (took < best) best = took;
  }
  return best;
}

HastenStack *hasten_open(const HastenModel *model) {
  if (!model || check_model(*model)) return nullptr;
  HastenStack *s = new HastenStack;
  s->stack.model = *model;
  s->stack.layers = (HastenLayer *)malloc(sizeof(HastenLayer) * (size_t)model->layers);
  memcpy(s->stack.layers, model->layer, sizeof(HastenLayer) * (size_t)model->layers);
  s->stack.model.layer = s->stack.layers;
  return s;
}

int32_t hasten_run(HastenStack *stack, const HastenPass *pass) {
  if (!stack || !pass) return fail("no stack or no pass");
  std::lock_guard<std::mutex> guard(stack->lock);
  Stack &s = stack->stack;
  int64_t keys = 1;
  if (check_pass(s.model, *pass, &keys)) return -1;
  if (reserve(s, pass->queries > pass->wanted_total ? pass->queries : pass->wanted_total, keys)) return -1;
  struct Job {
    const Stack *stack;
    const HastenPass *pass;
    const Kernels *kernels;
  } job = {&s, pass, &kernels()};
  run_on_all(
      [](void *context, int thread, int threads) {
        const Job &j = *(const Job *)context;
        j.kernels->pass(*j.stack, *j.pass, thread, threads);
      },
      &job);
  return 0;
}

int64_t hasten_workspace_bytes(const HastenStack *stack) { return stack ? stack->stack.bytes : 0; }

void hasten_close(HastenStack *stack) {
  if (!stack) return;
  Workspace &w = stack->stack.space;
  free(w.x), free(w.y), free(w.qkv), free(w.scores), free(w.part);
  drop_acts(w.normed), drop_acts(w.mixed), drop_acts(w.inner);
  free(stack->stack.layers);
  delete stack;
}

}  // extern "C"
