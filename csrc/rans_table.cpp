#include "rans_table.h"

#include <algorithm>
#include <cmath>

namespace pgolf {
namespace rans {
namespace {

constexpr int kStepsPerBit = 16, kLevels = 256;

// 2^(31 - level / 16), rounded down.
constexpr uint64_t kSixteenths[kStepsPerBit] = {
    2147483648, 2056437386, 1969251187, 1885761398, 1805811301, 1729250826, 1655936264, 1585729999,
    1518500249, 1454120821, 1392470868, 1333434672, 1276901416, 1222764985, 1170923761, 1121280435,
};

std::array<uint64_t, kLevels> make_weights() {
    std::array<uint64_t, kLevels> weights{};
    for (int i = 0; i < kLevels; i++) weights[i] = kSixteenths[i % kStepsPerBit] >> i / kStepsPerBit;
    return weights;
}

const std::array<uint64_t, kLevels>& weights() {
    static const auto table = make_weights();
    return table;
}

// The predictor's state: the last level and the last step between neighbors.
struct Curve {
    int level = 0, step = 0;
    int next() const { return level + step; }
    void move(int to) {
        step = to - level;
        level = to;
    }
};

}  // namespace

Levels fit_levels(const Counts& counts) {
    Levels levels;
    levels.fill(-1);
    const double most = *std::max_element(counts.begin(), counts.end());
    Curve curve;
    for (int symbol = 0; symbol < 256; symbol++) {
        const double count = counts[symbol];
        if (count == 0) {
            curve.step = 0;
            continue;
        }
        double least = HUGE_VAL;
        for (int level = 0; level < kLevels; level++) {
            // Bits of this symbol at this level, plus the bits that its share costs all other symbols.
            const double share = most * double(weights()[level]) / double(weights()[0]);
            const double data_bits = count * level / kStepsPerBit + share * M_LOG2E;
            const double bits = data_bits + gamma_bits(zigzag(level - curve.next()));
            if (bits < least) least = bits, levels[symbol] = level;
        }
        curve.move(levels[symbol]);
    }
    return levels;
}

Frequencies frequencies_of(const Levels& levels) {
    uint64_t sum = 0;
    for (int level : levels) sum += level < 0 ? 0 : weights()[level];
    Frequencies frequencies{};
    uint32_t given = 0;
    for (int symbol = 0; symbol < 256; symbol++) {
        if (levels[symbol] < 0) continue;
        frequencies[symbol] = uint32_t(std::max<uint64_t>(1, (weights()[levels[symbol]] << kFrequencyBits) / sum));
        given += frequencies[symbol];
    }
    *std::max_element(frequencies.begin(), frequencies.end()) += kTotal - given;  // rounding, of either sign
    return frequencies;
}

void write_levels(BitWriter& out, const Levels& levels) {
    std::vector<std::pair<int, int>> runs;  // first symbol, and one past the last
    for (int symbol = 0; symbol < 256; symbol++) {
        if (levels[symbol] < 0) continue;
        if (runs.empty() || runs.back().second < symbol) runs.emplace_back(symbol, symbol);
        runs.back().second = symbol + 1;
    }
    out.number(runs.size() - 1);
    Curve curve;
    int end = 0;
    for (const auto& [first, last] : runs) {
        out.number(uint64_t(first - end));
        out.number(uint64_t(last - first - 1));
        curve.step = 0;
        for (int symbol = first; symbol < last; symbol++) {
            out.number(zigzag(levels[symbol] - curve.next()));
            curve.move(levels[symbol]);
        }
        end = last;
    }
}

Levels read_levels(BitReader& in) {
    Levels levels;
    levels.fill(-1);
    Curve curve;
    uint64_t symbol = 0;
    for (uint64_t runs = in.number() + 1; runs > 0; runs--) {
        symbol += in.number();
        const uint64_t length = in.number() + 1;
        if (symbol + length > 256)
            throw std::invalid_argument("the rANS payload is corrupt: a model has over 256 symbols");
        curve.step = 0;
        for (const uint64_t end = symbol + length; symbol < end; symbol++) {
            const int64_t level = curve.next() + unzigzag(in.number());
            if (level < 0 || level >= kLevels)
                throw std::invalid_argument("the rANS payload is corrupt: a level is not 0..255");
            levels[symbol] = int(level);
            curve.move(levels[symbol]);
        }
    }
    return levels;
}

}  // namespace rans
}  // namespace pgolf
