"""Atomic writes, files of arrays, and optional packages."""

import errno

import pytest

from mtm.files import atomic_write


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "a"
    with atomic_write(path) as partial:
        partial.write_text("old")
    with pytest.raises(KeyError), atomic_write(path) as partial:
        partial.write_text("half")
        raise KeyError
    assert path.read_text() == "old"
    with atomic_write(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"  # until all is written
    assert path.read_text() == "new" and [p.name for p in path.parent.iterdir()] == ["a"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_names_the_file_and_the_remedy(tmp_path, number):
    with pytest.raises(OSError, match="free some space, or .*elsewhere: '.*a'$") as caught:
        with atomic_write(tmp_path / "a") as partial:
            partial.write_text("half")
            raise OSError(number, "the system's message, without a name")
    assert caught.value.errno == number and not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="something else$"), atomic_write(tmp_path / "a"):
        raise OSError(errno.EIO, "something else")
