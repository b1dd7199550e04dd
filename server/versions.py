"""Versions of what is installed."""

from importlib.metadata import PackageNotFoundError, version

UNKNOWN = "unknown"


def installed_version(package: str = "infmoe") -> str:
    """The version of an installed package; 'unknown' where the source runs without one."""
    try:
        return version(package)
    except PackageNotFoundError:
        return UNKNOWN
