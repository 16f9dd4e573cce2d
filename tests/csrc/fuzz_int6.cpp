// Products with packed 6-bit codes, and a block of the network that is made of them. Input: rows (1 byte), depth (1),
// columns (1), flags (1), then numbers, repeated to the size needed.
#include <cmath>
#include <cstring>

#include "decode.h"
#include "fuzz.h"
#include "int6_matmul.h"

namespace {

// Numbers in -1..1 with a few significant bits.
std::vector<float> numbers(const uint8_t* data, size_t size, size_t count, size_t salt) {
    std::vector<float> out(count);
    for (size_t i = 0; i < count; i++) out[i] = float(int(data[(i * 7 + salt) % size]) - 128) / 128;
    return out;
}

bool near(float got, double want, double scale) { return std::abs(got - want) <= 1e-5 * scale + 1e-6; }

struct Packed {
    std::vector<uint8_t> codes;
    std::vector<float> scale;

    Packed(const uint8_t* data, size_t size, size_t rows, size_t columns, size_t salt)
        : codes(rows * pgolf::packed_row_bytes(columns, 6)), scale(numbers(data, size, rows, salt)) {
        for (size_t i = 0; i < codes.size(); i++) codes[i] = data[(i + salt) % size];
    }
    pgolf::PackedWeights view() const { return {codes.data(), scale.data()}; }
};

void check_product(const uint8_t* data, size_t size, size_t rows, size_t depth, size_t columns, bool simd) {
    const Packed packed(data, size, columns, depth, 0);
    std::vector<int8_t> codes(columns * depth);
    pgolf::unpack_bits(packed.codes.data(), columns, depth, 6, codes.data());
    const std::vector<float> x = numbers(data, size, rows * depth, 3);
    std::vector<uint16_t> low(x.size()), low_y(rows * columns);
    for (size_t i = 0; i < x.size(); i++) {
        uint32_t word;
        std::memcpy(&word, &x[i], 4);
        low[i] = uint16_t(word >> 16);  // exact: 8 significant bits
    }
    std::vector<float> y(rows * columns), again(y.size());
    pgolf::int6_matmul(x.data(), rows, depth, packed.codes.data(), packed.scale.data(), columns, y.data(), {1, simd});
    pgolf::int6_matmul(x.data(), rows, depth, packed.codes.data(), packed.scale.data(), columns, again.data(), {2, simd});
    pgolf::int6_matmul(low.data(), rows, depth, packed.codes.data(), packed.scale.data(), columns, low_y.data(), {1, simd});
    fuzz::require(y == again, "the result depends on the number of threads");
    for (size_t m = 0; m < rows; m++)
        for (size_t n = 0; n < columns; n++) {
            double sum = 0;
            for (size_t k = 0; k < depth; k++) sum += double(x[m * depth + k]) * codes[n * depth + k];
            const double want = sum * packed.scale[n];
            fuzz::require(near(y[m * columns + n], want, double(depth) * 32), "a product");
            const uint32_t word = uint32_t(low_y[m * columns + n]) << 16;
            float wide;
            std::memcpy(&wide, &word, 4);
            fuzz::require(std::abs(wide - want) <= 0.004 * std::abs(want) + 1e-5 * double(depth) * 32, "a bfloat16 product");
        }
}

void check_block(const uint8_t* data, size_t size) {
    pgolf::DecodeBlock b{};
    b.batch = 1 + data[0] % 2, b.kv_heads = 1 + data[1] % 2, b.heads = b.kv_heads * (1 + data[2] % 2);
    const size_t width = 2 * (1 + data[3] % 8);
    b.dim = b.heads * width, b.half = data[1] / 8 % (width / 2 + 1), b.positions = 1 + data[2] / 4 % 5;
    b.activation = pgolf::Activation(data[0] / 4 % 3);
    b.hidden = 1 + data[3] / 8, b.up_rows = b.hidden * (b.activation == pgolf::Activation::swiglu ? 2 : 1);
    b.xsa = (data[0] & 64) != 0, b.layer_scale = 0.5f;
    const size_t kv_dim = b.kv_heads * width, cache = b.batch * b.positions * kv_dim;
    const Packed attention(data, size, 2 * (b.dim + kv_dim), b.dim, 1), up(data, size, b.up_rows, b.dim, 2);
    const Packed down(data, size, b.dim, b.hidden, 5);
    b.attention = attention.view(), b.up = up.view(), b.down = down.view();
    std::vector<std::vector<float>> given;
    const size_t angles = b.positions * b.half;
    for (size_t count : {b.dim, b.dim, b.dim, b.dim, b.heads, angles, angles, b.batch * kv_dim})
        given.push_back(numbers(data, size, count, given.size()));
    b.x_mix = given[0].data(), b.x0_mix = given[1].data(), b.attention_scale = given[2].data();
    b.mlp_scale = given[3].data(), b.gain = given[4].data(), b.cos = given[5].data(), b.sin = given[6].data();
    b.value_embed = data[2] & 64 ? given[7].data() : nullptr;
    const std::vector<float> x0 = numbers(data, size, b.batch * b.dim, 9);
    std::vector<float> first;
    for (const auto& table : pgolf::runnable_passes())
        for (const bool simd : {true, false}) {  // of the products
            fuzz::require(pgolf::choose_passes(table), "a runnable table was rejected");
            std::vector<float> results[2];
            for (size_t threads : {1, 2}) {
                std::vector<float> keys(cache), values(cache), x = x0;
                b.keys = keys.data(), b.values = values.data();
                for (b.position = 0; b.position < b.positions; b.position++)
                    pgolf::decode_block(b, x.data(), x0.data(), threads, simd);
                x.insert(x.end(), keys.begin(), keys.end());
                results[threads - 1] = x;
            }
            if (first.empty()) first = results[0];
            for (size_t i = 0; i < first.size(); i++) {
                const bool same = std::memcmp(&results[0][i], &results[1][i], sizeof(float)) == 0;
                fuzz::require(same || std::isnan(results[0][i]), "the block depends on the number of threads");
            }
            for (size_t i = 0; b.positions == 1 && i < b.batch * b.dim; i++)  // later positions magnify rounding
                fuzz::require(std::isfinite(results[0][i]) == std::isfinite(first[i]), "the forms of the block differ");
        }
}

}  // namespace

namespace fuzz {

Bytes make_input(Random& random) {
    Bytes bytes(5 + random.below(120));
    for (auto& byte : bytes) byte = uint8_t(random());
    return bytes;
}

}  // namespace fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    if (size < 5) return 0;
    const size_t rows = data[0] % 8, depth = data[1] % 150, columns = data[2] % 14;
    check_product(data + 4, size - 4, rows, depth, columns, (data[3] & 1) != 0);
    check_block(data, size);
    fuzz::accepted++;
    return 0;
}
