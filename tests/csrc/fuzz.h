// Helpers of the fuzz drivers. A driver is one fuzz_<target>.cpp that defines LLVMFuzzerTestOneInput, which must
// survive any input, and fuzz::make_input. Linked with fuzz_main.cpp it is a standalone program; with clang's -fsanitize=fuzzer
// and fuzz_libfuzzer.cpp it is a libFuzzer target. In both, `fuzz_<target> FILE` repeats one input.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace fuzz {

using Bytes = std::vector<uint8_t>;

// SplitMix64.
class Random {
   public:
    explicit Random(uint64_t seed) : state_(seed) {}
    uint64_t operator()() {
        uint64_t z = state_ += UINT64_C(0x9e3779b97f4a7c15);
        z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
        z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
        return z ^ z >> 31;
    }
    size_t below(size_t n) { return size_t((*this)() % n); }
    bool one_in(size_t n) { return below(n) == 0; }

   private:
    uint64_t state_;
};

// Returns an input that depends only on the state of `random`. Every driver defines it.
Bytes make_input(Random& random);

// Inputs that passed every check; they show how deep a campaign went.
inline uint64_t accepted = 0;

inline void require(bool condition, const char* what) {
    if (condition) return;
    std::fprintf(stderr, "wrong: %s\n", what);
    std::abort();
}

inline void append(Bytes& bytes, uint64_t value, size_t count) {
    for (size_t i = 0; i < count; i++) bytes.push_back(uint8_t(value >> 8 * i));
}

inline uint64_t number(const uint8_t* bytes, size_t count) {
    uint64_t value = 0;
    for (size_t i = 0; i < count; i++) value |= uint64_t(bytes[i]) << 8 * i;
    return value;
}

inline void overwrite(Bytes& bytes, size_t place, uint64_t value, size_t count) {
    for (size_t i = 0; i < count && place + i < bytes.size(); i++) bytes[place + i] = uint8_t(value >> 8 * i);
}

// Makes one change between bytes `first` and `end`: a bit, a byte, an edge-case number, bytes removed or repeated.
inline void mutate(Bytes& bytes, Random& random, size_t first, size_t end) {
    static constexpr uint64_t kNumbers[] = {0, 1, 2, 3, 7, 8, 255, 1 << 16, 1 << 30, UINT64_C(1) << 31, UINT64_MAX};
    end = std::min(end, bytes.size());
    if (first >= end) return;
    const size_t place = first + random.below(end - first);
    const size_t length = std::min(1 + random.below(8), end - place);
    const auto from = bytes.begin() + std::ptrdiff_t(place), to = from + std::ptrdiff_t(length);
    switch (random.below(6)) {
        case 0:
            return overwrite(bytes, place, random(), 1);
        case 1:
            return overwrite(bytes, place, kNumbers[random.below(std::size(kNumbers))], size_t(1) << random.below(4));
        case 2:
            bytes.erase(from, to);
            return;
        case 3: {
            const Bytes again(from, to);
            bytes.insert(from, again.begin(), again.end());
            return;
        }
        default:
            bytes[place] = uint8_t(bytes[place] ^ 1u << random.below(8));
    }
}

}  // namespace fuzz
