// What the kernels of one instruction set offer to attention: products and softmax of a tile of queries.
// Symbols: B samples, H heads of D channels, T queries, S keys.
#pragma once

#include <stdint.h>

namespace hif4 {

constexpr int kQueryTile = 12;     // queries; a tile and its products are the first cache's
constexpr int kKeyPanel = 32;      // keys, or channels of values, of one step of a product: two vectors
constexpr int kMaxKeyBlock = 256;  // keys between two updates of a softmax; their K and V are the second cache's
constexpr int kMaxWidth = 256;     // D

// The softmax of a tile so far: the sum over the keys seen of 2^(logit - largest) * value, not yet divided by `sum`.
struct alignas(64) QueryTile {
  uint16_t queries[kQueryTile][kMaxWidth];  // bf16; rows beyond the last query are zeros
  float out[kQueryTile][kMaxWidth];
  float largest[16];  // of the products of query and key
  float sum[16];
};

// What a tile computes between its two products.
struct alignas(64) Probabilities {
  float products[kQueryTile][kMaxKeyBlock];
  uint16_t rounded[kQueryTile][kMaxKeyBlock];  // bf16
};

// A block of keys, in pairs that lie side by side: keys [padded / 32][D / 2][32 keys][2], values [D / 32][padded / 2]
// [32 channels][2], `padded` being the count rounded up to whole panels with zeros.
struct KeyBlock {
  const uint16_t* keys;
  const uint16_t* values;
  int64_t count;
};

struct AttentionKernels {
  // One panel of a block of `padded` keys from `count` rows, each `stride` elements after the one before.
  void (*pack_keys)(const uint16_t* k, int64_t stride, int64_t count, int64_t width, uint16_t* out);
  void (*pack_values)(const uint16_t* v, int64_t stride, int64_t count, int64_t width, int64_t padded, uint16_t* out);
  // `factor` times the product of a query and a key is its logit in base 2.
  void (*attend)(QueryTile& tile, const KeyBlock& block, int64_t width, float factor, bool first,
                 Probabilities& scratch);
  // Divided by the sum and rounded to bf16: `count` rows.
  void (*finish)(const QueryTile& tile, int64_t count, int64_t width, uint16_t* out, int64_t stride);
  // out[i] = 2^x[i] for x[i] <= 0, as `attend` computes it.
  void (*exp2)(const float* x, int64_t count, float* out);
};

#if defined(__x86_64__) && (__clang_major__ >= 10 || (!defined(__clang__) && __GNUC__ >= 10))
#define HIF4_ATTENTION_AVX512 1
extern const AttentionKernels kAttentionAvx512;
#endif

}  // namespace hif4
