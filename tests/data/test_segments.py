import types
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pref_jax.config import TEMPLATE
from pref_jax.data.segments import SEGMENTS, TRUNCATIONS, Form, Layout, cut, kept_lengths
from pref_jax.errors import InputError

SINGLE = (0.1, 0.45, 0.45)
PARALLEL = (0.1, 0.9)


@pytest.mark.parametrize(
    ("name", "max_length", "budget", "limits"),
    [
        ("single", 512, SINGLE, (50, 228, 228)),
        ("parallel", 512, PARALLEL, (50, 458)),
        ("response", 512, PARALLEL, (50, 458)),
        ("single", 256, SINGLE, (25, 113, 113)),
        # 0.29 * 100 is 28.999999999999996 in floating point.
        ("parallel", 103, (0.29, 0.57), (29, 57)),
    ],
)
def test_limits_are_the_floor_of_the_typed_share(name, max_length, budget, limits):
    assert Layout(name, max_length, budget).limits == limits


def test_the_papers_presets_leave_unused_room_unused():
    layout = Layout("single", 512, SINGLE)
    kept = kept_lengths(np.array([[3, 1000, 5], [1000, 0, 229]]), layout)
    assert kept.tolist() == [[3, 228, 5], [50, 0, 228]]


@st.composite
def layouts(draw, reuse):
    name = draw(st.sampled_from(sorted(SEGMENTS)))
    weights = draw(st.lists(st.integers(1, 9), min_size=(n := len(SEGMENTS[name])), max_size=n))
    total = max(sum(weights), 10)
    budget = tuple(weight / total // 0.01 * 0.01 or 0.01 for weight in weights)
    template = TEMPLATE if name == "decoder" else None
    return Layout(name, draw(st.integers(120, 600)), budget, reuse, "head", template)


def slow_kept(lengths, layout):
    """The rule in words: shares first; then, again and again, the rest by shares of the needy."""
    shares = [Fraction(max(1, round(share * 10**6)), 10**6) for share in layout.budget]
    kept = [min(length, limit) for length, limit in zip(lengths, layout.limits, strict=True)]
    while layout.reuse_unused:
        spare = layout.room - sum(kept)
        needy = [i for i, length in enumerate(lengths) if kept[i] < length]
        total = sum(shares[i] for i in needy)
        given = {i: min(int(spare * shares[i] / total), lengths[i] - kept[i]) for i in needy}
        if not any(given.values()):
            break
        for i, count in given.items():
            kept[i] += count
    return kept


@settings(max_examples=150, deadline=None)
@given(st.booleans().flatmap(layouts), st.data())
def test_kept_lengths_follow_the_rule(layout, data):
    segments = len(layout.budget)
    rows = data.draw(
        st.lists(st.lists(st.integers(0, 900), min_size=segments, max_size=segments), max_size=6)
    )
    lengths = np.array(rows, np.int32).reshape(-1, segments)
    kept = kept_lengths(lengths, layout)
    assert kept.tolist() == [slow_kept(row, layout) for row in lengths.tolist()]
    assert (kept <= lengths).all()
    assert (kept.sum(axis=1) <= layout.room).all()
    if layout.reuse_unused:
        # Nothing is cut where there was room for it, up to what cannot be divided.
        spare = layout.room - kept.sum(axis=1)
        assert (spare[(kept < lengths).any(axis=1)] < segments).all()
        assert (kept == lengths)[lengths.sum(axis=1) <= layout.room].all()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 900), min_size=3, max_size=3), st.booleans())
def test_swapping_the_responses_swaps_what_is_kept(lengths, reuse):
    layout = Layout("single", 255, SINGLE, reuse)
    prompt, a, b = lengths
    kept = kept_lengths(np.array([[prompt, a, b], [prompt, b, a]]), layout)
    assert kept[0].tolist() == kept[1][[0, 2, 1]].tolist()


