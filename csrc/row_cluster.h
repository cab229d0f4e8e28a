// Row-resident primitives: a row lies in the shared memory of a cluster of thread blocks, read from memory
// once, and its gradient is made from there.
//
// A program is written once, for any Machine that can run it. The GPU's runs it in every thread of the
// cluster (row_cluster.cu); a CPU's, for tests, runs it once and loops over blocks and threads inside:
//
//   load(row, columns)      every block gets its slice of the row, filled up to whole vectors with -inf
//   reduce(value_of, op)    value_of(slice, thread) of all threads, merged in an order that is fixed: over the
//                           lanes of a warp as a butterfly, then warps, then blocks, both first to last.
//                           Once for each type of value, since its storage is not waited for again
//   once(make)              the Slopes that one warp of every block computes
//   each(work)              work(slice, thread) in all threads
//   block_barrier(), wait_until_loaded() by every block, first(): whether to write a row's outputs
//
// Which thread sums which column depends on V and the dtype alone, not on where the row lies, so that the
// bits of a row do not depend on N, on strides or on being in place.
#pragma once

#include "row_scalars.h"
#include "row_words.h"

namespace fastpo::cluster {

constexpr int kThreads = 256;  // of a block
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr int kMaxBlocks = 8;  // of a cluster, on every GPU that has them
// A slice that lets four blocks or more share a processor, so that one loads while another computes.
constexpr int64_t kSliceBytes = 48 << 10;
constexpr float kLog2E = 1.4426950408889634f;

// How a row is cut: block b has the columns from b * share on, share at most.
struct Cut {
  int blocks = 0;  // 0: the row does not fit
  int share = 0;   // a multiple of the vectors' width
};

inline Cut cut_of(int64_t columns, int64_t item_size, int64_t most_bytes) {
  for (int blocks = 1; blocks <= kMaxBlocks; blocks *= 2) {
    const int64_t vectors = (columns * item_size + blocks * 16 - 1) / (blocks * 16);
    const int64_t bytes = vectors * 16;
    if (bytes <= most_bytes && (bytes <= kSliceBytes || blocks == kMaxBlocks))
      return {blocks, int(bytes / item_size)};
  }
  return {};
}

// A block's columns of a row, in shared memory.
struct Slice {
  Vector* vectors = nullptr;
  int64_t begin = 0;  // first column
  int columns = 0;

  template <class T>
  FASTPO_DEVICE int count() const {
    return (columns + kPerVector<T> - 1) / kPerVector<T>;
  }
  template <class T>
  FASTPO_DEVICE float at(int j) const {
    return to_float(reinterpret_cast<const T*>(vectors)[j]);
  }
};

FASTPO_DEVICE Slice slice_of(const Cut& cut, int block, int64_t columns, Vector* vectors) {
  const int64_t begin = int64_t(block) * cut.share, rest = columns - begin;
  return {vectors, begin, int(rest < 0 ? 0 : rest < cut.share ? rest : cut.share)};
}

struct Max {
  FASTPO_DEVICE float operator()(float a, float b) const { return max_numbers(a, b); }
};

struct Sums {
  float exps;    // of e_j = exp(x_j)
  float moment;  // of d_j e_j
};

struct Add {
  FASTPO_DEVICE Sums operator()(Sums a, Sums b) const { return {a.exps + b.exps, a.moment + b.moment}; }
};

// e = 2^(octaves d), d = gain z - offset. Exactly 0 at d = floor, to which d = -inf is raised where it is
// multiplied by e.
struct Exponential {
  float gain, offset, octaves, floor, to_x;  // x = to_x d

  FASTPO_DEVICE Exponential(float gain, float offset, float to_x)
      : gain(gain), offset(offset), octaves(to_x * kLog2E), floor(-128.0f / octaves), to_x(to_x) {}

