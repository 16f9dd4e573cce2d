// pgolf_fast._C: the GIL is released while working. No torch headers, so that one build serves every torch release.
#include "bind.h"

PYBIND11_MODULE(_C, m) {
    m.doc() = "C++ codecs of pgolf_fast: bit packing, LZMA over liblzma, rANS, the artifact's container, GPTQ.";
    pgolf::bind_lzma(m);
    pgolf::bind_bits(m);
    pgolf::bind_rans(m);
    pgolf::bind_container(m);
    pgolf::bind_gptq(m);
}
