"""The fused FFN: the op as PyTorch sees it, and the modules built on it."""
