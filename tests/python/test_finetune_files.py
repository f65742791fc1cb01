"""Files and folders are whole or absent, whatever happens while they are written."""

import pytest

from halfbyte.finetune.files import replace_file, replace_folder, write_json, write_text


class Interrupted(Exception):
    pass


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(Interrupted), replace_file(path) as temporary:
        temporary.write_text("half of the n")
        assert path.read_text() == "old"  # never the new one half written
        raise Interrupted
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_a_write_replaces_the_old_file(tmp_path):
    path = tmp_path / "sub" / "a.json"
    write_json(path, {"a": 1})
    write_json(path, {"a": 2})
    assert path.read_text() == '{\n  "a": 2\n}\n'
    assert path.stat().st_mode & 0o777 == 0o644
    assert [file.name for file in path.parent.iterdir()] == ["a.json"]


def test_folders(tmp_path):
    path = tmp_path / "adapter"
    with replace_folder(path) as temporary:
        (temporary / "old").write_text("old")
        assert not path.exists()
    with pytest.raises(Interrupted), replace_folder(path) as temporary:
        (temporary / "new").write_text("new")
        raise Interrupted
    assert [file.name for file in path.iterdir()] == ["old"]
    with replace_folder(path) as temporary:
        (temporary / "new").write_text("new")
    assert [file.name for file in path.iterdir()] == ["new"]
    assert [file.name for file in tmp_path.iterdir()] == ["adapter"]
