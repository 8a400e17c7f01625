// Which instruction sets this processor has.
#include "library.h"

// What a function needs beyond the first processor of the architecture is on the function, and asked for before a call.
#if defined(__x86_64__) && defined(__SSE3__)
#error "build without -m options: the library must run on every x86-64 processor"
#endif

namespace hif4 {
namespace {

int best_set() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    const bool vnni = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("bmi") &&
                      __builtin_cpu_supports("bmi2");
    if (!vnni) return 1;
    return __builtin_cpu_supports("avx512vbmi") ? 3 : 2;
  }
#endif
  return 0;
}

}  // namespace

int usable_set(int set) {
  static const int best = best_set();
  if (set < 0) return best;
  return set <= best ? set : -1;
}

}  // namespace hif4

// The best instruction set of this processor: 0 portable, 1 AVX2, 2 AVX-512 with VNNI, 3 with VBMI as well.
HIF4_EXPORT int hif4_instruction_set() {
  return hif4::usable_set(-1);
}