  FASTPO_DEVICE float shift(float z) const { return fmaf(z, gain, -offset); }
  FASTPO_DEVICE float operator()(float d) const { return exp2_flushed(d * octaves); }
  FASTPO_DEVICE float floored(float d) const { return fmaxf(d, floor); }
};

// The largest logit of a thread's vectors, or NaN if one is.
template <class T>
FASTPO_DEVICE float max_of(const Slice& slice, int thread) {
  uint32_t best[2] = {minus_infinities(T{}), minus_infinities(T{})};
#pragma unroll 4
  for (int v = thread; v < slice.count<T>(); v += kThreads) {
    const Vector vector = slice.vectors[v];
    for (int i = 0; i < 4; ++i) best[i % 2] = max_words(best[i % 2], vector.word[i], T{});
  }
  return max_in_word(max_words(best[0], best[1], T{}), T{});
}

template <class T>
FASTPO_DEVICE Sums sums_of(const Slice& slice, int thread, const Exponential& exp) {
  Sums sums[2] = {{0, 0}, {0, 0}};
#pragma unroll 2
  for (int v = thread; v < slice.count<T>(); v += kThreads) {
    float z[kPerVector<T>];
    unpack(slice.vectors[v], T{}, z);
    for (int i = 0; i < kPerVector<T>; ++i) {
      const float d = exp.shift(z[i]), e = exp(d);  // e first: a maximum drops NaN
      sums[i % 2].exps += e;
      sums[i % 2].moment = fmaf(exp.floored(d), e, sums[i % 2].moment);
    }
  }
  return Add()(sums[0], sums[1]);
}

template <bool kEntropy>
FASTPO_DEVICE float gradient_at(float z, const Exponential& exp, const Slopes& slopes) {
  const float d = exp.shift(z), e = exp(d);
  if (!kEntropy) return product_flushed(e, slopes.scale);
  const float x = exp.floored(d) * exp.to_x;
  return product_flushed(e, fmaf(slopes.mean_shift - x, slopes.entropy_scale, slopes.scale));
}

template <bool kEntropy, class T, class O>
FASTPO_DEVICE void write_slice(const Slice& slice, int thread, const Exponential& exp, const Slopes& slopes,
                               O* row) {
  constexpr int kCount = kPerVector<T>;
  O* out = row + slice.begin;
  int rest = 0;  // the first column that no vector wrote
  if (is_aligned_for<kCount>(out)) {
    const int whole = slice.columns / kCount;
#pragma unroll 2
    for (int v = thread; v < whole; v += kThreads) {
      float z[kCount];
      unpack(slice.vectors[v], T{}, z);
      for (float& number : z) number = gradient_at<kEntropy>(number, exp, slopes);
      store_aligned<kCount>(out + v * kCount, z);
    }
    rest = whole * kCount;
  }
  for (int j = rest + thread; j < slice.columns; j += kThreads)
    assign(out[j], gradient_at<kEntropy>(slice.at<T>(j), exp, slopes));
}

template <int kCount, class O>
FASTPO_DEVICE void zero_slice(const Slice& slice, int thread, O* row) {
  O* out = row + slice.begin;
  int rest = 0;
  if (is_aligned_for<kCount>(out)) {
    constexpr float kZeros[kCount] = {};
    for (int v = thread; v < slice.columns / kCount; v += kThreads)
      store_aligned<kCount>(out + v * kCount, kZeros);
    rest = slice.columns / kCount * kCount;
  }
  for (int j = rest + thread; j < slice.columns; j += kThreads) assign(out[j], 0.0f);
}

template <class T, class Machine, class O>
FASTPO_DEVICE void fill_zero(Machine& machine, O* row) {
  machine.each([&](const Slice& slice, int thread) { zero_slice<kPerVector<T>>(slice, thread, row); });
}

// The gradient of a loaded row. All of it must have been read, wherever `row` lies.
template <class T, class Machine, class O>
FASTPO_DEVICE void write_gradient(Machine& machine, const Exponential& exp, const Slopes& slopes,
                                  int64_t token, O* row) {
  machine.each([&](const Slice& slice, int thread) {
    if (slopes.entropy_scale == 0)
      write_slice<false, T>(slice, thread, exp, slopes, row);
    else
      write_slice<true, T>(slice, thread, exp, slopes, row);
  });
  machine.block_barrier();
  machine.each([&](const Slice& slice, int thread) {
    if (thread == 0 && token >= slice.begin && token < slice.begin + slice.columns)
      assign(row[token], product_flushed(slopes.token_grad, 1.0f));
  });
}

FASTPO_DEVICE float temperature_of(const RowsIn& in, int64_t i) {
  return in.temperature.per_row ? in.temperature.per_row[i] : float(in.temperature.value);
}

// The two reductions of a loaded row, and whom they are relative to.
struct Swept {
  float max, inverse_t, token_shift;  // of z; (z_y - max) / T, NaN for a token outside the row
  Sums sums;

  FASTPO_DEVICE Exponential exponential() const { return {1.0f, max, inverse_t}; }

