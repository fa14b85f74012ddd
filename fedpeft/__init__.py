"""fedpeft: fine-tune transformer models across devices that keep their data."""

__version__ = "0.1.0"
