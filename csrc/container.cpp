#include "container.h"

#include <algorithm>
#include <array>
#include <iterator>
#include <stdexcept>
#include <unordered_map>

#include "lzma_codec.h"
#include "rans.h"
#include "sha256.h"

namespace pgolf {
namespace {

using std::to_string;

constexpr uint8_t kMagic[8] = {0x89, 'P', 'G', 'O', 'L', 'F', '\r', '\n'};
constexpr uint8_t kOldMagic[8] = {'P', 'G', 'O', 'L', 'F', 'A', 'R', 'T'};
constexpr uint32_t kVersion = 1;
constexpr const char* kSections[] = {"codes", "scales", "embeddings", "small"};
constexpr size_t kSectionCount = 4, kCodecCount = 5, kKindCount = 5;
constexpr uint64_t kItemBytes[] = {1, 1, 2, 2, 4, 4, 8, 2, 4};  // of int8 uint8 int16 ... int64 float16 float32
constexpr uint32_t kKindDtypes[kKindCount] = {1u << 0, 1u << 7, 1u << 7, 1u << 8, 0x5f};  // bit d: dtype d is allowed

constexpr uint64_t kMaxRawBytes = UINT64_C(1) << 30;    // of all sections together, when unpacked
constexpr uint32_t kMaxHeaderBytes = UINT32_C(16) << 20;  // stored and unpacked
constexpr uint32_t kMaxTensors = UINT32_C(1) << 16;
constexpr size_t kMaxDimensions = 8;
constexpr size_t kPrefixBytes = 32, kStart = kPrefixBytes + 4, kDigestBytes = 32;

uint64_t little_endian(const uint8_t* bytes, size_t count) {
    uint64_t value = 0;
    for (size_t i = 0; i < count; i++) value |= uint64_t(bytes[i]) << 8 * i;
    return value;
}

[[noreturn]] void damaged(const char* section, uint64_t offset, const std::string& problem) {
    throw std::invalid_argument(std::string("is damaged in section '") + section + "' at byte " + to_string(offset) +
                                ": " + problem + "; copy it again from where it came, or pack it again");
}

[[noreturn]] void broken(const std::string& problem) { damaged("header", kStart, problem); }

std::string hexadecimal(uint32_t value) {
    std::string text;
    for (int shift = 28; shift >= 0; shift -= 4) text += "0123456789abcdef"[value >> shift & 15];
    return text;
}

void check_crc(const char* section, uint64_t offset, uint32_t got, uint32_t want) {
    if (got != want)
        damaged(section, offset, "its checksum is " + hexadecimal(got) + ", but " + hexadecimal(want) + " was written");
}

// Fills `out_size` bytes at `out`, which are arrays of these shapes.
void unpack(const char* section, uint64_t offset, Codec codec, const uint8_t* stored, size_t size,
            const std::vector<Shape>& shapes, uint8_t* out, size_t out_size) try {
    if (codec == Codec::kLzma) return lzma_decompress(stored, size, out, out_size);
    if (codec == Codec::kRans) return rans_decode(stored, size, shapes.data(), shapes.size(), out, out_size);
    if (size != out_size)
        throw std::invalid_argument("the raw bytes hold " + to_string(size) + " bytes, but " + to_string(out_size) +
                                    " were stated");
    std::copy(stored, stored + size, out);
} catch (const std::invalid_argument& error) {
    damaged(section, offset, error.what());
}

// The matrices of a section as a codec sees them: all dimensions but the last are rows.
std::vector<Shape> shapes_of(const std::vector<Tensor>& tensors, uint8_t section) {
    std::vector<Shape> shapes;
    for (const Tensor& tensor : tensors) {
        if (tensor.section != section) continue;
        Shape shape = {1, 1, kItemBytes[tensor.dtype]};
        for (const uint32_t size : tensor.shape) {
            shape.rows *= shape.columns;
            shape.columns = size;
        }
        shapes.push_back(shape);
    }
    return shapes;
}

// Takes the fields of the unpacked header, one after another.
class Cursor {
   public:
    Cursor(const uint8_t* data, size_t size) : data_(data), left_(size) {}

