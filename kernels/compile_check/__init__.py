"""Compiles every GPU kernel for sm_80 and sm_90 on a machine without a GPU, and reads what the machine code needs.

    python -m kernels.compile_check [--arch 80 90] [--quick] [--jobs 2] [--summary]

Triton kernels are those that the drivers really launch: calls over meta tensors (`calls`: every dtype, both tiers, 20
sampled programs) record their launches, and each distinct kernel is compiled once per architecture (`units`), the
costliest first. CUDA C++ files (csrc/cuda/*.cu, `sources`) are compiled with nvcc where there is one.

One line per kernel and architecture: registers, bytes spilled, shared memory, the tensor-core instruction found
(`machine_code`); `--summary` gives one line per kind of kernel instead. Exit code 1 on a failed compilation, on spills,
on more shared memory than a block can have, and on a product of 16-bit or TF32 operands without tensor-core
instruction; 0 else. Results are kept by hash of the sources and versions, so that a second run only prints them.

Rejected: reading register counts from PTX. They are decided by ptxas, after it.
"""
