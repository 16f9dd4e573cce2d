// alpha x x^T + beta add in float32, then in bf16. Input: instruction set (1 byte), matrices (1), rows (1), columns (1),
// then values, which are exact in bf16, repeated.
#include <cmath>
#include <cstring>

#include "fuzz.h"
#include "passes.h"

namespace fuzz {

Bytes make_input(Random& random) {
    Bytes bytes(5 + random.below(100));
    for (auto& byte : bytes) byte = uint8_t(random());
    return bytes;
}

}  // namespace fuzz

namespace {

std::vector<uint16_t> narrowed(const std::vector<float>& wide) {
    std::vector<uint16_t> narrow(wide.size());
    for (size_t i = 0; i < wide.size(); i++) std::memcpy(&narrow[i], reinterpret_cast<const char*>(&wide[i]) + 2, 2);
    return narrow;
}

float widened(uint16_t x) {
    const uint32_t bits = uint32_t(x) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    if (size < 5) return 0;
    const auto names = pgolf::runnable_passes();
    fuzz::require(pgolf::choose_passes(names[data[0] % names.size()]), "a runnable table was rejected");
    const size_t count = data[1] % 3, rows = data[2] % 70, columns = data[3] % 40;
    const auto value = [&](size_t i) { return float(int8_t(data[4 + i % (size - 4)])) / 64; };
    std::vector<float> x(count * rows * columns), add(count * rows * rows), out(add.size(), NAN);
    for (size_t i = 0; i < x.size(); i++) x[i] = value(i);
    for (size_t m = 0; m < count; m++)
        for (size_t i = 0; i < rows; i++)
            for (size_t j = 0; j < rows; j++) add[(m * rows + i) * rows + j] = value(i + j);
    const bool adds = data[0] & 128;
    const auto run = [&](pgolf::Type type, const void* from, const void* other, void* to) {
        pgolf::passes().symmetric_product(type, from, adds ? other : nullptr, to, 2.0f, -0.5f, count, rows, columns,
                                          1 + data[1] / 128);
    };
    run(pgolf::Type::f32, x.data(), add.data(), out.data());
    const auto x16 = narrowed(x), add16 = narrowed(add);
    std::vector<uint16_t> out16(out.size(), 0xffff);
    run(pgolf::Type::bf16, x16.data(), add16.data(), out16.data());
    for (size_t m = 0; m < count; m++)
        for (size_t i = 0; i < rows; i++)
            for (size_t j = 0; j < rows; j++) {
                const size_t at = (m * rows + i) * rows + j;
                double wanted = adds ? -0.5 * add[at] : 0.0;
                for (size_t k = 0; k < columns; k++)
                    wanted += 2.0 * x[(m * rows + i) * columns + k] * x[(m * rows + j) * columns + k];
                fuzz::require(std::abs(out[at] - wanted) <= 1e-3, "a product is wrong");
                const double near = 1e-3 + std::abs(wanted) / 256;
                fuzz::require(std::abs(widened(out16[at]) - wanted) <= near, "a product of bf16 is wrong");
            }
    fuzz::accepted++;
    return 0;
}