    const uint8_t* take(size_t count, const std::string& what) {
        if (count > left_) broken("it ends within " + what);
        const uint8_t* taken = data_;
        data_ += count;
        left_ -= count;
        return taken;
    }
    uint64_t number(size_t bytes, const std::string& what) { return little_endian(take(bytes, what), bytes); }
    std::string text(size_t length_bytes, const std::string& what) {
        const size_t length = number(length_bytes, what);
        const uint8_t* start = take(length, what);
        return std::string(start, start + length);
    }
    size_t left() const { return left_; }

   private:
    const uint8_t* data_;
    size_t left_;
};

// Whether the text is UTF-8 in its shortest form, without surrogates.
bool is_utf8(const std::string& text) {
    const auto byte = [&](size_t i) { return i < text.size() ? uint8_t(text[i]) : 0; };
    for (size_t i = 0; i < text.size();) {
        const uint8_t first = byte(i);
        const size_t length = first < 0x80 ? 1 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
        if ((first >= 0x80 && first < 0xc2) || first > 0xf4) return false;
        for (size_t k = 1; k < length; k++)
            if ((byte(i + k) & 0xc0) != 0x80) return false;
        const uint8_t second = byte(i + 1);
        if ((first == 0xe0 && second < 0xa0) || (first == 0xed && second > 0x9f)) return false;
        if ((first == 0xf0 && second < 0x90) || (first == 0xf4 && second > 0x8f)) return false;
        i += length;
    }
    return true;
}

std::vector<Section> parse_sections(Cursor& cursor, uint64_t offset, uint64_t end) {
    std::vector<Section> sections;
    uint64_t raw_left = kMaxRawBytes;
    const size_t count = cursor.number(2, "the number of sections");
    for (size_t i = 0; i < count; i++) {
        const std::string what = "section " + to_string(i);
        const uint8_t* entry = cursor.take(22, what);
        const Section section = {entry[0],
                                 static_cast<Codec>(entry[1]),
                                 little_endian(entry + 2, 8),
                                 little_endian(entry + 10, 8),
                                 uint32_t(little_endian(entry + 18, 4)),
                                 offset};
        const uint64_t raw = section.raw_bytes, stored = section.stored_bytes;
        if (section.name >= kSectionCount) broken(what + " has the unknown name " + to_string(section.name));
        const std::string label = std::string("section '") + kSections[section.name] + "'";
        if (!sections.empty() && section.name <= sections.back().name)
            broken(label + " is there twice or out of order");
        if (entry[1] >= kCodecCount) broken(label + " has the unknown codec " + to_string(entry[1]));
        if (raw > raw_left)
            broken("its sections claim more than the limit of " + to_string(kMaxRawBytes) + " bytes unpacked");
        if (stored > end - offset)
            broken(label + " claims " + to_string(stored) + " bytes, but " + to_string(end - offset) + " are left");
        if (stored > raw || (stored == raw) != (section.codec == Codec::kRaw))
            broken(label + " stores " + to_string(raw) + " bytes in " + to_string(stored) + ", which its codec cannot");
        sections.push_back(section);
        raw_left -= raw;
        offset += stored;
    }
    if (offset != end) broken(to_string(end - offset) + " bytes of the file belong to no section");
    return sections;
}

// Elements of a tensor; throws when they, or the product of only the sizes that are not 0, are beyond the limit.
uint64_t elements_of(const std::vector<uint32_t>& shape, uint64_t item_bytes, const std::string& label) {
    const uint64_t limit = kMaxRawBytes / item_bytes;
    uint64_t product = 1;
    for (const uint32_t size : shape) {
        if (size > limit / product && size > 0)
            broken(label + " has sizes whose product is beyond the limit of " + to_string(kMaxRawBytes) + " bytes");
        product *= std::max(size, 1u);
    }
    return std::count(shape.begin(), shape.end(), 0u) ? 0 : product;
}

Tensor parse_tensor(Cursor& cursor, const std::string& label, const Section* const* sections, uint64_t* filled) {
    const uint8_t* entry = cursor.take(4, label);
    const uint8_t number = entry[0], kind = entry[1], dtype = entry[2], dimensions = entry[3];
    if (number >= kSectionCount || !sections[number])
        broken(label + " lies in section " + to_string(number) + ", which is not there");
    if (kind >= kKindCount || dtype >= std::size(kItemBytes) || !(kKindDtypes[kind] >> dtype & 1))
        broken(label + " has kind " + to_string(kind) + " and dtype " + to_string(dtype) +
               ", which do not go together");
    if (dimensions > kMaxDimensions)
        broken(label + " has " + to_string(dimensions) + " dimensions, but " + to_string(kMaxDimensions) +
               " are the limit");
    Tensor tensor{{}, number, kind, dtype, std::vector<uint32_t>(dimensions), filled[number]};
    const uint8_t* sizes = cursor.take(4 * size_t(dimensions), label);
    for (size_t i = 0; i < dimensions; i++) tensor.shape[i] = uint32_t(little_endian(sizes + 4 * i, 4));
    filled[number] += elements_of(tensor.shape, kItemBytes[dtype], label) * kItemBytes[dtype];
    if (filled[number] > sections[number]->raw_bytes)
        broken(label + " goes beyond the " + to_string(sections[number]->raw_bytes) + " bytes of section '" +
               kSections[number] + "'");
    tensor.name = cursor.text(2, label);
    if (tensor.name.empty()) broken(label + " has no name");
    if (!is_utf8(tensor.name)) broken("the name of " + label + " is no UTF-8");
    return tensor;
}

std::vector<Tensor> parse_tensors(Cursor& cursor, const std::vector<Section>& sections) {
    const Section* by_name[kSectionCount] = {};
    for (const Section& section : sections) by_name[section.name] = &section;
    uint64_t filled[kSectionCount] = {};  // bytes that belong to a tensor already
    bool used[kSectionCount] = {};
    const size_t count = cursor.number(4, "the number of tensors");
    if (count > kMaxTensors)
        broken("it claims " + to_string(count) + " tensors, but " + to_string(kMaxTensors) + " are the limit");
    std::vector<Tensor> tensors;
    std::unordered_map<std::string, size_t> numbers;
    for (size_t i = 0; i < count; i++) {
        const std::string label = "tensor " + to_string(i);
        tensors.push_back(parse_tensor(cursor, label, by_name, filled));
        used[tensors.back().section] = true;
        const auto [first, is_new] = numbers.emplace(tensors.back().name, i);
        if (!is_new) broken(label + " has the name of tensor " + to_string(first->second));
    }
    for (const Section& section : sections)
        if (!used[section.name] || filled[section.name] != section.raw_bytes)
            broken("tensors do not fill the " + to_string(section.raw_bytes) + " bytes of section '" +
                   kSections[section.name] + "'");
    return tensors;
}

// The header unpacked, after every check of prefix and checksum.
std::vector<uint8_t> unpack_header(const uint8_t* file, size_t size) {
    const auto starts_with = [&](const uint8_t(&magic)[8]) { return size >= 8 && std::equal(magic, magic + 8, file); };
    if (starts_with(kOldMagic))
        throw std::invalid_argument("was written before the format was fixed: pack it again (`pgolf pack RUN`)");
    if (!starts_with(kMagic))
        throw std::invalid_argument(
            "is none: it does not start with the bytes 89 'PGOLF'; `pgolf pack` writes artifacts");
    if (size < kStart + kDigestBytes) damaged("header", 8, "the file ends after " + to_string(size) + " bytes");
    const uint64_t version = little_endian(file + 8, 4), codec = little_endian(file + 12, 4);
    const uint64_t stored = little_endian(file + 16, 4), raw = little_endian(file + 20, 4);
    const uint64_t file_bytes = little_endian(file + 24, 8), left = size - kDigestBytes - kStart;
    if (version != kVersion)
        throw std::invalid_argument("has version " + to_string(version) + ", but this program reads version " +
                                    to_string(kVersion) + ": read it with the release of pgolf-fast that wrote it");
    if (file_bytes != size)
        damaged("header", 24, "the file has " + to_string(size) + " bytes, but " + to_string(file_bytes) +
                                  " were written");
    if (stored > left || stored > kMaxHeaderBytes)
        damaged("header", 16, "it claims " + to_string(stored) + " bytes, but " + to_string(left) + " are left");
    check_crc("header", 0, crc32(file + kStart, stored, crc32(file, kPrefixBytes)),
              uint32_t(little_endian(file + kPrefixBytes, 4)));
    if (codec > 1) damaged("header", 12, "its codec is " + to_string(codec) + ", but 0 or 1 is needed");
    if (raw > kMaxHeaderBytes)
        damaged("header", 20, "it claims " + to_string(raw) + " bytes unpacked, but " + to_string(kMaxHeaderBytes) +
                                  " are the limit");
    std::vector<uint8_t> header(raw);
    unpack("header", kStart, static_cast<Codec>(codec), file + kStart, stored, {}, header.data(), header.size());
    return header;
}

// Eight tables, so that eight bytes are taken at once: entry [k][b] is byte b's remainder after k more bytes.
std::array<std::array<uint32_t, 256>, 8> crc_tables() {
    std::array<std::array<uint32_t, 256>, 8> table{};
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t rest = byte;
        for (int bit = 0; bit < 8; bit++) rest = rest >> 1 ^ (rest & 1 ? 0xedb88320u : 0);
        table[0][byte] = rest;
    }
    for (size_t k = 1; k < 8; k++)
        for (size_t byte = 0; byte < 256; byte++)
            table[k][byte] = table[k - 1][byte] >> 8 ^ table[0][table[k - 1][byte] & 255];
    return table;
}

}  // namespace

