#include "kept_kernels.h"
#include "row_table.h"
#include "simd_portable.h"

namespace fastpo {

static constexpr KeptKernelTable kPortableKept = KeptKernels<Portable>::table();
const RowKernelTable kPortableRows = RowTable<Portable>::table(&kPortableKept);

}  // namespace fastpo
