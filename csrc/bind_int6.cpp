#include "bind.h"
#include "int6_matmul.h"

namespace pgolf {
namespace {

// Value is float, or uint16_t for the bits of bfloat16.
template <class Value>
void multiply_into(const Matrix<Value>& x, const Matrix<uint8_t>& packed, const Matrix<float>& scale, Matrix<Value>& y,
                   size_t threads, bool simd) {
    const size_t rows = rows_of(x, "x"), depth = static_cast<size_t>(x.shape(1)), columns = rows_of(packed, "packed");
    if (static_cast<size_t>(packed.shape(1)) != packed_row_bytes(depth, 6))
        throw py::value_error("packed has rows of " + std::to_string(packed.shape(1)) + " bytes, which do not hold " +
                              std::to_string(depth) + " codes");
    if (scale.ndim() != 1 || static_cast<size_t>(scale.shape(0)) != columns)
        throw py::value_error("scale must have a number for each of the " + std::to_string(columns) + " rows of packed");
    if (rows_of(y, "y") != rows || static_cast<size_t>(y.shape(1)) != columns)
        throw py::value_error("y must have the rows of x and a column for each row of packed");
    const Value* source = x.data();
    const uint8_t* codes = packed.data();
    const float* factors = scale.data();
    Value* target = y.mutable_data();
    py::gil_scoped_release unlocked;
    int6_matmul(source, rows, depth, codes, factors, columns, target, {threads, simd});
}

}  // namespace

void bind_int6(py::module_& m) {
    using py::arg;
    m.def("int6_simd", &int6_simd);
    m.def("int6_matmul", &multiply_into<float>, arg("x").noconvert(), arg("packed").noconvert(),
          arg("scale").noconvert(), arg("y").noconvert(), arg("threads") = 0, arg("simd") = true);
    m.def("int6_matmul", &multiply_into<uint16_t>, arg("x").noconvert(), arg("packed").noconvert(),
          arg("scale").noconvert(), arg("y").noconvert(), arg("threads") = 0, arg("simd") = true);
}

}  // namespace pgolf
