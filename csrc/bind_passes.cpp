#include <pybind11/stl.h>

#include <optional>

#include "operand.h"

namespace pgolf {
namespace {

Activation activation_of(const std::string& name) {
    if (name == "leaky_relu_squared") return Activation::leaky_relu_squared;
    if (name == "relu_squared") return Activation::relu_squared;
    if (name == "swiglu") return Activation::swiglu;
    throw py::value_error("activation is " + name + ": use leaky_relu_squared, relu_squared or swiglu");
}


void activate(const py::array& pre, py::array& hidden, const std::string& kind, size_t threads) {
    const Operand in("pre", pre), out("hidden", hidden);
    const Activation activation = activation_of(kind);
    const size_t count = out.size(), each = activation == Activation::swiglu ? 2 : 1;
    const void* from = in.like(out, each * count).data();
    void* to = out.writable();
    py::gil_scoped_release unlocked;
    passes().activate(out.type(), from, to, count, activation, threads);
}

void activate_backward(const py::array& dhidden, const py::array& pre, py::array& dpre, py::array& hidden,
                       const std::string& kind, size_t threads) {
    const Operand grad("dhidden", dhidden), in("pre", pre), din("dpre", dpre), out("hidden", hidden);
    const Activation activation = activation_of(kind);
    const size_t count = grad.size(), each = activation == Activation::swiglu ? 2 : 1;
    const void *dh = grad.data(), *x = in.like(grad, each * count).data();
    void *dx = din.like(grad, each * count).writable(), *h = out.like(grad, count).writable();
    py::gil_scoped_release unlocked;
    passes().activate_backward(grad.type(), dh, x, dx, h, count, activation, threads);
}

void symmetric_product(const py::array& x, const std::optional<py::array>& add, py::array& out, float alpha, float beta,
                       size_t threads) {
    const Operand from("x", x), to("out", out);
    if (x.ndim() != 3) from.fail(" has " + std::to_string(x.ndim()) + " dimensions, but 3 are needed");
    const size_t count = from.shape(0), rows = from.shape(1), columns = from.shape(2);
    const auto check = [&](const py::array& squares, const char* name) {
        if (squares.ndim() != 3 || squares.shape(0) != x.shape(0) || squares.shape(1) != x.shape(1) ||
            squares.shape(2) != x.shape(1))
            throw py::value_error(std::string(name) + " must have the shape (" + std::to_string(count) + ", " +
                                  std::to_string(rows) + ", " + std::to_string(rows) + ")");
        return Operand(name, squares).like(from, count * rows * rows).data();
    };
    check(out, "out");
    const void* other = add ? check(*add, "add") : nullptr;
    void* result = to.writable();
    py::gil_scoped_release unlocked;
    passes().symmetric_product(from.type(), from.data(), other, result, alpha, beta, count, rows, columns, threads);
}

void softcap_loss(py::array& logits, const py::array& targets, py::array& loss, py::array& logsumexp, float softcap,
                  float z_loss, bool gradient, size_t threads) {
    const Operand in("logits", logits), out("loss", loss), log_z("logsumexp", logsumexp);
    const size_t rows = out.size();
    if (logits.ndim() != 2) in.fail(" has " + std::to_string(logits.ndim()) + " dimensions, but 2 are needed");
    const size_t vocab = in.shape(1);
    in.has(rows * vocab);
    if (!py::isinstance<py::array_t<int64_t>>(targets) || !(targets.flags() & py::array::c_style) ||
        static_cast<size_t>(targets.size()) != rows)
        throw py::value_error("targets is " + std::string(py::str(targets.dtype())) + " with " +
                              std::to_string(targets.size()) + " elements; " + std::to_string(rows) +
                              " adjacent int64 are needed");
    const int64_t* ids = static_cast<const int64_t*>(targets.data());
    for (size_t i = 0; i < rows; i++)
        if (ids[i] < 0 || static_cast<size_t>(ids[i]) >= vocab)
            throw py::value_error("targets hold " + std::to_string(ids[i]) + "; ids from 0 to below " +
                                  std::to_string(vocab) + " are needed");
    float *losses = out.floats(rows), *log_zs = log_z.floats(rows);
    void* values = in.writable();
    py::gil_scoped_release unlocked;
    passes().softcap_loss(in.type(), values, ids, rows, vocab, {softcap, z_loss, gradient}, losses, log_zs, threads);
}

using Maybe = std::optional<py::array>;

// Null for None.
void* like(const char* name, const Maybe& array, const Operand& other, size_t count) {
    return array ? Operand(name, *array).like(other, count).writable() : nullptr;
}
float* floats(const char* name, const Maybe& array, size_t count) {
    return array ? Operand(name, *array).floats(count) : nullptr;
}

void expect_together(std::initializer_list<std::pair<const char*, bool>> operands) {
    for (const auto& [name, given] : operands)
        if (given != operands.begin()->second)
            throw py::value_error(std::string(name) + " is " + (given ? "given" : "None") + ", but " +
                                  operands.begin()->first + " is " + (given ? "None" : "given"));
}

// Returns the width of each of the `rows` rows of x: the size of `scale`, if given. Raises ValueError if x has another.
size_t width_of(const Operand& x, size_t rows, const Maybe& scale) {
    const size_t width = scale ? static_cast<size_t>(scale->size()) : rows ? x.size() / rows : 0;
    x.has(rows * width);
    return width;
}

// Sums of `each` elements over the rows of a block, added up in the order of the blocks.
class BlockSums {
   public:
    BlockSums(size_t rows, size_t each) : each_(each), sums_((rows + kSumRows - 1) / kSumRows * each) {}
    float* data() { return sums_.data(); }
    void store(float* total) const {
        for (size_t i = 0; i < each_; i++) {
            double sum = 0;
            for (size_t at = i; at < sums_.size(); at += each_) sum += sums_[at];
            total[i] = static_cast<float>(sum);
        }
    }