  FASTPO_DEVICE Summary summary() const {
    const float log_sum = logf(sums.exps), mean_shift = sums.moment / sums.exps * inverse_t;
    Summary row;
    row.row_max = max;
    row.inverse_t = inverse_t;
    row.exp_sum = sums.exps;
    row.log_sum = log_sum;
    row.mean_shift = mean_shift;
    // Of the right sign without a bound: the largest logit adds exactly 1 to the sum, and no d is above 0.
    row.logprob = token_shift - log_sum;
    row.entropy = log_sum - mean_shift;
    return row;
  }
};

// Loads row i and sweeps it twice. The token's logit is read before any block can write a gradient.
template <class T, class Machine>
FASTPO_DEVICE Swept sweep(Machine& machine, const RowsIn& in, int64_t i) {
  const T* z = static_cast<const T*>(in.logits.row(i));
  machine.load(z, in.columns);
  const int64_t token = in.tokens[i];
  const float token_logit = token >= 0 && token < in.columns ? to_float(z[token]) : NAN;
  Swept row;
  row.inverse_t = 1.0f / temperature_of(in, i);
  row.max = machine.reduce([](const Slice& slice, int thread) { return max_of<T>(slice, thread); }, Max());
  const Exponential exp = row.exponential();
  row.sums =
      machine.reduce([&](const Slice& slice, int thread) { return sums_of<T>(slice, thread, exp); }, Add());
  row.token_shift = (token_logit - row.max) * row.inverse_t;
  return row;
}

template <class T, class Machine>
FASTPO_DEVICE void stats_row(Machine& machine, const StatsParams& p, int64_t i) {
  Summary row = {};
  if (!p.mask || p.mask[i]) {
    const Swept swept = sweep<T>(machine, p.in, i);
    if (machine.first()) row = swept.summary();
  }
  if (machine.first()) store_stats(p, i, row);
}

template <class T, class O, class Machine>
FASTPO_DEVICE void grad_row(Machine& machine, const GradParams& p, int64_t i) {
  O* out = static_cast<O*>(p.out.row(i));
  if (p.logprob_grad[i] == 0 && (!p.entropy_grad || p.entropy_grad[i] == 0))
    return fill_zero<T>(machine, out);
  machine.load(static_cast<const T*>(p.in.logits.row(i)), p.in.columns);
  const float inverse_t = 1.0f / temperature_of(p.in, i);
  const Slopes slopes = machine.once([&] { return grad_slopes(p, i, inverse_t); });
  machine.wait_until_loaded();  // a narrower gradient lies over other blocks' slices
  write_gradient<T>(machine, Exponential(inverse_t, p.row_max[i], 1.0f), slopes, p.in.tokens[i], out);
}

template <class T, class O, class Machine>
FASTPO_DEVICE void policy_loss_row(Machine& machine, const LossParams& p, int64_t i) {
  O* out = p.out.data ? static_cast<O*>(p.out.row(i)) : nullptr;
  if (!mask_of(p, i)) {
    if (machine.first()) store_losses(p, i, {}, {});
    if (out) fill_zero<T>(machine, out);
    return;
  }
  const Swept swept = sweep<T>(machine, p.in, i);
  const Slopes slopes = machine.once([&]() -> Slopes {
    const Summary row = swept.summary();
    const RowLoss loss = row_loss(p, i, row);
    if (machine.first()) store_losses(p, i, row, loss);
    const float e = p.entropy_weight ? -p.entropy_weight[i] : 0.0f;
    if (loss.slope == 0 && e == 0) return {};
    return slopes_of(loss.slope, e, 1.0f / row.exp_sum, row);
  });
  if (!out) return;
  if (slopes.scale == 0 && slopes.entropy_scale == 0 && slopes.token_grad == 0)
    fill_zero<T>(machine, out);
  else
    write_gradient<T>(machine, swept.exponential(), slopes, p.in.tokens[i], out);
}

// row *= factor, by `threads` threads; no cluster is needed for it.
template <class T>
FASTPO_DEVICE void scale_row(T* row, int64_t columns, float factor, int thread, int threads) {
  constexpr int kCount = kPerVector<T>;
  int64_t rest = 0;
  if (is_aligned_for<kCount>(row)) {
    const int64_t whole = columns / kCount;
    for (int64_t v = thread; v < whole; v += threads) {
      float g[kCount];
      unpack(reinterpret_cast<const Vector*>(row)[v], T{}, g);
      for (float& number : g) number = product_flushed(number, factor);
      store_aligned<kCount>(row + v * kCount, g);
    }
    rest = whole * kCount;
  }
  for (int64_t j = rest + thread; j < columns; j += threads)
    assign(row[j], product_flushed(to_float(row[j]), factor));
}

}  // namespace fastpo::cluster
