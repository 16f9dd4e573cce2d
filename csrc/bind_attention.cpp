#include <pybind11/stl.h>

#include <optional>
#include <vector>

#include "operand.h"

namespace pgolf {
namespace {

using Shape = std::vector<py::ssize_t>;
using Optional = std::optional<py::array>;
using Starts = std::optional<Matrix<int32_t>>;

std::string text_of(const py::ssize_t* sizes, size_t count) {
    std::string text = "(";
    for (size_t i = 0; i < count; i++) text += (i ? ", " : "") + std::to_string(sizes[i]);
    return text + ")";
}

// Checks the operands of one call.
class Call {
   public:
    Call(const py::array& q, const py::array& k, const py::array& cos) : type_(Operand("q", q).type()) {
        if (q.ndim() != 4 || k.ndim() != 4 || cos.ndim() != 2)
            throw py::value_error("q, k and cos have " + std::to_string(q.ndim()) + ", " + std::to_string(k.ndim()) +
                                  " and " + std::to_string(cos.ndim()) + " dimensions, but 4, 4 and 2 are needed");
        q_ = Shape(q.shape(), q.shape() + 4), k_ = Shape(k.shape(), k.shape() + 4);
        if (k_[2] == 0 || q_[2] % k_[2] || q_[1] > k_[1])
            throw py::value_error("q has shape " + text_of(q_.data(), 4) + " and k " + text_of(k_.data(), 4) +
                                  ", but q's heads must be a multiple of k's, and its positions not more");
        if (q_[3] == 0 || 2 * cos.shape(1) > q_[3])
            throw py::value_error("cos turns " + std::to_string(2 * cos.shape(1)) + " channels of " +
                                  std::to_string(q_[3]));
        const auto size = [](py::ssize_t n) { return static_cast<size_t>(n); };
        shape_ = {size(q_[0]), size(q_[1]), size(k_[1]), size(q_[2]), size(k_[2]), size(q_[3]), size(cos.shape(1))};
        k_[0] = q_[0], k_[3] = q_[3];
        like_k("k", k);
    }

    const AttentionShape& shape(const py::array& gain, const py::array& cos, const py::array& sin, bool xsa,
                                const Optional& gate, const Starts& starts) {
        shape_.xsa = xsa;
        shape_.gain = floats("gain", gain, {q_[2]});
        shape_.cos = floats("cos", cos, {k_[1], cos.shape(1)});
        shape_.sin = floats("sin", sin, {k_[1], cos.shape(1)});
        if (gate) shape_.gate = heads("gate", *gate);
        if (starts) shape_.starts = ordered(*starts);
        return shape_;
    }
    // (batch, queries, heads)
    float* heads(const char* name, const py::array& array) const { return floats(name, array, {q_[0], q_[1], q_[2]}); }
    Type type() const { return type_; }
    void* like_q(const char* name, const py::array& array) const { return checked(name, array, type_, q_); }
    void* like_k(const char* name, const py::array& array) const { return checked(name, array, type_, k_); }
    float* q_rstd(const py::array& array) const { return floats("q_rstd", array, {q_[0], q_[1], q_[2], 1}); }
    float* k_rstd(const py::array& array) const { return floats("k_rstd", array, {k_[0], k_[1], k_[2], 1}); }
    float* lse(const py::array& array) const { return floats("lse", array, {q_[0], q_[2], q_[1]}); }
    float* dgain(const py::array& array) const { return floats("dgain", array, {q_[2]}); }

