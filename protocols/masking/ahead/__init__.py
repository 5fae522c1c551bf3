"""The masked sum with keys and shares dealt a round ahead: three trips, or two without the confirmation."""
