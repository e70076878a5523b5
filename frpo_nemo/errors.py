"""Define the one exception for mistakes of the user. Its message states what would be right."""

from frpo_nemo import redact


class ConfigError(ValueError):
    """Something in the configuration or the input is wrong. Raised before any model loads, where possible."""

    def __str__(self) -> str:
        return redact.text(super().__str__())  # messages quote values
