"""The search for garbage, kept short: it stops all threads, the event loop's and the engine's."""

import gc


def spare_modules() -> None:
    """Let the search for garbage pass by all there is now, which is to stay.

    A full search of what torch and we consist of, 225,000 objects, takes 0.08 to 0.1 s, and a body
    of 50,000 lists sets one off; of what comes later it takes less than a millisecond.
    """
    gc.collect()
    gc.freeze()
