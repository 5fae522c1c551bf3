"""The masked sum with keys and shares dealt a round ahead: what it lets a coalition learn."""
