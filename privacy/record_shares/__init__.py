"""Record-level privacy whose noise is added in shares: one secure sum a step, and no party's noise would do alone."""
