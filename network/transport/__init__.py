"""The reference transport: bytes between a coordinator's hub and the links of sites, over mutual TLS 1.3."""
