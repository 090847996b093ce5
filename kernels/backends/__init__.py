"""Backends of the FFN op. `kernels.call` states what a backend is; one module per backend."""
