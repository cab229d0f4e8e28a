// Logits as a row-resident kernel handles them: 16 bytes at a time, two 2-byte numbers in a word.
//
// Two versions of the same few functions: instructions of the GPU, and what they compute on a CPU.
#pragma once

#include <float.h>

#include "small_floats.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define FASTPO_DEVICE __device__ __forceinline__
#else
#define FASTPO_DEVICE inline
#endif

namespace fastpo {

template <int kCount>
struct alignas(4 * kCount) Words {
  uint32_t word[kCount];
};

using Vector = Words<4>;

template <class T>
constexpr int kPerVector = int(sizeof(Vector) / sizeof(T));
template <class T>
constexpr int kPerWord = int(4 / sizeof(T));

// The elements of a word.
struct Pair {
  float low, high;
};

FASTPO_DEVICE Pair unpacked(uint32_t word, BFloat16) {
  return {float_of_bits(word << 16), float_of_bits(word & 0xFFFF0000u)};
}

#ifdef __CUDACC__

FASTPO_DEVICE Pair unpacked(uint32_t word, Half) {
  const float2 pair = __half22float2(reinterpret_cast<const __half2&>(word));
  return {pair.x, pair.y};
}

FASTPO_DEVICE uint32_t packed(Pair pair, BFloat16) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(pair.low, pair.high);
  return reinterpret_cast<const uint32_t&>(both);
}

FASTPO_DEVICE uint32_t packed(Pair pair, Half) {
  const __half2 both = __floats2half2_rn(pair.low, pair.high);
  return reinterpret_cast<const uint32_t&>(both);
}

// Element by element; NaN wins.
FASTPO_DEVICE uint32_t max_words(uint32_t a, uint32_t b, BFloat16) {
  uint32_t c;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
}

FASTPO_DEVICE uint32_t max_words(uint32_t a, uint32_t b, Half) {
  uint32_t c;
  asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
}

FASTPO_DEVICE float max_numbers(float a, float b) {
  float c;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}

// 2^x within 2 ulp; 0 where that is under 2^-126.
FASTPO_DEVICE float exp2_flushed(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// a b; 0 where that is under 2^-126.
FASTPO_DEVICE float product_flushed(float a, float b) {
  float c;
  asm("mul.ftz.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}

#else

FASTPO_DEVICE Pair unpacked(uint32_t word, Half) {
  return {to_float(Half{uint16_t(word)}), to_float(Half{uint16_t(word >> 16)})};
}

template <class T>
FASTPO_DEVICE uint32_t packed(Pair pair, T) {
  T low, high;
  assign(low, pair.low);
  assign(high, pair.high);
  return uint32_t(low.bits) | uint32_t(high.bits) << 16;
}

FASTPO_DEVICE float max_numbers(float a, float b) { return max_or_nan(a, b); }

template <class T>
FASTPO_DEVICE uint32_t max_words(uint32_t a, uint32_t b, T type) {
  const Pair x = unpacked(a, type), y = unpacked(b, type);
  return packed({max_numbers(x.low, y.low), max_numbers(x.high, y.high)}, type);
}

FASTPO_DEVICE float flushed(float x) { return fabsf(x) < FLT_MIN ? 0.0f : x; }
FASTPO_DEVICE float exp2_flushed(float x) { return flushed(exp2f(x)); }
FASTPO_DEVICE float product_flushed(float a, float b) { return flushed(a * b); }

#endif

FASTPO_DEVICE uint32_t max_words(uint32_t a, uint32_t b, float) {
  return bits_of_float(max_numbers(float_of_bits(a), float_of_bits(b)));
}

// The largest element of a word.
template <class T>
FASTPO_DEVICE float max_in_word(uint32_t word, T type) {
  const Pair pair = unpacked(word, type);
  return max_numbers(pair.low, pair.high);
}

FASTPO_DEVICE float max_in_word(uint32_t word, float) { return float_of_bits(word); }

FASTPO_DEVICE uint32_t minus_infinities(float) { return 0xFF800000u; }
FASTPO_DEVICE uint32_t minus_infinities(BFloat16) { return 0xFF80FF80u; }
FASTPO_DEVICE uint32_t minus_infinities(Half) { return 0xFC00FC00u; }

template <class T>
FASTPO_DEVICE void unpack(const Vector& vector, T type, float* elements) {
  for (int i = 0; i < 4; ++i) {
    const Pair pair = unpacked(vector.word[i], type);
    elements[2 * i] = pair.low;
    elements[2 * i + 1] = pair.high;
  }
}

FASTPO_DEVICE void unpack(const Vector& vector, float, float* elements) {
  for (int i = 0; i < 4; ++i) elements[i] = float_of_bits(vector.word[i]);
}

// Stores kCount numbers as O, where they stand aligned to their size.
template <int kCount, class O>
FASTPO_DEVICE void store_aligned(O* out, const float* elements) {
  Words<kCount / 2> words;
  for (int i = 0; i < kCount / 2; ++i) words.word[i] = packed({elements[2 * i], elements[2 * i + 1]}, O{});
  *reinterpret_cast<Words<kCount / 2>*>(out) = words;
}

template <int kCount>
FASTPO_DEVICE void store_aligned(float* out, const float* elements) {
  Words<kCount> words;
  for (int i = 0; i < kCount; ++i) words.word[i] = bits_of_float(elements[i]);
  *reinterpret_cast<Words<kCount>*>(out) = words;
}

template <int kCount, class O>
FASTPO_DEVICE bool is_aligned_for(const O* place) {
  return reinterpret_cast<uintptr_t>(place) % (kCount * sizeof(O)) == 0;
}

}  // namespace fastpo
