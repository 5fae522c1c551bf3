"""Records of three sites: six numbers and a label to a row, NAME.npy. They stand in for what sites have."""

import numpy as np

random = np.random.default_rng(4)
for name, records in {"north": 250, "south": 120, "east": 80}.items():
    points = random.normal(size=(records, 6))
    labels = points @ [1.0, -2.0, 0.5, 0.0, 1.0, 0.3] > 0
    np.save(f"{name}.npy", np.column_stack([points, labels]).astype(np.float32))
