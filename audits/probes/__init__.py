"""What a probe trains on, and the tests of what it saw: noise, sampling, clipping."""
