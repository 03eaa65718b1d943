"""Files that belong together move together, and a full disk is told with its remedy."""

import errno

import pytest

from mtm.checkpoint import replacing, replacing_all


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_nothing_moves_before_all_is_written(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]
    with replacing_all(paths) as parts:
        for part in parts:
            part.write_text("old")
    assert contents(tmp_path) == {"a": "old", "b": "old"}
    with pytest.raises(KeyError), replacing_all(paths) as (part, _):
        part.write_text("new")
        raise KeyError
    with pytest.raises(FileNotFoundError), replacing_all(paths) as (part, _):
        part.write_text("new")  # and the other not at all
    assert contents(tmp_path) == {"a": "old", "b": "old"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_names_the_file_and_the_remedy(tmp_path, number):
    with pytest.raises(OSError, match="free some space there, or .* place: '.*/deep/a'$") as caught:
        with replacing(tmp_path / "deep" / "a") as part:
            part.write_text("half")
            raise OSError(number, "what the system says, without a name")
    assert caught.value.errno == number and not list((tmp_path / "deep").iterdir())
    with pytest.raises(OSError, match="something else$"), replacing(tmp_path / "a"):
        raise OSError(errno.EIO, "something else")
