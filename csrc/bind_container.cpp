#include "bind.h"

namespace pgolf {

void bind_container(py::module_&) {}

}  // namespace pgolf
