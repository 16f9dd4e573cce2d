#include <lzma.h>

#include "bind.h"
#include "lzma_codec.h"

namespace pgolf {
namespace {

py::bytes compress(const py::buffer& data, int preset, bool extreme, int lc, int lp, int pb, int nice_len, int mode) {
    const View in(data);
    std::string out;
    {
        py::gil_scoped_release unlocked;
        out = lzma_compress(in.data(), in.size(), preset, extreme, {lc, lp, pb, nice_len, mode});
    }
    return py::bytes(out);
}

py::bytes decompress(const py::buffer& data, py::ssize_t size) {
    if (size < 0) throw py::value_error("size is " + std::to_string(size) + ", but must not be negative");
    const View in(data);
    auto out = new_bytes(static_cast<size_t>(size));
    uint8_t* target = data_of(out);
    {
        py::gil_scoped_release unlocked;
        lzma_decompress(in.data(), in.size(), target, static_cast<size_t>(size));
    }
    return out;
}

}  // namespace

void bind_lzma(py::module_& m) {
    m.def("lzma_compress", &compress, py::arg("data"), py::arg("preset") = 9, py::arg("extreme") = false,
          py::kw_only(), py::arg("lc") = -1, py::arg("lp") = -1, py::arg("pb") = -1, py::arg("nice_len") = -1,
          py::arg("mode") = -1);
    m.def("lzma_decompress", &decompress, py::arg("data"), py::arg("size"));
    m.def("lzma_version", &lzma_version_string);
}

}  // namespace pgolf
