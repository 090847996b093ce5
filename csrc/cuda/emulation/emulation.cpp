// The emulated library: every kernel source, compiled as C++ with FFNAS_EMULATION.
#include "emulate.cpp"

#include "../abi.cu"
#include "../grouped_bwd.cu"
#include "../grouped_fwd.cu"
#include "../rows.cu"
