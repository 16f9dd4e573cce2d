// Arrays as matrices of bytes. Items of several bytes are split into planes: all first bytes, all second bytes, and so
// on. Items of 2 or 4 bytes may instead be one plane of indices into a palette, if all arrays of that item size
// together have at most 256 values.
#pragma once

#include <array>
#include <vector>

#include "rans.h"
#include "rans_bits.h"

namespace pgolf {
namespace rans {

class Palettes {
   public:
    static Palettes choose(const uint8_t* data, const Shape* shapes, size_t count);
    static Palettes read(BitReader& in);  // throws std::invalid_argument
    void write(BitWriter& out) const;

    size_t planes_of(size_t itemsize) const { return values_of(itemsize).empty() ? itemsize : 1; }
    // `planes` holds planes_of(itemsize) * count bytes, plane by plane.
    void split(const uint8_t* items, size_t count, size_t itemsize, uint8_t* planes) const;
    void join(const uint8_t* planes, size_t count, size_t itemsize, uint8_t* items) const;  // throws as read

   private:
    struct Palette {
        size_t itemsize;
        std::vector<uint64_t> values;  // ascending; empty: planes
    };
    const std::vector<uint64_t>& values_of(size_t itemsize) const;

    std::array<Palette, 2> palettes_{{{2, {}}, {4, {}}}};
};

}  // namespace rans
}  // namespace pgolf
