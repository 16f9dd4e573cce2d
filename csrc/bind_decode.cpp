#include <pybind11/stl.h>

#include <optional>

#include "bind.h"
#include "bits.h"
#include "decode.h"

namespace pgolf {
namespace {

using Array = py::array_t<float, py::array::c_style>;

// A decoder's settings and the block's arrays, by name; checked once, so that a step costs a few microseconds.
class Block {
   public:
    Block(const py::dict& sizes, const py::dict& arrays, const Matrix<uint8_t>& attention, const Matrix<uint8_t>& up,
          const Matrix<uint8_t>& down, float layer_scale, float eps, bool xsa, int activation)
        : kept_(py::make_tuple(arrays, attention, up, down)) {
        const auto size = [&](const char* name) { return sizes[name].cast<size_t>(); };
        b_ = {size("batch"), size("dim"), size("heads"), size("kv_heads"), size("up_rows"), size("hidden"), size("half"),
              size("positions"), 0};
        const size_t dim = b_.dim, width = b_.heads ? dim / b_.heads : 0, kv = b_.kv_heads * width, half = b_.half;
        const bool gated = activation == int(Activation::swiglu);
        if (!b_.batch || !width || width * b_.heads != dim || !b_.kv_heads || b_.heads % b_.kv_heads || 2 * half > width ||
            activation < 0 || activation > 2 || b_.up_rows != b_.hidden * (gated ? 2 : 1))
            throw py::value_error("sizes of the block do not fit each other");
        const auto array = [&](const char* name, size_t count) {
            const auto found = arrays[name].cast<py::array>();
            if (!py::isinstance<Array>(found) || static_cast<size_t>(found.size()) != count)
                throw py::value_error(std::string(name) + " must be " + std::to_string(count) + " float32 numbers");
            return static_cast<float*>(const_cast<void*>(found.data()));
        };
        const auto packed = [&](const char* name, const Matrix<uint8_t>& codes, size_t rows, size_t columns) {
            if (rows_of(codes, name) != rows || static_cast<size_t>(codes.shape(1)) != packed_row_bytes(columns, 6))
                throw py::value_error(std::string(name) + " has the wrong number of packed codes");
            return PackedWeights{codes.data(), array((std::string(name) + "_steps").c_str(), rows)};
        };
        b_.attention = packed("attention", attention, 2 * dim + 2 * kv, dim);
        b_.up = packed("up", up, b_.up_rows, dim);
        b_.down = packed("down", down, dim, b_.hidden);
        b_.x_mix = array("x_mix", dim), b_.x0_mix = array("x0_mix", dim);
        b_.attention_scale = array("attention_scale", dim), b_.mlp_scale = array("mlp_scale", dim);
        b_.gain = array("gain", b_.heads), cos_ = array("cos", b_.positions * half), sin_ = array("sin", b_.positions * half);
        b_.keys = array("keys", b_.batch * b_.positions * kv), b_.values = array("values", b_.batch * b_.positions * kv);
        b_.layer_scale = layer_scale, b_.eps = eps, b_.xsa = xsa, b_.activation = Activation(activation);
    }

    void step(Matrix<float>& x, const Matrix<float>& x0, const std::optional<Matrix<float>>& value_embed, size_t position,
              size_t threads) const {
        DecodeBlock b = b_;
        const auto fits = [&](const Matrix<float>& m, size_t columns) {
            return rows_of(m, "x") == b.batch && static_cast<size_t>(m.shape(1)) == columns;
        };
        if (!fits(x, b.dim) || !fits(x0, b.dim) || position >= b.positions ||
            (value_embed && !fits(*value_embed, b.dim / b.heads * b.kv_heads)))
            throw py::value_error("x, x0, value_embed or position do not fit the block");
        b.position = position, b.cos = cos_ + position * b.half, b.sin = sin_ + position * b.half;
        b.value_embed = value_embed ? value_embed->data() : nullptr;
        float* target = x.mutable_data();
        const float* second = x0.data();
        py::gil_scoped_release unlocked;
        decode_block(b, target, second, threads);
    }

   private:
    py::tuple kept_;  // the arrays that b_ points to
    DecodeBlock b_{};
    const float *cos_, *sin_;
};

}  // namespace

void bind_decode(py::module_& m) {
    using py::arg;
    py::class_<Block>(m, "DecodeBlock")
        .def(py::init<const py::dict&, const py::dict&, const Matrix<uint8_t>&, const Matrix<uint8_t>&,
                      const Matrix<uint8_t>&, float, float, bool, int>(),
             arg("sizes"), arg("arrays"), arg("attention").noconvert(), arg("up").noconvert(), arg("down").noconvert(),
             arg("layer_scale"), arg("eps"), arg("xsa"), arg("activation"))
        .def("step", &Block::step, arg("x").noconvert(), arg("x0").noconvert(),
             arg("value_embed").noconvert() = py::none(), arg("position"), arg("threads") = 0);
}

}  // namespace pgolf
