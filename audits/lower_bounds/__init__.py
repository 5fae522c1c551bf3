"""Lower bounds on epsilon from how well an attack told in from out."""
