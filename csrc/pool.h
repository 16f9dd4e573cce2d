// run_on_pool: like parallel_for, on the OpenMP threads that PyTorch has already started.
#pragma once

#include "parallel.h"

namespace pgolf {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// Returns GOMP_parallel of the OpenMP library that the process has loaded, or null if it has none.
GompParallel gomp_parallel();

// Calls work(i) once for every i < count, on at most `threads` threads (0: one per core); work must not throw.
// A region costs about 1 us on PyTorch's own threads, against 30 us or more for starting a std::thread. A thread takes
// the next index when it is done with one, so that a thread that the system has paused holds up one index only.
template <class Work>
void run_on_pool(size_t count, size_t threads, const Work& work) {
    const GompParallel parallel = threads == 1 || count <= 1 ? nullptr : gomp_parallel();
    if (!parallel) return parallel_for(count, threads, work);
    if (threads == 0) threads = std::max(1u, std::thread::hardware_concurrency());
    struct Job {
        const Work& work;
        const size_t count;
        std::atomic<size_t> next{0};
    } job{work, count};
    const auto run = [](void* given) {
        Job& job = *static_cast<Job*>(given);
        for (size_t i; (i = job.next.fetch_add(1, std::memory_order_relaxed)) < job.count;) job.work(i);
    };
    parallel(run, &job, static_cast<unsigned>(std::min(threads, count)), 0);
}

}  // namespace pgolf
