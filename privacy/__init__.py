"""What noise costs: budgets, accounting, mechanisms, and the torch wrapper."""
