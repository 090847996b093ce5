"""Backends of the FFN op. `kernels.backends.base` states what a backend is; one module per backend."""
