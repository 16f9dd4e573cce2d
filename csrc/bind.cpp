// pgolf_fast._C. Every function releases the GIL while it works. There are no torch headers, so that one build serves
// every torch release. PGOLF_NO_LZMA leaves out LZMA, for machines without <lzma.h>.
#include "bind.h"

PYBIND11_MODULE(_C, m) {
    m.doc() = "C++ codecs of pgolf_fast: bit packing, int6 products and decoding, LZMA over liblzma, rANS, GPTQ, CPU passes.";
#ifndef PGOLF_NO_LZMA
    pgolf::bind_lzma(m);
#endif
    pgolf::bind_bits(m);
    pgolf::bind_int6(m);
    pgolf::bind_rans(m);
    pgolf::bind_decode(m);
    pgolf::bind_gptq(m);
    pgolf::bind_passes(m);
    pgolf::bind_attention(m);
}
