// The artifact's container. Input: 1 byte, whose lowest bit says that length, checksums and digest are to be made right
// first (they would end nearly every execution at once), then the file.
#include <stdexcept>
#include <string>

#include "container.h"
#include "fuzz.h"
#include "lzma_codec.h"
#include "rans.h"
#include "sha256.h"

namespace {

using fuzz::append;
using fuzz::Bytes;
using fuzz::number;
using fuzz::overwrite;
using fuzz::Random;

constexpr size_t kStart = 36, kDigest = 32;

// Sections as far as the plain header shows them.
void put_section_checksums_right(Bytes& file, size_t header_end) {
    uint64_t place = kStart + 4 + number(&file[kStart], 4), offset = header_end;
    if (place + 2 > header_end) return;
    size_t count = number(&file[place], 2);
    for (place += 2; count > 0 && place + 22 <= header_end; count--, place += 22) {
        const uint64_t stored = number(&file[place + 10], 8);
        if (stored > file.size() - kDigest - offset) return;
        overwrite(file, place + 18, pgolf::crc32(&file[offset], stored), 4);
        offset += stored;
    }
}

void put_right(Bytes& file) {
    if (file.size() < kStart + kDigest) return;
    overwrite(file, 24, file.size(), 8);
    const uint64_t end = kStart + number(&file[16], 4);
    if (end <= file.size() - kDigest) {
        put_section_checksums_right(file, end);
        overwrite(file, 32, pgolf::crc32(&file[kStart], end - kStart, pgolf::crc32(file.data(), 32)), 4);
    }
    const pgolf::Digest digest = pgolf::sha256(file.data(), file.size() - kDigest);
    std::copy(digest.begin(), digest.end(), file.end() - kDigest);
}

// The bytes under a codec, raw where that would not be smaller, and the codec's number.
std::pair<Bytes, uint8_t> coded(const Bytes& raw, uint8_t codec, const std::vector<pgolf::Shape>& shapes) {
    Bytes packed = raw;
    if (codec == 1) {
        const std::string stream = pgolf::lzma_compress(raw.data(), raw.size(), 0, false);
        packed.assign(stream.begin(), stream.end());
    } else if (codec == 2) {
        packed = pgolf::rans_encode(raw.data(), raw.size(), shapes.data(), shapes.size(), {1});
    }
    if (packed.size() >= raw.size()) return {raw, 0};
    return {packed, codec};
}

void append(Bytes& to, const Bytes& more) { to.insert(to.end(), more.begin(), more.end()); }

// A right artifact of a few small tensors.
Bytes artifact(Random& random) {
    static constexpr struct {
        uint8_t kind, dtype, item_bytes;
    } kTypes[] = {{0, 0, 1}, {1, 7, 2}, {2, 7, 2}, {3, 8, 4}, {4, 1, 1}, {4, 3, 2}, {4, 4, 4}, {4, 6, 8}};
    Bytes sections[4], tensors;
    std::vector<pgolf::Shape> shapes[4];
    bool used[4] = {};
    const size_t count = random.below(5);
    append(tensors, count, 4);
    for (size_t i = 0; i < count; i++) {
        const auto& type = kTypes[random.below(std::size(kTypes))];
        const size_t section = random.below(4), dimensions = random.below(4);
        append(tensors, {uint8_t(section), type.kind, type.dtype, uint8_t(dimensions)});
        pgolf::Shape shape = {1, 1, type.item_bytes};
        for (size_t d = 0; d < dimensions; d++) {
            const size_t size = random.one_in(4) ? random.below(30) : random.below(5);
            append(tensors, size, 4);
            shape.rows *= shape.columns;
            shape.columns = size;
        }
        shapes[section].push_back(shape);
        const std::string name = "t" + std::to_string(i);
        append(tensors, name.size(), 2);
        tensors.insert(tensors.end(), name.begin(), name.end());
        const uint64_t values = random.below(4);
        for (size_t b = shape.rows * shape.columns * shape.itemsize; b > 0; b--)
            sections[section].push_back(uint8_t(random() & values));
        used[section] = true;
    }
    Bytes header = {2, 0, 0, 0, '{', '}'}, body;
    append(header, size_t(std::count(used, used + 4, true)), 2);
    for (uint8_t name = 0; name < 4; name++) {
        if (!used[name]) continue;
        const auto [stored, codec] = coded(sections[name], uint8_t(random.below(3)), shapes[name]);
        append(header, {name, codec});
        append(header, sections[name].size(), 8);
        append(header, stored.size(), 8);
        append(header, pgolf::crc32(stored.data(), stored.size()), 4);
        append(body, stored);
    }
    append(header, tensors);
    const auto [stored, codec] = coded(header, random.one_in(8), {});
    Bytes file = {0x89, 'P', 'G', 'O', 'L', 'F', '\r', '\n', 1, 0, 0, 0, codec, 0, 0, 0};
    append(file, stored.size(), 4);
    append(file, header.size(), 4);
    file.resize(kStart);
    append(file, stored);
    append(file, body);
    file.resize(file.size() + kDigest);
    put_right(file);
    return file;
}

const std::vector<Bytes>& artifacts() {
    static const std::vector<Bytes> made = [] {
        Random random(0);
        std::vector<Bytes> list;
        while (list.size() < 256) list.push_back(artifact(random));
        return list;
    }();
    return made;
}

// What a caller relies on once a file was parsed.
void check(const pgolf::Container& container, size_t size) {
    static constexpr uint64_t kItemBytes[] = {1, 1, 2, 2, 4, 4, 8, 2, 4};
    uint64_t filled[4] = {}, raw = 0;
    for (const auto& tensor : container.tensors) {
        fuzz::require(tensor.offset == filled[tensor.section], "a tensor starts where the one before it ended");
        uint64_t bytes = kItemBytes[tensor.dtype];
        for (uint32_t length : tensor.shape) bytes *= length;
        filled[tensor.section] += bytes;
    }
    for (const auto& section : container.sections) {
        fuzz::require(section.offset + section.stored_bytes <= size - kDigest, "a section lies in the file");
        fuzz::require(filled[section.name] == section.raw_bytes, "tensors fill their section");
        raw += section.raw_bytes;
    }
    fuzz::require(raw <= UINT64_C(1) << 30, "all sections together are within the limit");
}

}  // namespace

namespace fuzz {

Bytes make_input(Random& random) {
    Bytes file = artifacts()[random.below(artifacts().size())];
    const size_t header_end = kStart + size_t(number(&file[16], 4));
    for (size_t changes = random.below(4); changes > 0; changes--)
        if (random.one_in(4))
            mutate(file, random, 0, file.size());
        else
            mutate(file, random, kStart, header_end);
    file.insert(file.begin(), uint8_t(!random.one_in(16)));
    return file;
}

}  // namespace fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    if (size < 1) return 0;
    Bytes file(data + 1, data + size);
    if (data[0] & 1) put_right(file);
    try {
        const pgolf::Container container = pgolf::parse_container(file.data(), file.size());
        check(container, file.size());
        for (const auto& section : container.sections) {
            if (!pgolf::can_decode(section.codec) || section.raw_bytes > 1 << 20) continue;
            Bytes out(section.raw_bytes);
            pgolf::decode_section(file.data(), container, section, out.data());
        }
        fuzz::accepted++;
    } catch (const std::invalid_argument&) {
    }
    return 0;
}
