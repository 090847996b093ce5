// The emulated library: every kernel source, compiled as C++ with FFNAS_EMULATION.
#include "emulate.cpp"

#include "../abi.cu"
#include "../rows.cu"
