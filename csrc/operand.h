// Operand: an array that Python gives to a fused pass.
#pragma once

#include <optional>

#include "bind.h"
#include "passes.h"

namespace pgolf {

// A borrowed, contiguous array of float32 or, as uint16, of bfloat16.
class Operand {
   public:
    Operand(const char* name, const py::array& array) : name_(name), array_(array) {
        if (!(array.flags() & py::array::c_style)) fail(" is strided; a contiguous array is needed");
        const bool wide = py::isinstance<py::array_t<float>>(array);
        if (!wide && !py::isinstance<py::array_t<uint16_t>>(array))
            fail(".dtype is " + dtype() + "; float32, or uint16 holding bfloat16, is needed");
        type_ = wide ? Type::f32 : Type::bf16;
    }
    Type type() const { return type_; }
    size_t size() const { return static_cast<size_t>(array_.size()); }
    size_t shape(size_t i) const { return static_cast<size_t>(array_.shape(py::ssize_t(i))); }
    const void* data() const { return array_.data(); }
    void* writable() const { return const_cast<py::array&>(array_).mutable_data(); }

    const Operand& has(size_t count) const {
        if (size() != count)
            fail(" has " + std::to_string(size()) + " elements, but " + std::to_string(count) + " are needed");
        return *this;
    }
    const Operand& like(const Operand& other, size_t count) const {
        if (type_ != other.type_) fail(".dtype is " + dtype() + ", but " + other.name_ + ".dtype is " + other.dtype());
        return has(count);
    }
    // The array if it holds `count` float32.
    float* floats(size_t count) const {
        if (type_ != Type::f32) fail(".dtype is " + dtype() + "; float32 is needed");
        return static_cast<float*>(has(count).writable());
    }
    [[noreturn]] void fail(const std::string& why) const { throw py::value_error(name_ + why); }

   private:
    std::string dtype() const { return py::str(array_.dtype()); }

    const std::string name_;
    const py::array& array_;
    Type type_;
};

}  // namespace pgolf
