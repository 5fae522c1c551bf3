"""What the name of a metric says of it."""


def is_falling(metric: str) -> bool:
    """Whether less is better, by the last word of its name: error, loss, deviance or gap."""
    return metric.split(" ")[-1].lower() in ("error", "loss", "deviance", "gap")
