"""The Triton backend: program-driven kernels of the fused FFN op for NVIDIA GPUs from sm_80 up.

    microcode        program -> words of a machine with one accumulator, a second register and few slots
    elementary       operators and their derivatives, as Triton functions (primitives: exponential and reciprocal)
    evaluate         the machine itself: runs microcode over a tile
    gemm, epilogues  products with a program's segment as epilogue; row_kernels: LayerNorm, dropout and post, by rows
    products, rows   their launches; layout, launch: strides and alignments, and the one place that calls Triton
    ffn              one call: the order of launches, what is saved, what is computed again
    device_program   programs in device memory, and buffers that captured graphs can be replayed for
    specialize       which calls run generated code (codegen), compiled by background processes (compile_pool, recipe)
    prepare          compiles a shape family ahead of its first call
    tuning           block sizes per shape family

Nothing here is imported before the first call that could use it; importing `kernels.triton` itself is free.
"""
