// Packing of 6-bit codes, and 8-bit codes as they are. Input: rows (1 byte), columns (1), width and path (1), then packed bytes, repeated to
// the size needed.
#include <cstring>
#include <stdexcept>

#include "bits.h"
#include "fuzz.h"

namespace fuzz {

Bytes make_input(Random& random) {
    Bytes bytes(3 + random.below(100));
    for (auto& byte : bytes) byte = uint8_t(random());
    return bytes;
}

}  // namespace fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    if (size < 4) return 0;
    const size_t rows = data[0] % 5, columns = data[1] % 110;
    const int bits = data[2] % 2 ? 8 : 6, half = 1 << (bits - 1);
    const pgolf::BitsOptions options{1, (data[2] & 128) != 0};
    fuzz::Bytes packed(rows * pgolf::packed_row_bytes(columns, bits)), repacked(packed.size());
    for (size_t i = 0; i < packed.size(); i++) packed[i] = data[3 + i % (size - 3)];
    std::vector<int8_t> codes(rows * columns), again(rows * columns);
    pgolf::unpack_bits(packed.data(), rows, columns, bits, codes.data(), options);
    for (int8_t code : codes) fuzz::require(code >= -half && code < half, "an unpacked code is out of range");
    pgolf::pack_bits(codes.data(), rows, columns, bits, repacked.data(), options);
    pgolf::unpack_bits(repacked.data(), rows, columns, bits, again.data(), options);
    fuzz::require(again == codes, "round trip of codes");
    const std::vector<float> scale(rows, 0.5f);
    std::vector<float> values(codes.size());
    std::vector<uint16_t> low(codes.size());
    pgolf::dequantize_bits(packed.data(), scale.data(), rows, columns, bits, values.data(), options);
    pgolf::dequantize_bits(packed.data(), scale.data(), rows, columns, bits, low.data(), options);
    for (size_t i = 0; i < codes.size(); i++) {
        const uint32_t word = uint32_t(low[i]) << 16;  // exact: a code has at most 8 significant bits
        float wide;
        std::memcpy(&wide, &word, 4);
        fuzz::require(values[i] == 0.5f * codes[i] && wide == values[i], "codes times scales");
    }
    fuzz::accepted++;
    if (codes.empty()) return 0;
    const int8_t code = int8_t(data[size - 1]);
    codes[data[3] % codes.size()] = code;
    try {
        pgolf::pack_bits(codes.data(), rows, columns, bits, repacked.data(), options);
        fuzz::require(code >= -half && code < half, "a code out of range was packed");
    } catch (const std::invalid_argument&) {
        fuzz::require(code < -half || code >= half, "a code in range was rejected");
    }
    return 0;
}
