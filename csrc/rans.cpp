#include "rans.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "parallel.h"
#include "rans_coder.h"
#include "rans_model.h"
#include "rans_planes.h"

namespace pgolf {
namespace {

using namespace rans;
using Bytes = std::vector<uint8_t>;
using std::to_string;

enum Kind : uint8_t { kRaw = 0, kCoded = 1 };  // the payload's first byte
constexpr size_t kPrefix = 5;                  // kind, bytes of the header (u32)
constexpr size_t kMaxSegments = 64;

[[noreturn]] void fail(const std::string& what) { throw std::invalid_argument("the rANS payload is corrupt: " + what); }

void check_shapes(const Shape* shapes, size_t count, size_t size) {
    size_t left = size;
    for (size_t i = 0; i < count; i++) {
        const auto& [rows, columns, itemsize] = shapes[i];
        const std::string name = "shape " + to_string(i) + ", (" + to_string(rows) + ", " + to_string(columns) + ", " +
                                 to_string(itemsize) + "),";
        if (itemsize != 1 && itemsize != 2 && itemsize != 4 && itemsize != 8)
            throw std::invalid_argument(name + " has an item size other than 1, 2, 4 or 8");
        if (rows == 0 || columns == 0) continue;
        if (rows > left / itemsize / columns)
            throw std::invalid_argument(name + " exceeds the " + to_string(size) + " bytes of the data");
        left -= rows * columns * itemsize;
    }
    if (left > 0)
        throw std::invalid_argument("the shapes hold " + to_string(size - left) + " bytes, but there are " +
                                    to_string(size));
}

// Calls visit(shape, offset) for every nonempty array.
template <class Visit>
void for_arrays(const Shape* shapes, size_t count, const Visit& visit) {
    size_t offset = 0;
    for (size_t i = 0; i < count; i++) {
        const size_t size = shapes[i].rows * shapes[i].columns * shapes[i].itemsize;
        if (size > 0) visit(shapes[i], offset);
        offset += size;
    }
}

// Returns all row and column classes as matrices of one row each, which is how they are coded.
std::vector<Source> class_vectors(const std::vector<Source>& matrices) {
    std::vector<Source> vectors;
    for (const Source& matrix : matrices)
        for (const auto* classes : {&matrix.row_classes, &matrix.column_classes})
            if (!classes->empty())
                vectors.push_back({1, classes->size(), reinterpret_cast<const uint8_t*>(classes->data()), 0, {}, {}});
    return vectors;
}

template <class Byte>
size_t symbols_of(const std::vector<Matrix<Byte>>& matrices) {
    size_t symbols = 0;
    for (const auto& matrix : matrices) symbols += matrix.size();
    return symbols;
}

// Chooses a power of two: more lanes let a decoder work on more symbols at once, but each costs a 4-byte state. Limits
// the states to about 1/3000 of the segment, but takes at least one lane per 2^16 symbols.
size_t choose_lanes(size_t symbols, double bytes) {
    size_t lanes = 1;
    while (lanes < kMaxLanes && (bytes > double(12288 * lanes) || symbols >> 16 > lanes)) lanes *= 2;
    return lanes;
}

// Segments are decoded by one thread each: two from 1 MB, four from 4 MB, eight from 16 MB.
size_t choose_segments(double bytes) { return bytes > 16e6 ? 8 : bytes > 4e6 ? 4 : bytes > 1e6 ? 2 : 1; }

// Cuts matrices into segments of `each` symbols.
std::vector<Segment> segments_of(size_t symbols, size_t each, size_t lanes) {
    std::vector<Segment> segments;
    for (size_t first = 0; first < symbols; first += each)
        segments.push_back({first, std::min(first + each, symbols), lanes, {}, {}});
    return segments;
}

void append32(Bytes& out, uint32_t n) {
    for (int shift = 0; shift < 32; shift += 8) out.push_back(uint8_t(n >> shift));
}

void append(Bytes& out, const Segment& segment) {
    for (uint32_t state : segment.states) append32(out, state);
    const size_t at = out.size();
    out.resize(at + 2 * segment.words.size());
    uint8_t* to = out.data() + at;
    for (uint16_t word : segment.words) *to++ = uint8_t(word), *to++ = uint8_t(word >> 8);
}

// Matrices of bytes: arrays of single bytes in place, others as planes.
template <class Byte>
struct Matrices {
    std::vector<Matrix<Byte>> all;
    std::vector<bool> whole;  // whether the matrix is an array of single bytes
    Bytes planes;
};

template <class Byte>
Matrices<Byte> matrices_of(Byte* bytes, const Shape* shapes, size_t count, const Palettes& palettes) {
    Matrices<Byte> matrices;
    size_t capacity = 0;
    for_arrays(shapes, count, [&](const Shape& s, size_t) {
        capacity += s.itemsize == 1 ? 0 : s.rows * s.columns * palettes.planes_of(s.itemsize);
    });
    matrices.planes.resize(capacity);
    uint8_t* planes = matrices.planes.data();
    for_arrays(shapes, count, [&](const Shape& shape, size_t offset) {
        const size_t items = shape.rows * shape.columns;
        const bool whole = shape.itemsize == 1;
        for (size_t i = whole ? 1 : palettes.planes_of(shape.itemsize); i > 0; i--) {
            matrices.whole.push_back(whole);
            if (whole) {
                matrices.all.push_back({shape.rows, shape.columns, bytes + offset, 0, {}, {}});
            } else {
                matrices.all.push_back({1, items, planes, 0, {}, {}});
                planes += items;
            }
        }
    });
    return matrices;
}

// Writes each model with the number of times it repeats.
void write_models(BitWriter& header, const std::vector<Levels>& models) {
    std::vector<std::pair<const Levels*, uint64_t>> runs;
    for (const Levels& levels : models) {
        if (runs.empty() || *runs.back().first != levels)
            runs.emplace_back(&levels, 0);
        else
            runs.back().second++;
    }
    header.number(runs.size());
    for (const auto& [levels, repeats] : runs) {
        write_levels(header, *levels);
        header.number(repeats);
    }
}

std::vector<Frequencies> read_models(BitReader& header) {
    std::vector<Frequencies> models;
    for (uint64_t runs = header.number(); runs > 0; runs--) {
        const Frequencies frequencies = frequencies_of(read_levels(header));
        const uint64_t repeats = header.number();
        if (models.size() + repeats >= kMaxModels) fail("it has more than 256 models");
        models.insert(models.end(), repeats + 1, frequencies);
    }
    return models;
}

// Writes 0 for absent row or column classes, else 1 + the model that codes them.
void write_matrices(BitWriter& header, const std::vector<Source>& matrices, const std::vector<Source>& vectors) {
    auto vector = vectors.begin();
    for (const Source& matrix : matrices) {
        header.number(uint64_t(matrix.model));
        for (const auto* classes : {&matrix.row_classes, &matrix.column_classes})
            header.number(classes->empty() ? 0 : uint64_t(vector++->model) + 1);
    }
}

// Returns the matrices that hold the classes, which are decoded first; they point into `matrices`.
std::vector<Target> read_matrices(BitReader& header, std::vector<Target>& matrices, size_t models) {
    std::vector<Target> vectors;
    const auto number_below = [&](uint64_t limit) {
        const uint64_t n = header.number();
        if (n >= limit) fail("a matrix has model " + to_string(n) + " of " + to_string(limit));
        return int(n);
    };
    for (Target& matrix : matrices) {
        matrix.model = number_below(models);
        const size_t lengths[] = {matrix.rows, matrix.columns};
        std::vector<int8_t>* classes = &matrix.row_classes;
        for (size_t length : lengths) {
            if (const int model = number_below(models + 1)) {
                classes->resize(length);
                vectors.push_back({1, length, reinterpret_cast<uint8_t*>(classes->data()), model - 1, {}, {}});
            }
            classes = &matrix.column_classes;
        }
    }
    return vectors;
}

// Throws unless every model + row class + column class is one of `models` models.
void check_classes(const Target& matrix, size_t models) {
    int low = matrix.model, high = matrix.model;
    for (const auto* classes : {&matrix.row_classes, &matrix.column_classes}) {
        if (classes->empty()) continue;
        const auto [least, most] = std::minmax_element(classes->begin(), classes->end());
        low += *least;
        high += *most;
    }
    if (low < 0 || high >= int(models)) fail("a class leads to a model that does not exist");
}

Bytes raw_payload(const uint8_t* data, size_t size) {
    Bytes out(size + 1, kRaw);
    std::copy(data, data + size, out.begin() + 1);
    return out;
}

Bytes encode(const uint8_t* data, size_t size, const Shape* shapes, size_t count, size_t threads) {
    const Palettes palettes = Palettes::choose(data, shapes, count);
    Matrices<const uint8_t> matrices = matrices_of(data, shapes, count, palettes);
    uint8_t* planes = matrices.planes.data();
    for_arrays(shapes, count, [&](const Shape& shape, size_t offset) {
        if (shape.itemsize == 1) return;
        const size_t items = shape.rows * shape.columns;
        palettes.split(data + offset, items, shape.itemsize, planes);
        planes += items * palettes.planes_of(shape.itemsize);
    });
    Models models = choose_models(matrices.all, matrices.whole, kMaxModels * 3 / 4, threads);
    if (models.bits / 8 > double(size)) return raw_payload(data, size);
    std::vector<Source> vectors = class_vectors(matrices.all);
    const Models class_models = choose_models(vectors, {}, kMaxModels / 4, threads);
    for (Source& vector : vectors) vector.model += int(models.levels.size());
    models.levels.insert(models.levels.end(), class_models.levels.begin(), class_models.levels.end());

    const size_t symbols = symbols_of(matrices.all), class_symbols = symbols_of(vectors);
    const size_t lanes = choose_lanes(symbols, models.bits / 8), parts = choose_segments(models.bits / 8);
    const size_t each = std::min((symbols + parts * lanes - 1) / (parts * lanes) * lanes, symbols);
    std::vector<Segment> segments = segments_of(symbols, each, lanes);
    Segment classes{0, class_symbols, choose_lanes(class_symbols, class_models.bits / 8), {}, {}};
    const Encoder encoder(models.levels);
    parallel_for(segments.size() + 1, threads, [&](size_t i) {
        if (i < segments.size())
            encoder.encode_segment(matrices.all, segments[i]);
        else
            encoder.encode_segment(vectors, classes);
    });
    segments.insert(segments.begin(), std::move(classes));

    BitWriter header;
    palettes.write(header);
    write_models(header, models.levels);
    write_matrices(header, matrices.all, vectors);
    for (size_t i = 0; i < segments.size(); i++) {
        if (i == 1) header.number(each);
        header.number(segments[i].lanes - 1);
        header.number(segments[i].words.size());
    }
    Bytes out{kCoded};
    append32(out, uint32_t(header.bytes().size()));
    out.insert(out.end(), header.bytes().begin(), header.bytes().end());
    for (const Segment& segment : segments) append(out, segment);
    return out.size() <= size ? out : raw_payload(data, size);
}

void decode(const uint8_t* payload, size_t size, const Shape* shapes, size_t count, uint8_t* out, size_t threads) {
    if (size < kPrefix) fail("it ends within its first 5 bytes");
    if (payload[0] != kCoded) fail("its kind is " + to_string(payload[0]));
    const uint64_t header_size = load32(payload + 1);
    if (header_size > size - kPrefix) fail("its header is longer than the payload");
    BitReader header(payload + kPrefix, header_size);
    const uint8_t *body = payload + kPrefix + header_size, *end = payload + size;

    const Palettes palettes = Palettes::read(header);
    const std::vector<Frequencies> models = read_models(header);
    Matrices<uint8_t> matrices = matrices_of(out, shapes, count, palettes);
    const std::vector<Target> vectors = read_matrices(header, matrices.all, models.size());
    const Decoder decoder(models);

    const auto read_segment = [&](size_t first, size_t last) {
        const uint64_t lanes = header.number() + 1, words = header.number();
        if (lanes > kMaxLanes) fail("it has " + to_string(lanes) + " lanes, but at most 256 are possible");
        if (4 * lanes + 2 * words > size_t(end - body)) fail("a segment is longer than the payload");
        const StoredSegment segment{first, last, lanes, words, body};
        body += 4 * lanes + 2 * words;
        return segment;
    };
    decoder.decode_segment(vectors, read_segment(0, symbols_of(vectors)));
    for (Target& matrix : matrices.all) {
        check_classes(matrix, models.size());
        if (matrix.row_classes.empty() && matrix.column_classes.empty()) {
            matrix.columns = matrix.size();
            matrix.rows = 1;
        }
    }
    const size_t each = header.number(), symbols = symbols_of(matrices.all);
    if (each > symbols) fail("it holds " + to_string(each) + " symbols, but " + to_string(symbols) + " were stated");
    if (each == 0 || symbols / each > kMaxSegments) fail("it has over " + to_string(kMaxSegments) + " segments");
    std::vector<StoredSegment> segments;
    for (size_t first = 0; first < symbols; first += std::min(each, symbols - first))
        segments.push_back(read_segment(first, first + std::min(each, symbols - first)));
    if (body != end) fail("bytes are left over at its end");
    if (header.left() >= 8) fail("bits are left over in its header");
    parallel_for(segments.size(), threads, [&](size_t i) { decoder.decode_segment(matrices.all, segments[i]); });

    const uint8_t* planes = matrices.planes.data();
    for_arrays(shapes, count, [&](const Shape& shape, size_t offset) {
        if (shape.itemsize == 1) return;
        const size_t items = shape.rows * shape.columns;
        palettes.join(planes, items, shape.itemsize, out + offset);
        planes += items * palettes.planes_of(shape.itemsize);
    });
}

}  // namespace

std::vector<uint8_t> rans_encode(const uint8_t* data, size_t size, const Shape* shapes, size_t count,
                                 size_t threads) {
    check_shapes(shapes, count, size);
    return size == 0 ? Bytes{} : encode(data, size, shapes, count, threads);
}

void rans_decode(const uint8_t* payload, size_t size, const Shape* shapes, size_t count, uint8_t* out, size_t out_size,
                 size_t threads) {
    check_shapes(shapes, count, out_size);
    const bool raw = size == 0 || out_size == 0 || payload[0] == kRaw;
    if (!raw) return decode(payload, size, shapes, count, out, threads);
    if (size != out_size + (out_size > 0))
        fail("it has " + to_string(size) + " bytes for " + to_string(out_size) + " that are stored raw");
    if (size > 0) std::memcpy(out, payload + 1, out_size);
}

}  // namespace pgolf
