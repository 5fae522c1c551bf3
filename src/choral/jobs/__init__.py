"""Jobs as settings describe them: one training, the comparison of several, attacks on them."""
