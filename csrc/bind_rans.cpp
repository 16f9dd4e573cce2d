#include <pybind11/stl.h>

#include <tuple>
#include <vector>

#include "bind.h"
#include "rans.h"

namespace pgolf {
namespace {

using Shapes = std::vector<std::tuple<uint64_t, uint64_t, uint64_t>>;  // rows, columns, itemsize

std::vector<Shape> shapes_of(const Shapes& given) {
    std::vector<Shape> shapes;
    for (const auto& [rows, columns, itemsize] : given) shapes.push_back({rows, columns, itemsize});
    return shapes;
}

py::bytes encode(const py::buffer& data, const Shapes& given, size_t threads) {
    const View in(data);
    const std::vector<Shape> shapes = shapes_of(given);
    std::vector<uint8_t> out;
    {
        py::gil_scoped_release unlocked;
        out = rans_encode(in.data(), in.size(), shapes.data(), shapes.size(), threads);
    }
    return py::bytes(reinterpret_cast<const char*>(out.data()), out.size());
}

py::bytes decode(const py::buffer& payload, const Shapes& given, py::ssize_t size, size_t threads) {
    if (size < 0) throw py::value_error("size is " + std::to_string(size) + ", but must not be negative");
    const View in(payload);
    const std::vector<Shape> shapes = shapes_of(given);
    auto out = new_bytes(static_cast<size_t>(size));
    uint8_t* target = data_of(out);
    {
        py::gil_scoped_release unlocked;
        rans_decode(in.data(), in.size(), shapes.data(), shapes.size(), target, static_cast<size_t>(size), threads);
    }
    return out;
}

}  // namespace

void bind_rans(py::module_& m) {
    m.def("rans_encode", &encode, py::arg("data"), py::arg("shapes"), py::arg("threads") = 0);
    m.def("rans_decode", &decode, py::arg("payload"), py::arg("shapes"), py::arg("size"), py::arg("threads") = 0);
}

}  // namespace pgolf
