#include "kept_kernels.h"
#include "row_table.h"
#include "simd_avx2.h"

namespace fastpo {

static constexpr KeptKernelTable kAvx2Kept = KeptKernels<Avx2>::table();
const RowKernelTable kAvx2Rows = RowTable<Avx2>::table(&kAvx2Kept);

}  // namespace fastpo
