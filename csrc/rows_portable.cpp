#include "row_table.h"
#include "simd_portable.h"

namespace fastpo {

const RowKernelTable kPortableRows = RowTable<Portable>::table();

}  // namespace fastpo
