"""How candidates get their scores: trials, proxy training, successive halving, shared weights."""
