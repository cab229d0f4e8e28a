// Generalized advantage estimation: a reverse scan of every sequence, on the CPU and on CUDA. No torch header.
//
// fastpo.critic._specified is the specification. Everything is fp64: a recurrence of thousands of steps.
#pragma once

#include <stdint.h>

#include "token_loss.h"

namespace fastpo {

struct GaeParams {
  int64_t count = 0;                 // N
  const double* rewards = nullptr;   // (N,)
  const double* values = nullptr;    // (N,)
  const bool* mask = nullptr;        // (N,); null: all rows count
  int64_t sequences = 0;             // B
  const int64_t* offsets = nullptr;  // (B + 1,)
  double gamma = 1;
  double decay = 1;              // gamma * lam
  double* advantages = nullptr;  // (N,), out; 0 under a false mask

  FASTPO_SCALAR_MEMBER bool counts(int64_t i) const { return !mask || mask[i]; }
};

// A coefficient of 0 ends the recurrence: what follows, NaN included, is not looked at.
FASTPO_SCALAR double times(double coefficient, double x) { return coefficient == 0 ? 0 : coefficient * x; }

// Consecutive rows as a function of what stands behind them, the next value V and advantage A: their first
// row's advantage is `advantage` + `decay` A + `bootstrap` V. Rows that do not count are stepped over.
struct GaeRun {
  double advantage = 0;
  double decay = 1;
  double bootstrap = 0;
  double value = 0;  // of the first row that counts
  bool counts = false;
};

FASTPO_SCALAR GaeRun run_of(const GaeParams& p, int64_t i) {
  if (!p.counts(i)) return {};
  return {p.rewards[i] - p.values[i], p.decay, p.gamma, p.values[i], true};
}

// `left` followed by `right`.
FASTPO_SCALAR GaeRun joined(const GaeRun& left, const GaeRun& right) {
  GaeRun run;
  run.advantage = left.advantage + times(left.decay, right.advantage);
  run.bootstrap = times(left.decay, right.bootstrap);
  if (right.counts)
    run.advantage += times(left.bootstrap, right.value);
  else
    run.bootstrap += left.bootstrap;
  run.decay = left.decay * right.decay;
  run.value = left.counts ? left.value : right.value;
  run.counts = left.counts || right.counts;
  return run;
}

namespace gae {

constexpr int kThreads = 256;  // rows of a tile; their runs are in shared memory twice

// The advantages of sequence b by one block, from its last tile to its first. block.each(f) calls f(thread) for
// every thread, and waits for all of them. A row's bits depend on its own sequence alone.
template <class Block>
FASTPO_SCALAR_MEMBER void scan_sequence(Block& block, const GaeParams& p, int64_t b, GaeRun* runs,
                                        GaeRun* others, GaeRun* behind) {
  const auto inside = [&](int64_t row) { return row < 0 ? int64_t(0) : row > p.count ? p.count : row; };
  const int64_t begin = inside(p.offsets[b]), end = inside(p.offsets[b + 1]);
  const int64_t tiles = end > begin ? (end - begin + kThreads - 1) / kThreads : 0;
  block.each([&](int thread) {
    if (thread == 0) *behind = {0, 0, 0, 0, true};  // past the end: value and advantage 0
  });
  for (int64_t tile = tiles - 1; tile >= 0; --tile) {
    const int64_t first = begin + tile * kThreads;
    block.each([&](int thread) {
      const int64_t row = first + thread;
      runs[thread] = row < end ? run_of(p, row) : GaeRun{};
    });
    GaeRun *from = runs, *to = others;
    for (int apart = 1; apart < kThreads; apart *= 2) {  // then runs[t] spans rows t ... t + 2 apart - 1
      block.each([&](int t) { to[t] = t + apart < kThreads ? joined(from[t], from[t + apart]) : from[t]; });
      GaeRun* swap = from;
      from = to;
      to = swap;
    }
    block.each([&](int thread) {
      const int64_t row = first + thread;
      to[thread] = joined(from[thread], *behind);
      if (row < end) p.advantages[row] = p.counts(row) ? to[thread].advantage : 0.0;
    });
    block.each([&](int thread) {
      if (thread == 0) *behind = to[0];
    });
  }
}

}  // namespace gae
}  // namespace fastpo

// One launch on `stream`; returns a cudaError_t. Plain C, so that nothing here depends on a torch ABI.
extern "C" int fastpo_gae_cuda(const fastpo::GaeParams* p, void* stream);
