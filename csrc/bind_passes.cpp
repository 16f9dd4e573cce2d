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

using Matrices = py::array_t<float, py::array::c_style>;

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

void symmetric_product(const Matrices& x, const std::optional<Matrices>& add, Matrices& out, float alpha, float beta,
                       size_t threads) {
    if (x.ndim() != 3) throw py::value_error("x has " + std::to_string(x.ndim()) + " dimensions, but 3 are needed");
    const auto count = x.shape(0), rows = x.shape(1), columns = x.shape(2);
    const auto check = [&](const Matrices& squares, const char* name) {
        if (squares.ndim() != 3 || squares.shape(0) != count || squares.shape(1) != rows || squares.shape(2) != rows)
            throw py::value_error(std::string(name) + " must have the shape (" + std::to_string(count) + ", " +
                                  std::to_string(rows) + ", " + std::to_string(rows) + ")");
    };
    check(out, "out");
    if (add) check(*add, "add");
    const float *from = x.data(), *other = add ? add->data() : nullptr;
    float* to = out.mutable_data();
    py::gil_scoped_release unlocked;
    passes().symmetric_product(from, other, to, alpha, beta, size_t(count), size_t(rows), size_t(columns), threads);
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
    m.def("symmetric_product", &symmetric_product, py::arg("x").noconvert(), py::arg("add").noconvert(),
          py::arg("out").noconvert(), py::arg("alpha"), py::arg("beta"), py::arg("threads") = 0);
}

}  // namespace pgolf
