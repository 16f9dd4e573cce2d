// The fused passes for any CPU: vectors of 4, which SSE2 and NEON have.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <thread>
#include <vector>

#include "passes.h"
#include "pool.h"

#define PGOLF_LANES 4
namespace pgolf {
namespace portable {
#include "passes_all.h"
}  // namespace portable
}  // namespace pgolf

namespace pgolf {
const Passes passes_portable = portable::table("portable");
}  // namespace pgolf
