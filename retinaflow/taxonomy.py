"""Classes, their names, and the hierarchy between them.

A :class:`Taxonomy` fixes which classes exist and in which order: class ``k`` is row ``k`` of the class-descriptions
file. Its :class:`Hierarchy` is a directed acyclic graph over class ids (MIDs): a class may have several parents, and
nodes that are not in the class list pass ancestry on too. ``Subcategory`` links make ancestors; ``Part`` links (a
Human arm is part of a Person) only serve the rule of the group ``people-clothing``.

Class groups are resolved in :mod:`retinaflow.data.class_groups`. Cost: the closure is computed once, K <= 600 takes
milliseconds.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retinaflow.detections import Detections
from retinaflow.errors import DataError, SettingError, shown

_UNWRITABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Control characters, line ends and halves of characters: they cannot be drawn, or stand in a row of a table."""


@dataclass(frozen=True)
class Hierarchy:
    """Links between class ids, each a (parent, child) pair, without the root of the published file."""

    subcategories: tuple[tuple[str, str], ...] = ()
    parts: tuple[tuple[str, str], ...] = ()
    nodes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        parents: dict[str, set[str]] = {}
        for parent, child in self.subcategories:
            parents.setdefault(child, set()).add(parent)
        try:
            tuple(TopologicalSorter(parents).static_order())
        except CycleError as error:
            raise DataError(
                f"the class hierarchy must not contain a cycle, but got {' > '.join(map(str, error.args[1]))}"
            ) from None

    @staticmethod
    def from_tree(tree: dict[str, Any]) -> Hierarchy:
        """The hierarchy in the nested JSON of Open Images, without its root node.

        Raises DataError when a node has no ``LabelName`` or when the links form a cycle.
        """
        if not isinstance(tree, dict):
            raise DataError(f"the hierarchy must be one node, but got a {type(tree).__name__}")
        links: dict[str, dict[tuple[str, str], None]] = {"Subcategory": {}, "Part": {}}
        nodes: dict[str, None] = {}
        pending: list[tuple[str | None, dict[str, Any]]] = [(None, tree)]
        while pending:
            name, node = pending.pop()
            for kind, found in links.items():
                children = node.get(kind) or []
                if not isinstance(children, list):
                    raise DataError(f"the {kind} of {name or 'the root'} must be a list, but got {shown(children)}")
                for child in children:
                    if not isinstance(child, dict) or not isinstance(child.get("LabelName"), str):
                        parent = name or "the root"
                        raise DataError(f"every {kind} of {parent} must have a LabelName, but got {shown(child)}")
                    nodes[child["LabelName"]] = None
                    if name is not None:
                        found[(name, child["LabelName"])] = None
                    pending.append((child["LabelName"], child))
        return Hierarchy(tuple(links["Subcategory"]), tuple(links["Part"]), tuple(nodes))

    def reachable(self, start: str, *, parts: bool = False) -> set[str]:
        """``start`` and every node below it by Subcategory links, and with ``parts`` by Part links too."""
        below = [self._subcategories_of, *([self._parts_of] if parts else [])]
        seen = {start}
        pending = [start]
        while pending:
            parent = pending.pop()
            for child in chain.from_iterable(children.get(parent, ()) for children in below):
                if child not in seen:
                    seen.add(child)
                    pending.append(child)
        return seen

    @cached_property
    def _subcategories_of(self) -> dict[str, list[str]]:
        return _children(self.subcategories)

    @cached_property
    def _parts_of(self) -> dict[str, list[str]]:
        return _children(self.parts)


