"""What a data owner has released: ledgers chained by hashes, the plans on them, and what is spent of a promise."""
