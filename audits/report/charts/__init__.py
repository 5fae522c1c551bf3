"""The report's own charts, as inline SVG."""
