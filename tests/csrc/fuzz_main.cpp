// Turns a fuzz driver into a program that needs no clang:
//   fuzz_<target> [-runs=N] [-max_total_time=SECONDS] [-seed=S] [FILE...]
// with libFuzzer's options. Input i depends only on seed and i: when the child that runs them dies, or hangs for a
// minute, the parent generates the same input again and writes it to a file.
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <fstream>
#include <string>

#include "fuzz.h"

namespace {

using fuzz::Bytes;

Bytes input(uint64_t seed, uint64_t run) {
    fuzz::Random random(seed ^ run * UINT64_C(0xd1342543de82ef95));
    return fuzz::make_input(random);
}

// Runs until either limit (0: none); `run` is the current index.
void campaign(uint64_t runs, double seconds, uint64_t seed, volatile uint64_t& run) {
    const auto start = std::chrono::steady_clock::now();
    const auto elapsed = [&] {
        return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    };
    for (run = 0; runs == 0 || run < runs; run = run + 1) {
        if (run % 1024 == 0) {
            alarm(60);
            if (seconds > 0 && elapsed() > seconds) break;
        }
        const Bytes bytes = input(seed, run);
        LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
    }
    std::printf("%llu executions, %llu inputs accepted, %.1f s\n", static_cast<unsigned long long>(run),
                static_cast<unsigned long long>(fuzz::accepted), elapsed());
}

int repeat(const char* path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) {
        std::fprintf(stderr, "%s cannot be read\n", path);
        return 2;
    }
    const Bytes bytes((std::istreambuf_iterator<char>(file)), {});
    LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
    std::printf("%s: survived\n", path);
    return 0;
}

const char* value_of(const char* argument, const char* name) {
    const size_t length = std::strlen(name);
    return std::strncmp(argument, name, length) == 0 ? argument + length : nullptr;
}

}  // namespace

int main(int argc, char** argv) {
    uint64_t runs = 0, seed = 0;
    double seconds = 0;
    for (int i = 1; i < argc; i++) {
        if (const char* value = value_of(argv[i], "-runs="))
            runs = std::strtoull(value, nullptr, 10);
        else if (const char* value = value_of(argv[i], "-max_total_time="))
            seconds = std::atof(value);
        else if (const char* value = value_of(argv[i], "-seed="))
            seed = std::strtoull(value, nullptr, 10);
        else if (const int status = repeat(argv[i]))
            return status;
        else if (i + 1 == argc)
            return 0;
    }
    void* page = mmap(nullptr, sizeof(uint64_t), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    fuzz::require(page != MAP_FAILED, "no memory to share with the child");
    volatile uint64_t& run = *static_cast<uint64_t*>(page);
    const pid_t child = fork();
    if (child == 0) {
        campaign(runs, seconds, seed, run);
        return 0;
    }
    int status = 0;
    fuzz::require(child > 0 && waitpid(child, &status, 0) == child, "the child that runs the inputs");
    if (status == 0) return 0;
    const std::string path = std::string(argv[0]) + "-crash-" + std::to_string(seed) + "-" + std::to_string(run);
    const Bytes bytes = input(seed, run);
    std::ofstream file(path, std::ios::binary);
    file.write(reinterpret_cast<const char*>(bytes.data()), std::streamsize(bytes.size()));
    std::fprintf(stderr, "execution %llu failed; again: %s %s\n", static_cast<unsigned long long>(run), argv[0],
                 path.c_str());
    return 1;
}
