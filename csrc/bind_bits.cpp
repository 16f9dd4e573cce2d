#include "bind.h"
#include "int6.h"

namespace pgolf {
namespace {

Matrix<uint8_t> pack(const Matrix<int8_t>& codes) {
    const size_t rows = rows_of(codes, "codes"), columns = static_cast<size_t>(codes.shape(1));
    Matrix<uint8_t> packed({rows, int6_row_bytes(columns)});
    uint8_t* target = packed.mutable_data();
    const int8_t* source = codes.data();
    {
        py::gil_scoped_release unlocked;
        int6_pack(source, rows, columns, target);
    }
    return packed;
}

Matrix<int8_t> unpack(const Matrix<uint8_t>& packed, py::ssize_t columns) {
    const size_t rows = rows_of(packed, "packed"), row_bytes = static_cast<size_t>(packed.shape(1));
    if (columns < 0 || int6_row_bytes(static_cast<size_t>(columns)) != row_bytes)
        throw py::value_error("packed has rows of " + std::to_string(row_bytes) + " bytes, which do not hold " +
                              std::to_string(columns) + " codes");
    Matrix<int8_t> codes({rows, static_cast<size_t>(columns)});
    int8_t* target = codes.mutable_data();
    const uint8_t* source = packed.data();
    {
        py::gil_scoped_release unlocked;
        int6_unpack(source, rows, static_cast<size_t>(columns), target);
    }
    return codes;
}

}  // namespace

void bind_bits(py::module_& m) {
    m.def("int6_pack", &pack, py::arg("codes").noconvert());
    m.def("int6_unpack", &unpack, py::arg("packed").noconvert(), py::arg("columns"));
}

}  // namespace pgolf
