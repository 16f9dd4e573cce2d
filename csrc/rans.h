// Arrays of bytes to one entropy-coded payload and back: interleaved rANS (J. Duda, "Asymmetric numeral systems", 2013;
// F. Giesen, "Interleaved entropy coders", 2014) with transmitted static models. docs/rans.md describes every byte;
// pgolf_fast/artifact/rans_decoder.py is a short reference decoder. Needs no Python.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace pgolf {

// An array as the coder sees it: a row-major matrix of little-endian items of 1, 2, 4 or 8 bytes.
struct Shape {
    uint64_t rows, columns, itemsize;
};

// `data` holds the arrays one after another; the payload is at most one byte longer. `threads` 0 means one per core;
// the payload does not depend on it. Throws std::invalid_argument unless the shapes describe exactly `size` bytes.
std::vector<uint8_t> rans_encode(const uint8_t* data, size_t size, const Shape* shapes, size_t count,
                                 size_t threads = 0);

// Fills exactly `out_size` bytes at `out`, regardless of the payload; memory stays within a few times
// out_size + size. Throws std::invalid_argument that says what is wrong with the payload or the shapes.
void rans_decode(const uint8_t* payload, size_t size, const Shape* shapes, size_t count, uint8_t* out,
                 size_t out_size, size_t threads = 0);

}  // namespace pgolf
