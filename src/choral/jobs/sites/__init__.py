"""Jobs with sites beside trainings."""
