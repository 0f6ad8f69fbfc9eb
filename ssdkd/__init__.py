"""ssdkd: make a small neural network out of a big one without the big one's training data."""

__version__ = "0.1.0"
