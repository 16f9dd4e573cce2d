// Random and damaged bytes through the C++ codecs, meant for -fsanitize=address,undefined. Every input must end in a
// result or in one of the documented exceptions. Usage: fuzz_codec [iterations] [seed]
#include <cstdio>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "bits.h"
#include "lzma_codec.h"

namespace {

using Bytes = std::vector<uint8_t>;
using Random = std::mt19937;

size_t below(Random& random, size_t n) { return std::uniform_int_distribution<size_t>(0, n - 1)(random); }

Bytes random_bytes(Random& random, size_t size) {
    Bytes bytes(size);
    for (auto& byte : bytes) byte = uint8_t(random());
    return bytes;
}

void require(bool condition, const char* what) {
    if (!condition) {
        std::fprintf(stderr, "wrong: %s\n", what);
        std::exit(1);
    }
}

void decode_anything(const Bytes& stream, size_t out_size, size_t& refused) {
    Bytes out(out_size);
    try {
        pgolf::lzma_decompress(stream.data(), stream.size(), out.data(), out.size());
    } catch (const std::invalid_argument&) {
        refused++;
    }
}

// A valid stream with a few bytes changed, cut or added reaches deeper than noise does.
void fuzz_lzma(Random& random, size_t& refused) {
    if (below(random, 4) == 0)
        return decode_anything(random_bytes(random, below(random, 200)), below(random, 500), refused);
    const size_t size = below(random, 400);
    Bytes data = random_bytes(random, size);
    for (auto& byte : data) byte &= 7;
    const std::string packed = pgolf::lzma_compress(data.data(), data.size(), 0, false);
    Bytes stream(packed.begin(), packed.end()), out(size);
    pgolf::lzma_decompress(stream.data(), stream.size(), out.data(), out.size());
    require(out == data, "LZMA round trip");
    for (size_t i = below(random, 4); i > 0; i--)
        stream[below(random, stream.size())] ^= uint8_t(1u << below(random, 8));
    stream.resize(below(random, 3) ? stream.size() : below(random, stream.size() + 8));
    decode_anything(stream, below(random, 2) ? size : below(random, 800), refused);
}

void fuzz_bits(Random& random, size_t& refused) {
    const int bits = 4 + int(below(random, 5));
    const size_t rows = below(random, 5), columns = below(random, 70);
    const pgolf::BitsOptions options{1, below(random, 2) == 0};
    const Bytes packed = random_bytes(random, rows * pgolf::packed_row_bytes(columns, bits));
    std::vector<int8_t> codes(rows * columns), again(rows * columns);
    Bytes repacked(packed.size());
    pgolf::unpack_bits(packed.data(), rows, columns, bits, codes.data(), options);
    for (int8_t code : codes) require(code >= -(1 << (bits - 1)) && code < 1 << (bits - 1), "code out of range");
    pgolf::pack_bits(codes.data(), rows, columns, bits, repacked.data(), options);
    pgolf::unpack_bits(repacked.data(), rows, columns, bits, again.data(), options);
    require(again == codes, "round trip of packed codes");
    const std::vector<float> scale(rows, 0.5f);
    std::vector<float> values(codes.size());
    pgolf::dequantize_bits(packed.data(), scale.data(), rows, columns, bits, values.data(), options);
    for (size_t i = 0; i < codes.size(); i++) require(values[i] == 0.5f * codes[i], "codes times scales");
    if (codes.empty()) return;
    codes[below(random, codes.size())] = int8_t(random());
    try {
        pgolf::pack_bits(codes.data(), rows, columns, bits, repacked.data(), options);
    } catch (const std::invalid_argument&) {
        refused++;
    }
}

}  // namespace

int main(int argc, char** argv) {
    const long iterations = argc > 1 ? std::atol(argv[1]) : 20000;
    Random random(argc > 2 ? unsigned(std::atol(argv[2])) : 0);
    size_t refused = 0;
    for (long i = 0; i < iterations; i++) {
        fuzz_lzma(random, refused);
        fuzz_bits(random, refused);
    }
    std::printf("%ld iterations, %zu inputs refused\n", iterations, refused);
}
