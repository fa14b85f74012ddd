"""The errors that a user or a peer can cause."""


class ConfigError(ValueError):
    """A setting that can't be run: the text names the key, what was got, what is wanted."""


class ProtocolError(Exception):
    """The other side broke the protocol: its message is refused, and the round goes on without it."""


class DataError(ValueError):
    """A file or data set that can't be used: the text names the file and what to do."""
