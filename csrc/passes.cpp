#include "passes.h"

#include <atomic>

namespace pgolf {
namespace {

std::vector<const Passes*> runnable() {
    std::vector<const Passes*> tables;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bf16"))
        tables.push_back(&passes_avx512);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) tables.push_back(&passes_avx2);
#endif
    tables.push_back(&passes_portable);
    return tables;
}

std::atomic<const Passes*> chosen{nullptr};

}  // namespace

const Passes& passes() {
    const Passes* table = chosen.load(std::memory_order_relaxed);
    if (!table) chosen.store(table = runnable().front(), std::memory_order_relaxed);
    return *table;
}

bool choose_passes(const std::string& name) {
    for (const Passes* table : runnable())
        if (name == "auto" || name == table->name) {
            chosen.store(table, std::memory_order_relaxed);
            return true;
        }
    return false;
}

std::vector<std::string> runnable_passes() {
    std::vector<std::string> names;
    for (const Passes* table : runnable()) names.emplace_back(table->name);
    return names;
}

}  // namespace pgolf
