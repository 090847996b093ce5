"""Linear-chain conditional random fields: log Z, marginals, best sequences, divergence of two chains."""
