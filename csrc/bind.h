// Helpers of the binding files: buffers in, bytes or arrays out. bind_<codec>.cpp binds one codec.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

namespace pgolf {

namespace py = pybind11;

// A borrowed view of a contiguous buffer; raises BufferError for any other.
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

template <class T>
using Matrix = py::array_t<T, py::array::c_style>;

template <class T>
size_t rows_of(const Matrix<T>& matrix, const char* name) {
    if (matrix.ndim() != 2)
        throw py::value_error(std::string(name) + " has " + std::to_string(matrix.ndim()) +
                              " dimensions, but 2 are needed");
    return static_cast<size_t>(matrix.shape(0));
}

// Uninitialized bytes to fill in place, so that a large result is held only once.
inline py::bytes new_bytes(size_t size) {
    auto out = py::reinterpret_steal<py::bytes>(
        PyBytes_FromStringAndSize(nullptr, static_cast<py::ssize_t>(size)));
    if (!out) throw py::error_already_set();
    return out;
}

inline uint8_t* data_of(const py::bytes& bytes) {
    return reinterpret_cast<uint8_t*>(PyBytes_AS_STRING(bytes.ptr()));
}

void bind_lzma(py::module_& m);
void bind_bits(py::module_& m);
void bind_int6(py::module_& m);
void bind_rans(py::module_& m);
void bind_decode(py::module_& m);
void bind_gptq(py::module_& m);
void bind_passes(py::module_& m);
void bind_attention(py::module_& m);

}  // namespace pgolf
