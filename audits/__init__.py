"""What it shows: budgets, attacks, costs, the comparison and its report."""
