// Operand: an array that Python gives to a fused pass.
#pragma once

#include "bind.h"
#include "passes.h"

namespace pgolf {

// A borrowed, contiguous array of float32 or, as int16, of bfloat16.
class Operand {
   public:
    Operand(const char* name, const py::array& array) : name_(name), array_(array) {
        if (!(array.flags() & py::array::c_style)) throw py::value_error(std::string(name) + " must be contiguous");
        const bool wide = py::isinstance<py::array_t<float>>(array);
        if (!wide && !py::isinstance<py::array_t<int16_t>>(array))
            throw py::value_error(std::string(name) + " must hold float32, or bfloat16 as int16");
        type_ = wide ? Type::f32 : Type::bf16;
    }
    Type type() const { return type_; }
    size_t size() const { return static_cast<size_t>(array_.size()); }
    const void* data() const { return array_.data(); }
    void* writable() const { return const_cast<py::array&>(array_).mutable_data(); }

    const Operand& like(const Operand& other, size_t count) const {
        if (type_ != other.type_) throw py::value_error(std::string(name_) + " must have the dtype of " + other.name_);
        if (size() != count)
            throw py::value_error(std::string(name_) + " has " + std::to_string(size()) + " elements, but " +
                                  std::to_string(count) + " are needed");
        return *this;
    }

   private:
    const char* name_;
    const py::array& array_;
    Type type_;
};

}  // namespace pgolf
