"""Errors of the offload package, which the engine translates into its own."""


class StoreError(Exception):
    """An expert store that is damaged, incomplete or of an unknown version."""


class ReadCancelled(Exception):
    """A read that was given up because nobody wants it any more."""
