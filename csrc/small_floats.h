// Scalar conversions of bf16 and fp16, rounding to nearest even, for CPUs without instructions for it.
#pragma once

#include <cmath>
#include <cstring>

#include "rows.h"

namespace fastpo {

FASTPO_INLINE float float_of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

FASTPO_INLINE uint32_t bits_of_float(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

FASTPO_INLINE float to_float(float x) { return x; }

FASTPO_INLINE float to_float(BFloat16 x) { return float_of_bits(uint32_t(x.bits) << 16); }

// The exponent is rebiased by a multiplication, which also normalises fp16 subnormals.
FASTPO_INLINE float to_float(Half x) {
  uint32_t magnitude = uint32_t(x.bits & 0x7FFFu) << 13;
  float scaled = float_of_bits(magnitude) * 0x1p112f;
  uint32_t special = magnitude >= 0x0F800000u ? 0x7F800000u : 0u;  // inf and NaN
  return float_of_bits(bits_of_float(scaled) | special | uint32_t(x.bits & 0x8000u) << 16);
}

FASTPO_INLINE void assign(float& out, float x) { out = x; }

FASTPO_INLINE void assign(BFloat16& out, float x) {
  uint32_t bits = bits_of_float(x);
  uint32_t rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  out.bits = x != x ? uint16_t(0x7FC0) : uint16_t(rounded);
}

// Adding 2^(e + 13) to |x| of exponent e leaves the fp16 mantissa, rounded, in the low bits of the sum.
FASTPO_INLINE void assign(Half& out, float x) {
  uint32_t sign = bits_of_float(x) >> 16 & 0x8000u;
  float magnitude = std::fabs(x);
  if (!(magnitude < 65520.0f)) {
    out.bits = uint16_t(sign | (x != x ? 0x7E00u : 0x7C00u));
    return;
  }
  uint32_t exponent = bits_of_float(magnitude) & 0x7F800000u;
  if (exponent < 0x38800000u) exponent = 0x38800000u;  // 2^-14, the smallest normal fp16
  float aligned = magnitude + float_of_bits(exponent + (13u << 23));
  uint32_t mantissa = bits_of_float(aligned) - (exponent + (13u << 23));
  uint32_t biased = (exponent >> 23) - 113u;  // 0 for the subnormal range
  out.bits = uint16_t(sign | ((biased << 10) + mantissa));
}

}  // namespace fastpo
