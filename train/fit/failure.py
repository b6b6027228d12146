"""How a run fails that cannot go on."""


class RunFailed(RuntimeError):
    """A run cannot go on, and the message tells its user why; what it saved stays."""
