// Compiled once per instruction set: HASTEN_ISA names it, the compiler's flags allow it. Nothing of the standard library
// that could be inlined may be used here, or a function compiled for one set could end up being called from another.
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(HASTEN_AVX512) || defined(HASTEN_AVX2)
#include <immintrin.h>
#endif

#include "hasten.h"
#include "layout.h"
#include "pack.h"
#include "stack.h"
#include "threads.h"

namespace hasten {
namespace HASTEN_ISA {

#if defined(HASTEN_AVX512)
#include "simd_avx512.h"
#elif defined(HASTEN_AVX2)
#include "simd_avx2.h"
#else
#include "simd_portable.h"
#endif

#include "linear.h"
#include "vector_math.h"

#include "attention.h"
#include "output.h"
#include "pass.h"

}  // namespace HASTEN_ISA

#define NAME_OF(isa) #isa
#define NAME(isa) NAME_OF(isa)
#define TABLE_OF(isa) kernels_##isa
#define TABLE(isa) TABLE_OF(isa)

const Kernels *TABLE(HASTEN_ISA)() {
  using namespace HASTEN_ISA;
  static const Kernels table = {NAME(HASTEN_ISA), run_pass, run_linear, top_k, read_all};
  return &table;
}

}  // namespace hasten
