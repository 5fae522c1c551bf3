"""What releases cost, and the noise that fits: events, record- and client-level accountants, PLD, PRV, filters."""
