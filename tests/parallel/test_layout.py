"""Layouts: every group and every row is computed once, evenly, and by whoever has its condition."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from omnigen_fast.errors import RequestError
from omnigen_fast.parallel.digest import digest
from omnigen_fast.parallel.exchange import Share, velocity_places
from omnigen_fast.parallel.group import join
from omnigen_fast.parallel.layout import Layout, divide, most_branches, parse_layout

LAYOUTS = [Layout(*one) for one in product(range(1, 5), range(1, 5))]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("tokens", [16, 17, 4096, 4099])
def test_rows_are_split_evenly(layout, tokens):
    bounds = [layout.row_bounds(tokens, part) for part in range(layout.rows)]
    assert [first for first, _ in bounds] == [0, *(stop for _, stop in bounds[:-1])]
    assert bounds[-1][1] == tokens
    lengths = {stop - first for first, stop in bounds}
    assert max(lengths) == layout.most_rows(tokens) and max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("groups", range(1, 9))
def test_no_rank_is_idle(layout, groups):
    found = layout.for_groups(groups)
    assert found.size == layout.size and found.branches <= groups
    assert found == layout or groups < layout.branches
    assert found.rows in layout.row_counts()
    parts = found.parts(groups)
    assert [i for part in parts for i in part] == list(range(groups))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def conditions(division) -> list[set]:
    return [{KEYS[group] for group in part} for part in division.parts]


# Two pictures with input images: text, image and the negative prompt that both have.
PAIRED = [[[(0, "a"), (2, "a image")], [(1, "no")]], [[(0, "b"), (2, "b image")], [(1, "no")]]]
KEYS = {
    (picture, place): key
    for picture, units in enumerate(PAIRED)
    for unit in units
    for place, key in unit
}


def test_branches_with_a_common_prefix_stay_together():
    assert divide(Layout(2), PAIRED[:1]).parts == (((0, 0), (0, 2)), ((0, 1),))
    assert divide(Layout(3), PAIRED[:1]).parts == (((0, 0),), ((0, 2),), ((0, 1),))
    three = divide(Layout(3), PAIRED)
    assert conditions(three) == [{"a", "a image"}, {"b", "b image"}, {"no"}]
    assert conditions(divide(Layout(2), PAIRED)) == [{"a", "a image", "no"}, {"b", "b image", "no"}]


def test_equal_conditions_of_several_pictures_stay_together():
    texts = [[[(0, f"picture {i}")], [(1, "no")]] for i in range(4)]
    assert divide(Layout(4), texts).most_groups == 2
    assert divide(Layout(2), texts).most_groups == 4
    same = [[[(0, "cat")], [(1, "no")]]] * 2
    assert divide(Layout(2), same).parts == (((0, 0), (1, 0)), ((0, 1), (1, 1)))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("pictures", [PAIRED, PAIRED[:1]], ids=["two", "one"])
@pytest.mark.parametrize("tokens", [16, 19])
def test_every_velocity_is_sent_once_and_found(layout, pictures, tokens):
    division = divide(layout, pictures)
    every = sorted(group for part in division.parts for group in part)
    assert len(set(every)) == len(every) == 3 * len(pictures)
    place_of = {group: i for i, group in enumerate(every)}
    orders = [[place_of[group] for group in reversed(part)] for part in division.parts]
    places, sent = velocity_places(division, orders, tokens, len(every))
    gathered = {}
    for rank in range(layout.size):
        share = Share.of(division, rank, tokens)
        own = orders[division.layout.branch_rank(rank)]
        rows = [(group, row) for group in own for row in range(share.first, share.stop)]
        assert len(rows) <= sent
        gathered |= {rank * sent + i: row for i, row in enumerate(rows)}
    expected = [(group, row) for group in range(len(every)) for row in range(tokens)]
    assert [gathered[place] for place in places] == expected


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [(1, (1, 1)), (2, (2, 1)), (3, (3, 1)), (4, (2, 2)), (5, (1, 5)), (6, (3, 2)), (8, (2, 4))],
)
def test_most_branches(ranks, expected):
    assert most_branches(ranks) == Layout(*expected)


def test_what_may_be_asked_for():
    assert parse_layout("auto", 4) is None
    assert parse_layout({"branches": 2, "rows": 2}, 4) == Layout(2, 2)
    assert parse_layout({"rows": 3}, 3) == Layout(1, 3)
    assert parse_layout(Layout(3), 3) == Layout(3)


@pytest.mark.parametrize(
    ("parallel", "sentence"),
    [
        ("all", """parallel must be "auto" or such as {"branches": 2, "rows": 1}, got 'all'"""),
        ({}, "got {}"),
        ({"columns": 2}, "got {'columns': 2}"),
        ({"rows": 0}, "parallel needs rows from 1 to 64, got 0"),
        ({"branches": 65}, "parallel needs branches from 1 to 64, got 65"),
        ({"rows": True}, "got True"),
        ({"rows": "2"}, "got '2'"),
        (
            {"branches": 3},
            "parallel asks for 3 x 1 = 3 ranks, and the process group has 4; start as many ranks "
            'as that, or give parallel="auto"',
        ),
    ],
)
def test_what_may_not(parallel, sentence):
    with pytest.raises(RequestError) as error:
        parse_layout(parallel, 4)
    assert sentence in str(error.value)


def test_there_must_be_a_group(load_pipe):
    assert join(None, torch.device("cpu")) is None
    with pytest.raises(RequestError, match="parallel needs a process group: start the script with"):
        load_pipe(parallel="auto")


def test_digests():
    values = [torch.arange(8.0), torch.Generator(), {"a": 1}, [1, 2], (1, (2,)), None, "x"]
    assert len({digest(one) for one in values}) == len(values)
    assert digest(torch.arange(8.0)) == digest(torch.arange(8.0))
    assert digest(torch.Generator().manual_seed(1)) != digest(torch.Generator().manual_seed(2))
    large = torch.zeros(1 << 20)
    assert digest(large) == digest(torch.zeros(1 << 20)) != digest(torch.zeros(1 << 19))