def _children(links: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    children: dict[str, list[str]] = {}
    for parent, child in links:
        children.setdefault(parent, []).append(child)
    return children


@dataclass(frozen=True)
class Taxonomy:
    """``ids[K]`` (MIDs, unique) and display ``names[K]`` (not unique in Open Images), in class-index order.

    Example: with Vehicle > Car, ``is_ancestor[car, vehicle]`` is True and ``ancestors(car)`` is ``[vehicle]``.
    """

    ids: tuple[str, ...]
    names: tuple[str, ...]
    hierarchy: Hierarchy = field(default_factory=Hierarchy)

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.names):
            raise ValueError(f"a taxonomy needs one name per id, but got {len(self.ids)} ids, {len(self.names)} names")
        if len(set(self.ids)) != len(self.ids):
            twice = sorted(mid for mid, count in Counter(self.ids).items() if count > 1)
            raise DataError(f"class ids must be unique, but got twice: {', '.join(twice[:5])}")
        for text in (*self.ids, *self.names):
            if _UNWRITABLE.search(str(text)):
                raise DataError(
                    "the id and the name of a class must be one line of text, without line ends, tabs and control "
                    f"characters, but got {shown(text)}"
                )

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def index_of(self) -> dict[str, int]:
        """Class id -> class index."""
        return {mid: index for index, mid in enumerate(self.ids)}

    @cached_property
    def is_ancestor(self) -> NDArray[np.bool_]:
        """``[K, K]``: entry (c, a) is True if a is a strict ancestor of c. Unlisted nodes in between pass ancestry
        on."""
        result = np.zeros((len(self), len(self)), dtype=bool)
        for parent, mid in enumerate(self.ids):
            below = self.hierarchy.reachable(mid) - {mid}
            result[[self.index_of[child] for child in below if child in self.index_of], parent] = True
        return result

    def ancestors(self, index: int) -> NDArray[np.int64]:
        """Strict ancestors of a class, ascending class indices."""
        return np.flatnonzero(self.is_ancestor[index])

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Names for tables and figures: the display name, with the id where the name is not unique."""
        count = Counter(self.names)
        return tuple(
            f"{name} ({mid})" if count[name] > 1 else name for mid, name in zip(self.ids, self.names, strict=True)
        )

    def named(self, name: str) -> list[int]:
        """Class indices of a display name, ascending; case does not matter, and several classes may have one name."""
        return self._indices_of_name.get(name.casefold(), [])

    @cached_property
    def _indices_of_name(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for index, name in enumerate(self.names):
            found.setdefault(name.casefold(), []).append(index)
        return found

    def find(self, key: str) -> int:
        """Class index of an id or display name (case does not matter for names).

        Raises SettingError for an unknown key (with similar names) and for a name that several classes have (with their
        ids).
        """
        if key in self.index_of:
            return self.index_of[key]
        matches = self.named(key)
        if len(matches) == 1:
            return matches[0]
        if matches:
            ids = ", ".join(self.ids[index] for index in matches)
            raise SettingError(f"the class name {shown(key)} is not unique; use one of the ids {ids}")
        raise SettingError(f"no class has the id or name {shown(key)}{_near(key, self.names)}")

    def subset(self, indices: Sequence[int] | NDArray[np.integer]) -> Taxonomy:
        """The taxonomy of some classes, in the given order, with the whole hierarchy."""
        return Taxonomy(
            tuple(self.ids[index] for index in indices), tuple(self.names[index] for index in indices), self.hierarchy
        )

    def nearest_chosen(self, classes: Sequence[int] | NDArray[np.integer], *, upwards: bool) -> NDArray[np.bool_]:
        """``[K, G]``: the chosen classes that replace class c when only they are kept.

        A chosen class replaces itself. Another class is replaced by its nearest chosen ancestors (``upwards``: a box of
        a Taxi is a box of a Car) or descendants (where Vehicle is verified absent, Car is absent); the hierarchy leads
        from them to all the others.
        """
        chosen = np.asarray(classes, dtype=np.int64)
        related = self.is_ancestor if upwards else self.is_ancestor.T
        found = related[:, chosen].copy()
        # A more distant class follows from a nearer one that is related to it.
        further = related[np.ix_(chosen, chosen)].astype(np.int64)
        found &= (found.astype(np.int64) @ further) == 0
        found[chosen] = np.eye(len(chosen), dtype=bool)
        return found

    def to_document(self) -> dict[str, Any]:
        """Plain JSON values that :meth:`from_document` reads; equal taxonomies give equal documents."""
        return {
            "ids": list(self.ids),
            "names": list(self.names),
            "subcategories": sorted(map(list, self.hierarchy.subcategories)),
            "parts": sorted(map(list, self.hierarchy.parts)),
            "nodes": sorted(self.hierarchy.nodes),
        }

    @staticmethod
    def from_document(document: dict[str, Any]) -> Taxonomy:
        """The taxonomy of a document of :meth:`to_document`."""
        hierarchy = Hierarchy(
            tuple((parent, child) for parent, child in document["subcategories"]),
            tuple((parent, child) for parent, child in document["parts"]),
            tuple(document["nodes"]),
        )
        return Taxonomy(tuple(document["ids"]), tuple(document["names"]), hierarchy)


def expand_to_ancestors(detections: Detections, taxonomy: Taxonomy) -> Detections:
    """Each detection followed by copies of it for all ancestors of its class."""
    row, ancestor = np.nonzero(taxonomy.is_ancestor[detections.class_index])
    rows = np.concatenate([np.arange(len(detections)), row])
    classes = np.concatenate([detections.class_index, ancestor.astype(np.int32)])
    order = np.argsort(rows, kind="stable")
    copies = detections.take(rows[order])
    return Detections(copies.image_index, classes[order], copies.score, copies.boxes)


def _near(key: str, names: Iterable[str]) -> str:
    near = get_close_matches(key[:100], list(names), n=3)
    return f"; did you mean {' or '.join(near)}?" if near else ""
