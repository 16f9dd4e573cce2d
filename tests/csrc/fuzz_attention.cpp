// Attention of small shapes, forward and backward, against loops in double. Input: 16 bytes of shape, then any number
// of bytes that become values, repeated to the size needed.
#include <cmath>
#include <cstring>

#include "fuzz.h"
#include "passes.h"

namespace fuzz {

Bytes make_input(Random& random) {
    Bytes bytes(48 + random.below(200));
    for (auto& byte : bytes) byte = uint8_t(random());
    return bytes;
}

}  // namespace fuzz

namespace {

using pgolf::Type;
using Values = std::vector<double>;

// A tensor as the pass sees it: float32 or bfloat16 in a buffer of exactly its size.
struct Tensor {
    Type type;
    fuzz::Bytes bytes;

    Tensor(Type t, size_t count) : type(t), bytes(count * (t == Type::f32 ? 4 : 2), 0xff) {}
    size_t size() const { return bytes.size() / (type == Type::f32 ? 4 : 2); }
    double operator[](size_t i) const {
        uint32_t word = 0;
        if (type == Type::f32)
            std::memcpy(&word, &bytes[4 * i], 4);
        else
            word = uint32_t(fuzz::number(&bytes[2 * i], 2)) << 16;
        float value;
        std::memcpy(&value, &word, 4);
        return value;
    }
    void set(size_t i, float value) {
        uint32_t word;
        std::memcpy(&word, &value, 4);
        if (type == Type::f32)
            std::memcpy(&bytes[4 * i], &word, 4);
        else
            fuzz::overwrite(bytes, 2 * i, word >> 16, 2);
    }
    float* floats() { return reinterpret_cast<float*>(bytes.data()); }
    operator void*() { return bytes.data(); }
};

struct Input {
    const uint8_t* data;
    size_t size, next = 0;
    float value() { return float(int8_t(data[16 + next++ % (size - 16)])) / 128; }
    Tensor tensor(Type type, size_t count) {
        Tensor made(type, count);
        for (size_t i = 0; i < count; i++) made.set(i, value());
        return made;
    }
};

void turn(const pgolf::AttentionShape& s, Values& head, size_t position, double direction) {
    for (size_t c = 0; c < s.turned; c++) {
        const double cos = s.cos[position * s.turned + c], sin = direction * s.sin[position * s.turned + c];
        const double a = head[c], b = head[s.turned + c];
        head[c] = a * cos + b * sin, head[s.turned + c] = b * cos - a * sin;
    }
}

double dot(const Values& a, const Values& b) {
    double total = 0;
    for (size_t i = 0; i < a.size(); i++) total += a[i] * b[i];
    return total;
}

Values head_of(const Tensor& t, size_t head, size_t dim) {
    Values out(dim);
    for (size_t i = 0; i < dim; i++) out[i] = t[head * dim + i];
    return out;
}

void add(Values& to, size_t head, double scale, const Values& from) {
    for (size_t i = 0; i < from.size(); i++) to[head * from.size() + i] += scale * from[i];
}

double most_of(const Tensor& t) {
    double most = 1;
    for (size_t i = 0; i < t.size(); i++) most = std::max(most, t[i]);
    return most;
}

// Errors may grow with the largest result, and with `largest`; with operands of type bf16, products round to it.
void require_close(const Tensor& got, const Values& want, const char* what, Type operands, double largest = 1) {
    for (double x : want) largest = std::max(largest, std::fabs(x));
    const double allowed = largest * (operands == Type::f32 ? 2e-5 : 0.02);
    for (size_t i = 0; i < want.size(); i++) fuzz::require(std::fabs(got[i] - want[i]) <= allowed, what);
}

Values turned_heads(const pgolf::AttentionShape& s, const Tensor& unit, size_t heads, size_t positions, size_t first) {
    Values all;
    for (size_t head = 0; head * s.dim < unit.size(); head++) {
        Values x = head_of(unit, head, s.dim);
        turn(s, x, first + head / heads % positions, 1);
        all.insert(all.end(), x.begin(), x.end());
    }
    return all;
}

// Gradients of projections from those of turned heads; also adds the gains'.
Values back(const pgolf::AttentionShape& s, const Values& grad, const Tensor& unit, const Tensor& rstd, size_t heads,
            size_t positions, size_t first, Values* dgain) {
    Values out(grad.size());
    for (size_t head = 0; head * s.dim < grad.size(); head++) {
        Values g(grad.begin() + std::ptrdiff_t(head * s.dim), grad.begin() + std::ptrdiff_t((head + 1) * s.dim));
        const Values u = head_of(unit, head, s.dim);
        turn(s, g, first + head / heads % positions, -1);
        const double along = dot(g, u), gain = dgain ? s.gain[head % heads] : 1;
        if (dgain) (*dgain)[head % heads] += along;
        for (size_t i = 0; i < s.dim; i++)
            out[head * s.dim + i] = rstd[head] * gain * (g[i] - u[i] * along / double(s.dim));
    }
    return out;
}

// Gives the positions one by one to the pass that decodes. Of the last `queries` it must compute what `want` holds.
void check_decoding(const pgolf::AttentionShape& s, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& want,
                    size_t threads, bool embedded) {
    const size_t q_dim = s.heads * s.dim, kv_dim = s.kv_heads * s.dim, row = q_dim + 2 * kv_dim;
    Tensor keys(Type::f32, k.size()), values(Type::f32, k.size()), embed(Type::f32, s.batch * kv_dim);
    Tensor got = want, context(Type::f32, s.batch * q_dim), qkv(Type::f32, s.batch * row);
    Tensor gate(Type::f32, s.batch * s.heads);
    for (size_t position = 0; position < s.keys; position++) {
        const size_t query = std::max(position + s.queries, s.keys) - s.keys;
        for (size_t b = 0; b < s.batch; b++) {
            const size_t at = (b * s.keys + position) * kv_dim;
            for (size_t h = 0; s.gate && h < s.heads; h++)
                gate.set(b * s.heads + h, s.gate[(b * s.queries + query) * s.heads + h]);
            for (size_t i = 0; i < q_dim; i++) qkv.set(b * row + i, float(q[(b * s.queries + query) * q_dim + i]));
            for (size_t i = 0; i < kv_dim; i++) {
                const float value = float(v[at + i]) / (embedded ? 2 : 1);
                qkv.set(b * row + q_dim + i, float(k[at + i]));
                qkv.set(b * row + q_dim + kv_dim + i, value), embed.set(b * kv_dim + i, value);
            }
        }
        pgolf::AttentionShape newest = s;
        newest.queries = 1, newest.keys = position + 1;
        if (s.gate) newest.gate = gate.floats();
        const pgolf::DecodeAttention io{qkv.floats(),    embedded ? embed.floats() : nullptr, keys.floats(),
                                        values.floats(), context.floats(),                    s.keys};
        pgolf::passes().decode_attention(newest, io, threads);
        for (size_t b = 0; position + s.queries >= s.keys && b < s.batch; b++)
            for (size_t i = 0; i < q_dim; i++)
                got.set((b * s.queries + query) * q_dim + i, float(context[b * q_dim + i]));
    }
    Values exact;
    for (size_t i = 0; i < want.size(); i++) exact.push_back(want[i]);
    require_close(got, exact, "decoding", want.type);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    if (size < 17) return 0;
    const auto tables = pgolf::runnable_passes();
    fuzz::require(pgolf::choose_passes(tables[data[0] % tables.size()]), "a runnable table");
    const Type type = data[1] % 3 ? Type::f32 : Type::bf16;
    const size_t batch = data[2] % 3, keys = data[3] % 4 ? 1 + data[3] % 20 : data[4], kv = 1 + data[5] % 2;
    const size_t queries = keys ? 1 + data[6] % keys : 0, heads = kv * (1 + data[7] % 3), dim = 1 + data[8] % 40;
    const size_t turned = data[9] % (dim / 2 + 1), first = keys - queries, group = heads / kv;
    Input in{data, size};
    Tensor gain = in.tensor(Type::f32, heads), sin = in.tensor(Type::f32, keys * turned), cos = sin;
    for (size_t i = 0; i < sin.size(); i++) cos.set(i, float(std::sqrt(1 - sin[i] * sin[i])));
    const size_t q_heads = batch * queries * heads, k_heads = batch * keys * kv;
    Tensor gate = in.tensor(Type::f32, q_heads), dgate(Type::f32, q_heads);
    std::vector<int32_t> starts(batch * keys);  // a segment begins at about every 16th position, or at every other one
    for (size_t i = 0; i < starts.size(); i++)
        starts[i] = i % keys && std::fabs(in.value()) > (data[14] % 4 ? 0.06 : 0.5) ? starts[i - 1] : int32_t(i % keys);
    const bool gated = data[13] % 2 == 1, segmented = data[14] % 2 == 1;
    const pgolf::AttentionShape s{batch, queries, keys, heads, kv, dim, turned, data[10] % 2 == 1,
                                  gain.floats(), cos.floats(), sin.floats(), gated ? gate.floats() : nullptr,
                                  segmented ? starts.data() : nullptr};
    Tensor q = in.tensor(type, q_heads * dim), k = in.tensor(type, k_heads * dim), v = in.tensor(type, k_heads * dim);
    Tensor y(type, q_heads * dim), context(type, s.xsa || gated ? q_heads * dim : 0), lse(Type::f32, q_heads);
    Tensor q_rstd(Type::f32, q_heads), k_rstd(Type::f32, k_heads);
    const Tensor q_before = q, k_before = k;
    const size_t threads = 1 + data[11] % 3;
    pgolf::passes().attention(type, s, {q, k, v, y, context, q_rstd.floats(), k_rstd.floats(), lse.floats()}, threads);
    if (type == Type::f32 && !segmented)
        check_decoding(s, q_before, k_before, v, s.xsa || gated ? context : y, threads, data[12] % 2 == 1);
    for (size_t head = 0; head < k_heads; head++) {
        const Values x = head_of(k_before, head, dim);
        const double rstd = 1 / std::sqrt(dot(x, x) / double(dim) + 1.1920929e-7);
        fuzz::require(std::fabs(k_rstd[head] / rstd - 1) < 1e-5, "1 / RMS of k");
        for (size_t i = 0; i < dim; i++)
            fuzz::require(std::fabs(k[head * dim + i] - x[i] * rstd) <= (type == Type::f32 ? 2e-5 : 0.02) * rstd, "k");
    }

    Tensor g = in.tensor(type, q_heads * dim);
    Tensor dq(type, q.size()), dk(type, k.size()), dv(type, v.size()), dgain(Type::f32, heads);
    Tensor again(type, context.size());
    pgolf::passes().attention_backward(type, s,
                                       {g, q, k, v, y, q_rstd.floats(), k_rstd.floats(), lse.floats(), again, dq,
                                        dk, dv, dgain.floats(), gated ? dgate.floats() : nullptr},
                                       threads);
    fuzz::require(again.bytes == context.bytes, "backward's context");

    const Values qs = turned_heads(s, q, heads, queries, first), ks = turned_heads(s, k, kv, keys, 0);
    const double scale = 1 / std::sqrt(double(dim));
    Values want_y(y.size()), want_context(context.size()), want_lse(q_heads), want_dq(q.size()), want_dk(k.size());
    Values want_dv(v.size()), want_dgain(heads), want_dgate(gated ? q_heads : 0), p(keys), dp(keys);
    for (size_t head = 0; head < q_heads; head++) {
        const size_t b = head / heads / queries, i = head / heads % queries, h = head % heads, seen = first + i + 1;
        const auto key = [&](size_t j) { return (b * keys + j) * kv + h / group; };
        Values x(qs.begin() + std::ptrdiff_t(head * dim), qs.begin() + std::ptrdiff_t((head + 1) * dim));
        const auto k_of = [&](size_t j) {
            const auto begin = ks.begin() + std::ptrdiff_t(key(j) * dim);
            return Values(begin, begin + std::ptrdiff_t(dim));
        };
        const size_t start = segmented ? size_t(starts[b * keys + seen - 1]) : 0;
        double most = -INFINITY, total = 0;
        for (size_t j = start; j < seen; j++) most = std::max(most, p[j] = scale * s.gain[h] * dot(x, k_of(j)));
        for (size_t j = start; j < seen; j++) total += p[j] = std::exp(p[j] - most);
        for (size_t j = start; j < seen; j++) add(want_y, head, p[j] /= total, head_of(v, key(j), dim));
        want_lse[(b * heads + h) * queries + i] = most + std::log(total);
        // from the pass's own y, as its backward has it
        const Values out = head_of(y, head, dim), w = head_of(v, key(seen - 1), dim);
        Values grad = head_of(g, head, dim), kept = out;
        const Values raw = grad;
        const double factor = gated ? double(gate[head]) : 1;
        for (double& each : grad) each *= factor;
        if (s.xsa) {
            const double square = std::max(dot(w, w), 1e-24), gw = dot(grad, w) / square, yw = dot(out, w) / square;
            for (size_t c = 0; c < dim; c++) kept[c] -= yw * w[c];
            add(want_dv, key(seen - 1), -gw, out), add(want_dv, key(seen - 1), -yw, grad);
            add(want_dv, key(seen - 1), 2 * gw * yw, w);
            for (size_t c = 0; c < dim; c++) grad[c] -= gw * w[c];
        }
        if (context.size()) add(want_context, head, factor, kept);
        if (gated) want_dgate[head] = dot(raw, kept);
        const double delta = dot(grad, out);
        for (size_t j = start; j < seen; j++) {
            const double ds = p[j] * (dot(grad, head_of(v, key(j), dim)) - delta) * scale;
            add(want_dq, head, ds, k_of(j)), add(want_dk, key(j), ds * s.gain[h], x), add(want_dv, key(j), p[j], grad);
        }
    }
    require_close(y, want_y, "y", type);
    require_close(context, want_context, "context", type);
    require_close(lse, want_lse, "lse", type);
    require_close(dgate, want_dgate, "dgate", type, double(dim) / 16);
    require_close(dv, want_dv, "dv", type);
    const Values dq_all = back(s, want_dq, q, q_rstd, heads, queries, first, &want_dgain);
    require_close(dq, dq_all, "dq", type, most_of(q_rstd));
    require_close(dk, back(s, want_dk, k, k_rstd, kv, keys, 0, nullptr), "dk", type, most_of(k_rstd));
    require_close(dgain, want_dgain, "dgain", type, std::sqrt(double(1 + batch * queries * dim)));  // of so many terms
    fuzz::accepted++;
    return 0;
}
