"""ffnas search: the search space, samplers, stages, ledger and reports; a thin controller over `engine`."""
