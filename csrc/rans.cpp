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

enum Kind : uint8_t { kRaw = 0, kPlain = 1, kClassed = 2 };  // the payload's first byte
constexpr size_t kPrefix = 5;                                // kind, bytes of the header (u32)

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
            throw std::invalid_argument(name + " goes beyond the " + to_string(size) + " bytes there are");
        left -= rows * columns * itemsize;
    }
    if (left > 0)
        throw std::invalid_argument("the shapes hold " + to_string(size - left) + " bytes, but there are " + to_string(size));
}

// Calls visit(shape, offset) for every array that is not empty.
template <class Visit>
void for_arrays(const Shape* shapes, size_t count, const Visit& visit) {
    size_t offset = 0;
    for (size_t i = 0; i < count; i++) {
        const size_t size = shapes[i].rows * shapes[i].columns * shapes[i].itemsize;
        if (size > 0) visit(shapes[i], offset);
        offset += size;
    }
}

// Calls visit(classes) for all row and column classes; they are coded as arrays of their own, of one row each.
template <class Byte, class Visit>
void for_classes(std::vector<Matrix<Byte>>& matrices, const Visit& visit) {
    for (auto& matrix : matrices)
        for (auto* classes : {&matrix.row_classes, &matrix.column_classes})
            if (!classes->empty()) visit(*classes);
}

template <class Byte>
size_t symbols_of(const std::vector<Matrix<Byte>>& matrices) {
    size_t symbols = 0;
    for (const auto& matrix : matrices) symbols += matrix.size();
    return symbols;
}

// First symbols of the segments, and one behind the last.
std::vector<size_t> segment_bounds(size_t symbols, size_t lanes, size_t segments) {
    const size_t steps = (symbols + lanes - 1) / lanes, each = (steps + segments - 1) / segments * lanes;
    std::vector<size_t> bounds(segments + 1);
    for (size_t i = 0; i <= segments; i++) bounds[i] = std::min(i * each, symbols);
    return bounds;
}

// Enough lanes for a decoder that handles all of them at once, and segments for threads, as long as the states, 4 bytes
// a lane, are about 1/2000 of the payload.
int choose_log2_lanes(size_t symbols, double bytes) {
    int log2_lanes = 0;
    while ((1 << log2_lanes) < int(kMaxLanes) &&
           (bytes > double(16384 << log2_lanes) || symbols >> 17 > size_t(1) << log2_lanes))
        log2_lanes++;
    return log2_lanes;
}

size_t choose_segments(double bytes) { return bytes > (16 << 20) ? 8 : bytes > (4 << 20) ? 4 : bytes > (1 << 20) ? 2 : 1; }

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

// The matrices of an encoder and where their bytes are.
struct Sources {
    std::vector<Source> all, coded;  // coded: those that are not constant
    std::vector<bool> classed;       // of the coded ones: whether row and column classes are considered
    Bytes planes;
};

bool is_constant(const Source& matrix) {
    return std::all_of(matrix.bytes, matrix.bytes + matrix.size(), [&](uint8_t byte) { return byte == *matrix.bytes; });
}

Sources sources_of(const uint8_t* data, const Shape* shapes, size_t count, const Palettes& palettes, bool classed) {
    Sources sources;
    size_t room = 0;
    for_arrays(shapes, count, [&](const Shape& s, size_t) {
        room += s.itemsize == 1 ? 0 : s.rows * s.columns * palettes.planes_of(s.itemsize);
    });
    sources.planes.resize(room);
    uint8_t* planes = sources.planes.data();
    const auto take = [&](Source matrix, bool may_be_classed) {
        sources.all.push_back(matrix);
        if (is_constant(matrix)) return;
        sources.coded.push_back(std::move(matrix));
        sources.classed.push_back(classed && may_be_classed);
    };
    for_arrays(shapes, count, [&](const Shape& shape, size_t offset) {
        const size_t items = shape.rows * shape.columns;
        if (shape.itemsize == 1) return take({shape.rows, shape.columns, data + offset, 0, {}, {}}, true);
        palettes.split(data + offset, items, shape.itemsize, planes);
        for (size_t i = palettes.planes_of(shape.itemsize); i > 0; i--, planes += items)
            take({1, items, planes, 0, {}, {}}, false);
    });
    return sources;
}

Bytes raw_payload(const uint8_t* data, size_t size) {
    Bytes out(size + 1, kRaw);
    std::copy(data, data + size, out.begin() + 1);
    return out;
}

