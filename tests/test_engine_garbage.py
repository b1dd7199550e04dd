"""What is there when a server starts is not searched for garbage again; what comes later is."""

import gc
import weakref

from engine.garbage import spare_modules


class Ring:
    """Garbage that only a search finds."""

    def __init__(self):
        self.itself = self


def test_what_is_there_is_spared_and_what_comes_later_is_searched():
    found = weakref.ref(Ring())
    before = len(gc.get_objects())
    try:
        spare_modules()
        assert found() is None  # it was garbage before
        assert len(gc.get_objects()) < before / 10
        later = weakref.ref(Ring())
        gc.collect()
        assert later() is None
    finally:
        gc.unfreeze()
    assert len(gc.get_objects()) > before / 2
