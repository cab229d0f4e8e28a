// The row primitives, written once for any vector type S (simd_*.h) and compiled per instruction set.
//
// A row is swept three times: maximum; exponentials and their sums; gradient, backwards. The first
// sweep finds the row in cache, where the second sweep of the row before has fetched it, and the
// exponentials wait in cache too: in the gradient's own fp32 row, or else in a scratch row. So memory
// sees one read and one write of the row.
#pragma once

#include <math.h>

#include "exp.h"
#include "lanes.h"
#include "rows.h"

namespace fastpo {

template <class S>
struct RowKernels {
  using Vec = typename S::Vec;
  static constexpr int64_t W = S::width;
  static constexpr int kChains = 4;  // independent sums: shorter dependency chains, smaller error

  // x_j = u_j - m as (z_j - before) / T + after. With before = max z it is exactly 0 at the maximum;
  // when only m is known, after = -m, and the product is not rounded before the sum.
  struct Shift {
    float before;
    float inverse_t;
    float after;

    template <class T, class Lanes>
    FASTPO_INLINE Vec operator()(const T* z, Lanes lanes) const {
      const Vec difference = S::sub(S::load(z, lanes), S::all(before));
      return S::mul_add_exact(difference, S::all(inverse_t), S::all(after));
    }
  };

  // What the sweeps over a row leave: s = sum exp x_j.
  struct Summary {
    Shift shift;
    float exp_sum;     // s
    float log_sum;     // log s
    float mean_shift;  // E_p[x]
    float logprob;
    float entropy;
  };

  // dz_j = exp(x_j) * (scale + spread * (mean_shift - x_j)) for every column but the token's.
  struct Slopes {
    float scale;       // -c / (s T)
    float spread;      // e / (s T)
    float mean_shift;  // E_p[x]
    float token_grad;  // dz_y
  };

  // Calls body(chain, column, lanes) for the vectors of a row, first to last.
  template <class Body>
  static FASTPO_INLINE void forward(int64_t columns, Body&& body) {
    int64_t j = 0;
    for (; j + kChains * W <= columns; j += kChains * W)
#pragma GCC unroll 4
      for (int chain = 0; chain < kChains; ++chain) body(chain, j + chain * W, All{});
    for (; j + W <= columns; j += W) body(0, j, All{});
    if (j < columns) body(1, j, First{int(columns - j)});
  }

  // Calls body(column, lanes) for the vectors of a row, last to first: a 2-byte gradient in the upper
  // half of a row of fp32 logits then never overwrites a logit that has yet to be read.
  template <class Body>
  static FASTPO_INLINE void backward(int64_t columns, Body&& body) {
    int64_t j = columns / W * W;
    if (j < columns) body(j, First{int(columns - j)});
    for (j -= W; j >= 0; j -= W) body(j, All{});
  }

  template <class T>
  static float max_logit(const T* z, int64_t columns) {
    Vec best[kChains];
    for (Vec& b : best) b = S::all(-INFINITY);
    forward(columns, [&](int chain, int64_t j, auto lanes) FASTPO_LAMBDA {
      best[chain] = S::max(best[chain], S::load(z + j, lanes));
    });
    return S::maximum(S::max(S::max(best[0], best[1]), S::max(best[2], best[3])));
  }

  // -inf becomes kExpFloor, so that x * exp(x) is 0, not NaN.
  static FASTPO_INLINE Vec floored(Vec x) { return S::max(S::all(kExpFloor), x); }