Bytes encode(const uint8_t* data, size_t size, const Shape* shapes, size_t count, bool classed, size_t threads) {
    if (size == 0) return {};
    const Palettes palettes = Palettes::choose(data, shapes, count);
    Sources sources = sources_of(data, shapes, count, palettes, classed);
    const Models models = choose_models(sources.coded, sources.classed, threads);
    if (models.bits / 8 > double(size)) return raw_payload(data, size);

    Bytes classes;
    std::vector<Shape> class_shapes;
    for_classes(sources.coded, [&](const std::vector<int8_t>& some) {
        classes.insert(classes.end(), some.begin(), some.end());
        class_shapes.push_back({1, some.size(), 1});
    });
    const Kind kind = classes.empty() ? kPlain : kClassed;
    classes = encode(classes.data(), classes.size(), class_shapes.data(), class_shapes.size(), false, threads);

    const size_t symbols = symbols_of(sources.coded);
    const int log2_lanes = choose_log2_lanes(symbols, models.bits / 8);
    std::vector<Segment> segments(symbols == 0 ? 0 : choose_segments(models.bits / 8));
    if (symbols > 0) {
        const std::vector<size_t> bounds = segment_bounds(symbols, size_t(1) << log2_lanes, segments.size());
        std::vector<Frequencies> frequencies;
        for (const Levels& levels : models.levels) frequencies.push_back(frequencies_of(levels));
        parallel_for(segments.size(), threads, [&](size_t i) {
            segments[i].first = bounds[i];
            segments[i].last = bounds[i + 1];
            encode_segment(sources.coded, frequencies, size_t(1) << log2_lanes, segments[i]);
        });
    }

    BitWriter header;
    palettes.write(header);
    header.number(models.levels.size());
    for (size_t i = 0; i < models.levels.size(); i++) {
        const bool again = i > 0 && models.levels[i] == models.levels[i - 1];
        if (i > 0) header.bits(again, 1);
        if (!again) write_levels(header, models.levels[i]);
    }
    auto coded = sources.coded.begin();
    for (const Source& matrix : sources.all) {
        if (coded == sources.coded.end() || coded->bytes != matrix.bytes) {
            header.number(0);
            header.bits(*matrix.bytes, 8);
            continue;
        }
        header.number(uint64_t(coded->model) + 1);
        if (kind == kClassed) header.bits(!coded->row_classes.empty() * 2 + !coded->column_classes.empty(), 2);
        ++coded;
    }
    if (kind == kClassed) header.number(classes.size());
    header.number(uint64_t(log2_lanes));
    header.number(segments.size());
    for (const Segment& segment : segments) header.number(segment.words.size());

    Bytes out{kind};
    append32(out, uint32_t(header.bytes().size()));
    out.insert(out.end(), header.bytes().begin(), header.bytes().end());
    out.insert(out.end(), classes.begin(), classes.end());
    for (const Segment& segment : segments) append(out, segment);
    return out.size() <= size ? out : raw_payload(data, size);
}

// The matrices of a decoder and where their bytes go: arrays of single bytes to their place, others to planes first.
struct Targets {
    std::vector<Target> all;
    Bytes planes;
};

Targets targets_of(uint8_t* out, const Shape* shapes, size_t count, const Palettes& palettes) {
    Targets targets;
    size_t room = 0;
    for_arrays(shapes, count, [&](const Shape& s, size_t) {
        room += s.itemsize == 1 ? 0 : s.rows * s.columns * palettes.planes_of(s.itemsize);
    });
    targets.planes.resize(room);
    uint8_t* planes = targets.planes.data();
    for_arrays(shapes, count, [&](const Shape& shape, size_t offset) {
        const size_t items = shape.rows * shape.columns;
        if (shape.itemsize == 1) return targets.all.push_back({shape.rows, shape.columns, out + offset, 0, {}, {}});
        for (size_t i = palettes.planes_of(shape.itemsize); i > 0; i--, planes += items)
            targets.all.push_back({1, items, planes, 0, {}, {}});
    });
    return targets;
}

std::vector<Frequencies> read_models(BitReader& header) {
    const uint64_t count = header.number();
    if (count > kMaxModels) fail("it has " + to_string(count) + " models, but at most 256 are possible");
    std::vector<Frequencies> models;
    for (uint64_t i = 0; i < count; i++) {
        if (i > 0 && header.bits(1))
            models.push_back(models.back());
        else
            models.push_back(frequencies_of(read_levels(header)));
    }
    return models;
}

// Whether every sum of model, row class and column class is one of `models` models.
void check_models(const Target& matrix, size_t models) {
    int low = matrix.model, high = matrix.model;
    for (const auto* classes : {&matrix.row_classes, &matrix.column_classes}) {
        if (classes->empty()) continue;
        const auto [least, most] = std::minmax_element(classes->begin(), classes->end());
        low += *least;
        high += *most;
    }
    if (low < 0 || high >= int(models)) fail("a class leads to a model that is not there");
}

