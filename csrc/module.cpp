// The Python module fastpo._C. Importing it registers the operators; its one function tells what was built.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "rows.h"

namespace py = pybind11;

static py::dict build_info() {
  std::vector<std::string> compiled;
  for (auto table = fastpo::compiled_row_kernels(); *table; ++table) compiled.emplace_back((*table)->simd);
  py::dict info;
  info["simd_compiled"] = compiled;
  info["simd"] = fastpo::row_kernels().simd;
  info["cuda_archs"] = py::str(FASTPO_CUDA_ARCHS).attr("split")();
  info["torch_target"] = FASTPO_TORCH_TARGET;
  info["compiler"] = __VERSION__;
  return info;
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastpo's compiled operators (torch.ops.fastpo); build_info() tells what was built.";
  m.def("build_info", &build_info,
        "SIMD levels compiled and the one in use, CUDA architectures, the oldest torch served, compiler.\n\n"
        "Raises RuntimeError when FASTPO_SIMD names a level that this CPU lacks.");
}
