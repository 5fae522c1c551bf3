"""What the sums are built from: keys, Shamir's sharing, single-use states, integers modulo 2^bits, mask streams."""
