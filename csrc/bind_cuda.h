// The device and the stream that an operator's launch goes to.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

// Weak: a CPU-only torch lacks it, and the module must load there too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace fastpo::bind {

// Makes the device of `x` the current one for as long as it lives.
class CurrentStream {
 public:
  explicit CurrentStream(const torch::stable::Tensor& x) : guard_(x.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "this torch was built without CUDA");
    aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream_);
  }

  void* get() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

}  // namespace fastpo::bind
