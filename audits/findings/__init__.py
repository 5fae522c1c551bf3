"""What is found, as data and in words: the report's schema, evidence, claims, statistics, the verdict."""
