#include <pybind11/stl.h>

#include "bind.h"
#include "bits.h"
#include "decode.h"

namespace pgolf {
namespace {

using Dims = std::vector<py::ssize_t>;

constexpr py::ssize_t kLargest = 1 << 20;  // size: products of three sizes stay below 2^63

std::string text(const py::object& given) { return py::str(given); }

[[noreturn]] void fail(const std::string& name, const py::handle& given, const std::string& needed) {
    std::string what = std::string("a ") + Py_TYPE(given.ptr())->tp_name;
    if (py::isinstance<py::int_>(given)) what = py::str(given);
    if (given.is_none()) what = "None";
    if (py::isinstance<py::array>(given)) {
        const auto array = py::reinterpret_borrow<py::array>(given);
        what = std::string(array.writeable() ? "" : "read-only ") +
               (array.flags() & py::array::c_style ? "" : "strided ") + text(array.dtype()) + " of shape " +
               text(array.attr("shape"));
    }
    throw py::value_error(name + " is " + what + "; " + needed + " is needed");
}

py::object item(const py::dict& all, const char* name) {
    return all.contains(name) ? py::object(all[name]) : py::object(py::none());
}

// Returns the numbers of a contiguous array of that type and shape.
template <class T>
T* numbers(const std::string& name, const py::handle& given, const Dims& shape, bool writable = false) {
    if (py::isinstance<Matrix<T>>(given)) {
        const auto array = py::reinterpret_borrow<py::array>(given);
        const py::ssize_t *begin = array.shape(), *end = begin + array.ndim();
        if (std::equal(begin, end, shape.begin(), shape.end()) && (array.writeable() || !writable))
            return static_cast<T*>(const_cast<void*>(array.data()));
    }
    const std::string kind = std::string(writable ? "a writable" : "a") + " contiguous " + text(py::dtype::of<T>());
    fail(name, given, kind + " array of shape " + text(py::tuple(py::cast(shape))));
}

// A decoder's settings and the block's arrays, by name; checked once, so that a step costs a few microseconds.
class Block {
   public:
    Block(const py::dict& sizes, const py::dict& arrays, const py::object& attention, const py::object& up,
          const py::object& down, float layer_scale, bool xsa, int activation) {
        if (activation < 0 || activation > 2) fail("activation", py::int_(activation), "0, 1 or 2");
        const auto size = [&](const char* name, py::ssize_t least) {
            const py::object given = item(sizes, name);
            const std::string range = std::to_string(least) + " to " + std::to_string(kLargest);
            if (!py::isinstance<py::int_>(given) || given < py::int_(least) || given > py::int_(kLargest))
                fail(std::string("sizes['") + name + "']", given, "a number from " + range);
            return given.cast<py::ssize_t>();
        };
        const auto batch = size("batch", 1), dim = size("dim", 1), heads = size("heads", 1),
                   groups = size("kv_heads", 1), rows = size("up_rows", 1), hidden = size("hidden", 1),
                   half = size("half", 0), positions = size("positions", 1), width = dim / heads, kv = groups * width;
        const auto require = [&](bool fits, const char* name, const std::string& needed) {
            if (!fits) fail(std::string("sizes['") + name + "']", item(sizes, name), needed);
        };
        const auto up_rows = activation == int(Activation::swiglu) ? 2 * hidden : hidden;
        require(dim % heads == 0, "dim", "a multiple of sizes['heads'], " + std::to_string(heads) + ",");
        require(heads % groups == 0, "heads", "a multiple of sizes['kv_heads'], " + std::to_string(groups) + ",");
        require(half <= width / 2, "half", "at most half a head, " + std::to_string(width / 2) + ",");
        require(rows == up_rows, "up_rows", std::to_string(up_rows) + " for this sizes['hidden'] and activation");
        b_ = {size_t(batch), size_t(dim),  size_t(heads),     size_t(groups), size_t(rows),
              size_t(hidden), size_t(half), size_t(positions), 0};
        py::dict kept;  // a copy: the caller may replace the items of `arrays`
        const auto array = [&](const char* name, const Dims& shape, bool writable = false) {
            const py::object found = item(arrays, name);
            kept[name] = found;
            return numbers<float>(std::string("arrays['") + name + "']", found, shape, writable);
        };
        const auto packed = [&](const char* name, const py::object& codes, py::ssize_t count, size_t columns) {
            const auto* bytes = numbers<uint8_t>(name, codes, {count, py::ssize_t(packed_row_bytes(columns, 6))});
            return PackedWeights{bytes, array((std::string(name) + "_steps").c_str(), {count})};
        };
        b_.attention = packed("attention", attention, 2 * dim + 2 * kv, b_.dim);
        b_.up = packed("up", up, rows, b_.dim), b_.down = packed("down", down, dim, b_.hidden);
        b_.x_mix = array("x_mix", {dim}), b_.x0_mix = array("x0_mix", {dim});
        b_.attention_scale = array("attention_scale", {dim}), b_.mlp_scale = array("mlp_scale", {dim});
        b_.gain = array("gain", {heads});
        b_.cos = array("cos", {positions, half}), b_.sin = array("sin", {positions, half});
        const Dims cache{batch, groups, positions, width};
        b_.keys = array("keys", cache, true), b_.values = array("values", cache, true);
        b_.layer_scale = layer_scale, b_.xsa = xsa, b_.activation = Activation(activation);
        kept_ = py::make_tuple(kept, attention, up, down);
    }

    void step(const py::object& x, const py::object& x0, const py::object& value_embed, py::ssize_t position,
              size_t threads) const {
        DecodeBlock b = b_;
        const auto batch = py::ssize_t(b.batch), dim = py::ssize_t(b.dim),
                   kv = py::ssize_t(b.dim / b.heads * b.kv_heads);
        float* target = numbers<float>("x", x, {batch, dim}, true);
        const float* second = numbers<float>("x0", x0, {batch, dim});
        b.value_embed = value_embed.is_none() ? nullptr : numbers<float>("value_embed", value_embed, {batch, kv});
        if (position < 0 || size_t(position) >= b.positions)
            fail("position", py::int_(position), "a number from 0 to " + std::to_string(b.positions - 1));
        b.position = size_t(position);
        py::gil_scoped_release unlocked;
        decode_block(b, target, second, threads);
    }

   private:
    py::tuple kept_;  // the arrays that b_ points to
    DecodeBlock b_{};
};

}  // namespace

void bind_decode(py::module_& m) {
    using py::arg;
    py::class_<Block>(m, "DecodeBlock")
        .def(py::init<const py::dict&, const py::dict&, const py::object&, const py::object&, const py::object&, float,
                      bool, int>(),
             arg("sizes"), arg("arrays"), arg("attention"), arg("up"), arg("down"), arg("layer_scale"), arg("xsa"),
             arg("activation"))
        .def("step", &Block::step, arg("x"), arg("x0"), arg("value_embed") = py::none(), arg("position"),
             arg("threads") = 0);
}

}  // namespace pgolf
