"""Benchmarks: pytest-benchmark cases (`pytest benchmarks/ --benchmark-only`) and tables of ratios (`python -m`)."""
