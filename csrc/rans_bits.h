// The header of a rANS payload: a string of bits, most significant bit first, most of them Elias gamma codes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <vector>

namespace pgolf {
namespace rans {

inline uint32_t load16(const uint8_t* p) { return uint32_t(p[0]) | uint32_t(p[1]) << 8; }
inline uint32_t load32(const uint8_t* p) { return load16(p) | load16(p + 2) << 16; }

// Returns the bits of the Elias gamma code of n: as many zeros as n + 1 has bits after its first, then n + 1.
inline int gamma_bits(uint64_t n) {
    int bits = 1;
    for (n++; n > 1; n >>= 1) bits += 2;
    return bits;
}

// Maps signed to unsigned: 0, -1, 1, -2, ... become 0, 1, 2, 3, ...
inline uint64_t zigzag(int64_t n) { return n < 0 ? uint64_t(-(n + 1)) * 2 + 1 : uint64_t(n) * 2; }
inline int64_t unzigzag(uint64_t n) { return n & 1 ? -int64_t(n >> 1) - 1 : int64_t(n >> 1); }

class BitWriter {
   public:
    void bits(uint64_t value, int count) {
        for (int i = count - 1; i >= 0; i--) {
            if (used_ == 0) bytes_.push_back(0);
            bytes_.back() |= uint8_t((value >> i & 1) << (7 - used_));
            used_ = (used_ + 1) % 8;
        }
    }
    void number(uint64_t n) {  // below 2^32
        const int size = gamma_bits(n);
        bits(0, size / 2);
        bits(n + 1, size - size / 2);
    }
    const std::vector<uint8_t>& bytes() const { return bytes_; }

   private:
    std::vector<uint8_t> bytes_;
    int used_ = 0;  // bits of the last byte
};

class BitReader {
   public:
    BitReader(const uint8_t* bytes, size_t size) : bytes_(bytes), left_(uint64_t(size) * 8) {}
    uint64_t bits(int count) {
        uint64_t value = 0;
        for (int i = 0; i < count; i++) {
            if (left_ == 0) throw std::invalid_argument("the rANS payload is corrupt: its header ends too early");
            value = value << 1 | (bytes_[at_ / 8] >> (7 - at_ % 8) & 1);
            at_++, left_--;
        }
        return value;
    }
    uint64_t number() {
        int zeros = 0;
        while (bits(1) == 0)
            if (++zeros > 32) throw std::invalid_argument("the rANS payload is corrupt: a number has over 32 bits");
        return (uint64_t(1) << zeros | bits(zeros)) - 1;
    }
    uint64_t left() const { return left_; }

   private:
    const uint8_t* bytes_;
    uint64_t at_ = 0, left_;
};

}  // namespace rans
}  // namespace pgolf
