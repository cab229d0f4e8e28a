// 2^(n / W) for integers n, by table and exponent, for vectors of W = 8 or 16 lanes: see exp.h.
#pragma once

#include <cstdint>

namespace fastpo {

template <int W>
struct Exp2Steps {
  static_assert(W == 8 || W == 16, "one table fills one vector");
  static constexpr int kShift = W == 16 ? 19 : 20;  // moves n / W to a float's exponent

  // (2^f - 1) / f = linear + square f + cubic f^2, to 2e-9 for |f| <= 1 / 32, to 3e-8 for 1 / 16.
  static constexpr float kLinear = W == 16 ? 0.6931472f : 0.69314724f;
  static constexpr float kSquare = W == 16 ? 0.24023429f : 0.24025764f;
  static constexpr float kCubic = W == 16 ? 0.055502135f : 0.055496223f;

  // The bits of 2^(k / W), less what the shifted n with n % W = k brings into the mantissa.
  struct Table {
    alignas(4 * W) uint32_t bits[W] = {};

    constexpr Table() {
      constexpr uint32_t kRoots[16] = {// 2^(k / 16)
                                       0x3F800000, 0x3F85AAC3, 0x3F8B95C2, 0x3F91C3D3, 0x3F9837F0, 0x3F9EF532,
                                       0x3FA5FED7, 0x3FAD583F, 0x3FB504F3, 0x3FBD08A4, 0x3FC5672A, 0x3FCE248C,
                                       0x3FD744FD, 0x3FE0CCDF, 0x3FEAC0C7, 0x3FF5257D};
      for (uint32_t k = 0; k < W; ++k) bits[k] = kRoots[k * 16 / W] - (k << kShift);
    }
  };
};

template <int W>
constexpr typename Exp2Steps<W>::Table kExp2Table{};

}  // namespace fastpo
