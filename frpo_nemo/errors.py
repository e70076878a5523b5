"""The one exception for mistakes of the user: its message is a sentence that says what would be right."""


class ConfigError(ValueError):
    """Something in the configuration or the input is wrong. Raised before any model loads, where possible."""
