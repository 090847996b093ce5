"""Several processes: ranks of one program, how they find each other, and who may do what."""
