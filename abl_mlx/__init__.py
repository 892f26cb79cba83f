"""Find, remove and measure the refusal direction of a local chat model."""

__version__ = "0.1.0"
