// hif4_attention: argument layout in attention_bindings.py, blocking and threads here, arithmetic in the kernels.
#include "attention.h"

#include <math.h>
#include <string.h>

#include <algorithm>

#include "library.h"

#if HIF4_ATTENTION_AVX512
#include <cpuid.h>
#endif

namespace {

using namespace hif4;

constexpr int64_t kTilesOfTask = 8;        // of queries, for which a block of keys is fetched once
constexpr int64_t kPackedBytes = 8 << 20;  // packed keys and values of the heads worked on, one (4 S D bytes) at least
constexpr int64_t kOneThread = 1 << 21;    // multiplications that are not worth waking a thread for

#if HIF4_ATTENTION_AVX512
bool has_avx512_bf16() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16");
}

bool has_amx_bf16() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
}
#endif

// The kernels of a set; null for one that has none or that this processor cannot run. The best are none where there is
// AMX: it multiplies bf16 many times as fast as these, and torch uses it.
const AttentionKernels* kernels_of(int set) {
#if HIF4_ATTENTION_AVX512
  static const bool bf16 = has_avx512_bf16(), amx = has_amx_bf16();
  if (bf16 && usable_set(set) >= 2 && (set >= 0 || !amx)) return &kAttentionAvx512;
#endif
  return nullptr;
}

// A tensor [B, H, rows, D] whose last dimension is contiguous; strides in elements.
struct Rows {
  const uint16_t* data;
  int64_t batch, head, row;

  const uint16_t* at(int64_t b, int64_t h, int64_t i) const { return data + b * batch + h * head + i * row; }
};

struct Shape {
  int64_t batch, heads, queries, keys, width;
};

struct Worker {
  QueryTile tiles[kTilesOfTask];
  Probabilities scratch;
};

int attention(const AttentionKernels& kernels, const Rows& q, const Rows& k, const Rows& v, uint16_t* out,
              const Shape& shape, Team team) {
  const int64_t width = shape.width, all = shape.batch * shape.heads;
  if (all * shape.queries * shape.keys * width < kOneThread) team.threads = 1;
  // Blocks of about equal size. Their order is that of a query's sums: the number of threads changes no bit.
  const int64_t block = ceil_div(ceil_div(shape.keys, ceil_div(shape.keys, kMaxKeyBlock)), kKeyPanel) * kKeyPanel;
  const int64_t blocks = ceil_div(shape.keys, block);
  const int64_t packed = ceil_div(shape.keys, kKeyPanel) * kKeyPanel * width;  // elements of a head's keys
  const int64_t group = std::max<int64_t>(1, std::min(all, kPackedBytes / (packed * 4)));
  const int64_t tiles = ceil_div(shape.queries, kQueryTile);
  int64_t share = kTilesOfTask;  // tiles of a task; fewer where there would be less than four tasks a thread
  while (share > 1 && group * ceil_div(tiles, share) < 4 * team.threads) share /= 2;
  const int64_t tasks = ceil_div(tiles, share);

  Scratch<uint16_t> keys(group * packed), values(group * packed);
  Scratch<Worker> workers(team.threads);
  if (!keys.ok() || !values.ok() || !workers.ok()) return kNoMemory;
  // Of exp(product / sqrt(D)) as a power of two.
  const float factor = static_cast<float>(1.4426950408889634 / sqrt(static_cast<double>(width)));

  for (int64_t first = 0; first < all; first += group) {
    const int64_t some = std::min(group, all - first);
    run(team, some * blocks, [&](int64_t task, int) {
      const int64_t local = task / blocks, start = task % blocks * block, head = first + local;
      const int64_t count = std::min(block, shape.keys - start), padded = ceil_div(count, kKeyPanel) * kKeyPanel;
      uint16_t* block_keys = keys.get() + local * packed + start * width;
      uint16_t* block_values = values.get() + local * packed + start * width;
      for (int64_t key = 0; key < count; key += kKeyPanel) {
        const int64_t b = head / shape.heads, h = head % shape.heads;
        kernels.pack_keys(k.at(b, h, start + key), k.row, count - key, width, block_keys + key * width);
        kernels.pack_values(v.at(b, h, start + key), v.row, count - key, width, padded,
                            block_values + key * kKeyPanel);
      }
    });
    run(team, some * tasks, [&](int64_t task, int id) {
      Worker& worker = workers.get()[id];
      const int64_t local = task / tasks, head = first + local, b = head / shape.heads, h = head % shape.heads;
      const int64_t begin = task % tasks * share * kQueryTile;
      const int64_t end = std::min(begin + share * kQueryTile, shape.queries);
      for (int64_t i = begin; i < ceil_div(end, kQueryTile) * kQueryTile; i++) {
        uint16_t* row = worker.tiles[(i - begin) / kQueryTile].queries[(i - begin) % kQueryTile];
        if (i < end)
          memcpy(row, q.at(b, h, i), width * sizeof(uint16_t));
        else
          memset(row, 0, width * sizeof(uint16_t));
      }
      for (int64_t start = 0; start < shape.keys; start += block) {
        const int64_t at = local * packed + start * width;
        const KeyBlock keys_here = {keys.get() + at, values.get() + at, std::min(block, shape.keys - start)};
        for (int64_t i = begin; i < end; i += kQueryTile)
          kernels.attend(worker.tiles[(i - begin) / kQueryTile], keys_here, width, factor, start == 0, worker.scratch);
      }
      for (int64_t i = begin; i < end; i += kQueryTile)
        kernels.finish(worker.tiles[(i - begin) / kQueryTile], std::min<int64_t>(kQueryTile, end - i), width,
                       out + ((b * shape.queries + i) * shape.heads + h) * width, shape.heads * width);
    });
  }
  return kDone;
}

}  // namespace

// Whether hif4_attention can run with the instruction set, -1 for the best, on this processor.
HIF4_EXPORT int hif4_has_attention(int set) { return kernels_of(set) != nullptr; }

// out [B, T, H, D], contiguous, from q [B, H, T, D] and k and v [B, H, S, D] with their strides over all but D, in
// elements; bf16; S and T at least 1, D a multiple of 32 and at most 256.
HIF4_EXPORT int hif4_attention(const uint16_t* q, const uint16_t* k, const uint16_t* v, uint16_t* out,
                               const int64_t* q_strides, const int64_t* k_strides, const int64_t* v_strides,
                               int64_t batch, int64_t heads, int64_t queries, int64_t keys, int64_t width, int threads,
                               void* parallel, int set) {
  const AttentionKernels* kernels = kernels_of(set);
  if (!kernels) return kNoSuchSet;
  const Team team = {std::max(1, threads), reinterpret_cast<Parallel>(parallel)};
  const auto rows = [](const uint16_t* data, const int64_t* strides) {
    return Rows{data, strides[0], strides[1], strides[2]};
  };
  return attention(*kernels, rows(q, q_strides), rows(k, k_strides), rows(v, v_strides), out,
                   {batch, heads, queries, keys, width}, team);
}

// out[i] = 2^x[i] for x[i] <= 0, as attention computes its probabilities.
HIF4_EXPORT int hif4_attention_exp2(const float* x, int64_t count, float* out, int set) {
  const AttentionKernels* kernels = kernels_of(set);
  if (!kernels) return kNoSuchSet;
  kernels->exp2(x, count, out);
  return kDone;
}
