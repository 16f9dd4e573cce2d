// The LZMA decoder. Input: mode (1 byte), output bytes (2), then an .xz stream, or data for a round trip.
#include <stdexcept>
#include <string>

#include "fuzz.h"
#include "lzma_codec.h"

namespace {

using fuzz::Bytes;

Bytes compressed(const Bytes& data) {
    const std::string stream = pgolf::lzma_compress(data.data(), data.size(), 0, false);
    return Bytes(stream.begin(), stream.end());
}

void round_trip(const Bytes& data) {
    const Bytes stream = compressed(data);
    Bytes out(data.size());
    pgolf::lzma_decompress(stream.data(), stream.size(), out.data(), out.size());
    fuzz::require(out == data, "LZMA round trip");
    fuzz::accepted++;
}

struct Stream {
    size_t size;
    Bytes bytes;
};

const std::vector<Stream>& streams() {
    static const std::vector<Stream> made = [] {
        fuzz::Random random(0);
        std::vector<Stream> list;
        for (size_t i = 0; i < 64; i++) {
            Bytes data(random.below(400));
            for (auto& byte : data) byte = uint8_t(random() & 7);
            list.push_back({data.size(), compressed(data)});
        }
        return list;
    }();
    return made;
}

}  // namespace

namespace fuzz {

Bytes make_input(Random& random) {
    const Stream& stream = streams()[random.below(streams().size())];
    Bytes bytes = {uint8_t(random.one_in(32))};
    append(bytes, random.one_in(4) ? random.below(500) : stream.size, 2);
    bytes.insert(bytes.end(), stream.bytes.begin(), stream.bytes.end());
    for (size_t changes = random.below(4); changes > 0; changes--) mutate(bytes, random, 3, bytes.size());
    return bytes;
}

}  // namespace fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    if (size < 3) return 0;
    const Bytes rest(data + 3, data + size);
    if (data[0] == 1) {
        round_trip(rest);
        return 0;
    }
    Bytes out(size_t(fuzz::number(data + 1, 2)));
    try {
        pgolf::lzma_decompress(rest.data(), rest.size(), out.data(), out.size());
        fuzz::accepted++;
    } catch (const std::invalid_argument&) {
    }
    return 0;
}