   private:
    const size_t each_;
    std::vector<float> sums_;
};

void residual_norm(const py::array& x, const Maybe& branch, const Maybe& x_scale, const Maybe& branch_scale,
                   const Maybe& mixed, py::array& normed, py::array& rstd, float scale, size_t threads) {
    const Operand in("x", x), out("normed", normed), r("rstd", rstd);
    const size_t rows = r.size(), width = width_of(in, rows, branch_scale), count = rows * width;
    expect_together({{"branch", !!branch}, {"branch_scale", !!branch_scale}, {"mixed", !!mixed}});
    if (x_scale) expect_together({{"branch", !!branch}, {"x_scale", true}});
    const ResidualNorm given{in.data(), like("branch", branch, in, count), floats("x_scale", x_scale, width),
                             floats("branch_scale", branch_scale, width), like("mixed", mixed, in, count),
                             out.like(in, count).writable(), r.floats(rows), rows, width, scale};
    py::gil_scoped_release unlocked;
    passes().residual_norm(in.type(), given, threads);
}

void residual_norm_backward(const Maybe& dmixed, const py::array& dnormed, const Maybe& x, const Maybe& branch,
                            const Maybe& x_scale, const Maybe& branch_scale, const py::array& mixed,
                            const py::array& rstd, py::array& dx, const Maybe& dbranch, const Maybe& dscales,
                            float scale, size_t threads) {
    const Operand out("mixed", mixed), r("rstd", rstd), grad("dnormed", dnormed), into("dx", dx);
    const size_t rows = r.size(), width = width_of(out, rows, branch_scale), count = rows * width;
    const size_t vectors = x_scale ? 2 : 1;
    expect_together({{"branch", !!branch}, {"dmixed", !!dmixed}, {"x", !!x}, {"branch_scale", !!branch_scale},
                     {"dbranch", !!dbranch}, {"dscales", !!dscales}});
    if (x_scale) expect_together({{"branch", !!branch}, {"x_scale", true}});
    float* totals = floats("dscales", dscales, vectors * width);
    BlockSums sums(totals ? rows : 0, vectors * width);
    const ResidualNormBackward given{like("dmixed", dmixed, out, count), grad.like(out, count).data(),
                                     like("x", x, out, count), like("branch", branch, out, count), out.data(),
                                     floats("x_scale", x_scale, width), floats("branch_scale", branch_scale, width),
                                     r.floats(rows), into.like(out, count).writable(),
                                     like("dbranch", dbranch, out, count), sums.data(), rows, width, scale};
    py::gil_scoped_release unlocked;
    passes().residual_norm_backward(out.type(), given, threads);
    if (totals) sums.store(totals);
}

Sequences sequences_of(const py::array& x) {
    if (x.ndim() != 3) Operand("x", x).fail(" has " + std::to_string(x.ndim()) + " dimensions, but 3 are needed");
    return {static_cast<size_t>(x.shape(0)), static_cast<size_t>(x.shape(1)), static_cast<size_t>(x.shape(2))};
}

void smear_gate(const py::array& x, const py::array& gate, py::array& out, size_t threads) {
    const Sequences shape = sequences_of(x);
    const Operand in("x", x), sigmoid("gate", gate), into("out", out);
    const float* s = sigmoid.floats(shape.width);
    void* to = into.like(in, in.size()).writable();
    py::gil_scoped_release unlocked;
    passes().smear_gate(in.type(), in.data(), s, to, shape, threads);
}

void smear_gate_backward(const py::array& dout, const py::array& x, const py::array& gate, py::array& dx,
                         py::array& dsum, size_t threads) {
    const Sequences shape = sequences_of(x);
    const Operand grad("dout", dout), in("x", x), sigmoid("gate", gate), into("dx", dx), total("dsum", dsum);
    const void* g = grad.like(in, in.size()).data();
    const float* s = sigmoid.floats(shape.width);
    void* d = into.like(in, in.size()).writable();
    float* t = total.floats(shape.width);
    BlockSums sums(shape.count * shape.length, shape.width);
    py::gil_scoped_release unlocked;
    passes().smear_gate_backward(in.type(), g, in.data(), s, d, sums.data(), shape, threads);
    sums.store(t);
}

void choose(const std::string& name) {
    if (choose_passes(name)) return;
    std::string known = "auto";
    for (const std::string& each : runnable_passes()) known += ", " + each;
    throw py::value_error("no instruction set " + name + " on this CPU: use one of " + known);
}

}  // namespace

void bind_passes(py::module_& m) {
    m.def("passes", [] { return passes().name; });
    m.def("runnable_passes", &runnable_passes);
    m.def("choose_passes", &choose, py::arg("name"));
    m.def("activate", &activate, py::arg("pre"), py::arg("hidden"), py::arg("activation"), py::arg("threads") = 0);
    m.def("activate_backward", &activate_backward, py::arg("dhidden"), py::arg("pre"), py::arg("dpre"),
          py::arg("hidden"), py::arg("activation"), py::arg("threads") = 0);
    m.def("symmetric_product", &symmetric_product, py::arg("x"), py::arg("add"), py::arg("out"), py::arg("alpha"),
          py::arg("beta"), py::arg("threads") = 0);
    m.def("softcap_loss", &softcap_loss, py::arg("logits"), py::arg("targets"), py::arg("loss"), py::arg("logsumexp"),
          py::arg("softcap"), py::arg("z_loss"), py::arg("gradient"), py::arg("threads") = 0);
    m.def("residual_norm", &residual_norm, py::arg("x"), py::arg("branch"), py::arg("x_scale"), py::arg("branch_scale"),
          py::arg("mixed"), py::arg("normed"), py::arg("rstd"), py::arg("scale"), py::arg("threads") = 0);
    m.def("residual_norm_backward", &residual_norm_backward, py::arg("dmixed"), py::arg("dnormed"), py::arg("x"),
          py::arg("branch"), py::arg("x_scale"), py::arg("branch_scale"), py::arg("mixed"), py::arg("rstd"),
          py::arg("dx"), py::arg("dbranch"), py::arg("dscales"), py::arg("scale"), py::arg("threads") = 0);
    m.def("smear_gate", &smear_gate, py::arg("x"), py::arg("gate"), py::arg("out"), py::arg("threads") = 0);
    m.def("smear_gate_backward", &smear_gate_backward, py::arg("dout"), py::arg("x"), py::arg("gate"), py::arg("dx"),
          py::arg("dsum"), py::arg("threads") = 0);
}

}  // namespace pgolf
