#include "rans_planes.h"

#include <algorithm>
#include <map>

#include "rans_model.h"

namespace pgolf {
namespace rans {
namespace {

constexpr size_t kMostValues = 256;

uint64_t load_item(const uint8_t* bytes, size_t itemsize) {
    uint64_t item = 0;
    for (size_t i = 0; i < itemsize; i++) item |= uint64_t(bytes[i]) << 8 * i;
    return item;
}

size_t items_of(const Shape& shape) { return shape.rows * shape.columns; }

double bits_of(const Counts& counts) { return entropy_bits(counts) + model_bits(counts); }

// Returns no values when planes are as short, or there are too many values.
std::vector<uint64_t> choose_values(const uint8_t* data, const Shape* shapes, size_t count, size_t itemsize) {
    std::map<uint64_t, uint32_t> found;
    std::vector<Counts> planes(itemsize, Counts{});
    for (size_t i = 0; i < count; data += items_of(shapes[i]) * shapes[i].itemsize, i++) {
        if (shapes[i].itemsize != itemsize) continue;
        for (size_t j = 0; j < items_of(shapes[i]); j++) {
            const uint8_t* item = data + j * itemsize;
            found[load_item(item, itemsize)]++;
            if (found.size() > kMostValues) return {};
            for (size_t plane = 0; plane < itemsize; plane++) planes[plane][item[plane] ^ kSymbolFlip]++;
        }
    }
    std::vector<uint64_t> values;
    Counts indices{};
    for (const auto& [value, times] : found) {
        indices[values.size() ^ kSymbolFlip] = times;
        values.push_back(value);
    }
    double saved = -bits_of(indices);
    for (size_t i = 0; i < values.size(); i++) saved -= gamma_bits(values[i] - (i > 0 ? values[i - 1] : 0));
    for (const Counts& counts : planes) saved += bits_of(counts);
    return saved > 0 ? values : std::vector<uint64_t>{};
}

}  // namespace

const std::vector<uint64_t>& Palettes::values_of(size_t itemsize) const {
    static const std::vector<uint64_t> none;
    for (const Palette& palette : palettes_)
        if (palette.itemsize == itemsize) return palette.values;
    return none;
}

Palettes Palettes::choose(const uint8_t* data, const Shape* shapes, size_t count) {
    Palettes palettes;
    for (Palette& palette : palettes.palettes_)
        palette.values = choose_values(data, shapes, count, palette.itemsize);
    return palettes;
}

Palettes Palettes::read(BitReader& in) {
    Palettes palettes;
    for (Palette& palette : palettes.palettes_) {
        const uint64_t values = in.number(), limit = uint64_t(1) << palette.itemsize * 8;
        if (values > kMostValues)
            throw std::invalid_argument("the rANS payload is corrupt: a palette has over 256 values");
        for (uint64_t i = 0, value = 0; i < values; i++) {
            value += in.number();
            if (value >= limit)
                throw std::invalid_argument("the rANS payload is corrupt: a value of a palette does not fit its items");
            palette.values.push_back(value);
        }
    }
    return palettes;
}

void Palettes::write(BitWriter& out) const {
    for (const Palette& palette : palettes_) {
        out.number(palette.values.size());
        uint64_t last = 0;
        for (uint64_t value : palette.values) {
            out.number(value - last);
            last = value;
        }
    }
}

void Palettes::split(const uint8_t* items, size_t count, size_t itemsize, uint8_t* planes) const {
    const std::vector<uint64_t>& values = values_of(itemsize);
    for (size_t i = 0; i < count; i++, items += itemsize) {
        if (!values.empty()) {
            const auto found = std::lower_bound(values.begin(), values.end(), load_item(items, itemsize));
            planes[i] = uint8_t(found - values.begin());
            continue;
        }
        for (size_t plane = 0; plane < itemsize; plane++) planes[plane * count + i] = items[plane];
    }
}

void Palettes::join(const uint8_t* planes, size_t count, size_t itemsize, uint8_t* items) const {
    const std::vector<uint64_t>& values = values_of(itemsize);
    for (size_t i = 0; i < count; i++, items += itemsize) {
        if (!values.empty() && planes[i] >= values.size())
            throw std::invalid_argument("the rANS payload is corrupt: an index is beyond its palette");
        for (size_t plane = 0; plane < itemsize; plane++)
            items[plane] = values.empty() ? planes[plane * count + i] : uint8_t(values[planes[i]] >> 8 * plane);
    }
}

}  // namespace rans
}  // namespace pgolf
