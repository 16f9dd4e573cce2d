// The rANS coder. Input: mode (1 byte): bit 0 makes a round trip, bit 1 states a size other than the shapes'; number
// of arrays (1); per array rows (2), columns (2), item size (1) and by how many bits to shift rows left (1); then a
// payload, or data.
#include <stdexcept>

#include "fuzz.h"
#include "rans.h"

namespace {

using fuzz::append;
using fuzz::Bytes;
using fuzz::number;
using fuzz::Random;
using pgolf::Shape;

constexpr size_t kLimit = 1 << 16;  // larger outputs only cost time
constexpr size_t kOneThread = 1;

// Returns the bytes of all arrays, or kLimit + 1 if they exceed kLimit.
size_t bytes_of(const std::vector<Shape>& shapes) {
    uint64_t sum = 0;
    for (const auto& [rows, columns, itemsize] : shapes)
        if (rows > 0 && columns > 0 && itemsize > 0) {
            if (rows > kLimit / columns / itemsize) return kLimit + 1;
            sum += rows * columns * itemsize;
        }
    return size_t(std::min<uint64_t>(sum, kLimit + 1));
}

// Returns numbers like weights: they cluster, in some arrays by row or by column.
Bytes weights(const std::vector<Shape>& shapes, Random& random) {
    Bytes data;
    for (const auto& [rows, columns, itemsize] : shapes) {
        const size_t by_row = random.below(3), by_column = random.below(3), bits = random.below(7);
        for (uint64_t row = 0; row < rows; row++)
            for (uint64_t column = 0; column < columns; column++) {
                const size_t spread = bits + by_row * (row % 2) + by_column * (column % 2);
                const uint64_t value = random() & random() & ((UINT64_C(1) << spread) - 1);
                append(data, random.one_in(2) ? ~value : value, itemsize);
            }
    }
    return data;
}

Bytes encoded(const Bytes& data, const std::vector<Shape>& shapes) {
    return pgolf::rans_encode(data.data(), data.size(), shapes.data(), shapes.size(), kOneThread);
}

Bytes described(const std::vector<Shape>& shapes, uint8_t mode) {
    Bytes input = {mode, uint8_t(shapes.size())};
    for (const auto& [rows, columns, itemsize] : shapes) {
        append(input, rows, 2);
        append(input, columns, 2);
        append(input, itemsize, 1);
        append(input, 0, 1);
    }
    return input;
}

struct Example {
    Bytes to_decode, to_encode;
    size_t payload;  // its offset
};

const std::vector<Example>& examples() {
    static const std::vector<Example> made = [] {
        Random random(0);
        std::vector<Example> list;
        while (list.size() < 256) {
            std::vector<Shape> shapes(random.below(5));
            const size_t scale = random.one_in(8) ? 100 : 12;
            for (Shape& shape : shapes)
                shape = {random.below(scale), random.below(scale),
                         random.one_in(3) ? UINT64_C(1) << random.below(4) : 1};
            const Bytes data = weights(shapes, random), packed = encoded(data, shapes);
            Example example = {described(shapes, 0), described(shapes, 1), 0};
            example.payload = example.to_decode.size();
            example.to_decode.insert(example.to_decode.end(), packed.begin(), packed.end());
            example.to_encode.insert(example.to_encode.end(), data.begin(), data.end());
            list.push_back(example);
        }
        return list;
    }();
    return made;
}

void decode(const Bytes& payload, const std::vector<Shape>& shapes, Bytes& out) {
    pgolf::rans_decode(payload.data(), payload.size(), shapes.data(), shapes.size(), out.data(), out.size(),
                       kOneThread);
}

void round_trip(const Bytes& data, const std::vector<Shape>& shapes) {
    const Bytes payload = encoded(data, shapes);
    fuzz::require(payload.size() <= data.size() + 1, "a payload is at most one byte longer than the data");
    Bytes out(data.size());
    decode(payload, shapes, out);
    fuzz::require(out == data, "rANS round trip");
}

}  // namespace

namespace fuzz {

Bytes make_input(Random& random) {
    const Example& example = examples()[random.below(examples().size())];
    if (random.one_in(64)) {
        Bytes bytes = example.to_encode;
        for (size_t changes = random.below(8); changes > 0 && bytes.size() > example.payload; changes--)
            bytes[example.payload + random.below(bytes.size() - example.payload)] = uint8_t(random());
        return bytes;
    }
    Bytes bytes = example.to_decode;
    if (random.one_in(16)) mutate(bytes, random, 0, example.payload);
    for (size_t changes = random.below(4); changes > 0; changes--)
        mutate(bytes, random, example.payload, random.one_in(4) ? bytes.size() : example.payload + 32);
    return bytes;
}

}  // namespace fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    if (size < 2) return 0;
    std::vector<Shape> shapes(data[1] % 8);
    const size_t start = 2 + 6 * shapes.size();
    if (size < start) return 0;
    for (size_t i = 0; i < shapes.size(); i++) {
        const uint8_t* at = data + 2 + 6 * i;
        shapes[i] = {number(at, 2) << at[5] % 49, number(at + 2, 2), at[4]};
    }
    const size_t capacity = bytes_of(shapes);
    const Bytes rest(data + start, data + size);
    Bytes out(std::min(capacity, kLimit));
    if (data[0] & 2 && !rest.empty()) out.resize(rest[0]);
    try {
        if (data[0] & 1) {
            round_trip(rest, shapes);
        } else {
            decode(rest, shapes, out);
            fuzz::require(out.size() == capacity, "only shapes that fill the output are accepted");
        }
        fuzz::accepted++;
    } catch (const std::invalid_argument&) {
    }
    return 0;
}
