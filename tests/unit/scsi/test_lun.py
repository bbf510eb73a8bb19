"""[TARGET:LUN=]SPEC."""

from __future__ import annotations

import pytest

from pyvhost.scsi.lun import Lun, parse_place, place


def test_places_are_taken_as_they_are_written_and_the_rest_in_turn() -> None:
    assert place(["a.img", "0:1=b.img,readonly", "memory:1G", "5:7=/x=y:z", Lun(0, 0, "c")]) == [
        Lun(0, 2, "a.img"),
        Lun(0, 1, "b.img,readonly"),
        Lun(0, 3, "memory:1G"),
        Lun(5, 7, "/x=y:z"),
        Lun(0, 0, "c"),
    ]
    assert place(["a", "b"], taken=[(0, 0), (1, 1)]) == [Lun(0, 1, "a"), Lun(0, 2, "b")]
    assert place(["nbd:unix:/x:0=1", "1:x=y", "./1:2=z"])[1].spec == "1:x=y"
    assert place(["0:3="[:3]])[0] == Lun(0, 0, "0:3")


@pytest.mark.parametrize(
    ("specs", "words"),
    [
        (["0:1=a", "0:1=b"], "0:1 is there already"),
        (["1:1=a"], "1:1 is there already"),
        (["256:0=a"], "LUN 256:0: targets go from 0 to 255"),
        (["0:16384=a"], "LUNs from 0 to 16383"),
        ([""], "needs a store"),
        (["0:1="], "needs a store"),
        ([Lun(-1, 0, "a")], "LUN -1:0"),
    ],
)
def test_what_can_not_be(specs: list[str | Lun], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        place(specs, taken=[(1, 1)])


def test_a_full_target() -> None:
    with pytest.raises(ValueError, match="no LUN left"):
        place(["a"], taken=[(0, lun) for lun in range(16384)])


def test_a_place_alone() -> None:
    assert parse_place("3:16383") == (3, 16383)
    for text in ("3", "3:", "a:b", "0:3=x", "-1:0", "1:2:3"):
        with pytest.raises(ValueError, match="not TARGET:LUN"):
            parse_place(text)
    with pytest.raises(ValueError, match="from 0 to 255"):
        parse_place("256:0")
