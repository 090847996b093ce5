"""CUDA C++ kernels (csrc/cuda) and their Python side.

    build      nvcc, once per source and compiler, into the cache
    library    the compiled library through ctypes, or its emulation on the CPU (tests)
    programs   copies of programs on a device
    rows       post segment, dropout, residual and LayerNorm by rows
    grouped    several stacks of FFNs in one launch
    stack      one whole stack in one launch, the case of one member

Importing this package touches no device and compiles nothing.
"""
