"""Train, check and ship models that predict which of two LLM answers people prefer."""

__version__ = "0.1.0"
