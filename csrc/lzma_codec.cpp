#include "lzma_codec.h"

#include <lzma.h>

#include <algorithm>
#include <new>
#include <stdexcept>

namespace pgolf {
namespace {

using std::to_string;

// An lzma_stream that is always ended.
class Stream {
   public:
    Stream(const uint8_t* in, size_t in_size) {
        state.next_in = in;
        state.avail_in = in_size;
    }
    ~Stream() { lzma_end(&state); }
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;

    lzma_stream state = LZMA_STREAM_INIT;
};

void require_ok(lzma_ret result, const char* what) {
    if (result == LZMA_MEM_ERROR) throw std::bad_alloc();
    if (result != LZMA_OK)
        throw std::runtime_error(std::string("liblzma: ") + what + " failed with code " + to_string(result));
}

// The smallest power of two that holds the data, and at least liblzma's minimum of 4 KiB.
uint32_t dictionary_for(size_t size, uint32_t at_most) {
    uint32_t dictionary = 4096;
    while (dictionary < size && dictionary < at_most) dictionary <<= 1;
    return std::min(dictionary, at_most);
}

template <class Number>
void replace(Number& option, int setting, int low, int high, const char* name) {
    if (setting == -1) return;
    if (setting < low || setting > high)
        throw std::invalid_argument(std::string(name) + " is " + to_string(setting) + ", but must be in " +
                                    to_string(low) + ".." + to_string(high));
    option = static_cast<Number>(setting);
}

void replace_all(lzma_options_lzma& options, const LzmaSettings& settings) {
    replace(options.lc, settings.lc, 0, 4, "lc");
    replace(options.lp, settings.lp, 0, 4, "lp");
    replace(options.pb, settings.pb, 0, 4, "pb");
    replace(options.nice_len, settings.nice_len, 2, 273, "nice_len");
    replace(options.mode, settings.mode, 1, 2, "mode");
    if (options.lc + options.lp > 4)
        throw std::invalid_argument("lc + lp is " + to_string(options.lc + options.lp) + ", but must be at most 4");
}

void grow(std::string& out, lzma_stream& state) {
    const size_t used = out.size() - state.avail_out;
    out.resize(out.size() * 2);
    state.next_out = reinterpret_cast<uint8_t*>(out.data()) + used;
    state.avail_out = out.size() - used;
}

// Only called with a result that means decoding failed.
[[noreturn]] void fail_decoding(lzma_ret result, const lzma_stream& state, size_t size, size_t out_size) {
    switch (result) {
        case LZMA_MEM_ERROR:
            throw std::bad_alloc();
        case LZMA_MEMLIMIT_ERROR:
            throw std::invalid_argument("the LZMA stream asks for more than " +
                                        to_string(kDecoderMemoryLimit >> 20) + " MiB of memory");
        case LZMA_FORMAT_ERROR:
            throw std::invalid_argument("the bytes are not an LZMA (.xz) stream");
        case LZMA_BUF_ERROR:
            if (state.avail_in > 0)
                throw std::invalid_argument("the LZMA stream holds more than the stated " + to_string(out_size) +
                                            " bytes");
            throw std::invalid_argument("the LZMA stream is truncated: it does not end within its " +
                                        to_string(size) + " bytes");
        default:
            throw std::invalid_argument("the LZMA stream is corrupt near byte " + to_string(size - state.avail_in));
    }
}

}  // namespace

std::string lzma_compress(const uint8_t* data, size_t size, int preset, bool extreme, const LzmaSettings& settings) {
    if (preset < 0 || preset > 9)
        throw std::invalid_argument("preset is " + to_string(preset) + ", but LZMA presets are 0..9");
    lzma_options_lzma options{};
    if (lzma_lzma_preset(&options, static_cast<uint32_t>(preset) | (extreme ? LZMA_PRESET_EXTREME : 0)))
        throw std::runtime_error("liblzma does not know preset " + to_string(preset));
    options.dict_size = dictionary_for(size, options.dict_size);
    replace_all(options, settings);
    const lzma_filter filters[] = {{LZMA_FILTER_LZMA2, &options}, {LZMA_VLI_UNKNOWN, nullptr}};

    Stream stream(data, size);
    require_ok(lzma_stream_encoder(&stream.state, filters, LZMA_CHECK_CRC32), "starting the encoder");
    std::string out(size / 2 + 4096, '\0');
    stream.state.next_out = reinterpret_cast<uint8_t*>(out.data());
    stream.state.avail_out = out.size();
    lzma_ret result;
    while ((result = lzma_code(&stream.state, LZMA_FINISH)) == LZMA_OK)
        if (stream.state.avail_out == 0) grow(out, stream.state);
    if (result != LZMA_STREAM_END) require_ok(result, "encoding");
    out.resize(out.size() - stream.state.avail_out);
    return out;
}

void lzma_decompress(const uint8_t* data, size_t size, uint8_t* out, size_t out_size) {
    Stream stream(data, size);
    require_ok(lzma_stream_decoder(&stream.state, kDecoderMemoryLimit, 0), "starting the decoder");
    stream.state.next_out = out;
    stream.state.avail_out = out_size;
    lzma_ret result;
    do result = lzma_code(&stream.state, LZMA_FINISH);
    while (result == LZMA_OK);
    if (result != LZMA_STREAM_END) fail_decoding(result, stream.state, size, out_size);
    if (stream.state.avail_out > 0)
        throw std::invalid_argument("the LZMA stream holds " + to_string(out_size - stream.state.avail_out) +
                                    " bytes, but " + to_string(out_size) + " were stated");
    if (stream.state.avail_in > 0)
        throw std::invalid_argument(to_string(stream.state.avail_in) + " bytes follow the end of the LZMA stream");
}

}  // namespace pgolf
