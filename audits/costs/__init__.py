"""What a run costs in money, bytes and energy, at stated prices."""
