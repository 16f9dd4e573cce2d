// The fused passes for AVX-512 with bfloat16 products.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <thread>
#include <vector>

#include "passes.h"
#include "pool.h"

#if defined(__x86_64__)
#if !defined(__clang__)  // GCC 12 warns of its own header's undefined operands
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")
#endif
#define PGOLF_LANES 16
#define PGOLF_AVX512  // intrinsics beside the compiler's vectors (simd.h)
namespace pgolf {
namespace avx512 {
#include "passes_all.h"
}  // namespace avx512
}  // namespace pgolf
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace pgolf {
const Passes passes_avx512 = avx512::table("avx512");
}  // namespace pgolf
#endif
