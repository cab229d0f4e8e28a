// exp of a vector, for arguments that a softmax makes: at most a rounding error above 0.
#pragma once

#include "rows.h"

namespace fastpo {

// Below this exp is taken as 0 (it is under 2^-126 there); -inf is clamped to it first.
constexpr float kExpFloor = -88.0f;

// x in [kExpFloor, 0.5], or NaN; 0 at kExpFloor, never subnormal. Relative error: 1 ulp + 3e-9 |x|, far
// below the 6e-8 |x| that rounding the argument has cost already.
//
// exp(x) = 2^n exp(f), n = round(x log2 e), |f| <= ln(2) / 2. Adding 1.5 * 2^23 + 127 rounds and leaves
// n + 127 in the low bits of the sum, from where a shift makes 2^n: 0 for n = -127. The polynomial is a
// minimax fit to exp(f), to 4e-9.
template <class S>
FASTPO_INLINE typename S::Vec exp(typename S::Vec x) {
  using Vec = typename S::Vec;
  const Vec magic = S::all(12583039.0f);
  const Vec biased = S::mul_add(x, S::all(1.44269504f), magic);
  const Vec n = S::sub(biased, magic);
  const Vec f = S::mul_add_exact(n, S::all(-0.693147181f), x);
  Vec p = S::all(1.38145e-3f);
  p = S::mul_add(p, f, S::all(8.36875e-3f));
  p = S::mul_add(p, f, S::all(4.166839e-2f));
  p = S::mul_add(p, f, S::all(1.6666521e-1f));
  p = S::mul_add(p, f, S::all(4.9999994e-1f));
  p = S::mul_add(p, f, S::all(1.0f));
  p = S::mul_add(p, f, S::all(1.0f));
  return S::mul(p, S::power_of_two(biased));
}

}  // namespace fastpo
