"""The error of everything that reads data."""


class DataError(ValueError):
    """Data that is missing, damaged or too small; the message says which and what to do."""
