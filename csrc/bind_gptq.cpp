#include "bind.h"

namespace pgolf {

void bind_gptq(py::module_&) {}

}  // namespace pgolf
