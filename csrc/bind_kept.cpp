// Kept sets as torch operators, through libtorch's stable ABI: see kept_rows.h.
#include <torch/csrc/stable/library.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <tuple>
#include <vector>

#include "bind.h"
#include "kept_rows.h"

namespace {

using namespace fastpo::bind;
using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

fastpo::KeptIn kept_in(const Tensor& hidden, const Tensor& weight, const MaybeTensor& bias,
                       const Tensor& tokens, const Tensor& ids, const Tensor& offsets, double temperature,
                       const MaybeTensor& temperatures, double gain, bool capped) {
  const int64_t rows = hidden.size(0), kept = ids.numel();
  fastpo::KeptIn in;
  in.hidden = matrix(hidden, "hidden");
  in.weight = matrix(weight, "weight");
  in.width = hidden.size(1);
  in.vocabulary = weight.size(0);
  STD_TORCH_CHECK(weight.size(1) == in.width && in.weight.dtype == in.hidden.dtype,
                  "weight must be (V, D) with the width and dtype of hidden");
  in.bias = bias ? vector<const void>(*bias, weight.scalar_type(), in.vocabulary, "bias") : nullptr;
  in.tokens = vector<const int64_t>(tokens, ScalarType::Long, rows, "tokens");
  in.ids = vector<const int64_t>(ids, ScalarType::Long, kept, "ids");
  in.offsets = vector<const int64_t>(offsets, ScalarType::Long, rows + 1, "offsets");
  in.temperature = {floats(temperatures, rows, "temperatures"), temperature};
  in.gain = float(gain);
  in.capped = capped;
  // Everything below reads at these numbers.
  bool rising = in.offsets[0] == 0 && in.offsets[rows] == kept;
  for (int64_t i = 0; i < rows; ++i) rising &= in.offsets[i] <= in.offsets[i + 1];
  STD_TORCH_CHECK(rising, "offsets must rise from 0 to the number of ids, which is ", kept);
  for (int64_t j = 0; j < kept; ++j)
    STD_TORCH_CHECK(in.ids[j] >= 0 && in.ids[j] < in.vocabulary, "ids must lie in [0, ", in.vocabulary,
                    "), got ", in.ids[j]);
  return in;
}

// About as many kept ids as one thread deserves.
int64_t rows_per_task(const fastpo::KeptIn& in, int64_t rows, int64_t kept) {
  return rows * kElementsPerTask / (kept * in.width + 1) + 1;
}

Five kept_stats(const Tensor& hidden, const Tensor& weight, const MaybeTensor& bias, const Tensor& tokens,
                const Tensor& ids, const Tensor& offsets, double temperature, const MaybeTensor& temperatures,
                double gain, bool capped, const MaybeTensor& mask) {
  const int64_t rows = hidden.size(0), kept = ids.numel();
  fastpo::KeptStatsParams p;
  p.in = kept_in(hidden, weight, bias, tokens, ids, offsets, temperature, temperatures, gain, capped);
  p.mask = mask ? vector<const bool>(*mask, ScalarType::Bool, rows, "mask") : nullptr;
  Tensor logits = torch::stable::new_empty(hidden, {kept}, ScalarType::Float);
  Tensor logprobs = new_vector(hidden, ScalarType::Float), entropy = new_vector(hidden, ScalarType::Float);
  Tensor row_max = new_vector(hidden, ScalarType::Float), log_sum = new_vector(hidden, ScalarType::Float);
  p.logits = floats(logits, kept, "logits");
  p.logprobs = floats(logprobs, rows, "logprobs");
  p.entropy = floats(entropy, rows, "entropy");
  p.row_max = floats(row_max, rows, "row_max");
  p.log_sum = floats(log_sum, rows, "log_sum");
  const auto& kernels = fastpo::row_kernels().kept;
  torch::stable::parallel_for(0, rows, rows_per_task(p.in, rows, kept),
                              [&](int64_t begin, int64_t end) { kernels->stats(p, begin, end); });
  return {logprobs, entropy, row_max, log_sum, logits};
}

// The gradient's place (rows, width): of the operands' dtype, or fp32; absent if not given.
fastpo::Matrix gradient(const MaybeTensor& out, int64_t rows, int64_t width, fastpo::DType dtype,
                        const char* name) {
  if (!out) return {};
  const fastpo::Matrix place = matrix(*out, name);
  STD_TORCH_CHECK(out->size(0) == rows && out->size(1) == width, name, " must be ", rows, " x ", width);
  STD_TORCH_CHECK(place.dtype == dtype || place.dtype == fastpo::DType::kFloat32, name,
                  " must have the dtype of hidden, or float32");
  return place;
}

// A large gradient is fresh memory, of which Linux would hand out and clear one page of 4 KiB per fault:
// 55 of 72 ms at V = 49152, D = 576. Asking for pages of 2 MiB is a hint, and so may fail.
void prefer_huge_pages(const fastpo::Matrix& place, int64_t rows, int64_t width) {
#ifdef __linux__
  constexpr uintptr_t kPage = 1 << 12;
  const uintptr_t data = reinterpret_cast<uintptr_t>(place.data), begin = (data + kPage - 1) / kPage * kPage;
  const uintptr_t end = data + ((rows - 1) * place.row_stride + width) * item_size(place.dtype);
  if (end > begin + (1 << 22))
    madvise(reinterpret_cast<void*>(begin), (end - begin) / kPage * kPage, MADV_HUGEPAGE);
#endif
}

// Counting sort by id, stable: within an id by row. Slopes of 0 add nothing.
void sort_pairs(const fastpo::KeptIn& in, int64_t rows, const float* slopes, std::vector<int64_t>& ends,
                std::vector<fastpo::KeptPair>& pairs) {
  ends.assign(in.vocabulary + 1, 0);
  for (int64_t j = 0; j < in.offsets[rows]; ++j) ends[in.ids[j] + 1] += slopes[j] != 0;
  for (int64_t id = 0; id < in.vocabulary; ++id) ends[id + 1] += ends[id];
  pairs.resize(ends[in.vocabulary]);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = in.offsets[i]; j < in.offsets[i + 1]; ++j)
      if (slopes[j] != 0) pairs[ends[in.ids[j]]++] = {i, slopes[j]};  // then ends[id] is that id's end
}

