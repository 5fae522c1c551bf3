"""Is each record of a batch treated by itself? Models, losses and collation are held to it as they train."""
