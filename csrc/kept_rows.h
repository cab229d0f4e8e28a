// Rows over their kept sets: a row n has a few token ids of its own, ids[offsets[n] .. offsets[n + 1]), and
// its softmax is over these alone. No torch header here; fastpo/backends/base.py is the specification.
//
// Only the logits of kept ids are computed, as gathered dot products of hidden states with rows of the head;
// the gradients are gathered sums of the same rows. A row without ids is not of this kind and is left
// alone; one with a single id has log-prob 0, no entropy, no gradient, and reads nothing.
#pragma once

#include "rows.h"

namespace fastpo {

struct KeptIn {
  Matrix hidden;                     // (N, D)
  Matrix weight;                     // (V, D), of the same dtype
  const void* bias = nullptr;        // (V,), of the same dtype
  int64_t width = 0;                 // D
  int64_t vocabulary = 0;            // V
  const int64_t* tokens = nullptr;   // (N,)
  const int64_t* ids = nullptr;      // (M,)
  const int64_t* offsets = nullptr;  // (N + 1,)
  Temperature temperature;
  float gain = 1;       // z = gain * (h . w + b), or its tanh
  bool capped = false;  // whether tanh follows

  FASTPO_INLINE int64_t size(int64_t i) const { return offsets[i + 1] - offsets[i]; }
};

struct KeptStatsParams {
  KeptIn in;
  const bool* mask = nullptr;  // (N,)
  float* logits = nullptr;     // (M,), z, out, as all below; 0 where no gradient comes of it
  float* logprobs = nullptr;   // (N,)
  float* entropy = nullptr;
  float* row_max = nullptr;
  float* log_sum = nullptr;
};

struct KeptGradParams {
  KeptIn in;
  const float* logits = nullptr;    // (M,), of kept_stats, as the next four
  const float* logprobs = nullptr;  // (N,)
  const float* entropy = nullptr;
  const float* row_max = nullptr;
  const float* log_sum = nullptr;
  const float* logprob_grad = nullptr;  // (N,), c
  const float* entropy_grad = nullptr;  // (N,), e
  float* slopes = nullptr;              // (M,), dL/d(h . w + b), out
  Matrix hidden_grad;                   // (N, D), out; data null: not wanted
};

// One summand of a row of dW: slope * h_row.
struct KeptPair {
  int64_t row;
  float slope;
};

// dW and db from pairs sorted by id, and by row within an id: the order of the sums.
struct KeptWeightParams {
  Matrix hidden;                    // (N, D)
  int64_t width = 0;                // D
  const KeptPair* pairs = nullptr;  // those of id v: pairs[ends[v - 1] .. ends[v])
  const int64_t* ends = nullptr;    // (V,)
  Matrix weight_grad;               // (V, D), out; data null: not wanted
  Matrix bias_grad;                 // (V, 1), out; data null: not wanted
  bool add = false;                 // add to what is there; else every row is written, zeros included
};

// Compiled for one instruction set. `scratch` holds D floats.
struct KeptKernelTable {
  void (*stats)(const KeptStatsParams&, int64_t begin, int64_t end);                         // rows
  void (*hidden_grad)(const KeptGradParams&, int64_t begin, int64_t end, float* scratch);    // rows
  void (*weight_grad)(const KeptWeightParams&, int64_t begin, int64_t end, float* scratch);  // ids
};

}  // namespace fastpo