  // The first two sweeps. Keeps exp(x_j) in `exps` if kKeep, which may be the row itself; fetches the row
  // at `ahead` meanwhile.
  template <bool kKeep, class T>
  static Summary summarize(const RowsIn& in, int64_t i, const T* ahead, float* exps) {
    const T* z = static_cast<const T*>(in.logits.row(i));
    Summary row;
    row.shift = {max_logit(z, in.columns), in.temperature.inverse(i), 0.0f};
    const Shift shift = row.shift;
    const double token_x = token_shifted(in, i, z, shift.before);
    Vec sums[kChains], weighted[kChains];
    for (Vec& s : sums) s = S::all(0);
    for (Vec& s : weighted) s = S::all(0);
    forward(in.columns, [&](int chain, int64_t j, auto lanes) FASTPO_LAMBDA {
      if (ahead) __builtin_prefetch(ahead + j, 0, 2);
      const Vec x = floored(shift(z + j, lanes));
      const Vec e = exp<S>(x);
      if (kKeep) S::store(exps + j, e, lanes);
      sums[chain] = S::add(sums[chain], e);
      weighted[chain] = S::mul_add(x, e, weighted[chain]);
    });
    row.exp_sum = total(sums);
    const double log_sum = log(double(row.exp_sum));
    row.log_sum = float(log_sum);
    row.mean_shift = total(weighted) / row.exp_sum;
    const float entropy = row.log_sum - row.mean_shift;
    row.entropy = entropy < 0 ? 0.0f : entropy;
    const float logprob = float(token_x - log_sum);
    row.logprob = logprob > 0 ? 0.0f : logprob;  // by a rounding error
    return row;
  }

  static FASTPO_INLINE float total(const Vec* chains) {
    return S::sum(S::add(S::add(chains[0], chains[1]), S::add(chains[2], chains[3])));
  }

  // (z_y - max z) / T of the row's token, in double: a log-prob of -20 enters exp, and three roundings
  // to fp32 would cost it 3e-6. NaN for a token outside the row.
  template <class T>
  static double token_shifted(const RowsIn& in, int64_t i, const T* z, float row_max) {
    const int64_t token = in.tokens[i];
    if (token < 0 || token >= in.columns) return NAN;
    return (double(S::first(S::load(z + token, First{1}))) - row_max) / in.temperature.of(i);
  }

  // The two slopes and the token's own gradient from c, e and the statistics of a row; `inverse_s` = 1 / s.
  static Slopes slopes_of(float c, float e, float inverse_s, const Summary& row) {
    const float inverse_t = row.shift.inverse_t;
    const float p = expf(row.logprob);
    const float x = p > 0 ? row.logprob + row.log_sum : row.mean_shift;  // p = 0: the term is 0
    const float entropy_part = e != 0 ? e * p * (row.mean_shift - x) : 0.0f;
    const float token_grad = inverse_t * (entropy_part - c * expm1f(row.logprob));
    return {-c * inverse_t * inverse_s, e * inverse_t * inverse_s, row.mean_shift, token_grad};
  }

  template <class O>
  static FASTPO_INLINE void fill_zero(O* out, int64_t columns) {
    backward(columns, [&](int64_t j, auto lanes) FASTPO_LAMBDA {
      S::store(out + j, S::all(0), lanes);
    });
  }

  template <class T>
  static void scale_row(T* row, int64_t columns, float factor) {
    backward(columns, [&](int64_t j, auto lanes) FASTPO_LAMBDA {
      S::store(row + j, S::mul(S::load(row + j, lanes), S::all(factor)), lanes);
    });
  }

  // Third sweep. kKept: exp(x_j) stands in `exps`; kEntropy: the entropy term is there, and needs x_j.
  template <bool kKept, bool kEntropy, class T, class O>
  static void write_grad(const RowsIn& in, int64_t i, const Shift& row_shift, const Slopes& slopes,
                         const float* exps, O* out) {
    const T* z = static_cast<const T*>(in.logits.row(i));
    const Shift shift = row_shift;
    const Vec scale = S::all(slopes.scale), spread = S::all(slopes.spread);
    const Vec mean_shift = S::all(slopes.mean_shift);
    const int64_t token = in.tokens[i];
    backward(in.columns, [&](int64_t j, auto lanes) FASTPO_LAMBDA {
      Vec x = S::all(0), factor = scale;
      if (kEntropy || !kKept) x = floored(shift(z + j, lanes));
      if (kEntropy) factor = S::mul_add(S::sub(mean_shift, x), spread, scale);
      const Vec e = kKept ? S::load(exps + j, lanes) : exp<S>(x);
      S::store(out + j, S::mul(e, factor), lanes);
    });
    if (token >= 0 && token < in.columns)
      S::store(out + token, S::all(slopes.token_grad), First{1});
  }
};

}  // namespace fastpo
