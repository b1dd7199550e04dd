import pytest

from engine.units import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("1.5GiB", 1536 * 2**20), ("300 MB", 300 * 10**6), ("2kib", 2048), ("7B", 7)],
)
def test_sizes_are_read(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "lots", "-1", "1 XiB", "1e9", "1.5.5GB", "GiB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="is no size in bytes; write"):
        parse_bytes(text)


def test_sizes_are_written():
    sizes = [0, 1023, 1536, 5 * 2**20, 360 * 2**30, 2**42]
    expected = ["0 B", "1023 B", "1.5 KiB", "5.0 MiB", "360.0 GiB", "4.0 TiB"]
    assert [format_bytes(size) for size in sizes] == expected


@pytest.mark.parametrize("text", ["9" * 400, "99999999999GiB", "1" + "0" * 30])
def test_sizes_beyond_all_memory_are_refused(text):
    with pytest.raises(ValueError, match="beyond all memory"):
        parse_bytes(text)
