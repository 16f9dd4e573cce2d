// One buffer to one .xz stream (LZMA2, CRC32) and back, with liblzma. Thread-safe; needs no Python.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace pgolf {

// Memory limit of the decoder itself. Preset 9 needs 65 MiB; a forged header may ask for 4 GiB.
constexpr uint64_t kDecoderMemoryLimit = UINT64_C(256) << 20;

// Settings of the LZMA2 filter that replace the preset's; -1 keeps the preset's.
struct LzmaSettings {
    int lc = -1, lp = -1, pb = -1;  // 0..4, lc + lp at most 4
    int nice_len = -1;              // 2..273
    int mode = -1;                  // 1 fast, 2 normal
};

// `preset` is 0..9. The dictionary is no larger than the data needs: compression is the same, and a small buffer does
// not cost the hundreds of megabytes that preset 9 would reserve.
// Throws std::invalid_argument for a bad preset or setting, std::bad_alloc, std::runtime_error.
std::string lzma_compress(const uint8_t* data, size_t size, int preset, bool extreme,
                          const LzmaSettings& settings = {});

// Fills exactly `out_size` bytes at `out`, never more. Throws std::invalid_argument that says whether the stream is
// truncated, corrupt (and near which byte), longer or shorter than stated, or followed by other bytes.
void lzma_decompress(const uint8_t* data, size_t size, uint8_t* out, size_t out_size);

}  // namespace pgolf
