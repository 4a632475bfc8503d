import os

import pytest

from pipelines.cli import GrimaceError
from pipelines.exporters.quiet import quiet


def test_chatter_is_held_back_and_streams_come_back(capfd):
    with quiet("conversion"):
        print("from Python")
        os.write(2, b"from C++\n")
    print("after")
    assert capfd.readouterr() == ("after\n", "")


def test_a_failure_shows_the_last_lines(capfd):
    with pytest.raises(GrimaceError) as caught, quiet("conversion of a.keras"):
        for line in range(100):
            os.write(2, f"line {line}\n".encode())
        raise ValueError("no such kernel")
    message = str(caught.value)
    assert message.startswith("the conversion of a.keras failed")
    assert message.endswith("line 98\n  line 99\n  no such kernel")
    assert "line 50" not in message
    assert capfd.readouterr() == ("", "")


def test_what_the_user_can_act_on_passes_as_it_is():
    with pytest.raises(GrimaceError, match=r"^plain words$"), quiet("conversion"):
        raise GrimaceError("plain words")
