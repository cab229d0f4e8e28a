// The row primitives, written once for any vector type S (simd_*.h) and compiled per instruction set.
//
// A row is swept twice: exponentials and their sums, block by block; gradient, backwards. A block fits
// the first-level cache, where its maximum is found first. The exponentials wait in the second-level
// cache: in the gradient's own fp32 row, or else in a scratch row. So memory sees one read and one write.
#pragma once

#include <float.h>
#include <math.h>

#include <type_traits>

#include "exp.h"
#include "lanes.h"
#include "row_scalars.h"

namespace fastpo {

template <class S>
struct RowKernels {
  using Vec = typename S::Vec;
  static constexpr int64_t W = S::width;
  static constexpr int kChains = 4;  // independent sums: shorter dependency chains, smaller error
  static constexpr int64_t kCacheLine = 64;

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

  // Calls body(column, lanes) for the vectors of a row that becomes one of O, in place: first to last, as
  // memory likes it, unless the logits are larger.
  template <class T, class O, class Body>
  static FASTPO_INLINE void rewrite(int64_t columns, Body&& body) {
    if constexpr (sizeof(O) < sizeof(T))
      backward(columns, body);
    else
      forward(columns, [&](int, int64_t j, auto lanes) FASTPO_LAMBDA { body(j, lanes); });
  }

  static FASTPO_INLINE float total(const Vec* chains) {
    return S::sum(S::add(S::add(chains[0], chains[1]), S::add(chains[2], chains[3])));
  }

  // The largest logit. Some NaNs it drops: the sums see them all.
  template <class T>
  static float max_logit(const T* z, int64_t columns) {
    Vec best[kChains];
    for (Vec& b : best) b = S::all(-INFINITY);
    forward(columns, [&](int chain, int64_t j, auto lanes)
                         FASTPO_LAMBDA { best[chain] = S::max(best[chain], S::load(z + j, lanes)); });
    return S::maximum(S::max(S::max(best[0], best[1]), S::max(best[2], best[3])));
  }

  // Sums over the blocks so far, with d_j = z_j - reference and the largest logit so far as reference.
  // It starts finite, so that in a block of -inf d_j is -inf, not NaN.
  struct Sums {
    float reference = -FLT_MAX;
    double exps = 0;      // of exp(d_j / T)
    double weighted = 0;  // of d_j exp(d_j / T)
    double squares = 0;   // of exp(2 d_j / T), if details are wanted
    double logits = 0;    // of z_j, likewise

    void raise(float block_max, double temperature) {
      if (!(block_max > reference)) return;
      const double change = double(reference) - block_max, factor = ::exp(change / temperature);
      weighted = factor * (weighted + change * exps);
      exps *= factor;
      squares *= factor * factor;
      reference = block_max;
    }
  };

  // Adds a block to the sums, and fetches the next one, which after the last is of the next row. Keeps
  // exp(d_j / T) in `exps` if kKeep, which may be the block itself.
  template <bool kKeep, class T>
  static void add_block(const T* z, int64_t columns, ScaledExp<S> exp, float* exps, Sums& sums) {
    const Vec reference = S::all(sums.reference);
    Vec plain[kChains], weighted[kChains];
    for (Vec& s : plain) s = S::all(0);
    for (Vec& s : weighted) s = S::all(0);
    forward(columns, [&](int chain, int64_t j, auto lanes) FASTPO_LAMBDA {
      if (chain * W * sizeof(T) % kCacheLine == 0) __builtin_prefetch(z + j + kBlock);
      const Vec d = exp.floored(S::sub(S::load(z + j, lanes), reference));
      const Vec e = exp(d);
      if (kKeep) S::store(exps + j, e, lanes);
      plain[chain] = S::add(plain[chain], e);
      weighted[chain] = S::mul_add(d, e, weighted[chain]);
    });
    sums.exps += total(plain);
    sums.weighted += total(weighted);
  }

  // What else a sweep can tell; the block loop finds the maximum first, and so where it stands first.
  struct Details {
    float log_sum_sq_probs;
    float mean_logit;  // of u
    bool is_top1;
  };

