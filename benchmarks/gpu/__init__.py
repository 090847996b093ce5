"""What is measured and checked on a CUDA device; `python -m benchmarks.gpu_check` runs all of it in one go.

    records    results as JSON lines, appended after every case; a run that died goes on after the case it died in
    sides      the sides of the FFN benchmark, CUDA graphs, clocks, floors
    families   one process each: machine, compile, accuracy, kernels, ffn, checks, tiles, steps
    recorder   the GPU tests' outcomes as records (a pytest plugin)
    report     the records as Markdown
    hidden     packages hidden from a rehearsal

Commands:

    python -m benchmarks.gpu FAMILY --out FOLDER [--rehearse]      one family alone
    python -m benchmarks.gpu --show FOLDER                         print the report of a folder's results again
    python -m benchmarks.gpu --readme FOLDER                       put its table into README
"""
