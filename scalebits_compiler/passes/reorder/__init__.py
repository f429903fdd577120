"""Channel permutations: which exist, which pay, and how they are folded away."""
