// What the operators' bindings share: tensors checked and seen as plain pointers.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "rows.h"

namespace fastpo::bind {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kElementsPerTask = 32768;  // below this a row is not worth a thread of its own

inline DType dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, "this backend takes float32, bfloat16 or float16 matrices; convert first");
  }
}

// Where all tensors of an operator must lie.
struct Place {
  bool cuda = false;
  int32_t index = -1;

  bool has(const Tensor& x) const { return cuda ? x.is_cuda() && x.get_device_index() == index : x.is_cpu(); }
  const char* name() const { return cuda ? "CUDA" : "CPU"; }
};

inline Matrix matrix(const Tensor& x, const char* name, const Place& place = {}) {
  STD_TORCH_CHECK(place.has(x) && x.dim() == 2, name, " must be a 2-D ", place.name(),
                  " tensor (N, V) on the operator's device, got ", x.dim(), "-D");
  STD_TORCH_CHECK(x.size(1) <= 1 || x.stride(1) == 1, name, " must have unit stride along V");
  return {x.data_ptr(), dtype_of(x.scalar_type()), x.stride(0)};
}

// The data of a contiguous (N,) vector.
template <class T>
T* vector(const Tensor& x, ScalarType type, int64_t rows, const char* name, const Place& place = {}) {
  STD_TORCH_CHECK(place.has(x) && x.scalar_type() == type && x.numel() == rows && x.is_contiguous(), name,
                  " must be a contiguous ", place.name(), " vector of the operator's device and dtype with ",
                  rows, " elements");
  return static_cast<T*>(x.data_ptr());
}

inline float* floats(const Tensor& x, int64_t rows, const char* name, const Place& place = {}) {
  return vector<float>(x, ScalarType::Float, rows, name, place);
}

inline const float* floats(const MaybeTensor& x, int64_t rows, const char* name, const Place& place = {}) {
  return x ? floats(*x, rows, name, place) : nullptr;
}

inline Tensor new_vector(const Tensor& like, ScalarType type) {
  return torch::stable::new_empty(like, {like.size(0)}, type);
}

}  // namespace fastpo::bind
