"""Layers of equal windows share a block table; all groups share one pool of pages."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.groups import layer_groups
from core.layout import KVLayout, LayerShape


def layout(*windows: int | None, kv_heads: tuple[int, ...] = ()) -> KVLayout:
    heads = kv_heads or (2,) * len(windows)
    shapes = [LayerShape(count, 8, 8, window) for count, window in zip(heads, windows, strict=True)]
    return KVLayout.whole(layers=shapes, dtype="float32", block_size=4)


@pytest.mark.parametrize(
    ("windows", "expected"),
    [
        ([None, None], [((0, 1), None)]),
        ([7, 7], [((0, 1), 7)]),
        ([7, None, 7, None], [((0, 2), 7), ((1, 3), None)]),
        ([7, 7, 7, 7, 7, None], [((0,), 7), ((1,), 7), ((2,), 7), ((3,), 7), ((4,), 7), ((5,), None)]),
        ([None, 7, 7], [((0,), None), ((1,), 7), ((2,), 7)]),
        ([7, 7, 7, None, None], [((0, 1, 2), 7), ((3, 4), None)]),
        ([7, 9, None], [((0,), 7), ((1,), 9), ((2,), None)]),
    ],
)
def test_layers_are_grouped_by_window(windows: list[int | None], expected: list[tuple[tuple[int, ...], int | None]]) -> None:
    groups = layer_groups(layout(*windows)).groups
    assert [(group.layers, group.sliding_window) for group in groups] == expected


def test_layers_of_unlike_shapes_keep_everything_in_one_group() -> None:
    groups = layer_groups(layout(7, None, kv_heads=(1, 2)))
    assert not groups.windowed
    assert [group.layers for group in groups.groups] == [(0, 1)]


@given(st.lists(st.sampled_from([None, 3, 8]), min_size=1, max_size=40))
def test_every_layer_has_one_group_and_one_page_tensor_that_no_other_of_its_group_has(windows: list[int | None]) -> None:
    cut = layer_groups(layout(*windows))
    assert sorted(layer for group in cut.groups for layer in group.layers) == list(range(len(windows)))
    assert sorted(layer for layers in cut.page_layers for layer in layers) == list(range(len(windows)))
    for index, group in enumerate(cut.groups):
        assert {windows[layer] for layer in group.layers} == {group.sliding_window}
        assert all(cut.group_of(layer) == index for layer in group.layers)
    for layers in cut.page_layers:
        assert len({cut.group_of(layer) for layer in layers}) == len(layers)
