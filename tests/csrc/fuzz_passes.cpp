// The fused passes against loops over doubles. Input: pass and type (1 byte), table (1), rows (1), width (1), options
// (1), then bytes that make the values, repeated to the size needed. Tables: those that this CPU can run, and one with
// vectors of 16 that needs no AVX-512.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <thread>
#include <vector>

#include "fuzz.h"
#include "passes.h"
#include "pool.h"

#define PGOLF_LANES 16
namespace pgolf {
namespace wide {
#include "passes_all.h"
}  // namespace wide
}  // namespace pgolf

namespace fuzz {

Bytes make_input(Random& random) {
    Bytes bytes(5 + random.below(60));
    for (auto& byte : bytes) byte = uint8_t(random());
    return bytes;
}

}  // namespace fuzz

namespace {

using pgolf::Type;
using Doubles = std::vector<double>;

struct Input {
    const uint8_t* data;
    size_t size, next = 0;
    double value() {  // -8 to 8, in steps that bfloat16 holds
        const int code = data[next++ % size];
        return (code - 128) / 16.0;
    }
};

// An array of either type, of exactly the size that a pass may touch.
class Array {
   public:
    Array(Type type, size_t count, Input* input = nullptr) : type_(type), bytes_(count * (type == Type::f32 ? 4 : 2)) {
        for (size_t i = 0; input && i < count; i++) {
            const float value = float(input->value());
            uint32_t word;
            std::memcpy(&word, &value, 4);
            const uint16_t half = uint16_t(word >> 16);
            if (type == Type::f32)
                std::memcpy(&bytes_[4 * i], &value, 4);
            else
                std::memcpy(&bytes_[2 * i], &half, 2);
        }
    }
    void* data() { return bytes_.data(); }
    float* floats() { return static_cast<float*>(data()); }
    double operator[](size_t i) const {
        uint32_t word = 0;
        if (type_ == Type::f32) std::memcpy(&word, &bytes_[4 * i], 4);
        if (type_ == Type::bf16) std::memcpy(reinterpret_cast<char*>(&word) + 2, &bytes_[2 * i], 2);
        float value;
        std::memcpy(&value, &word, 4);
        return value;
    }
    // Compares with `want` relative to `size`, the magnitude of the terms that it sums.
    void expect(size_t i, double want, double size, const char* what) const {
        const double error = std::fabs((*this)[i] - want), step = type_ == Type::f32 ? 1e-6 : 4e-3;
        fuzz::require(error <= step * std::fabs(want) + 2e-6 * size + 1e-30, what);
    }

