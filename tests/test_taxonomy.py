"""Classes, names and the hierarchy between them."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path

import numpy as np
import pytest
from made_index import SHARED, make_taxonomy, parents_of, random_index

from retinaflow.data.class_files import read_taxonomy
from retinaflow.errors import DataError
from retinaflow.taxonomy import Hierarchy, Taxonomy

META = SHARED / "oid_meta"
needs_published_files = pytest.mark.skipif(not META.is_dir(), reason="the published class files are not here")


def node(name: str, *children: dict[str, object], parts: tuple[dict[str, object], ...] = ()) -> dict[str, object]:
    return {"LabelName": name, "Subcategory": list(children), "Part": list(parts)}


def test_no_classes_have_no_ancestors() -> None:
    empty = make_taxonomy(0)
    assert len(empty) == 0
    assert empty.is_ancestor.shape == (0, 0)
    assert empty.labels == ()


def test_ancestry_by_hand_goes_up_over_all_levels_and_over_both_parents() -> None:
    # 0 > 1 > 3 and 2 > 3: class 3 has the parents 1 and 2, and 0 above 1.
    taxonomy = make_taxonomy(5, [(0, 1), (1, 3), (2, 3)])
    assert taxonomy.ancestors(3).tolist() == [0, 1, 2]
    assert taxonomy.ancestors(1).tolist() == [0]
    assert not taxonomy.is_ancestor.diagonal().any(), "no class is its own ancestor"


@pytest.mark.parametrize("seed", range(5))
def test_ancestry_agrees_with_walking_up_link_by_link(seed: int) -> None:
    taxonomy = random_index(seed, images=0, classes=12).taxonomy
    above = parents_of(taxonomy)
    expected = np.array([[a in above[c] for a in range(12)] for c in range(12)])
    assert taxonomy.is_ancestor.any()
    np.testing.assert_array_equal(taxonomy.is_ancestor, expected)


def test_a_class_that_is_not_in_the_list_still_passes_ancestry_on() -> None:
    links = Hierarchy((("top", "unlisted"), ("unlisted", "leaf")))
    taxonomy = Taxonomy(("leaf", "top"), ("Leaf", "Top"), links)
    assert taxonomy.ancestors(0).tolist() == [1]


def test_the_root_of_the_published_tree_takes_no_part_and_parts_make_no_ancestors() -> None:
    hierarchy = Hierarchy.from_tree(node("root", node("animal", node("dog", parts=(node("paw"),))), node("car")))
    assert set(hierarchy.subcategories) == {("animal", "dog")}
    assert hierarchy.parts == (("dog", "paw"),)
    assert set(hierarchy.nodes) == {"animal", "dog", "car", "paw"}
    assert hierarchy.reachable("animal") == {"animal", "dog"}
    assert hierarchy.reachable("animal", parts=True) == {"animal", "dog", "paw"}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        pytest.param(node("root", node("a", node("b", node("a")))), "must not contain a cycle, but got", id="cycle"),
        pytest.param(node("root", node("a", node("a"))), "must not contain a cycle, but got a > a", id="own parent"),
        pytest.param(
            {"Subcategory": [{"Name": "x"}]}, "every Subcategory of the root must have a LabelName", id="nameless"
        ),
        pytest.param(node("root", node("a", "b")), "every Subcategory of a must have a LabelName", id="text"),  # type: ignore[arg-type]
        pytest.param([], "the hierarchy must be one node, but got a list", id="list"),
    ],
)
def test_a_faulty_tree_is_refused_with_its_rule(tree: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Hierarchy.from_tree(tree)


def test_a_tree_whose_children_are_null_is_a_leaf() -> None:
    assert Hierarchy.from_tree({"LabelName": "root", "Subcategory": None, "Part": None}) == Hierarchy()


@pytest.mark.parametrize("key", ["/m/2", "c2", "C2"])
def test_a_class_is_found_by_id_and_by_name_in_any_case(key: str) -> None:
    assert make_taxonomy(3).find(key) == 2


def test_a_name_that_two_classes_share_is_refused_with_their_ids() -> None:
    taxonomy = Taxonomy(("/m/1", "/m/2", "/m/3"), ("Mouse", "Cat", "Mouse"))
    with pytest.raises(ValueError, match="the class name 'mouse' is not unique; use one of the ids /m/1, /m/3"):
        taxonomy.find("mouse")
    assert taxonomy.labels == ("Mouse (/m/1)", "Cat", "Mouse (/m/3)")
    assert taxonomy.find("/m/3") == 2


def test_the_work_grows_with_the_classes_and_not_with_their_square() -> None:
    # A chain of 20 levels and 4,000 classes below it, in pairs of one name; quadratic work takes many seconds.
    ids = tuple(f"/m/{number}" for number in range(4_020))
    links = [(ids[number], ids[number + 1]) for number in range(20)] + [(ids[20], mid) for mid in ids[21:]]
    taxonomy = Taxonomy(ids, tuple(f"c{number // 2}" for number in range(len(ids))), Hierarchy(tuple(links), (), ids))
    began = time.process_time()
    assert taxonomy.ancestors(4_019).tolist() == list(range(21))
    assert taxonomy.labels[4_018:] == ("c2009 (/m/4018)", "c2009 (/m/4019)")
    assert time.process_time() - began < 1.5


def test_an_unknown_name_is_refused_with_near_ones() -> None:
    taxonomy = Taxonomy(("/m/1", "/m/2"), ("Person", "Car"))
    with pytest.raises(ValueError, match=r"no class has the id or name 'Persn'; did you mean Person\?"):
        taxonomy.find("Persn")


def test_ids_are_unique_and_every_id_has_a_name() -> None:
    with pytest.raises(ValueError, match="class ids must be unique, but got twice: /m/1"):
        Taxonomy(("/m/1", "/m/1"), ("a", "b"))
    with pytest.raises(ValueError, match="one name per id, but got 2 ids, 1 names"):
        Taxonomy(("/m/1", "/m/2"), ("a",))


def test_a_subset_keeps_the_given_order_and_ancestry_through_classes_left_out() -> None:
    taxonomy = make_taxonomy(4, [(0, 1), (1, 2)]).subset([2, 0])
    assert taxonomy.names == ("c2", "c0")
    assert taxonomy.ancestors(0).tolist() == [1]


def test_a_document_gives_the_same_taxonomy_back_and_survives_json() -> None:
    taxonomy = random_index(3).taxonomy
    document = json.loads(json.dumps(taxonomy.to_document()))
    again = Taxonomy.from_document(document)
    assert again.to_document() == taxonomy.to_document()
    np.testing.assert_array_equal(again.is_ancestor, taxonomy.is_ancestor)


@pytest.fixture(scope="module")
def published() -> Taxonomy:
    return read_taxonomy(META / "challenge-2018-class-descriptions-500.csv", META / "bbox_labels_600_hierarchy.json")


@needs_published_files
def test_the_challenge_has_500_classes_and_the_published_ancestry(published: Taxonomy) -> None:
    with (META / "derived-ancestors-500.csv").open(newline="", encoding="utf-8") as file:
        expected = {(row["LabelName"], row["AncestorLabelName"]) for row in csv.DictReader(file)}
    child, ancestor = np.nonzero(published.is_ancestor)
    found = {(published.ids[c], published.ids[a]) for c, a in zip(child, ancestor, strict=True)}
    assert len(published) == 500
    assert found == expected


@needs_published_files
@pytest.mark.parametrize("name", ["Bench", "Mouse"])
def test_two_published_names_are_ambiguous(name: str, published: Taxonomy) -> None:
    assert published.names.count(name) == 2
    with pytest.raises(ValueError, match=f"the class name '{name}' is not unique"):
        published.find(name)


CLASS_LISTS: dict[str, bytes] = {
    "plain": b"/m/a,A\n/m/b,B b\n",
    "header": b"LabelName,DisplayName\n/m/a,A\n/m/b,B b\n",
    "byte order mark and CRLF": b"\xef\xbb\xbf/m/a,A\r\n/m/b,B b\r\n",
    "quoted": b'"/m/a","A"\n/m/b,"B b"\n',
    "blank lines, spaces, no last newline": b"\n/m/a, A\n  \n/m/b ,B b",
    "more columns": b"LabelName,DisplayName,Boxes\n/m/a,A,4\n/m/b,B b,5\n",
}


@pytest.mark.parametrize("name", CLASS_LISTS)
def test_a_class_list_may_be_written_in_several_ways(name: str, tmp_path: Path) -> None:
    path = tmp_path / "classes.csv"
    path.write_bytes(CLASS_LISTS[name])
    taxonomy = read_taxonomy(path, None)
    assert taxonomy.ids == ("/m/a", "/m/b")
    assert taxonomy.names == ("A", "B b")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "the class list must name at least one class, but is empty", id="empty"),
        pytest.param(b" \n\n", "the class list must name at least one class, but is empty", id="blank"),
        pytest.param(
            b"LabelName,DisplayName\n", "the class list must name at least one class, but is empty", id="header"
        ),
        pytest.param(
            b"/m/a,A\n/m/b\n",
            r"classes.csv line 2: a class must have an id and a name \(/m/01g317,Person\), but got /m/b$",
            id="no name",
        ),
        pytest.param(b"/m/a,A\n,B\n", "classes.csv line 2: a class must have an id and a name", id="no id"),
        pytest.param(b"/m/a,A\n\n/m/b,\n", "classes.csv line 3: a class must have an id and a name", id="empty name"),
        pytest.param(
            b"/m/a,A\n/m/b,B,C\n", "classes.csv line 2: a row must have 2 fields, a name with a comma", id="comma"
        ),
        pytest.param(b"/m/a,A\n/m/a,B\n", "classes.csv: class ids must be unique, but got twice: /m/a", id="twice"),
        pytest.param(
            b'/m/a,"A\nB"\n', r"classes.csv: the id and the name of a class must be one line of text", id="lines"
        ),
        pytest.param(b"/m/a,A\tB\n", r"must be one line .*, but got 'A.tB'", id="tab"),
        pytest.param("/m/a,A\u2028B\n".encode(), "must be one line of text", id="line separator"),
        pytest.param(b"/m/\x1ba,A\n", "must be one line of text", id="control character"),
        pytest.param(b"/m/a,Caf\xe9\n", "classes.csv line 1: the file must be text in UTF-8", id="latin-1"),
    ],
)
def test_a_faulty_class_list_is_refused_with_its_rule(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "classes.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_taxonomy(path, None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"{oops", r"hierarchy\.json line 1: not a readable JSON file: Expecting prop", id="no JSON"),
        pytest.param(b"[]", r"hierarchy\.json: the hierarchy must be one node, but got a list", id="list"),
        pytest.param(
            json.dumps(node("r", node("a", node("b", node("a"))))).encode(),
            r"hierarchy\.json: the class hierarchy must not contain a cycle, but got",
            id="cycle",
        ),
    ],
)
def test_a_fault_of_the_hierarchy_names_the_hierarchy_file_and_not_the_class_list(
    content: bytes, message: str, tmp_path: Path
) -> None:
    folder = tmp_path
    (folder / "classes.csv").write_bytes(b"/m/a,A\n")
    (folder / "hierarchy.json").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_taxonomy(folder / "classes.csv", folder / "hierarchy.json")
    assert "classes.csv" not in str(caught.value)


def test_a_missing_class_list_or_hierarchy_names_the_setting(tmp_path: Path) -> None:
    folder = tmp_path
    with pytest.raises(DataError, match="give the class list as classes="):
        read_taxonomy(folder / "none.csv", None)
    (folder / "classes.csv").write_bytes(b"/m/a,A\n")
    with pytest.raises(DataError, match="give the hierarchy as hierarchy=, or hierarchy=none"):
        read_taxonomy(folder / "classes.csv", folder / "none.json")
