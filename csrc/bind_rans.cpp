#include "bind.h"

namespace pgolf {

void bind_rans(py::module_&) {}

}  // namespace pgolf
