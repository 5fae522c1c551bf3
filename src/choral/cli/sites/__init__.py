"""Commands of sites and of who coordinates them."""
