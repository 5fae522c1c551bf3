"""The server of the masked sum: a stage for each kind of message, and the driver that goes through them."""