  // Adds a block's squares and logits; its exponentials are computed anew, from the first-level cache.
  template <class T>
  static void add_details(const T* z, int64_t columns, ScaledExp<S> exp, Sums& sums) {
    const Vec reference = S::all(sums.reference);
    Vec squares[kChains], logits[kChains];
    for (Vec& s : squares) s = S::all(0);
    for (Vec& s : logits) s = S::all(0);
    forward(columns, [&](int chain, int64_t j, auto lanes) FASTPO_LAMBDA {
      const Vec logit = S::load(z + j, lanes), e = exp(exp.floored(S::sub(logit, reference)));
      squares[chain] = S::mul_add(e, e, squares[chain]);
      if constexpr (std::is_same_v<decltype(lanes), All>) logits[chain] = S::add(logits[chain], logit);
    });
    for (int64_t j = columns / W * W; j < columns; ++j) sums.logits += S::first(S::load(z + j, First{1}));
    sums.squares += total(squares);
    sums.logits += total(logits);
  }

  // Whether the token's logit is the row's largest and the first of that size, as argmax has it.
  // `start`: of the first block that holds the largest logit.
  template <class T>
  static bool is_first_max(const RowsIn& in, const T* z, int64_t start, float max, int64_t token) {
    if (token < start || token >= start + block_size(in, start)) return false;
    if (S::first(S::load(z + token, First{1})) != max) return false;
    return token == start || max_logit(z + start, token - start) < max;
  }

  // First sweep for statistics alone, with details.
  template <class T>
  static Summary summarize(const RowsIn& in, int64_t i, Details& details) {
    const T* z = static_cast<const T*>(in.logits.row(i));
    const double temperature = in.temperature.of(i);
    const ScaledExp<S> exp(temperature);
    Sums sums;
    float max = -INFINITY;
    int64_t max_start = 0;
    for (int64_t start = 0; start < in.columns; start += kBlock) {
      const int64_t size = block_size(in, start);
      const float block_max = max_logit(z + start, size);
      if (block_max > max) max = block_max, max_start = start;
      sums.raise(block_max, temperature);
      add_block<false>(z + start, size, exp, nullptr, sums);
      add_details(z + start, size, exp, sums);
    }
    const Summary row = summary_of(sums, token_logit(in, i, z), temperature);
    details.log_sum_sq_probs = float(log(sums.squares) - 2 * log(sums.exps));
    details.mean_logit = float(sums.logits / double(in.columns) / temperature);
    const bool is_number = row.logprob == row.logprob;
    details.is_top1 = is_number && is_first_max(in, z, max_start, max, in.tokens[i]);
    return row;
  }

  // First sweep. Keeps the exponentials of every block, and to which logit they are relative, if kKeep.
  template <bool kKeep, class T>
  static Summary summarize(const RowsIn& in, int64_t i, const Kept& kept) {
    const T* z = static_cast<const T*>(in.logits.row(i));
    const double temperature = in.temperature.of(i), token = token_logit(in, i, z);
    const ScaledExp<S> exp(temperature);
    Sums sums;
    for (int64_t start = 0; start < in.columns; start += kBlock) {
      const int64_t size = block_size(in, start);
      sums.raise(max_logit(z + start, size), temperature);
      if (kKeep) kept.references[start / kBlock] = sums.reference;
      add_block<kKeep>(z + start, size, exp, kept.exps + start, sums);
    }
    return summary_of(sums, token, temperature);
  }

  static FASTPO_INLINE int64_t block_size(const RowsIn& in, int64_t start) {
    return in.columns - start < kBlock ? in.columns - start : kBlock;
  }

  // NaN for a token outside the row.
  template <class T>
  static float token_logit(const RowsIn& in, int64_t i, const T* z) {
    const int64_t token = in.tokens[i];
    return token >= 0 && token < in.columns ? S::first(S::load(z + token, First{1})) : NAN;
  }

