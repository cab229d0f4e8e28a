// Kept sets for any vector type S (simd_*.h), compiled per instruction set. See kept_rows.h.
#pragma once

#include <math.h>
#include <string.h>

#include "kept_rows.h"
#include "lanes.h"
#include "row_table.h"

namespace fastpo {

template <class S>
struct KeptKernels {
  using Vec = typename S::Vec;
  static constexpr int64_t W = S::width;
  static constexpr int kChains = 4;

  static constexpr KeptKernelTable table() { return {stats, hidden_grad, weight_grad}; }

  static void stats(const KeptStatsParams& p, int64_t begin, int64_t end) {
    [[maybe_unused]] const typename S::SubnormalGuard guard;
    RowTable<S>::with_type(p.in.hidden.dtype, [&](auto zero) {
      for (int64_t i = begin; i < end; ++i) stats_row<decltype(zero)>(p, i);
    });
  }

  static void hidden_grad(const KeptGradParams& p, int64_t begin, int64_t end, float* scratch) {
    [[maybe_unused]] const typename S::SubnormalGuard guard;
    const DType out_dtype = p.hidden_grad.data ? p.hidden_grad.dtype : p.in.hidden.dtype;
    with_types(p.in.hidden.dtype, out_dtype, [&](auto zero, auto zero_out) {
      for (int64_t i = begin; i < end; ++i) grad_row<decltype(zero), decltype(zero_out)>(p, i, scratch);
    });
  }

  static void weight_grad(const KeptWeightParams& p, int64_t begin, int64_t end, float* scratch) {
    [[maybe_unused]] const typename S::SubnormalGuard guard;
    if (p.weight_grad.data) {
      with_types(p.hidden.dtype, p.weight_grad.dtype, [&](auto zero, auto zero_out) {
        using T = decltype(zero);
        using O = decltype(zero_out);
        for (int64_t id = begin; id < end; ++id) weight_row<T, O>(p, id, scratch);
      });
    }
    if (p.bias_grad.data) {
      RowTable<S>::with_type(p.bias_grad.dtype, [&](auto zero) {
        for (int64_t id = begin; id < end; ++id) bias_row<decltype(zero)>(p, id);
      });
    }
  }

 private:
  template <class T>
  static FASTPO_INLINE float number(const T* p) {
    return S::first(S::load(p, First{1}));
  }

  // a . b, while the cache fetches `next`, the row of the next dot product.
  template <class T>
  static FASTPO_INLINE float dot(const T* a, const T* b, int64_t size, const T* next) {
    Vec sums[kChains];
    for (Vec& s : sums) s = S::all(0);
    int64_t j = 0;
    for (; j + kChains * W <= size; j += kChains * W) {
      prefetch<kChains>(next + j);
#pragma GCC unroll 4
      for (int k = 0; k < kChains; ++k)
        sums[k] = S::mul_add(S::load(a + j + k * W, All{}), S::load(b + j + k * W, All{}), sums[k]);
    }
    for (; j + W <= size; j += W) sums[0] = S::mul_add(S::load(a + j, All{}), S::load(b + j, All{}), sums[0]);
    float sum = S::sum(S::add(S::add(sums[0], sums[1]), S::add(sums[2], sums[3])));
    for (; j < size; ++j) sum += number(a + j) * number(b + j);
    return sum;
  }

  template <int kVectors, class T>
  static FASTPO_INLINE void prefetch(const T* p) {
    constexpr int64_t kLine = 64 / sizeof(T);
    for (int64_t j = 0; j < kVectors * W; j += kLine) __builtin_prefetch(p + j);
  }

  // sum += factor * x
  template <class T>
  static FASTPO_INLINE void accumulate(float* sum, float factor, const T* x, int64_t size, const T* next) {
    const Vec factors = S::all(factor);
    int64_t j = 0;
    for (; j + 2 * W <= size; j += 2 * W) {
      prefetch<2>(next + j);
#pragma GCC unroll 2
      for (int64_t k = j; k < j + 2 * W; k += W)
        S::store(sum + k, S::mul_add(factors, S::load(x + k, All{}), S::load(sum + k, All{})), All{});
    }
    for (; j < size; ++j) sum[j] += factor * number(x + j);
  }

  // out = sum, or out += sum
  template <class O>
  static FASTPO_INLINE void put(O* out, const float* sum, int64_t size, bool add) {
    int64_t j = 0;
    for (; j + W <= size; j += W) {
      const Vec x = S::load(sum + j, All{});
      S::store(out + j, add ? S::add(S::load(out + j, All{}), x) : x, All{});
    }
    for (; j < size; ++j) S::store(out + j, S::all(add ? number(out + j) + sum[j] : sum[j]), First{1});
  }

  // The weight row of kept id `at`, or of the last one.
  template <class T>
  static FASTPO_INLINE const T* head_row(const KeptIn& in, int64_t at, int64_t end) {
    return static_cast<const T*>(in.weight.row(in.ids[at < end ? at : end - 1]));
  }

  template <class T>
  static FASTPO_INLINE float logit(const KeptIn& in, const T* hidden, int64_t at, int64_t end) {
    float product = dot(hidden, head_row<T>(in, at, end), in.width, head_row<T>(in, at + 1, end));
    if (in.bias) product += number(static_cast<const T*>(in.bias) + in.ids[at]);
    const float z = in.gain * product;
    return in.capped ? tanhf(z) : z;
  }

