// Lets libFuzzer start from a driver's own inputs, and return to them now and then.
#include <cstring>

#include "fuzz.h"

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned int seed) {
    fuzz::Random random(seed);
    if (size > 1 && !random.one_in(16)) return LLVMFuzzerMutate(data, size, max_size);
    const fuzz::Bytes made = fuzz::make_input(random);
    const size_t length = std::min(made.size(), max_size);
    if (length > 0) std::memcpy(data, made.data(), length);
    return length;
}
