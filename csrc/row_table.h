// The primitives over a range of rows: what is masked, which types meet, and the table of entry points.
//
// No gradient below 2^-126 is written: peaked logits make most of a row such, and later products in fp32
// would take 12 to 15 times as long over subnormals on some CPUs. All primitives compute so, and agree.
#pragma once

#include "row_kernels.h"

namespace fastpo {

template <class S>
struct RowTable {
  using Kernels = RowKernels<S>;

  static constexpr RowKernelTable table(const KeptKernelTable* kept) {
    return {S::name, row_stats, row_grad, row_policy_loss, scale, kept};
  }

  static void row_stats(const StatsParams& p, int64_t begin, int64_t end) {
    [[maybe_unused]] const typename S::SubnormalGuard guard;
    with_type(p.in.logits.dtype, [&](auto zero) {
      for (int64_t i = begin; i < end; ++i) stats_row<decltype(zero)>(p, i);
    });
  }

  static void row_grad(const GradParams& p, int64_t begin, int64_t end) {
    [[maybe_unused]] const typename S::SubnormalGuard guard;
    with_types(p.in.logits.dtype, p.out.dtype, [&](auto zero, auto zero_out) {
      for (int64_t i = begin; i < end; ++i) grad_row<decltype(zero), decltype(zero_out)>(p, i);
    });
  }

  static void row_policy_loss(const LossParams& p, int64_t begin, int64_t end, float* scratch) {
    [[maybe_unused]] const typename S::SubnormalGuard guard;
    const DType out_dtype = p.out.data ? p.out.dtype : p.in.logits.dtype;
    with_types(p.in.logits.dtype, out_dtype, [&](auto zero, auto zero_out) {
      for (int64_t i = begin; i < end; ++i) loss_row<decltype(zero), decltype(zero_out)>(p, i, scratch);
    });
  }

  static void scale(const ScaleParams& p, int64_t begin, int64_t end) {
    [[maybe_unused]] const typename S::SubnormalGuard guard;
    with_type(p.grad.dtype, [&](auto zero) {
      using T = decltype(zero);
      for (int64_t i = begin; i < end; ++i)
        Kernels::scale_row(static_cast<T*>(p.grad.row(i)), p.columns, p.factor);
    });
  }

  // Calls f with a zero of the element type, so that generic lambdas can name it.
  template <class F>
  static void with_type(DType dtype, F&& f) {
    switch (dtype) {
      case DType::kFloat32:
        return f(float{});
      case DType::kBFloat16:
        return f(BFloat16{});
      case DType::kFloat16:
        return f(Half{});
    }
  }

 private:
  template <class T>
  static void stats_row(const StatsParams& p, int64_t i) {
    const bool mask = !p.mask || p.mask[i];
    typename Kernels::Details details = {};
    Summary row = {};
    if (mask && p.is_top1) row = Kernels::template summarize<T>(p.in, i, details);
    if (mask && !p.is_top1) row = Kernels::template summarize<false, T>(p.in, i, {});
    if (p.is_top1) {
      p.log_sum_sq_probs[i] = details.log_sum_sq_probs;
      p.mean_logits[i] = details.mean_logit;
      p.is_top1[i] = details.is_top1;
    }
    store_stats(p, i, row);
  }

  template <class T, class O>
  static void grad_row(const GradParams& p, int64_t i) {
    O* out = static_cast<O*>(p.out.row(i));
    const float c = p.logprob_grad[i], e = p.entropy_grad ? p.entropy_grad[i] : 0.0f;
    if (c == 0 && e == 0) return Kernels::fill_zero(out, p.in.columns);
    const Slopes slopes = grad_slopes(p, i, p.in.temperature.inverse(i));
    if (e == 0)
      Kernels::template write_grad<false, T>(p.in, i, p.row_max[i], slopes, out);
    else
      Kernels::template write_grad<true, T>(p.in, i, p.row_max[i], slopes, out);
  }

  template <class T, class O>
  static void loss_row(const LossParams& p, int64_t i, float* scratch) {
    O* out = p.out.data ? static_cast<O*>(p.out.row(i)) : nullptr;
    if (!mask_of(p, i)) {
      store_losses(p, i, {}, {});
      if (out) Kernels::fill_zero(out, p.in.columns);
      return;
    }
    if (!out) {
      write_loss(p, i, Kernels::template summarize<false, T>(p.in, i, {}));
      return;
    }
    const Kept kept = {place_for_exps(p, i, out, scratch), scratch + p.in.columns};
    const Summary row = Kernels::template summarize<true, T>(p.in, i, kept);
    write_kept_grad<T>(p, i, row, write_loss(p, i, row), kept, out);
  }

  // The gradient's row can hold the exponentials if it is fp32 and the logits are not needed again.
  static float* place_for_exps(const LossParams& p, int64_t i, float* out, float* scratch) {
    return p.entropy_weight && p.entropy_weight[i] != 0 ? scratch : out;
  }
  template <class O>
  static float* place_for_exps(const LossParams&, int64_t, O*, float* scratch) {
    return scratch;
  }

  // Writes the row's loss and returns c = dloss/dlogprob.
  static float write_loss(const LossParams& p, int64_t i, const Summary& row) {
    const RowLoss loss = row_loss(p, i, row);
    store_losses(p, i, row, loss);
    return loss.slope;
  }

  template <class T, class O>
  static void write_kept_grad(const LossParams& p, int64_t i, const Summary& row, float c, const Kept& kept,
                              O* out) {
    const float e = p.entropy_weight ? -p.entropy_weight[i] : 0.0f;
    if (c == 0 && e == 0) return Kernels::fill_zero(out, p.in.columns);
    const Slopes slopes = slopes_of(c, e, 1.0f / row.exp_sum, row);
    if (e == 0)
      Kernels::template write_kept_grad<false, T>(p.in, i, row, slopes, kept, out);
    else
      Kernels::template write_kept_grad<true, T>(p.in, i, row, slopes, kept, out);
  }

  // The pairs that occur: a gradient has the logits' type, or a 2-byte type under fp32 logits.
  template <class F>
  static void with_types(DType dtype, DType out_dtype, F&& f) {
    with_type(dtype, [&](auto zero) {
      if (dtype == out_dtype) return f(zero, zero);
      if (out_dtype == DType::kBFloat16) return f(float{}, BFloat16{});
      return f(float{}, Half{});
    });
  }
};

}  // namespace fastpo
