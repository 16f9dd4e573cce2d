// The artifact's container, version 1: the C++ twin of pgolf_fast/artifact/reader.py, with the same checks in the same
// order and the same messages. docs/artifact.md describes every byte. Thread-safe; needs no Python.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace pgolf {

enum class Codec : uint8_t { kRaw, kLzma, kRans, kZstd, kBrotli };

struct Section {
    uint8_t name;  // 0 codes, 1 scales, 2 embeddings, 3 small
    Codec codec;
    uint64_t raw_bytes, stored_bytes;
    uint32_t crc32;
    uint64_t offset;  // byte of the file at which it starts
};

struct Tensor {
    std::string name;  // UTF-8
    uint8_t section, kind, dtype;
    std::vector<uint32_t> shape;
    uint64_t offset;  // from the start of its unpacked section
};

struct Container {
    std::string config;  // JSON, not looked at here
    std::vector<Section> sections;
    std::vector<Tensor> tensors;
};

// zlib's CRC-32 of `data`, going on from that of the bytes before it.
uint32_t crc32(const uint8_t* data, size_t size, uint32_t before = 0);

// What a whole file says about itself, after every check but those that unpacking makes: lengths, limits, checksums,
// digest, and that tensors fill their sections. Memory is bounded by the limits, whatever the file says.
// Throws std::invalid_argument that says what the file is or, for a damaged one, names section and byte;
// std::bad_alloc; std::runtime_error when the header needs a liblzma that is not there.
Container parse_container(const uint8_t* file, size_t size);

// Whether decode_section knows the codec: zstd and brotli are left to Python.
bool can_decode(Codec codec);

// Unpacks a section of a parsed file into section.raw_bytes bytes at `out`. Throws std::invalid_argument that names
// section and byte, std::bad_alloc, and std::runtime_error without a liblzma.
void decode_section(const uint8_t* file, const Container& container, const Section& section, uint8_t* out);

}  // namespace pgolf
