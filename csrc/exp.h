// exp(d / T) of vectors d that a softmax makes: at most a rounding error above 0.
#pragma once

#include <float.h>
#include <math.h>

#include "exp2_steps.h"
#include "rows.h"

namespace fastpo {

// For floor <= d <= T / 2, or NaN; exactly 0 at the floor, -127 octaves down. Relative error: 1.2 ulp, and
// what rounding T ln(2) costs: 3e-9 |d / T| at T = 1, at most 6e-8 |d / T|. Results under 2^-126 are
// inexact, if they are not flushed to 0, but stay under it.
//
// With o = T ln(2) and W = 8 or 16 steps per octave, d = o n / W + f, |f| <= o / (2 W). Adding
// 1.5 * 2^23 / W to d / o rounds it to such a step and leaves n in the low bits of the sum, from where
// `S::step` makes 2^(n / W): one lookup in a table of W numbers, and n / W as the exponent. A cubic does
// the rest, exp(f / T).
template <class S>
class ScaledExp {
 public:
  using Vec = typename S::Vec;

  explicit ScaledExp(double temperature) {
    using Steps = Exp2Steps<S::width>;
    const double octave = temperature * 0.69314718055994531;
    floor_ = S::all(float(-127 * octave));
    per_octave_ = S::all(float(1 / octave));
    minus_octave_ = S::all(float(-octave));
    linear_ = coefficient(Steps::kLinear / octave);
    square_ = coefficient(Steps::kSquare / octave / octave);
    cubic_ = coefficient(Steps::kCubic / octave / octave / octave);
  }

  // -inf becomes finite, so that d * exp(d / T) is 0, not NaN. NaN stays.
  FASTPO_INLINE Vec floored(Vec d) const { return S::max(floor_, d); }

  FASTPO_INLINE Vec operator()(Vec d) const {
    const Vec magic = S::all(12582912.0f / S::width);
    const Vec biased = S::mul_add(d, per_octave_, magic);
    const Vec f = S::mul_add_exact(S::sub(biased, magic), minus_octave_, d);
    const Vec step = S::step(biased);
    const Vec slope = S::mul_add(S::mul_add(cubic_, f, square_), f, linear_);
    return S::mul_add(step, S::mul(slope, f), step);
  }

 private:
  // Infinite would be wrong where f is 0: for T under 1e-13, which leaves nothing but the largest logits.
  static Vec coefficient(double x) { return S::all(float(fmin(x, FLT_MAX))); }

  Vec floor_, per_octave_, minus_octave_, linear_, square_, cubic_;
};

}  // namespace fastpo