uint32_t crc32(const uint8_t* data, size_t size, uint32_t before) {
    static const auto table = crc_tables();
    uint32_t rest = ~before;
    for (; size >= 8; size -= 8, data += 8) {
        const uint64_t word = little_endian(data, 8) ^ rest;
        rest = 0;
        for (int k = 0; k < 8; k++) rest ^= table[7 - k][word >> 8 * k & 255];
    }
    for (; size > 0; size--, data++) rest = rest >> 8 ^ table[0][(rest ^ *data) & 255];
    return ~rest;
}

Container parse_container(const uint8_t* file, size_t size) {
    const std::vector<uint8_t> header = unpack_header(file, size);
    const uint64_t start = kStart + little_endian(file + 16, 4), end = size - kDigestBytes;
    Cursor cursor(header.data(), header.size());
    Container container;
    container.config = cursor.text(4, "the configuration");
    container.sections = parse_sections(cursor, start, end);
    container.tensors = parse_tensors(cursor, container.sections);
    if (cursor.left() > 0) broken(to_string(cursor.left()) + " bytes follow its last tensor");
    for (const Section& section : container.sections)
        check_crc(kSections[section.name], section.offset, crc32(file + section.offset, section.stored_bytes),
                  section.crc32);
    const Digest digest = sha256(file, end);
    if (!std::equal(digest.begin(), digest.end(), file + end))
        damaged("digest", end, "it is not the SHA-256 of the bytes before it");
    return container;
}

bool can_decode(Codec codec) { return codec <= Codec::kRans; }

void decode_section(const uint8_t* file, const Container& container, const Section& section, uint8_t* out) {
    unpack(kSections[section.name], section.offset, section.codec, file + section.offset, section.stored_bytes,
           shapes_of(container.tensors, section.name), out, section.raw_bytes);
}

}  // namespace pgolf
