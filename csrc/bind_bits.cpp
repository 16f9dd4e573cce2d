#include "bind.h"
#include "bits.h"

namespace pgolf {
namespace {

// Raises ValueError unless shape and width of packed codes match.
void check_packed(const Matrix<uint8_t>& packed, py::ssize_t columns, int bits) {
    rows_of(packed, "packed");
    if (bits != 6 && bits != 8)
        throw py::value_error("bits is " + std::to_string(bits) + ", but codes have 6 or 8 bits");
    const auto row_bytes = static_cast<size_t>(packed.shape(1));
    if (columns < 0 || packed_row_bytes(static_cast<size_t>(columns), bits) != row_bytes)
        throw py::value_error("packed has rows of " + std::to_string(row_bytes) + " bytes, which do not hold " +
                              std::to_string(columns) + " codes of " + std::to_string(bits) + " bits");
}

Matrix<uint8_t> pack(const Matrix<int8_t>& codes, int bits, size_t threads, bool simd) {
    const size_t rows = rows_of(codes, "codes"), columns = static_cast<size_t>(codes.shape(1));
    Matrix<uint8_t> packed({rows, packed_row_bytes(columns, bits)});
    uint8_t* target = packed.mutable_data();
    const int8_t* source = codes.data();
    {
        py::gil_scoped_release unlocked;
        pack_bits(source, rows, columns, bits, target, {threads, simd});
    }
    return packed;
}

Matrix<int8_t> unpack(const Matrix<uint8_t>& packed, py::ssize_t columns, int bits, size_t threads, bool simd) {
    check_packed(packed, columns, bits);
    const size_t rows = rows_of(packed, "packed");
    Matrix<int8_t> codes({rows, static_cast<size_t>(columns)});
    int8_t* target = codes.mutable_data();
    const uint8_t* source = packed.data();
    {
        py::gil_scoped_release unlocked;
        unpack_bits(source, rows, static_cast<size_t>(columns), bits, target, {threads, simd});
    }
    return codes;
}

// Value is float, or uint16_t for the bits of bfloat16.
template <class Value>
void dequantize_into(const Matrix<uint8_t>& packed, const py::array_t<float, py::array::c_style>& scale, int bits,
                     Matrix<Value>& values, size_t threads, bool simd) {
    const size_t rows = rows_of(values, "values"), columns = static_cast<size_t>(values.shape(1));
    check_packed(packed, values.shape(1), bits);
    if (rows_of(packed, "packed") != rows || scale.ndim() != 1 || static_cast<size_t>(scale.shape(0)) != rows)
        throw py::value_error("packed, scale and values differ in rows");
    Value* target = values.mutable_data();
    const uint8_t* source = packed.data();
    const float* factors = scale.data();
    py::gil_scoped_release unlocked;
    dequantize_bits(source, factors, rows, columns, bits, target, {threads, simd});
}

}  // namespace

void bind_bits(py::module_& m) {
    using py::arg;
    m.def("pack_bits", &pack, arg("codes").noconvert(), arg("bits"), arg("threads") = 0, arg("simd") = true);
    m.def("unpack_bits", &unpack, arg("packed").noconvert(), arg("columns"), arg("bits"), arg("threads") = 0,
          arg("simd") = true);
    m.def("dequantize_bits", &dequantize_into<float>, arg("packed").noconvert(), arg("scale").noconvert(), arg("bits"),
          arg("values").noconvert(), arg("threads") = 0, arg("simd") = true);
    m.def("dequantize_bits", &dequantize_into<uint16_t>, arg("packed").noconvert(), arg("scale").noconvert(),
          arg("bits"), arg("values").noconvert(), arg("threads") = 0, arg("simd") = true);
    m.def("bits_simd", &bits_simd);
}

}  // namespace pgolf
