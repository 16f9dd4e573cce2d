#include "lzma_api.h"

#include <stdexcept>
#include <string>

#if __has_include(<lzma.h>)
#include <lzma.h>
#define PGOLF_SAME(ours, theirs) static_assert(ours == theirs, "liblzma's ABI is not the one lzma_api.h describes")
namespace abi = pgolf::lzma_abi;
PGOLF_SAME(sizeof(abi::Stream), sizeof(lzma_stream));
PGOLF_SAME(offsetof(abi::Stream, avail_out), offsetof(lzma_stream, avail_out));
PGOLF_SAME(offsetof(abi::Stream, internal), offsetof(lzma_stream, internal));
PGOLF_SAME(sizeof(abi::Filter), sizeof(lzma_filter));
PGOLF_SAME(offsetof(abi::Filter, options), offsetof(lzma_filter, options));
PGOLF_SAME(sizeof(abi::Options), sizeof(lzma_options_lzma));
PGOLF_SAME(offsetof(abi::Options, mode), offsetof(lzma_options_lzma, mode));
PGOLF_SAME(offsetof(abi::Options, depth), offsetof(lzma_options_lzma, depth));
PGOLF_SAME(int(abi::kStreamEnd), int(LZMA_STREAM_END));
PGOLF_SAME(int(abi::kMemory), int(LZMA_MEM_ERROR));
PGOLF_SAME(int(abi::kMemoryLimit), int(LZMA_MEMLIMIT_ERROR));
PGOLF_SAME(int(abi::kFormat), int(LZMA_FORMAT_ERROR));
PGOLF_SAME(int(abi::kOptions), int(LZMA_OPTIONS_ERROR));
PGOLF_SAME(int(abi::kData), int(LZMA_DATA_ERROR));
PGOLF_SAME(int(abi::kBuffer), int(LZMA_BUF_ERROR));
PGOLF_SAME(abi::kFinish, int(LZMA_FINISH));
PGOLF_SAME(abi::kCheckCrc32, int(LZMA_CHECK_CRC32));
PGOLF_SAME(abi::kExtreme, LZMA_PRESET_EXTREME);
PGOLF_SAME(abi::kFilterLzma2, LZMA_FILTER_LZMA2);
PGOLF_SAME(abi::kFilterEnd, LZMA_VLI_UNKNOWN);
#undef PGOLF_SAME
#endif

#ifdef PGOLF_LZMA_DLOPEN
#include <dlfcn.h>
#endif

namespace pgolf {

#ifdef PGOLF_LZMA_DLOPEN

namespace {

void* open_library() {
    for (const char* name : {"liblzma.so.5", "liblzma.5.dylib", "liblzma.so"})
        if (void* handle = dlopen(name, RTLD_NOW | RTLD_LOCAL)) return handle;
    throw std::runtime_error("liblzma.so.5 was not found; install the xz libraries (on Debian: liblzma5)");
}

template <class Function>
void find(void* handle, Function& function, const char* name) {
    function = reinterpret_cast<Function>(dlsym(handle, name));
    if (!function) throw std::runtime_error(std::string("liblzma has no function ") + name);
}

LzmaApi load() {
    void* handle = open_library();  // never closed: the table lives as long as the process
    LzmaApi api{};
    find(handle, api.version, "lzma_version_string");
    find(handle, api.preset, "lzma_lzma_preset");
    find(handle, api.encoder, "lzma_stream_encoder");
    find(handle, api.decoder, "lzma_stream_decoder");
    find(handle, api.code, "lzma_code");
    find(handle, api.end, "lzma_end");
    return api;
}

}  // namespace

const char* lzma_how() { return "dlopen"; }

#else

namespace {

// The two types of every function differ in name only: the assertions above compare their layouts.
template <class To, class From>
void assign(To& to, From* from) {
    to = reinterpret_cast<To>(from);
}

LzmaApi load() {
    LzmaApi api{};
    assign(api.version, &lzma_version_string);
    assign(api.preset, &lzma_lzma_preset);
    assign(api.encoder, &lzma_stream_encoder);
    assign(api.decoder, &lzma_stream_decoder);
    assign(api.code, &lzma_code);
    assign(api.end, &lzma_end);
    return api;
}

}  // namespace

const char* lzma_how() { return "linked"; }

#endif

const LzmaApi& lzma_api() {
    static const LzmaApi api = load();
    return api;
}

}  // namespace pgolf
