"""The base class of all errors that this library raises on purpose."""


class AdaptiveMarginsError(Exception):
    """An error whose message names what was found, what was expected and the way out.

    The command line prints it as one line.
    """


class ArgumentError(AdaptiveMarginsError, ValueError):
    """An argument that is not allowed or does not fit the data; the command line exits with 2.

    Attributes:
        name: of the parameter.
    """

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


class TrainingError(AdaptiveMarginsError, RuntimeError):
    """Training that cannot continue: a loss that is not finite, too few triples, a full disk."""
