// parallel_for: indices 0 .. count-1 over threads; the first exception is rethrown on the caller's thread.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace pgolf {

// Calls work(i) once for every i < count, on at most `threads` threads (0: one per core).
// A thread takes the next index when it is done with one, so uneven pieces balance; the order is not fixed.
template <class Work>
void parallel_for(size_t count, size_t threads, const Work& work) {
    if (threads == 0) threads = std::max(1u, std::thread::hardware_concurrency());
    threads = std::min(threads, count);
    if (threads <= 1) {
        for (size_t i = 0; i < count; i++) work(i);
        return;
    }
    std::atomic<size_t> next{0};
    std::exception_ptr failure;
    std::mutex guard;
    const auto run = [&] {
        for (size_t i; (i = next++) < count;) try {
                work(i);
            } catch (...) {
                const std::lock_guard<std::mutex> lock(guard);
                if (!failure) failure = std::current_exception();
                next = count;
            }
    };
    std::vector<std::thread> others;
    try {
        for (size_t i = 1; i < threads; i++) others.emplace_back(run);
    } catch (const std::system_error&) {  // no more threads can start: those that run do all the work
    }
    run();
    for (auto& thread : others) thread.join();
    if (failure) std::rethrow_exception(failure);
}

}  // namespace pgolf