@pytest.mark.parametrize("truncation", TRUNCATIONS)
@pytest.mark.parametrize("kept", [0, 1, 2, 5, 6, 7, 9])
def test_cut_keeps_the_named_part(truncation, kept):
    ids = np.arange(7, dtype=np.int32)
    whole = list(range(7))
    expected = {
        "head": whole[:kept],
        "turns": whole[:kept],  # of one turn
        "tail": whole[max(0, 7 - kept) :],
        "head_tail": whole if kept >= 7 else whole[: kept - kept // 2] + whole[7 - kept // 2 :],
    }[truncation]
    assert cut(ids, kept, truncation).tolist() == expected


@pytest.mark.parametrize("kept", [0, 1, 2, 3, 5, 6, 7, 9])
def test_a_marker_stands_where_ids_are_missing_and_takes_their_room(kept):
    ids, marker = np.arange(7, dtype=np.int32), np.array([90, 91], np.int32)
    for truncation in TRUNCATIONS:
        found = cut(ids, kept, truncation, marker).tolist()
        assert len(found) == min(kept, 7)
        if kept in (0, 1, 2) or kept >= 7:  # no room for it, or nothing is missing
            assert found == cut(ids, kept, truncation).tolist()
            continue
        at = found.index(90)
        assert found[at : at + 2] == [90, 91]
        before, after = found[:at], found[at + 2 :]
        assert before + after == cut(ids, kept - 2, truncation).tolist()
        assert before == list(range(at)) and after == list(range(7 - len(after), 7))
        sides = {"head": not after, "turns": not after, "tail": not before}
        assert sides.get(truncation, len(before) >= len(after))


@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=6),
    st.integers(0, 60),
    st.sampled_from([[], [-1], [-1, -2]]),
)
def test_each_turn_keeps_its_beginning_in_the_same_room(lengths, kept, marker):
    ids, ends = np.arange(sum(lengths)), np.cumsum(lengths)[:-1]
    found = cut(ids, kept, "turns", np.array(marker, int), ends)
    assert len(found) == min(kept, len(ids))
    if kept >= len(ids):
        return
    # Without a marker the room of each turn can be read off.
    plain = cut(ids, kept, "turns", ends=ends).tolist()
    rooms = []
    for turn in np.split(ids, ends):
        seen = [number for number in plain if number in turn]
        assert seen == turn[: len(seen)].tolist()
        rooms.append(len(seen))
    assert sum(rooms) == kept
    for room, length in zip(rooms, lengths, strict=True):
        assert room == length or room >= max(kept // len(lengths), max(rooms) - len(lengths))
    # A marker takes the last places of each turn that is cut and has more of them.
    at = 0
    for room, length, turn in zip(rooms, lengths, np.split(ids, ends), strict=True):
        part, at = found[at : at + room].tolist(), at + room
        if room == length or room <= len(marker):
            assert part == turn[:room].tolist()
        else:
            assert part == [*turn[: room - len(marker)], *marker]


@pytest.mark.parametrize("ends", [[5, 3], [3, 99], [0, 0], [7]])
def test_ends_that_are_no_ends_lose_and_double_nothing(ends):
    found = cut(np.arange(7), 6, "turns", ends=ends).tolist()
    assert len(found) == 6 and found == sorted(set(found))


def test_a_marker_has_to_be_something():
    for marker in ("", " ", "\n"):
        with pytest.raises(InputError, match=r"input\.marker"):
            Layout("single", 512, SINGLE, marker=marker)
    tokenizer = types.SimpleNamespace(
        cls_id=101, sep_id=102, encode=lambda texts: [np.zeros(0, np.int32) for _ in texts]
    )
    with pytest.raises(InputError, match="no token for it"):
        Form(Layout("single", 512, SINGLE, marker="\u200b"), tokenizer)


def test_join_puts_separators_and_types():
    tokenizer = types.SimpleNamespace(cls_id=101, sep_id=102)
    form = Form(Layout("single", 512, SINGLE), tokenizer)
    ids, type_start = form.join([np.array([5, 6]), np.array([7]), np.array([], int)])
    assert ids.tolist() == [101, 5, 6, 102, 7, 102, 102]
    assert ids.dtype == np.int32
    assert type_start == 4
    form = Form(Layout("parallel", 512, PARALLEL), tokenizer)
    ids, type_start = form.join([np.array([], int), np.array([7])])
    assert (ids.tolist(), type_start) == ([101, 102, 7, 102], 2)


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("layout", ("both", 512, SINGLE)),
        ("budget", ("single", 512, PARALLEL)),
        ("budget", ("parallel", 512, SINGLE)),
        ("budget", ("single", 512, ())),
        ("budget", ("single", 512, (0.1, 0.5, 0.5))),
        ("budget", ("single", 512, (0.0, 0.5, 0.5))),
        ("budget", ("single", 512, (-0.1, 0.5, 0.5))),
        ("budget", ("single", 512, (float("nan"), 0.5, 0.5))),
        ("budget", ("single", 512, (float("inf"), 0.5, 0.5))),
        ("budget", ("single", 512, ("0.1", 0.45, 0.45))),
        ("max_length", ("single", 13, SINGLE)),
        ("max_length", ("single", -1, SINGLE)),
        ("max_length", ("single", 51.2, SINGLE)),
        ("max_length", ("single", True, SINGLE)),
        ("truncation", ("single", 512, SINGLE, False, "middle")),
        ("reuse_unused", ("single", 512, SINGLE, "no")),
    ],
)
def test_impossible_layouts_are_refused_by_field(field, arguments):
    with pytest.raises(InputError, match=rf"^--config\.input\.{field}: "):
        Layout(*arguments)


def test_the_least_length_is_named():
    with pytest.raises(InputError, match="give at least 14"):
        Layout("single", 13, SINGLE)
    assert min(Layout("single", 14, SINGLE).limits) == 1


def test_shares_that_no_length_can_serve_are_named():
    with pytest.raises(InputError, match=r"--config\.input\.budget: .* 100,003, .*larger shares"):
        Layout("parallel", 512, (1e-5, 0.9))
