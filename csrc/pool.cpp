#include "pool.h"

#include "parallel.h"

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace pgolf {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// Returns GOMP_parallel of the OpenMP library that the process has loaded, or null if it has none.
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

struct Job {
    void (*work)(const void*, size_t);
    const void* context;
    const size_t count;
    std::atomic<size_t> next{0};
};

void take_work(void* given) {
    Job& job = *static_cast<Job*>(given);
    for (size_t i; (i = job.next.fetch_add(1, std::memory_order_relaxed)) < job.count;) job.work(job.context, i);
}

}  // namespace

void run_on_pool(size_t count, size_t threads, void (*work)(const void*, size_t), const void* context) {
    const GompParallel parallel = threads == 1 || count <= 1 ? nullptr : gomp_parallel();
    if (!parallel) return parallel_for(count, threads, [=](size_t i) { work(context, i); });
    if (threads == 0) threads = std::max(1u, std::thread::hardware_concurrency());
    Job job{work, context, count};
    parallel(take_work, &job, static_cast<unsigned>(std::min(threads, count)), 0);
}

}  // namespace pgolf
