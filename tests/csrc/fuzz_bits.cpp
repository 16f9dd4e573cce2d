// Packing of 6-bit codes. Input: rows (1 byte), columns (1), then packed bytes, repeated as often as needed.
#include <stdexcept>

#include "fuzz.h"
#include "int6.h"

namespace fuzz {

Bytes make_input(Random& random) {
    Bytes bytes(2 + random.below(64));
    for (auto& byte : bytes) byte = uint8_t(random());
    return bytes;
}

}  // namespace fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    if (size < 3) return 0;
    const size_t rows = data[0] % 5, columns = data[1] % 70;
    fuzz::Bytes packed(rows * pgolf::int6_row_bytes(columns)), repacked(packed.size());
    for (size_t i = 0; i < packed.size(); i++) packed[i] = data[2 + i % (size - 2)];
    std::vector<int8_t> codes(rows * columns), again(rows * columns);
    pgolf::int6_unpack(packed.data(), rows, columns, codes.data());
    for (int8_t code : codes) fuzz::require(code >= -32 && code <= 31, "an unpacked code is out of range");
    pgolf::int6_pack(codes.data(), rows, columns, repacked.data());
    pgolf::int6_unpack(repacked.data(), rows, columns, again.data());
    fuzz::require(again == codes, "codes there and back");
    fuzz::accepted++;
    if (codes.empty()) return 0;
    codes[data[2] % codes.size()] = int8_t(data[size - 1]);
    try {
        pgolf::int6_pack(codes.data(), rows, columns, repacked.data());
    } catch (const std::invalid_argument&) {
        fuzz::require(int8_t(data[size - 1]) < -32 || int8_t(data[size - 1]) > 31, "a code in range was refused");
    }
    return 0;
}
