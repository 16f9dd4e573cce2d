#include <pybind11/stl.h>

#include <algorithm>
#include <optional>

#include "bind.h"
#include "gptq.h"

namespace pgolf {
namespace {

template <class T>
using Vector = py::array_t<T, py::array::c_style>;

template <class T>
const T* checked(const Vector<T>& vector, size_t size, const char* name) {
    if (vector.ndim() != 1 || static_cast<size_t>(vector.shape(0)) != size)
        throw py::value_error(std::string(name) + " must be a vector of " + std::to_string(size) + " values");
    return vector.data();
}

constexpr size_t kMostClasses = size_t(1) << 22;  // so that 256 * class fits an int32_t

// Raises ValueError unless every row class + column class is a row of `cost`.
void check_classes(const GptqBlock& block, size_t classes) {
    if (!block.rows || !block.columns) return;
    const auto rows = std::minmax_element(block.row_class, block.row_class + block.rows);
    const auto columns = std::minmax_element(block.column_class, block.column_class + block.columns);
    if (*rows.first < 0 || *columns.first < 0 ||
        int64_t(*rows.second) + *columns.second >= int64_t(std::min(classes, kMostClasses)))
        throw py::value_error("row_class + column_class must be one of the " + std::to_string(classes) +
                              " rows of cost");
}

void round_block(Matrix<float>& work, Matrix<int8_t>& codes, const Vector<float>& row_step,
                 const Vector<float>& column_step, const Matrix<float>& factor, int clip_range,
                 const std::optional<Matrix<float>>& cost, const std::optional<Vector<int32_t>>& row_class,
                 const std::optional<Vector<int32_t>>& column_class, const std::optional<Vector<float>>& lam,
                 size_t threads) {
    GptqBlock block{};
    block.columns = rows_of(work, "work");
    block.rows = static_cast<size_t>(work.shape(1));
    block.clip_range = clip_range;
    if (rows_of(codes, "codes") != block.columns || static_cast<size_t>(codes.shape(1)) != block.rows)
        throw py::value_error("codes must have the shape of work");
    if (rows_of(factor, "factor") != block.columns || static_cast<size_t>(factor.shape(1)) != block.columns)
        throw py::value_error("factor must be a square with a side of " + std::to_string(block.columns));
    if (clip_range < 1 || clip_range > 127) throw py::value_error("clip_range must be 1 to 127");
    block.row_step = checked(row_step, block.rows, "row_step");
    block.column_step = checked(column_step, block.columns, "column_step");
    block.factor = factor.data();
    if (cost) {
        if (!row_class || !column_class || !lam) throw py::value_error("cost needs row_class, column_class and lam");
        const size_t classes = rows_of(*cost, "cost");
        if (static_cast<size_t>(cost->shape(1)) != kCostsPerClass)
            throw py::value_error("cost must have " + std::to_string(kCostsPerClass) + " columns");
        block.cost = cost->data();
        block.row_class = checked(*row_class, block.rows, "row_class");
        block.column_class = checked(*column_class, block.columns, "column_class");
        block.lam = checked(*lam, block.rows, "lam");
        check_classes(block, classes);
    }
    float* values = work.mutable_data();
    int8_t* target = codes.mutable_data();
    py::gil_scoped_release unlocked;
    gptq_round_block(block, values, target, threads);
}

}  // namespace

void bind_gptq(py::module_& m) {
    m.def("gptq_round_block", &round_block, py::arg("work").noconvert(), py::arg("codes").noconvert(),
          py::arg("row_step").noconvert(), py::arg("column_step").noconvert(), py::arg("factor").noconvert(),
          py::arg("clip_range"), py::arg("cost").noconvert() = py::none(),
          py::arg("row_class").noconvert() = py::none(), py::arg("column_class").noconvert() = py::none(),
          py::arg("lam").noconvert() = py::none(),
          py::arg("threads") = 0);
}

}  // namespace pgolf
