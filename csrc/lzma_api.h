// The part of liblzma used here, behind one table of functions, so that the codec does not care whether the library
// was linked or is opened at run time (machines without <lzma.h>). The structures repeat liblzma's stable ABI
// (liblzma.so.5, unchanged since 5.0); lzma_api.cpp asserts their layout against <lzma.h> wherever that exists.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pgolf {
namespace lzma_abi {

struct Stream {
    const uint8_t* next_in;
    size_t avail_in;
    uint64_t total_in;
    uint8_t* next_out;
    size_t avail_out;
    uint64_t total_out;
    const void* allocator;
    void* internal;
    void* reserved_ptr[4];
    uint64_t reserved_u64[2];
    size_t reserved_size[2];
    int reserved_enum[2];
};

struct Filter {
    uint64_t id;
    void* options;
};

struct Options {
    uint32_t dict_size;
    const uint8_t* preset_dict;
    uint32_t preset_dict_size, lc, lp, pb;
    int mode;
    uint32_t nice_len;
    int match_finder;
    uint32_t depth;
    uint32_t reserved_u32[8];
    int reserved_enum[4];
    void* reserved_ptr[2];
};

enum Result : int {
    kOk = 0,
    kStreamEnd = 1,
    kMemory = 5,
    kMemoryLimit = 6,
    kFormat = 7,
    kOptions = 8,
    kData = 9,
    kBuffer = 10
};
constexpr int kFinish = 3;
constexpr int kCheckCrc32 = 1;
constexpr uint32_t kExtreme = UINT32_C(1) << 31;
constexpr uint64_t kFilterLzma2 = UINT64_C(0x21);
constexpr uint64_t kFilterEnd = UINT64_MAX;

}  // namespace lzma_abi

struct LzmaApi {
    const char* (*version)();
    unsigned char (*preset)(lzma_abi::Options*, uint32_t);
    int (*encoder)(lzma_abi::Stream*, const lzma_abi::Filter*, int check);
    int (*decoder)(lzma_abi::Stream*, uint64_t memory_limit, uint32_t flags);
    int (*code)(lzma_abi::Stream*, int action);
    void (*end)(lzma_abi::Stream*);
};

// Throws std::runtime_error when liblzma has to be opened at run time and is not there.
const LzmaApi& lzma_api();

// "linked" or "dlopen".
const char* lzma_how();

}  // namespace pgolf
