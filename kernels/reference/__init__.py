"""Every op in plain PyTorch, at any dtype: what the fast ones are compared with."""
