#include "pool.h"

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace pgolf {

GompParallel gomp_parallel() {
#if defined(__linux__)
    // PyTorch loads its libgomp with global symbols. Linking another libgomp would start a second set of threads. Until
    // it is found it is looked for again: PyTorch may be imported later.
    static std::atomic<GompParallel> found{nullptr};
    GompParallel known = found.load(std::memory_order_relaxed);
    if (!known) {
        known = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
        found.store(known, std::memory_order_relaxed);
    }
    return known;
#else
    return nullptr;
#endif
}

}  // namespace pgolf
