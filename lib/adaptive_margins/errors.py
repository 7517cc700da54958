"""The base class of all errors that this library raises on purpose."""


class AdaptiveMarginsError(Exception):
    """An error whose message names what was found, what was expected and the way out; the command line prints it as one line."""
