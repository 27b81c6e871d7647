"""The error of a user's mistake."""


class UserError(Exception):
    """Something the user can mend. `main` prints the message as one paragraph and exits with status 2."""
