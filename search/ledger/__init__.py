"""The ledger: every trial that ended, and the candidates that several workers divide among themselves."""
