// AVX-512 (F, BW, VL, DQ): 16 float lanes.
#pragma once

#include <immintrin.h>

#include "lanes.h"
#include "rows.h"

namespace fastpo {

struct Avx512 {
  using Vec = __m512;
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
    return _mm512_cvtph_ps(
        _mm256_mask_loadu_epi16(_mm256_set1_epi16(short(0xFC00)), lanes(part), p));
  }

  static FASTPO_INLINE void store(float* p, Vec v, All) { _mm512_storeu_ps(p, v); }
  static FASTPO_INLINE void store(float* p, Vec v, First part) {
    _mm512_mask_storeu_ps(p, lanes(part), v);
  }
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
  static FASTPO_INLINE Vec power_of_two(Vec biased) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(biased), 23));
  }
  static FASTPO_INLINE float first(Vec v) { return _mm512_cvtss_f32(v); }
  static FASTPO_INLINE float sum(Vec v) { return _mm512_reduce_add_ps(v); }
  static FASTPO_INLINE float maximum(Vec v) { return _mm512_reduce_max_ps(v); }

 private:
  static FASTPO_INLINE Vec widen(__m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  // fp32 -> bf16, to nearest even; the rounding carry would turn some NaNs into 0, so NaN goes apart.
  static FASTPO_INLINE __m256i narrow(Vec v) {
    __m512i bits = _mm512_castps_si512(v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i carry = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, carry), 16);
    __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC0)));
  }
};

}  // namespace fastpo
