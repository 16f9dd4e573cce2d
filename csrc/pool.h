// run_on_pool: like parallel_for, on the OpenMP threads that PyTorch has already started.
#pragma once

#include <cstddef>

namespace pgolf {

// Calls work(context, i) once for every i < count, on at most `threads` threads (0: one per core); work must not throw.
// A parallel region costs about 1 us on PyTorch's own threads; starting a std::thread takes 30 us or more. Threads take
// one index at a time, so that a thread that the system has paused holds up only one.
void run_on_pool(size_t count, size_t threads, void (*work)(const void* context, size_t i), const void* context);

// Calls work(i). The threading itself is not a template, or it would be compiled for each pass and instruction set.
template <class Work>
void run_on_pool(size_t count, size_t threads, const Work& work) {
    run_on_pool(count, threads, [](const void* given, size_t i) { (*static_cast<const Work*>(given))(i); }, &work);
}

}  // namespace pgolf
