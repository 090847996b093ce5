"""Strategy `inherit`: students made of the teacher's own layers.

library      every layer alone: what it loses in each variant (heads, FFN width, left out), by replace-one KL
solve        the best combinations under the budget, by dynamic programming over the sums
last round   the best of them, uniform students and random ones, distilled shortly side by side
finish       the winner of each group distilled in full; the closest to the teacher on held-out rows is the found model
"""
