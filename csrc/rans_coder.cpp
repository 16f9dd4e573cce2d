#include "rans_coder.h"

#include <algorithm>
#include <cstring>
#include <memory>

namespace pgolf {
namespace rans {
namespace {

constexpr uint32_t kLow = uint32_t(1) << 16;  // states between symbols are 2^16 .. 2^32-1
constexpr uint32_t kSlotMask = kTotal - 1;

// Calls visit(matrix, row, column, length, lane) for symbols first..last-1 in order, in pieces within one row and of at
// most lanes - lane symbols.
template <class Byte, class Visit>
void for_pieces(const std::vector<Matrix<Byte>>& matrices, size_t lanes, size_t first, size_t last,
                const Visit& visit) {
    size_t begin = 0;  // index of the matrix's first symbol
    for (const auto& matrix : matrices) {
        const size_t end = begin + matrix.size(), stop = std::min(end, last);
        for (size_t at = std::max(begin, first); at < stop;) {
            const size_t row = (at - begin) / matrix.columns, column = (at - begin) % matrix.columns;
            const size_t lane = (at - first) % lanes;
            const size_t length = std::min({matrix.columns - column, lanes - lane, stop - at});
            visit(matrix, row, column, length, lane);
            at += length;
        }
        begin = end;
    }
}

}  // namespace

Encoder::Encoder(const std::vector<Levels>& models) : tables_(models.size()) {
    for (size_t i = 0; i < models.size(); i++) {
        const Frequencies frequencies = frequencies_of(models[i]);
        uint32_t start = 0;
        for (int symbol = 0; symbol < 256; symbol++) {
            const uint32_t frequency = frequencies[symbol];
            const uint64_t reciprocal = frequency == 0 ? 0 : ((uint64_t(1) << 46) + frequency - 1) / frequency;
            tables_[i][symbol ^ kSymbolFlip] = {reciprocal, frequency, start};
            start += frequency;
        }
    }
}

template <bool kColumns>
void Encoder::encode_run(const uint8_t* in, size_t length, const Table* models, const int8_t* classes,
                         uint32_t* states, uint16_t*& words) {
    uint16_t* word = words;
    for (size_t i = length; i-- > 0;) {
        const Step& step = models[kColumns ? classes[i] : 0][in[i]];
        uint32_t x = states[i];
        const bool full = x >> 18 >= step.frequency;
        word[-1] = uint16_t(x);
        word -= full;
        x = full ? x >> 16 : x;
        const uint32_t quotient = uint32_t(x * step.reciprocal >> 46);
        states[i] = x + quotient * (kTotal - step.frequency) + step.start;
    }
    words = word;
}

void Encoder::encode_segment(const std::vector<Source>& matrices, Segment& segment) const {
    struct Piece {
        const uint8_t* in;
        uint32_t length, lane;
        const Table* models;
        const int8_t* classes;
    };
    std::vector<Piece> pieces;
    for_pieces(matrices, segment.lanes, segment.first, segment.last,
               [&](const Source& m, size_t row, size_t column, size_t length, size_t lane) {
                   const int8_t* classes = m.column_classes.empty() ? nullptr : m.column_classes.data() + column;
                   pieces.push_back({m.bytes + row * m.columns + column, uint32_t(length), uint32_t(lane),
                                     tables_.data() + m.row_model(row), classes});
               });
    // The last symbol is coded first. A symbol emits at most one word; one more word is scratch.
    const size_t capacity = segment.last - segment.first + 1;
    const std::unique_ptr<uint16_t[]> words(new uint16_t[capacity]);
    uint16_t* word = words.get() + capacity;
    segment.states.assign(segment.lanes, kLow);
    for (auto piece = pieces.rbegin(); piece != pieces.rend(); ++piece) {
        uint32_t* states = segment.states.data() + piece->lane;
        if (piece->classes)
            encode_run<true>(piece->in, piece->length, piece->models, piece->classes, states, word);
        else
            encode_run<false>(piece->in, piece->length, piece->models, nullptr, states, word);
    }
    segment.words.assign(word, words.get() + capacity);
}

Decoder::Decoder(const std::vector<Frequencies>& models) : tables_(models.size()) {
    for (size_t i = 0; i < models.size(); i++) {
        Table& table = tables_[i];
        int count = 0;
        uint32_t start = 0;
        for (int symbol = 0; symbol < 256; symbol++) {
            if (models[i][symbol] == 0) continue;
            table.byte[count] = uint8_t(symbol ^ kSymbolFlip);
            table.start[count++] = uint16_t(start);
            start += models[i][symbol];
        }
        std::fill(table.start + count, table.start + 257, uint16_t(kTotal));
        for (int group = 0, at = 0; group < 1 << kGuessBits; group++) {
            while (table.start[at + 1] <= group << (kFrequencyBits - kGuessBits)) at++;
            table.guess[group] = uint8_t(at);
        }
    }
}

// kCareful: the words may end within the run; otherwise there is one for each symbol.
template <bool kCareful, bool kColumns>
void Decoder::decode_run(uint8_t* out, size_t length, const Table* models, const int8_t* classes, uint32_t* states,
                         const uint8_t*& word, const uint8_t* end) {
    const uint8_t* next = word;
    for (size_t i = 0; i < length; i++) {
        const Table& table = models[kColumns ? classes[i] : 0];
        uint32_t x = states[i];
        const uint32_t slot = x & kSlotMask;
        uint32_t at = table.guess[slot >> (kFrequencyBits - kGuessBits)];
        while (table.start[at + 1] <= slot) at++;
        const uint32_t start = table.start[at];
        out[i] = table.byte[at];
        x = (table.start[at + 1] - start) * (x >> kFrequencyBits) + slot - start;
        const bool low = x < kLow;
        if (kCareful && low && next == end)
            throw std::invalid_argument("the rANS payload is corrupt: its words end too early");
        const uint32_t refilled = x << 16 | (kCareful && !low ? 0 : load16(next));
        states[i] = low ? refilled : x;
        next += low ? 2 : 0;
    }
    word = next;
}

void Decoder::decode_segment(const std::vector<Target>& matrices, const StoredSegment& segment) const {
    uint32_t states[kMaxLanes];
    for (size_t i = 0; i < segment.lanes; i++) {
        states[i] = load32(segment.bytes + 4 * i);
        if (states[i] < kLow) throw std::invalid_argument("the rANS payload is corrupt: a state is out of range");
    }
    const uint8_t *word = segment.bytes + 4 * segment.lanes, *end = word + 2 * segment.words;
    for_pieces(matrices, segment.lanes, segment.first, segment.last,
               [&](const Target& m, size_t row, size_t column, size_t length, size_t lane) {
                   const bool careful = size_t(end - word) < 2 * length, columns = !m.column_classes.empty();
                   const auto run = careful ? (columns ? decode_run<true, true> : decode_run<true, false>)
                                            : (columns ? decode_run<false, true> : decode_run<false, false>);
                   run(m.bytes + row * m.columns + column, length, tables_.data() + m.row_model(row),
                       columns ? m.column_classes.data() + column : nullptr, states + lane, word, end);
               });
    if (word != end) throw std::invalid_argument("the rANS payload is corrupt: words are left over");
    for (size_t i = 0; i < segment.lanes; i++)
        if (states[i] != kLow)
            throw std::invalid_argument("the rANS payload is corrupt: a state does not end at its initial value");
}

}  // namespace rans
}  // namespace pgolf
