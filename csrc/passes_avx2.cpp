// The fused passes for AVX2 with FMA.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <thread>
#include <vector>

#include "passes.h"
#include "pool.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define PGOLF_LANES 8
namespace pgolf {
namespace avx2 {
#include "passes_all.h"
}  // namespace avx2
}  // namespace pgolf
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace pgolf {
const Passes passes_avx2 = avx2::table("avx2");
}  // namespace pgolf
#endif