   private:
    static void* checked(const char* name, const py::array& array, Type type, const Shape& shape) {
        const Operand operand(name, array);
        if (operand.type() != type)
            throw py::value_error(std::string(name) + " must hold " +
                                  (type == Type::f32 ? "float32" : "bfloat16 as uint16"));
        const size_t ndim = static_cast<size_t>(array.ndim());
        if (Shape(array.shape(), array.shape() + ndim) != shape)
            throw py::value_error(std::string(name) + " has shape " + text_of(array.shape(), ndim) + ", but " +
                                  text_of(shape.data(), shape.size()) + " is needed");
        return operand.writable();
    }
    const int32_t* ordered(const Matrix<int32_t>& starts) const {
        const Shape wanted{k_[0], k_[1]};
        if (Shape(starts.shape(), starts.shape() + starts.ndim()) != wanted)
            throw py::value_error("starts has shape " + text_of(starts.shape(), size_t(starts.ndim())) + ", but " +
                                  text_of(wanted.data(), 2) + " is needed");
        const int32_t* given = starts.data();
        for (py::ssize_t i = 0; i < starts.size(); i++) {
            const py::ssize_t position = i % k_[1], least = position ? given[i - 1] : 0;
            if (given[i] < least || given[i] > position)
                throw py::value_error("starts holds " + std::to_string(given[i]) + " for position " +
                                      std::to_string(position) + ", but " + std::to_string(least) + " to " +
                                      std::to_string(position) + " is needed");
        }
        return given;
    }
    static float* floats(const char* name, const py::array& array, const Shape& shape) {
        return static_cast<float*>(checked(name, array, Type::f32, shape));
    }

    Type type_;
    Shape q_, k_;
    AttentionShape shape_{};
};

void attention(const py::array& q, const py::array& k, const py::array& v, const py::array& gain, const py::array& cos,
               const py::array& sin, const py::array& y, const py::array& context, const py::array& q_rstd,
               const py::array& k_rstd, const py::array& lse, bool xsa, const Optional& gate, const Starts& starts,
               size_t threads) {
    Call call(q, k, cos);
    const AttentionShape shape = call.shape(gain, cos, sin, xsa, gate, starts);
    const AttentionForward io{call.like_q("q", q), call.like_k("k", k), call.like_k("v", v),
                              call.like_q("y", y), call.like_q("context", context), call.q_rstd(q_rstd),
                              call.k_rstd(k_rstd), call.lse(lse)};
    py::gil_scoped_release unlocked;
    passes().attention(call.type(), shape, io, threads);
}

void attention_backward(const py::array& dcontext, const py::array& q, const py::array& k, const py::array& v,
                        const py::array& y, const py::array& q_rstd, const py::array& k_rstd, const py::array& lse,
                        const py::array& gain, const py::array& cos, const py::array& sin, const py::array& context,
                        const py::array& dq, const py::array& dk, const py::array& dv, const py::array& dgain, bool xsa,
                        const Optional& gate, const Starts& starts, const Optional& dgate, size_t threads) {
    Call call(q, k, cos);
    const AttentionShape shape = call.shape(gain, cos, sin, xsa, gate, starts);
    if (gate.has_value() != dgate.has_value()) throw py::value_error("gate and dgate are needed together");
    const AttentionBackward io{call.like_q("dcontext", dcontext), call.like_q("q", q), call.like_k("k", k),
                               call.like_k("v", v), call.like_q("y", y), call.q_rstd(q_rstd), call.k_rstd(k_rstd),
                               call.lse(lse), call.like_q("context", context), call.like_q("dq", dq),
                               call.like_k("dk", dk), call.like_k("dv", dv), call.dgain(dgain),
                               dgate ? call.heads("dgate", *dgate) : nullptr};
    py::gil_scoped_release unlocked;
    passes().attention_backward(call.type(), shape, io, threads);
}

}  // namespace

void bind_attention(py::module_& m) {
    m.def("attention", &attention, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("gain"), py::arg("cos"),
          py::arg("sin"), py::arg("y"), py::arg("context"), py::arg("q_rstd"), py::arg("k_rstd"), py::arg("lse"),
          py::arg("xsa"), py::arg("gate") = py::none(), py::arg("starts") = py::none(), py::arg("threads") = 0);
    m.def("attention_backward", &attention_backward, py::arg("dcontext"), py::arg("q"), py::arg("k"), py::arg("v"),
          py::arg("y"), py::arg("q_rstd"), py::arg("k_rstd"), py::arg("lse"), py::arg("gain"), py::arg("cos"),
          py::arg("sin"), py::arg("context"), py::arg("dq"), py::arg("dk"), py::arg("dv"), py::arg("dgain"),
          py::arg("xsa"), py::arg("gate") = py::none(), py::arg("starts") = py::none(), py::arg("dgate") = py::none(),
          py::arg("threads") = 0);
}

}  // namespace pgolf