   private:
    Type type_;
    std::vector<uint8_t> bytes_;
};

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

void check_activation(const pgolf::Passes& passes, Type type, size_t count, int option, Input& input) {
    const auto kind = pgolf::Activation(option % 3);
    const size_t each = kind == pgolf::Activation::swiglu ? 2 : 1;
    Array pre(type, each * count, &input), grad(type, count, &input), hidden(type, count), again(type, count),
        dpre(type, each * count);
    passes.activate(type, pre.data(), hidden.data(), count, kind, 1 + option % 2);
    passes.activate_backward(type, grad.data(), pre.data(), dpre.data(), again.data(), count, kind, 1);
    for (size_t i = 0; i < count; i++) {
        const double x = pre[each * i], g = grad[i];
        fuzz::require(again[i] == hidden[i], "the hidden layer of backward");
        if (each == 2) {
            const double up = pre[2 * i + 1], s = sigmoid(x);
            hidden.expect(i, x * s * up, std::fabs(x * s * up), "swiglu");
            dpre.expect(2 * i, g * up * s * (1 + x * (1 - s)), std::fabs(g * up), "the gradient of the gate");
            dpre.expect(2 * i + 1, g * x * s, 0, "the gradient of up");
        } else {
            const double slope = kind == pgolf::Activation::relu_squared ? 0 : 0.5, leaky = x > 0 ? x : slope * x;
            hidden.expect(i, leaky * leaky, 0, "the squared activation");
            dpre.expect(i, 2 * g * leaky * (x > 0 ? 1 : slope), 0, "its gradient");
        }
    }
}

void check_loss(const pgolf::Passes& passes, Type type, size_t rows, size_t vocab, int option, Input& input) {
    if (option % 8 == 0) vocab = 8200 + vocab, rows = std::min<size_t>(rows, 2);  // beyond the columns kept
    Array logits(type, rows * vocab, &input), loss(Type::f32, rows), log_z(Type::f32, rows), out = logits;
    const float cap = option % 3 ? 30 : option % 2 ? 0.5f : 200, z_loss = option & 64 ? 0.125f : 0;
    std::vector<int64_t> targets(rows);
    for (size_t i = 0; i < rows; i++) targets[i] = int64_t(input.data[i % input.size] * 37 % vocab);
    passes.softcap_loss(type, out.data(), targets.data(), rows, vocab, {cap, z_loss, option % 5 != 0}, loss.floats(),
                        log_z.floats(), 1 + option % 2);
    for (size_t row = 0; row < rows; row++) {
        const auto capped = [&](size_t i) { return cap * std::tanh(logits[row * vocab + i] / cap); };
        double z = 0;
        for (size_t i = 0; i < vocab; i++) z += std::exp(capped(i));
        const double lse = std::log(z), own = lse - capped(size_t(targets[row]));
        log_z.expect(row, lse, 8, "logsumexp");
        loss.expect(row, own + z_loss * lse * lse, 8 + 8 * std::fabs(lse), "the loss");
        for (size_t i = row * vocab; i < (row + 1) * vocab; i++) {
            if (option % 5 == 0) {
                fuzz::require(out[i] == logits[i], "logits changed without a gradient");
                continue;
            }
            const double t = std::tanh(logits[i] / cap), hot = i % vocab == size_t(targets[row]);
            const double p = std::exp(cap * t - lse), grad = ((1 + 2 * z_loss * lse) * p - hot) * (1 - t * t);
            out.expect(i, grad, p * (8 + std::fabs(lse)) + hot, "d loss / d logits");
        }
    }
}

void check_norm(const pgolf::Passes& passes, Type type, size_t rows, size_t width, int option, Input& input) {
    const bool branched = option % 3, scaled = branched && option & 1;
    const size_t count = rows * width, vectors = scaled ? 2 : 1;
    const size_t blocks = (rows + pgolf::kSumRows - 1) / pgolf::kSumRows;
    Array x(type, count, &input), branch(type, count, &input), dm(type, count, &input), dn(type, count, &input);
    Array xs(Type::f32, width, &input), bs(Type::f32, width, &input), rstd(Type::f32, rows), sum(type, count);
    Array normed(type, count), dx(type, count), db(type, count), sums(Type::f32, blocks * vectors * width);
    const float scale = 0.5f;
    const float *x_scale = scaled ? xs.floats() : nullptr, *b_scale = branched ? bs.floats() : nullptr;
    void* given = branched ? branch.data() : nullptr;
    Array& mixed = branched ? sum : x;
    const pgolf::ResidualNorm forward{x.data(),      given,         x_scale, b_scale, sum.data(),
                                      normed.data(), rstd.floats(), rows,    width,   scale};
    passes.residual_norm(type, forward, 1 + option % 2);
    const pgolf::ResidualNormBackward backward{dm.data(),     dn.data(), x.data(),  given,         mixed.data(),
                                               x_scale,       b_scale,   rstd.floats(), dx.data(), db.data(),
                                               sums.floats(), rows,      width,     scale};
    passes.residual_norm_backward(type, backward, 1);
    Doubles want(vectors * width), size(vectors * width);
    for (size_t row = 0; row < rows; row++) {
        double squares = 0, along = 0;
        for (size_t i = row * width; i < (row + 1) * width; i++) squares += mixed[i] * mixed[i];
        const double r = 1 / std::sqrt(squares / double(width) + 1.1920928955078125e-07);
        rstd.expect(row, r, 0, "1 / rms");
        for (size_t i = row * width; i < (row + 1) * width; i++) along += scale * dn[i] * mixed[i] * r / double(width);
        for (size_t c = 0; c < width; c++) {
            const size_t i = row * width + c;
            const double a = scaled ? xs[c] : 1;
            const double left = a * x[i], right = bs[c] * branch[i];
            if (branched) sum.expect(i, left + right, std::fabs(left) + std::fabs(right), "mixed");
            normed.expect(i, scale * r * mixed[i], 0, "the norm");
            const double total = (scale * dn[i] - mixed[i] * r * along) * r + (branched ? dm[i] : 0);
            const double terms = 30 * r + 10;
            dx.expect(i, a * total, std::fabs(a) * terms, "the gradient of x");
            if (!branched) continue;
            db.expect(i, bs[c] * total, std::fabs(bs[c]) * terms, "the gradient of the branch");
            want[c] += total * branch[i], size[c] += std::fabs(branch[i]) * terms;
            if (scaled) want[width + c] += total * x[i], size[width + c] += std::fabs(x[i]) * terms;
        }
    }
    for (size_t c = 0; branched && rows && c < vectors * width; c++) {
        for (size_t block = 1; block < blocks; block++) sums.floats()[c] += sums.floats()[block * vectors * width + c];
        sums.expect(c, want[c], size[c], "the gradient of a scale");
    }
}

void check_smear(const pgolf::Passes& passes, Type type, size_t rows, size_t width, int option, Input& input) {
    const size_t length = 1 + size_t(option) % 7, count = rows * length * width,
                 blocks = (rows * length + pgolf::kSumRows - 1) / pgolf::kSumRows;
    Array x(type, count, &input), grad(type, count, &input), gate(Type::f32, width, &input), out(type, count),
        dx(type, count), sums(Type::f32, blocks * width);
    for (size_t c = 0; c < width; c++) gate.floats()[c] = float(sigmoid(gate[c]));
    const pgolf::Sequences shape{rows, length, width};
    passes.smear_gate(type, x.data(), gate.floats(), out.data(), shape, 1 + option % 2);
    passes.smear_gate_backward(type, grad.data(), x.data(), gate.floats(), dx.data(), sums.floats(), shape, 1);
    for (size_t c = 0; c < width; c++) {
        double total = 0, size = 0;
        for (size_t t = 0; t < rows * length; t++) {
            const size_t i = t * width + c;
            const double s = gate[c], before = t % length ? x[i - width] : 0;
            const double after = (t + 1) % length ? grad[i + width] : 0;
            out.expect(i, (1 - s) * x[i] + s * before, std::fabs(x[i]) + std::fabs(before), "the smeared value");
            dx.expect(i, (1 - s) * grad[i] + s * after, std::fabs(grad[i]) + std::fabs(after), "its gradient");
            total += grad[i] * (before - x[i]), size += std::fabs(grad[i]) * (std::fabs(before) + std::fabs(x[i]));
        }
        for (size_t block = 1; block < blocks; block++) sums.floats()[c] += sums.floats()[block * width + c];
        if (blocks) sums.expect(c, total, size, "the gate's gradient");
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    if (size < 6) return 0;
    static const pgolf::Passes wide = pgolf::wide::table("wide");
    const Type type = data[0] & 128 ? Type::f32 : Type::bf16;
    const auto names = pgolf::runnable_passes();
    const size_t which = data[1] % (names.size() + 1), rows = data[2] % 80, width = 1 + data[3] % 70;
    pgolf::choose_passes(which < names.size() ? names[which] : "auto");
    const pgolf::Passes& passes = which < names.size() ? pgolf::passes() : wide;
    Input input{data + 5, size - 5};
    const auto check = data[0] % 4 == 0 ? check_loss : data[0] % 4 == 1 ? check_norm : check_smear;
    if (data[0] % 4 == 3)
        check_activation(passes, type, rows * width, data[4], input);
    else
        check(passes, type, rows, width, data[4], input);
    fuzz::accepted++;
    return 0;
}
