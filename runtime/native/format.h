// The HiFloat4 format in plain C++ that every instruction set can take: the functions are inlined into callers whose
// target attribute decides which instructions the compiler may vectorize them with.
#pragma once

#include <stdint.h>
#include <string.h>

#define HIF4_INLINE static inline __attribute__((always_inline))

namespace hif4 {

constexpr int kUnit = 64;       // channels that share one E6M2
constexpr int kUnitBytes = 32;  // their codes
constexpr int kScaleBytes = 4;  // E6M2, E1_8, E1_16 (two bytes)

HIF4_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

HIF4_INLINE float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

HIF4_INLINE uint32_t bf16_rne(float x) {  // not for NaN
  const uint32_t bits = bits_of(x);
  return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
}

HIF4_INLINE uint16_t bf16_of(float x) {
  return static_cast<uint16_t>((bits_of(x) & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : bf16_rne(x));
}

// E6M2 / 4, NaN for the byte 0xFF. fp32 keeps exponent and two fraction bits above bit 21.
HIF4_INLINE float unit_scale(uint8_t stored) {
  return stored == 0xFF ? float_of(0x7FC00000) : float_of((stored + ((127 - 48) << 2) - 8u) << 21);
}

}  // namespace hif4