  // In double: a log-prob of -20 enters exp, and three roundings to fp32 would cost it 3e-6.
  static Summary summary_of(const Sums& sums, float token_logit, double temperature) {
    const double log_sum = log(sums.exps), mean_shift = sums.weighted / sums.exps / temperature;
    const double token_shift = (double(token_logit) - sums.reference) / temperature;
    Summary row;
    row.row_max = sums.reference;
    row.inverse_t = float(1 / temperature);
    row.exp_sum = float(sums.exps);
    row.log_sum = float(log_sum);
    row.mean_shift = float(mean_shift);
    // By a rounding error, either can be beyond its bound.
    row.logprob = token_shift > log_sum ? 0.0f : float(token_shift - log_sum);
    row.entropy = mean_shift > log_sum ? 0.0f : float(log_sum - mean_shift);
    return row;
  }

  template <class O>
  static FASTPO_INLINE void fill_zero(O* out, int64_t columns) {
    rewrite<O, O>(columns, [&](int64_t j, auto lanes) FASTPO_LAMBDA { S::store(out + j, S::all(0), lanes); });
  }

  template <class T>
  static void scale_row(T* row, int64_t columns, float factor) {
    rewrite<T, T>(columns, [&](int64_t j, auto lanes) FASTPO_LAMBDA {
      S::store(row + j, S::mul(S::load(row + j, lanes), S::all(factor)), lanes);
    });
  }

  // Second sweep, over the exponentials that the first has kept. kEntropy: the entropy term is there,
  // and needs x_j.
  template <bool kEntropy, class T, class O>
  static void write_kept_grad(const RowsIn& in, int64_t i, const Summary& row, const Slopes& slopes,
                              const Kept& kept, O* out) {
    const T* z = static_cast<const T*>(in.logits.row(i));
    const double temperature = in.temperature.of(i);
    const ScaledExp<S> exp(temperature);
    const Vec row_max = S::all(row.row_max), inverse_t = S::all(row.inverse_t);
    const Vec mean_shift = S::all(slopes.mean_shift);
    for (int64_t start = (in.columns - 1) / kBlock * kBlock; start >= 0; start -= kBlock) {
      // From the block's reference to the row's maximum.
      const double rise = double(row.row_max) - kept.references[start / kBlock];
      const float rebase = float(::exp(-rise / temperature));
      const Vec scale = S::all(slopes.scale * rebase), entropy_scale = S::all(slopes.entropy_scale * rebase);
      backward(block_size(in, start), [&](int64_t k, auto lanes) FASTPO_LAMBDA {
        const int64_t j = start + k;
        Vec factor = scale;
        if (kEntropy) {
          const Vec d = exp.floored(S::sub(S::load(z + j, lanes), row_max));
          factor = S::mul_add(S::sub(mean_shift, S::mul(d, inverse_t)), entropy_scale, scale);
        }
        S::store(out + j, S::mul(S::load(kept.exps + j, lanes), factor), lanes);
      });
    }
    write_token(in, i, slopes, out);
  }

  // The same from the logits and the statistics of a row alone: x_j = z_j / T - m, where the product is
  // not rounded before the difference.
  template <bool kEntropy, class T, class O>
  static void write_grad(const RowsIn& in, int64_t i, float m, const Slopes& slopes, O* out) {
    const T* z = static_cast<const T*>(in.logits.row(i));
    const ScaledExp<S> exp(1);
    const Vec inverse_t = S::all(in.temperature.inverse(i)), minus_m = S::all(-m);
    const Vec scale = S::all(slopes.scale), entropy_scale = S::all(slopes.entropy_scale);
    const Vec mean_shift = S::all(slopes.mean_shift);
    rewrite<T, O>(in.columns, [&](int64_t j, auto lanes) FASTPO_LAMBDA {
      const Vec x = exp.floored(S::mul_add_exact(S::load(z + j, lanes), inverse_t, minus_m));
      const Vec factor = kEntropy ? S::mul_add(S::sub(mean_shift, x), entropy_scale, scale) : scale;
      S::store(out + j, S::mul(exp(x), factor), lanes);
    });
    write_token(in, i, slopes, out);
  }

  template <class O>
  static FASTPO_INLINE void write_token(const RowsIn& in, int64_t i, const Slopes& slopes, O* out) {
    const int64_t token = in.tokens[i];
    if (token >= 0 && token < in.columns) S::store(out + token, S::all(slopes.token_grad), First{1});
  }
};

}  // namespace fastpo
