"""The Triton backend: program-driven kernels of the fused FFN op for NVIDIA GPUs from sm_80 up.

    microcode     program -> words of a machine with one accumulator, a second register and few slots
    elementary    operators and their derivatives, as Triton functions
    evaluate      the machine itself: runs microcode over a tile
    gemm, rows    the kernels: products with a program epilogue; LayerNorm, dropout and the post segment by rows
    ffn           one call: the order of launches, what is saved, what is computed again
    specialize    code generated from one program, compiled by background processes, swapped in when ready
    tuning        block sizes per shape family

Nothing here is imported before the first call that could use it; importing `kernels.triton` itself is free.
"""