  template <class T>
  static void stats_row(const KeptStatsParams& p, int64_t i) {
    const KeptIn& in = p.in;
    const int64_t begin = in.offsets[i], end = in.offsets[i + 1];
    p.logprobs[i] = p.entropy[i] = p.row_max[i] = p.log_sum[i] = 0;
    for (int64_t j = begin; j < end; ++j) p.logits[j] = 0;
    if ((p.mask && !p.mask[i]) || begin == end) return;
    if (end - begin == 1) {
      if (in.ids[begin] != in.tokens[i]) p.logprobs[i] = NAN;
      return;
    }
    const T* hidden = static_cast<const T*>(in.hidden.row(i));
    float max = -INFINITY, token = NAN;
    for (int64_t j = begin; j < end; ++j) {
      const float z = p.logits[j] = logit(in, hidden, j, end);
      if (z > max) max = z;
      if (in.ids[j] == in.tokens[i]) token = z;
    }
    write_stats(p, i, max, token);
  }

  // The few exponentials of a row in double.
  static void write_stats(const KeptStatsParams& p, int64_t i, float max, float token) {
    const double temperature = p.in.temperature.of(i);
    double exps = 0, weighted = 0;
    for (int64_t j = p.in.offsets[i]; j < p.in.offsets[i + 1]; ++j) {
      const double x = (double(p.logits[j]) - max) / temperature, e = ::exp(x);
      exps += e;
      if (e != 0) weighted += x * e;  // NaN is not 0
    }
    const double log_sum = ::log(exps), logprob = (double(token) - max) / temperature - log_sum;
    const double entropy = log_sum - weighted / exps, row_max = max / temperature;
    p.logprobs[i] = logprob > 0 ? 0.0f : float(logprob);
    p.entropy[i] = entropy < 0 ? 0.0f : float(entropy);
    p.row_max[i] = float(row_max);
    p.log_sum[i] = float(log_sum + (row_max - p.row_max[i]));
  }

  template <class T, class O>
  static void grad_row(const KeptGradParams& p, int64_t i, float* sum) {
    const KeptIn& in = p.in;
    const int64_t begin = in.offsets[i], end = in.offsets[i + 1];
    if (begin == end) return;
    const float c = p.logprob_grad[i], e = p.entropy_grad ? p.entropy_grad[i] : 0.0f;
    const bool flat = end - begin == 1 || (c == 0 && e == 0);
    for (int64_t j = begin; j < end; ++j) p.slopes[j] = flat ? 0.0f : slope(p, i, j, c, e);
    if (!p.hidden_grad.data) return;
    memset(sum, 0, in.width * sizeof(float));
    for (int64_t j = begin; j < end && !flat; ++j)
      accumulate(sum, p.slopes[j], head_row<T>(in, j, end), in.width, head_row<T>(in, j + 1, end));
    put(static_cast<O*>(p.hidden_grad.row(i)), sum, in.width, false);
  }

  // dL/d(h . w + b) of kept id j.
  static float slope(const KeptGradParams& p, int64_t i, int64_t j, float c, float e) {
    const double inverse_t = 1.0 / p.in.temperature.of(i), z = p.logits[j];
    const double shift = z * inverse_t - p.row_max[i], x = shift - p.log_sum[i], prob = ::exp(x);
    const bool is_token = p.in.ids[j] == p.in.tokens[i];
    double slope = c * (is_token ? -::expm1(double(p.logprobs[i])) : -prob);
    if (e != 0 && prob != 0) slope -= e * prob * (x + p.entropy[i]);  // E_p[u] - u_j = -(x_j + H)
    if (p.in.capped) slope *= 1 - z * z;
    return float(slope * inverse_t * p.in.gain);
  }

  template <class T, class O>
  static void weight_row(const KeptWeightParams& p, int64_t id, float* sum) {
    const int64_t begin = id ? p.ends[id - 1] : 0, end = p.ends[id];
    O* out = static_cast<O*>(p.weight_grad.row(id));
    if (begin == end) {
      if (!p.add) memset(out, 0, p.width * sizeof(O));
      return;
    }
    memset(sum, 0, p.width * sizeof(float));
    for (int64_t k = begin; k < end; ++k) {
      const auto row = [&](int64_t at) { return static_cast<const T*>(p.hidden.row(p.pairs[at].row)); };
      accumulate(sum, p.pairs[k].slope, row(k), p.width, row(k + 1 < end ? k + 1 : k));
    }
    put(out, sum, p.width, p.add);
  }

  template <class O>
  static void bias_row(const KeptWeightParams& p, int64_t id) {
    const int64_t begin = id ? p.ends[id - 1] : 0, end = p.ends[id];
    O* out = static_cast<O*>(p.bias_grad.data) + id;
    if (begin == end && p.add) return;
    float sum = p.add ? number(out) : 0.0f;
    for (int64_t k = begin; k < end; ++k) sum += p.pairs[k].slope;
    S::store(out, S::all(sum), First{1});
  }

  // The pairs that occur: a gradient has the operands' type, or is fp32.
  template <class F>
  static void with_types(DType dtype, DType out_dtype, F&& f) {
    RowTable<S>::with_type(dtype, [&](auto zero) {
      if (dtype == out_dtype) return f(zero, zero);
      return f(zero, float{});
    });
  }
};

}  // namespace fastpo
