// Any CPU: 8 float lanes in plain C++, written so that compilers vectorise the lane loops.
#pragma once

#include <float.h>
#include <math.h>
#include <string.h>

#include "exp2_steps.h"
#include "lanes.h"
#include "rows.h"
#include "small_floats.h"

namespace fastpo {

struct Portable {
  static constexpr int64_t width = 8;
  static constexpr const char* name = "portable";

  struct Vec {
    float lane[width];
  };

  template <class T>
  static FASTPO_INLINE Vec load(const T* p, All) {
    return map([=](int k) { return to_float(p[k]); });
  }
  template <class T>
  static FASTPO_INLINE Vec load(const T* p, First part) {
    return map([=](int k) { return k < part.count ? to_float(p[k]) : -INFINITY; });
  }
  // Not every CPU has a switch for it: stores leave subnormals out one by one.
  struct SubnormalGuard {};
  static FASTPO_INLINE float flushed(float x) { return fabsf(x) < FLT_MIN ? 0.0f : x; }

  template <class T>
  static FASTPO_INLINE void store(T* p, const Vec& v, All) {
    for (int k = 0; k < width; ++k) assign(p[k], flushed(v.lane[k]));
  }
  template <class T>
  static FASTPO_INLINE void store(T* p, const Vec& v, First part) {
    for (int k = 0; k < part.count; ++k) assign(p[k], flushed(v.lane[k]));
  }

  static FASTPO_INLINE Vec all(float x) {
    return map([=](int) { return x; });
  }
  static FASTPO_INLINE Vec add(const Vec& a, const Vec& b) {
    return map([&](int k) { return a.lane[k] + b.lane[k]; });
  }
  static FASTPO_INLINE Vec sub(const Vec& a, const Vec& b) {
    return map([&](int k) { return a.lane[k] - b.lane[k]; });
  }
  static FASTPO_INLINE Vec mul(const Vec& a, const Vec& b) {
    return map([&](int k) { return a.lane[k] * b.lane[k]; });
  }
  static FASTPO_INLINE Vec mul_add(const Vec& a, const Vec& b, const Vec& c) {
    return map([&](int k) { return a.lane[k] * b.lane[k] + c.lane[k]; });
  }
  // The product is not rounded before the sum: double holds a product of two floats exactly.
  static FASTPO_INLINE Vec mul_add_exact(const Vec& a, const Vec& b, const Vec& c) {
    return map([&](int k) { return float(double(a.lane[k]) * b.lane[k] + c.lane[k]); });
  }
  // As maxps: NaN in `b` survives.
  static FASTPO_INLINE Vec max(const Vec& a, const Vec& b) {
    return map([&](int k) { return a.lane[k] > b.lane[k] ? a.lane[k] : b.lane[k]; });
  }
  static FASTPO_INLINE Vec step(const Vec& biased) {
    return map([&](int k) {
      const uint32_t n = bits_of_float(biased.lane[k]);
      return float_of_bits(kExp2Table<8>.bits[n % 8] + (n << Exp2Steps<8>::kShift));
    });
  }
  static FASTPO_INLINE float first(const Vec& v) { return v.lane[0]; }
  static FASTPO_INLINE float sum(const Vec& v) {
    float low = (v.lane[0] + v.lane[4]) + (v.lane[2] + v.lane[6]);
    float high = (v.lane[1] + v.lane[5]) + (v.lane[3] + v.lane[7]);
    return low + high;
  }
  static FASTPO_INLINE float maximum(const Vec& v) {
    float best = v.lane[0];
    for (float x : v.lane) best = best > x ? best : x;
    return best;
  }

 private:
  template <class F>
  static FASTPO_INLINE Vec map(F&& lane) {
    Vec v;
    for (int k = 0; k < width; ++k) v.lane[k] = lane(k);
    return v;
  }
};

}  // namespace fastpo
