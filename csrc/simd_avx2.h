// AVX2 with FMA and F16C: 8 float lanes.
#pragma once

#include <immintrin.h>
#include <string.h>

#include "exp2_steps.h"
#include "flush_to_zero.h"
#include "lanes.h"
#include "rows.h"

namespace fastpo {

struct Avx2 {
  using Vec = __m256;
  using SubnormalGuard = FlushToZero;
  static constexpr int64_t width = 8;
  static constexpr const char* name = "avx2";

  static FASTPO_INLINE Vec load(const float* p, All) { return _mm256_loadu_ps(p); }
  static FASTPO_INLINE Vec load(const float* p, First part) {
    __m256i mask = lanes(part);
    return _mm256_blendv_ps(all(-INFINITY), _mm256_maskload_ps(p, mask), _mm256_castsi256_ps(mask));
  }
  static FASTPO_INLINE Vec load(const BFloat16* p, All) { return widen(bits_of(p)); }
  static FASTPO_INLINE Vec load(const BFloat16* p, First part) { return widen(bits_of(p, part, 0xFF80)); }
  static FASTPO_INLINE Vec load(const Half* p, All) { return _mm256_cvtph_ps(bits_of(p)); }
  static FASTPO_INLINE Vec load(const Half* p, First part) {
    return _mm256_cvtph_ps(bits_of(p, part, 0xFC00));
  }

  static FASTPO_INLINE void store(float* p, Vec v, All) { _mm256_storeu_ps(p, v); }
  static FASTPO_INLINE void store(float* p, Vec v, First part) { _mm256_maskstore_ps(p, lanes(part), v); }
  static FASTPO_INLINE void store(BFloat16* p, Vec v, All) { put(p, narrow(v)); }
  static FASTPO_INLINE void store(BFloat16* p, Vec v, First part) { put(p, narrow(v), part); }
  static FASTPO_INLINE void store(Half* p, Vec v, All) { put(p, to_half(v)); }
  static FASTPO_INLINE void store(Half* p, Vec v, First part) { put(p, to_half(v), part); }

  static FASTPO_INLINE Vec all(float x) { return _mm256_set1_ps(x); }
  static FASTPO_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static FASTPO_INLINE Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
  static FASTPO_INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
  static FASTPO_INLINE Vec mul_add(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  static FASTPO_INLINE Vec mul_add_exact(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  // maxps returns its second operand when either is NaN: NaN in `b` survives.
  static FASTPO_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
  static FASTPO_INLINE Vec step(Vec biased) {
    const __m256i n = _mm256_castps_si256(biased);
    const __m256i roots = _mm256_load_si256(reinterpret_cast<const __m256i*>(kExp2Table<8>.bits));
    const __m256i root = _mm256_permutevar8x32_epi32(roots, n);
    return _mm256_castsi256_ps(_mm256_add_epi32(root, _mm256_slli_epi32(n, Exp2Steps<8>::kShift)));
  }
  static FASTPO_INLINE float first(Vec v) { return _mm256_cvtss_f32(v); }
  static FASTPO_INLINE float sum(Vec v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
  static FASTPO_INLINE float maximum(Vec v) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
  }

 private:
  static FASTPO_INLINE __m256i lanes(First part) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(part.count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static FASTPO_INLINE __m128i bits_of(const void* p) {
    return _mm_loadu_si128(static_cast<const __m128i*>(p));
  }
  // AVX2 has no masked 16-bit load: a partial vector goes through the stack.
  static FASTPO_INLINE __m128i bits_of(const void* p, First part, uint16_t fill) {
    uint16_t lane[8];
    for (uint16_t& bits : lane) bits = fill;
    memcpy(lane, p, part.count * sizeof(uint16_t));
    return bits_of(lane);
  }
  static FASTPO_INLINE void put(void* p, __m128i bits) { _mm_storeu_si128(static_cast<__m128i*>(p), bits); }
  static FASTPO_INLINE void put(void* p, __m128i bits, First part) {
    uint16_t lane[8];
    put(lane, bits);
    memcpy(p, lane, part.count * sizeof(uint16_t));
  }
  static FASTPO_INLINE __m128i to_half(Vec v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
  static FASTPO_INLINE Vec widen(__m128i bits) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  // fp32 -> bf16, to nearest even; the rounding carry would turn some NaNs into 0, so NaN goes apart.
  static FASTPO_INLINE __m128i narrow(Vec v) {
    __m256i bits = _mm256_castps_si256(v);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i carry = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF));
    __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, carry), 16);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC0), nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
  }
};

}  // namespace fastpo
