// pgolf_fast._C: buffers in, bytes or arrays out, the GIL released while working. No torch headers, so that one build
// serves every torch release.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "int6.h"
#include "lzma_api.h"
#include "lzma_codec.h"

namespace py = pybind11;

namespace {

// Borrowed view of any contiguous buffer; raises BufferError otherwise.
class View {
   public:
    explicit View(py::handle object) {
        if (PyObject_GetBuffer(object.ptr(), &buffer_, PyBUF_SIMPLE) != 0) throw py::error_already_set();
    }
    ~View() { PyBuffer_Release(&buffer_); }
    View(const View&) = delete;
    View& operator=(const View&) = delete;
    const uint8_t* data() const { return static_cast<const uint8_t*>(buffer_.buf); }
    size_t size() const { return static_cast<size_t>(buffer_.len); }

   private:
    Py_buffer buffer_{};
};

py::bytes lzma_compress(const py::buffer& data, int preset, bool extreme) {
    const View in(data);
    std::string out;
    {
        py::gil_scoped_release unlocked;
        out = pgolf::lzma_compress(in.data(), in.size(), preset, extreme);
    }
    return py::bytes(out);
}

py::bytes lzma_decompress(const py::buffer& data, py::ssize_t size) {
    if (size < 0) throw py::value_error("size is " + std::to_string(size) + ", but it must not be negative");
    const View in(data);
    // Filled in place, to hold a large section once only.
    auto out = py::reinterpret_steal<py::bytes>(PyBytes_FromStringAndSize(nullptr, size));
    if (!out) throw py::error_already_set();
    auto* target = reinterpret_cast<uint8_t*>(PyBytes_AS_STRING(out.ptr()));
    {
        py::gil_scoped_release unlocked;
        pgolf::lzma_decompress(in.data(), in.size(), target, static_cast<size_t>(size));
    }
    return out;
}

template <class T>
using Matrix = py::array_t<T, py::array::c_style>;

template <class T>
size_t rows_of(const Matrix<T>& matrix, const char* name) {
    if (matrix.ndim() != 2)
        throw py::value_error(std::string(name) + " has " + std::to_string(matrix.ndim()) +
                              " dimensions, but 2 are needed");
    return static_cast<size_t>(matrix.shape(0));
}

Matrix<uint8_t> int6_pack(const Matrix<int8_t>& codes) {
    const size_t rows = rows_of(codes, "codes"), columns = static_cast<size_t>(codes.shape(1));
    Matrix<uint8_t> packed({rows, pgolf::int6_row_bytes(columns)});
    uint8_t* target = packed.mutable_data();
    const int8_t* source = codes.data();
    {
        py::gil_scoped_release unlocked;
        pgolf::int6_pack(source, rows, columns, target);
    }
    return packed;
}

Matrix<int8_t> int6_unpack(const Matrix<uint8_t>& packed, py::ssize_t columns) {
    const size_t rows = rows_of(packed, "packed"), row_bytes = static_cast<size_t>(packed.shape(1));
    if (columns < 0 || pgolf::int6_row_bytes(static_cast<size_t>(columns)) != row_bytes)
        throw py::value_error("packed has rows of " + std::to_string(row_bytes) + " bytes, which do not hold " +
                              std::to_string(columns) + " codes");
    Matrix<int8_t> codes({rows, static_cast<size_t>(columns)});
    int8_t* target = codes.mutable_data();
    const uint8_t* source = packed.data();
    {
        py::gil_scoped_release unlocked;
        pgolf::int6_unpack(source, rows, static_cast<size_t>(columns), target);
    }
    return codes;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "C++ codecs of pgolf_fast: LZMA over liblzma, int6 packing.";
    m.def("lzma_compress", &lzma_compress, py::arg("data"), py::arg("preset") = 9, py::arg("extreme") = false);
    m.def("lzma_decompress", &lzma_decompress, py::arg("data"), py::arg("size"));
    m.def("int6_pack", &int6_pack, py::arg("codes").noconvert());
    m.def("int6_unpack", &int6_unpack, py::arg("packed").noconvert(), py::arg("columns"));
    m.def("lzma_version", [] { return pgolf::lzma_api().version(); });
    m.def("lzma_how", &pgolf::lzma_how);
}
