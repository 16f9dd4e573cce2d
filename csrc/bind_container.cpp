#include <exception>
#include <utility>
#include <vector>

#include "bind.h"
#include "container.h"
#include "parallel.h"

namespace pgolf {
namespace {

py::list sections_of(const Container& container) {
    py::list list;
    for (const Section& s : container.sections)
        list.append(
            py::make_tuple(s.name, static_cast<int>(s.codec), s.raw_bytes, s.stored_bytes, s.crc32, s.offset));
    return list;
}

py::list tensors_of(const Container& container) {
    py::list list;
    for (const Tensor& t : container.tensors) {
        py::tuple shape(t.shape.size());
        for (size_t i = 0; i < t.shape.size(); i++) shape[i] = t.shape[i];
        list.append(py::make_tuple(t.name, t.section, t.kind, t.dtype, shape, t.offset));
    }
    return list;
}

// (configuration, sections, tensors, sections unpacked), as pgolf_fast/artifact/reader.py returns them; None stands for
// a section that is left to Python.
py::tuple read_container(const py::buffer& data) {
    const View in(data);
    Container container;
    {
        py::gil_scoped_release unlocked;
        container = parse_container(in.data(), in.size());
    }
    py::list unpacked;
    std::vector<std::pair<const Section*, uint8_t*>> work;
    for (const Section& section : container.sections)
        if (can_decode(section.codec)) {
            auto out = new_bytes(section.raw_bytes);
            work.emplace_back(&section, data_of(out));
            unpacked.append(std::move(out));
        } else {
            unpacked.append(py::none());
        }
    std::vector<std::exception_ptr> failures(work.size());  // of several, the first section's is thrown
    {
        py::gil_scoped_release unlocked;
        parallel_for(work.size(), 0, [&](size_t i) {
            try {
                decode_section(in.data(), container, *work[i].first, work[i].second);
            } catch (...) {
                failures[i] = std::current_exception();
            }
        });
    }
    for (const auto& failure : failures)
        if (failure) std::rethrow_exception(failure);
    return py::make_tuple(py::bytes(container.config), sections_of(container), tensors_of(container), unpacked);
}

}  // namespace

void bind_container(py::module_& m) { m.def("read_container", &read_container, py::arg("data")); }

}  // namespace pgolf