void weight_grad(const fastpo::KeptGradParams& p, int64_t rows, const fastpo::Matrix& weight_grad,
                 const fastpo::Matrix& bias_grad, bool add) {
  std::vector<int64_t> ends;
  std::vector<fastpo::KeptPair> pairs;
  sort_pairs(p.in, rows, p.slopes, ends, pairs);
  fastpo::KeptWeightParams w;
  w.hidden = p.in.hidden;
  w.width = p.in.width;
  w.pairs = pairs.data();
  w.ends = ends.data();
  w.weight_grad = weight_grad;
  w.bias_grad = bias_grad;
  w.add = add;
  if (weight_grad.data && !add) prefer_huge_pages(weight_grad, p.in.vocabulary, p.in.width);
  const auto& kernels = fastpo::row_kernels().kept;
  torch::stable::parallel_for(0, p.in.vocabulary, kElementsPerTask / (p.in.width + 1) + 1,
                              [&](int64_t begin, int64_t end) {
                                std::vector<float> scratch(w.width);
                                kernels->weight_grad(w, begin, end, scratch.data());
                              });
}

void kept_grad(const Tensor& hidden, const Tensor& weight, const Tensor& tokens, const Tensor& ids,
               const Tensor& offsets, double temperature, const MaybeTensor& temperatures, double gain,
               bool capped, const Tensor& logits, const Tensor& logprobs, const Tensor& entropy,
               const Tensor& row_max, const Tensor& log_sum, const Tensor& logprob_grad,
               const MaybeTensor& entropy_grad, const MaybeTensor& hidden_grad,
               const MaybeTensor& weight_grad_out, const MaybeTensor& bias_grad_out, bool add) {
  const int64_t rows = hidden.size(0), kept = ids.numel();
  fastpo::KeptGradParams p;
  p.in = kept_in(hidden, weight, {}, tokens, ids, offsets, temperature, temperatures, gain, capped);
  p.logits = floats(logits, kept, "logits");
  p.logprobs = floats(logprobs, rows, "logprobs");
  p.entropy = floats(entropy, rows, "entropy");
  p.row_max = floats(row_max, rows, "row_max");
  p.log_sum = floats(log_sum, rows, "log_sum");
  p.logprob_grad = floats(logprob_grad, rows, "logprob_grad");
  p.entropy_grad = floats(entropy_grad, rows, "entropy_grad");
  const auto dtype = p.in.hidden.dtype;
  p.hidden_grad = gradient(hidden_grad, rows, p.in.width, dtype, "hidden_grad");
  const fastpo::Matrix dw = gradient(weight_grad_out, p.in.vocabulary, p.in.width, dtype, "weight_grad");
  const fastpo::Matrix db = gradient(bias_grad_out, p.in.vocabulary, 1, dtype, "bias_grad");
  STD_TORCH_CHECK(!bias_grad_out || bias_grad_out->is_contiguous(), "bias_grad must be contiguous");
  std::vector<float> slopes(kept);
  p.slopes = slopes.data();
  const auto& kernels = fastpo::row_kernels().kept;
  torch::stable::parallel_for(0, rows, rows_per_task(p.in, rows, kept), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(p.in.width);
    kernels->hidden_grad(p, begin, end, scratch.data());
  });
  if (dw.data || db.data) weight_grad(p, rows, dw, db, add);
}

#define FASTPO_KEPT_ROWS \
  "Tensor tokens, Tensor ids, Tensor offsets, float temperature, Tensor? temperatures, "

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastpo, m) {
  m.def("cpp_kept_stats(Tensor hidden, Tensor weight, Tensor? bias, " FASTPO_KEPT_ROWS
        "float gain, bool capped, Tensor? mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("cpp_kept_grad(Tensor hidden, Tensor weight, " FASTPO_KEPT_ROWS
        "float gain, bool capped, Tensor logits, Tensor logprobs, Tensor entropy, Tensor row_max, "
        "Tensor log_sum, Tensor logprob_grad, Tensor? entropy_grad, Tensor(a!)? hidden_grad, "
        "Tensor(b!)? weight_grad, Tensor(c!)? bias_grad, bool add) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastpo, CPU, m) {
  m.impl("cpp_kept_stats", TORCH_BOX(&kept_stats));
  m.impl("cpp_kept_grad", TORCH_BOX(&kept_grad));
}
