// AVX-512 (F, BW, VL, DQ): 16 float lanes.
#pragma once

#include <immintrin.h>

#include "exp2_steps.h"
#include "flush_to_zero.h"
#include "lanes.h"
#include "rows.h"

namespace fastpo {

struct Avx512 {
  using Vec = __m512;
  using SubnormalGuard = FlushToZero;
  static constexpr int64_t width = 16;
  static constexpr const char* name = "avx512";

  static FASTPO_INLINE __mmask16 lanes(First part) { return __mmask16((1u << part.count) - 1u); }

  static FASTPO_INLINE Vec load(const float* p, All) { return _mm512_loadu_ps(p); }
  static FASTPO_INLINE Vec load(const float* p, First part) {
    return _mm512_mask_loadu_ps(all(-INFINITY), lanes(part), p);
  }
  static FASTPO_INLINE Vec load(const BFloat16* p, All) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static FASTPO_INLINE Vec load(const BFloat16* p, First part) {
    return widen(_mm256_mask_loadu_epi16(_mm256_set1_epi16(short(0xFF80)), lanes(part), p));
  }
  static FASTPO_INLINE Vec load(const Half* p, All) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static FASTPO_INLINE Vec load(const Half* p, First part) {
    return _mm512_cvtph_ps(_mm256_mask_loadu_epi16(_mm256_set1_epi16(short(0xFC00)), lanes(part), p));
  }

  static FASTPO_INLINE void store(float* p, Vec v, All) { _mm512_storeu_ps(p, v); }
  static FASTPO_INLINE void store(float* p, Vec v, First part) { _mm512_mask_storeu_ps(p, lanes(part), v); }
  static FASTPO_INLINE void store(BFloat16* p, Vec v, All) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v));
  }
  static FASTPO_INLINE void store(BFloat16* p, Vec v, First part) {
    _mm256_mask_storeu_epi16(p, lanes(part), narrow(v));
  }
  static FASTPO_INLINE void store(Half* p, Vec v, All) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  static FASTPO_INLINE void store(Half* p, Vec v, First part) {
    _mm256_mask_storeu_epi16(p, lanes(part), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }

  static FASTPO_INLINE Vec all(float x) { return _mm512_set1_ps(x); }
  static FASTPO_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static FASTPO_INLINE Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
  static FASTPO_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static FASTPO_INLINE Vec mul_add(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static FASTPO_INLINE Vec mul_add_exact(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  // maxps returns its second operand when either is NaN: NaN in `b` survives.
  static FASTPO_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
  static FASTPO_INLINE Vec step(Vec biased) {
    const __m512i n = _mm512_castps_si512(biased);
    const __m512i root = _mm512_permutexvar_epi32(n, _mm512_load_si512(kExp2Table<16>.bits));
    return _mm512_castsi512_ps(_mm512_add_epi32(root, _mm512_slli_epi32(n, Exp2Steps<16>::kShift)));
  }
  static FASTPO_INLINE float first(Vec v) { return _mm512_cvtss_f32(v); }
  static FASTPO_INLINE float sum(Vec v) { return _mm512_reduce_add_ps(v); }
  static FASTPO_INLINE float maximum(Vec v) { return _mm512_reduce_max_ps(v); }

 private:
  // A bf16 is the upper word of a float: one permutation of words each way.
  static FASTPO_INLINE Vec widen(__m256i bits) {
    const __m512i words = _mm512_maskz_permutexvar_epi16(0xAAAAAAAA, _mm512_srli_epi16(word_numbers(), 1),
                                                         _mm512_castsi256_si512(bits));
    return _mm512_castsi512_ps(words);
  }
  // To nearest even. Of a NaN, which is quiet after any arithmetic, the upper word is one already; the
  // rounding carry would turn some into 0.
  static FASTPO_INLINE __m256i narrow(Vec v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __mmask16 number = _mm512_cmp_ps_mask(v, v, _CMP_ORD_Q);
    const __mmask16 odd = _mm512_mask_test_epi32_mask(number, bits, _mm512_set1_epi32(0x10000));
    __m512i rounded = _mm512_mask_add_epi32(bits, number, bits, _mm512_set1_epi32(0x7FFF));
    rounded = _mm512_mask_add_epi32(rounded, odd, bits, _mm512_set1_epi32(0x8000));
    const __m512i upper = _mm512_add_epi16(_mm512_slli_epi16(word_numbers(), 1), _mm512_set1_epi16(1));
    return _mm512_castsi512_si256(_mm512_permutexvar_epi16(upper, rounded));
  }
  static FASTPO_INLINE __m512i word_numbers() {
    alignas(64) static constexpr uint16_t kNumbers[32] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10,
                                                          11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
                                                          22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
    return _mm512_load_si512(kNumbers);
  }
};

}  // namespace fastpo