void decode(const uint8_t* payload, size_t size, const Shape* shapes, size_t count, uint8_t* out, size_t out_size,
            bool classed, size_t threads) {
    if (out_size == 0 && size == 0) return;
    if (out_size == 0 || size == 0) fail("it has " + to_string(size) + " bytes for " + to_string(out_size));
    const uint8_t kind = payload[0];
    if (kind == kRaw) {
        if (size - 1 != out_size) fail("it holds " + to_string(size - 1) + " bytes, but " + to_string(out_size) + " were stated");
        std::memcpy(out, payload + 1, out_size);
        return;
    }
    if (kind != kPlain && !(kind == kClassed && classed)) fail("its kind is " + to_string(kind));
    if (size < kPrefix) fail("it ends within its first 5 bytes");
    const uint64_t header_size = payload[1] | payload[2] << 8 | payload[3] << 16 | uint64_t(payload[4]) << 24;
    if (header_size > size - kPrefix) fail("its header is longer than the payload");
    BitReader header(payload + kPrefix, header_size);
    const uint8_t *body = payload + kPrefix + header_size, *end = payload + size;

    const Palettes palettes = Palettes::read(header, shapes, count);
    const std::vector<Frequencies> models = read_models(header);
    Targets targets = targets_of(out, shapes, count, palettes);
    std::vector<Target> coded;
    for (Target& matrix : targets.all) {
        const uint64_t model = header.number();
        if (model == 0) {
            std::memset(matrix.bytes, int(header.bits(8)), matrix.size());
            continue;
        }
        if (model > models.size()) fail("a matrix has a model that is not there");
        matrix.model = int(model) - 1;
        const uint64_t by = kind == kClassed ? header.bits(2) : 0;
        matrix.row_classes.resize(by & 2 ? matrix.rows : 0);
        matrix.column_classes.resize(by & 1 ? matrix.columns : 0);
        if (by == 0) matrix.columns = matrix.size(), matrix.rows = 1;
        coded.push_back(std::move(matrix));
    }
    if (kind == kClassed) {
        const uint64_t bytes = header.number();
        if (bytes > size_t(end - body)) fail("its classes are longer than the payload");
        Bytes classes;
        std::vector<Shape> class_shapes;
        for_classes(coded, [&](const std::vector<int8_t>& some) { class_shapes.push_back({1, some.size(), 1}); });
        for (const Shape& shape : class_shapes) classes.resize(classes.size() + shape.columns);
        decode(body, bytes, class_shapes.data(), class_shapes.size(), classes.data(), classes.size(), false, threads);
        const uint8_t* next = classes.data();
        for_classes(coded, [&](std::vector<int8_t>& some) {
            std::memcpy(some.data(), next, some.size());
            next += some.size();
        });
        body += bytes;
    }
    for (const Target& matrix : coded) check_models(matrix, models.size());

    const size_t symbols = symbols_of(coded);
    const uint64_t log2_lanes = header.number(), segments = header.number();
    if (log2_lanes > 8) fail("it has 2^" + to_string(log2_lanes) + " lanes, but at most 256 are possible");
    const size_t lanes = size_t(1) << log2_lanes;
    if ((segments == 0) != (symbols == 0) || segments > size_t(end - body) / 4) fail("it has " + to_string(segments) + " segments");
    std::vector<WordsView> views;
    for (uint64_t i = 0; i < segments; i++) {
        const uint64_t words = header.number(), bytes = 4 * lanes + 2 * words;
        if (bytes > size_t(end - body)) fail("segment " + to_string(i) + " is longer than the payload");
        views.push_back({body, words});
        body += bytes;
    }
    if (body != end) fail("bytes are left over at its end");
    if (header.left() >= 8) fail("bits are left over in its header");
    if (segments > 0) {
        const Decoder decoder(models);
        const std::vector<size_t> bounds = segment_bounds(symbols, lanes, segments);
        parallel_for(segments, threads, [&](size_t i) {
            decoder.decode_segment(coded, lanes, bounds[i], bounds[i + 1], views[i]);
        });
    }
    const uint8_t* planes = targets.planes.data();
    for_arrays(shapes, count, [&](const Shape& shape, size_t offset) {
        if (shape.itemsize == 1) return;
        const size_t items = shape.rows * shape.columns;
        palettes.join(planes, items, shape.itemsize, out + offset);
        planes += items * palettes.planes_of(shape.itemsize);
    });
}

}  // namespace

std::vector<uint8_t> rans_encode(const uint8_t* data, size_t size, const Shape* shapes, size_t count,
                                 const RansOptions& options) {
    check_shapes(shapes, count, size);
    return encode(data, size, shapes, count, true, options.threads);
}

void rans_decode(const uint8_t* payload, size_t size, const Shape* shapes, size_t count, uint8_t* out, size_t out_size,
                 const RansOptions& options) {
    check_shapes(shapes, count, out_size);
    decode(payload, size, shapes, count, out, out_size, true, options.threads);
}

size_t rans_size(const uint8_t* data, size_t size, const Shape* shapes, size_t count, const RansOptions& options) {
    return rans_encode(data, size, shapes, count, options).size();
}

}  // namespace pgolf
