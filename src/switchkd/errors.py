"""The one exception for mistakes a user can mend."""


class UserError(ValueError):
    """Raised where input, configuration or files cannot be used.

    The message is one line: what is wrong, with which value, and the way out. The command line prints it after
    `switchkd: error:` and exits with code 2; library users catch it as a `ValueError`.
    """
