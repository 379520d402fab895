"""COCO annotation files: what is taken as meant, left out with a warning, refused with one clear line."""

import copy
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from annotations import HEIGHT, SQUARE, WIDTH, annotation, compressed_rle, dataset, square_mask, uncompressed_rle
from PIL import Image
from pycocotools import mask as mask_utils

from formats.coco import check_sizes, coco_paths, match_classes, read_annotations
from formats.images import DataError

TINY_COCO = Path(__file__).resolve().parents[2] / "shared" / "data" / "tiny_coco"
NAN, INFINITY = float("nan"), float("inf")


def write(folder, content, size=(WIDTH, HEIGHT)):
    """Write a data set's annotation file and black images; returns the arguments for read_annotations."""
    (folder / "images").mkdir()
    for i in (1, 2):
        Image.new("RGB", size).save(folder / "images" / f"{i}.png")
    path = folder / "instances.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path, folder / "images"


def read(arguments, warning=None, **options):
    """The data set as it was read, with exactly one warning that holds `warning`, or none."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = read_annotations(*arguments, **options)
    messages = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    assert len(messages) == (warning is not None), messages
    if warning:
        assert messages[0].startswith(f"{arguments[0]}: ") and "\n" not in messages[0]
        assert warning in messages[0]
    return found


def mask_of(annotation, height=HEIGHT, width=WIDTH):
    segmentation = annotation["segmentation"]
    if isinstance(segmentation, list):
        segmentation = mask_utils.merge(mask_utils.frPyObjects(segmentation, height, width))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return mask_utils.decode(segmentation)


# --- taken as meant


POINTS = [[x, y] for x, y in zip(SQUARE[0][::2], SQUARE[0][1::2], strict=True)]
FORMS = {
    "polygons": SQUARE,
    "polygon": SQUARE[0],
    "whole numbers": [[10, 5, 20, 5, 20, 15, 10, 15]],
    "points": POINTS,
    "polygons of points": [POINTS],
    "polygons of polygons": [SQUARE],
    "a contour of OpenCV": [[point] for point in POINTS],
    "contours of OpenCV": [[[point] for point in POINTS]],
    "RLE in a list": [compressed_rle(square_mask())],
    "an empty list beside it": [[], SQUARE[0]],
    "runs": uncompressed_rle(square_mask()),
    "runs as floats": {"size": [30.0, 40.0], "counts": [float(n) for n in uncompressed_rle(square_mask())["counts"]]},
    "compressed": compressed_rle(square_mask()),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_segmentation_is_the_same_mask(tmp_path, form):
    content = dataset([annotation(1, FORMS[form]), annotation(2, FORMS[form], area=None, bbox=None)])
    del content["annotations"][1]["area"], content["annotations"][1]["bbox"]
    for found in read(write(tmp_path, content))["annotations"]:
        assert np.array_equal(mask_of(found), square_mask())
        assert found["area"] == 100 and found["bbox"] == [10, 5, 10, 10]


def test_rle_with_many_runs_passes_the_check_and_decodes(tmp_path):
    mask = (np.random.default_rng(0).random((HEIGHT, WIDTH)) < 0.3).astype(np.uint8)
    mask[:, 20:] = 0  # one long run: several characters in the compressed form, and a large negative difference before
    forms = [uncompressed_rle(mask), compressed_rle(mask), compressed_rle(1 - mask)]
    content = dataset([annotation(i, form, bbox=None) for i, form in enumerate(forms)])
    for i, found in enumerate(read(write(tmp_path, content))["annotations"]):
        assert np.array_equal(mask_of(found), mask if i < 2 else 1 - mask)


def test_several_polygons_are_one_mask_and_a_box_within_the_image(tmp_path):
    second = [30.0, 20.0, 44.0, 20.0, 44.0, 24.0, 30.0, 24.0]  # four columns beyond the edge
    [found] = read(write(tmp_path, dataset([annotation(1, [*SQUARE, second], bbox=[], area=NAN)])))["annotations"]
    assert mask_of(found).sum() == found["area"] == 140 and found["bbox"] == [10, 5, 30, 19]


def test_a_figure_of_eight_is_no_line(tmp_path):
    eight = [[5.0, 5.0, 15.0, 15.0, 15.0, 5.0, 5.0, 15.0]]  # its halves run in opposite directions: no signed area
    [found] = read(write(tmp_path, dataset([annotation(1, eight, bbox=None, area=None)])))["annotations"]
    assert 40 < found["area"] < 60 and found["bbox"] == [5, 5, 10, 10]


@pytest.mark.parametrize("ids", [[0, 1, 2], [None] * 3, ["a", "b", "c"], [5, 5, 5], [3, "x", None], [2.5, [], True]])
def test_annotations_are_numbered_from_1_whatever_their_ids(tmp_path, ids):
    content = dataset([annotation(number, area=area) for area, number in enumerate(ids, start=1)])
    content["annotations"] = [{k: v for k, v in a.items() if v is not None} for a in content["annotations"]]
    assert [a["id"] for a in read(write(tmp_path, content))["annotations"]] == [1, 2, 3]


@pytest.mark.parametrize("one, two", [(1, "1"), ("1", 1), (1.0, 1), ("1.0", 1), ("a", "a"), (2**60, 2**60), ("007", 7)])
def test_image_ids_mean_the_same_in_every_form(tmp_path, one, two):
    content = dataset([annotation(1, image_id=two), annotation(2, image_id=2)])
    content["images"][0]["id"] = one
    found = read(write(tmp_path, content))
    ids = [image["id"] for image in found["images"]]
    assert [a["image_id"] for a in found["annotations"]] == ids and len(set(ids)) == 2
    assert all(type(i) is int and i < 2**53 for i in ids) and ids[1] == 2
    assert [image["file_id"] for image in found["images"]] == [one, 2]


def test_categories_have_ids_in_any_form_too(tmp_path):
    for folder, ids in {"numbers": ("90", 7.0), "texts": ("dog", "cat")}.items():
        (tmp_path / folder).mkdir()
        content = dataset([annotation(1, category_id=ids[0]), annotation(2, category_id=ids[1])])
        for category, number in zip(content["categories"], ids, strict=True):
            category["id"] = number
        found = read(write(tmp_path / folder, content))
        used = [a["category_id"] for a in found["annotations"]]
        assert used == [c["id"] for c in found["categories"]] == ([90, 7] if folder == "numbers" else [1, 2])
        assert [c["file_id"] for c in found["categories"]] == list(ids)


FLAGS = [
    (None, None, 0),
    (0, 0, 0),
    (1, None, 1),
    (True, None, 1),
    (0.0, False, 0),
    ("1", 0, 1),
    (0, 1, 1),
    (0, "1", 1),
]


def test_iscrowd_and_ignore_in_every_form(tmp_path):
    annotations = [annotation(1, iscrowd=crowd, ignore=ignore) for crowd, ignore, _ in FLAGS]
    annotations = [{k: v for k, v in a.items() if v is not None} for a in annotations]
    found = read(write(tmp_path, dataset(annotations)))["annotations"]
    assert [a["iscrowd"] for a in found] == [expected for *_, expected in FLAGS]


@pytest.mark.parametrize("height, width", [(30.0, "40"), (None, None), (-1, -1), (None, 40), (30, -1), (0, "0")])
def test_sizes_in_every_form_and_from_the_file(tmp_path, height, width):
    content = dataset([annotation(1)])
    content["images"][0] |= {"height": height, "width": width}
    image = read(write(tmp_path, content))["images"][0]
    assert (image["height"], image["width"]) == (HEIGHT, WIDTH)
    assert type(image["height"]) is type(image["width"]) is int


def test_a_height_without_a_width_must_fit_the_file(tmp_path):
    content = dataset([annotation(1)])
    del content["images"][1]["width"]
    content["images"][1]["height"] = 60
    with pytest.raises(DataError, match=r"2\.png: the image is 40x30, its annotation file says \?x60"):
        read_annotations(*write(tmp_path, content))


NAMES = {"1.png": "1.png", "images\\1.png": "1.png", "C:\\data\\images\\1.png": "1.png", "/home/me/1.png": "1.png",
         "1.png?signed=ab#c": "1.png", "/data/local-files/?d=1.png": "1.png",
         "sub/3.png": "sub/3.png", "sub\\3.png": "sub/3.png", "train/sub/3.png": "sub/3.png"}  # fmt: skip


@pytest.mark.parametrize("given", NAMES)
@pytest.mark.parametrize("field", ["file_name", "coco_url"])
def test_images_are_found_by_as_much_of_their_path_as_is_there(tmp_path, given, field):
    content = dataset([annotation(1)])
    del content["images"][0]["file_name"]
    content["images"][0][field] = given if field == "file_name" else "http://a.b/c/" + given
    arguments = write(tmp_path, content)
    (tmp_path / "images" / "sub").mkdir()
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "images" / "sub" / "3.png")
    assert read(arguments)["images"][0]["file_name"] == NAMES[given]


COMPOSED, DECOMPOSED = "Gr\u00f6\u00dfe 1.png", "Gro\u0308\u00dfe 1.png"  # a person sees the same
SPELLINGS = {  # what the file says: what is in the folder
    COMPOSED: DECOMPOSED,
    "data\\" + DECOMPOSED: COMPOSED,
    "Gr%C3%B6%C3%9Fe%201.png": DECOMPOSED,
    "http://a.b/upload/o/images%2Fa%20b.png": "a b.png",
    "a b+c.png": "a%20b+c.png",
    "\uc0ac\uc9c4/IMG_1.JPG": "\uc0ac\uc9c4/img_1.jpg",
    "Photos/1.PNG": "photos/1.Png",
    "100% (%zz).png": "100% (%ZZ).PNG",
    " a b.png\n": "a b.png",
}


@pytest.mark.parametrize("given", SPELLINGS)
def test_a_file_is_found_under_the_name_that_a_person_sees(tmp_path, given):
    arguments = write(tmp_path, content := dataset([annotation(1)]))
    content["images"][0]["file_name"] = given
    arguments[0].write_text(json.dumps(content))
    path = arguments[1] / SPELLINGS[given]
    path.parent.mkdir(exist_ok=True)
    (arguments[1] / "1.png").rename(path)
    assert read(arguments)["images"][0]["file_name"] == SPELLINGS[given]
    twin = path.with_suffix(path.suffix[:2].lower() + path.suffix[2:].upper())
    twin.write_bytes(path.read_bytes())
    with pytest.raises(DataError, match=r"could be '.*', '.*' in .*images; give it the name of one"):
        read_annotations(*arguments)
    content["images"][0]["file_name"] = SPELLINGS[given]  # in this very spelling there is one
    arguments[0].write_text(json.dumps(content))
    assert read(arguments)["images"][0]["file_name"] == SPELLINGS[given]


def test_a_name_that_is_not_there_is_shown_with_the_nearest_that_is(tmp_path):
    content = dataset([annotation(1)])
    content["images"][1]["file_name"] = "train/2 .png"
    arguments = write(tmp_path, content)
    for i in range(3000):
        (arguments[1] / f"1{i}.txt").touch()
    with pytest.raises(
        DataError, match=r"'train/2 \.png', the nearest name there is '2\.png'; check the image folder$"
    ):
        read_annotations(*arguments)
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"2 of 2 images are not in .*none, .* '1\.png', the folder is empty; check"):
        read_annotations(arguments[0], tmp_path / "none")


def test_ids_of_other_spellings_in_one_file_are_other_ids(tmp_path):
    content = dataset([annotation(number, image_id=i) for number, i in enumerate(("01", "1", 1, 1.0, "001"))])
    content["images"][0]["id"], content["images"][1]["id"] = "01", 1
    content["categories"][0]["id"], content["categories"][1]["id"] = "07", "007"
    for number, category in enumerate(("07", "007", "07", "07", "07")):
        content["annotations"][number]["category_id"] = category
    found = read(write(tmp_path, content), "1 annotation(s) of images that are not in the file left out; the first is "
                 "annotation 4: unknown image id '001', expected one of '01', 1")  # fmt: skip
    assert [a["image_id"] for a in found["annotations"]] == [1, 2, 2, 2]
    assert [a["category_id"] for a in found["annotations"]] == [1, 2, 1, 1]
    assert [image["file_id"] for image in found["images"]] == ["01", 1]
    (tmp_path / "instances.json").write_text(json.dumps(content | {"annotations": [annotation(9, image_id=1)]}))
    with pytest.raises(DataError, match="annotation 9: unknown category id 7, expected one of '07', '007'"):
        read_annotations(tmp_path / "instances.json", tmp_path / "images")


def test_a_text_means_no_other_text(tmp_path):
    content = dataset([annotation(1, image_id="a"), annotation(2, image_id="b"), annotation(3, image_id=2)])
    content["images"][0]["id"] = "a"  # the only text
    content["categories"][0]["id"] = "a"
    path, images = write(tmp_path, content)
    found = read(
        (path, images), "1 annotation(s) of images that are not in the file left out; the first is annotation 2"
    )
    assert [a["image_id"] for a in found["annotations"]] == [1, 2]
    path.write_text(json.dumps(content | {"annotations": [annotation(1, image_id=2, category_id="b")]}))
    with pytest.raises(DataError, match="annotation 1: unknown category id 'b', expected one of 'a', 7"):
        read_annotations(path, images)


def test_class_names_are_texts_of_any_kind(tmp_path):
    names = ["", 7, 2.5, " ", "a\nb", "\ub108\ud2b8", "Gro\u0308\u00dfe"]
    content = dataset([annotation(i, category_id=i) for i in range(len(names))])
    content["categories"] = [{"id": i, "name": name} for i, name in enumerate(names)]
    arguments = write(tmp_path, content)
    expected = ["", "7", "2.5", " ", "a\nb", "\ub108\ud2b8", "Gr\u00f6\u00dfe"]  # composed or not: one class
    found = [category["name"] for category in read(arguments)["categories"]]
    assert found == expected and match_classes(expected[::-1], found) == [6, 5, 4, 3, 2, 1, 0]
    for twins in (("", ""), (7, "7"), (COMPOSED, DECOMPOSED)):
        for category, name in zip(content["categories"], twins, strict=False):
            category["name"] = name
        arguments[0].write_text(json.dumps(content))
        with pytest.raises(DataError, match="categories 0 and 1 both have the name") as caught:
            read_annotations(*arguments)
        assert "\n" not in str(caught.value)


def test_encodings_of_json(tmp_path):
    path, images = write(tmp_path, "")
    text = json.dumps(dataset([annotation(1)]))
    for encoding in ("utf-8-sig", "utf-16", "utf-8"):
        path.write_bytes(text.encode(encoding))
        assert len(read((path, images))["annotations"]) == 1
    path.write_bytes(text.replace("dog", "hund\xfc").encode("cp1252"))
    with pytest.raises(DataError, match=r"instances\.json: is not JSON \(.*byte 0xfc .*; give .*, in UTF-8$"):
        read_annotations(path, images)


def test_a_file_without_annotations_on_request(tmp_path):
    arguments = write(tmp_path, "")
    for content in (dataset([]), dataset(None), {k: v for k, v in dataset([]).items() if k != "annotations"}):
        arguments[0].write_text(json.dumps(content))
        found = read(arguments, need_annotations=False)
        assert len(found["images"]) == 2 and found["annotations"] == []
        with pytest.raises(DataError, match="annotations"):
            read_annotations(*arguments)


# --- left out with a warning


EMPTY = {
    "two points": ({"segmentation": [[1, 2, 3, 4]]}, "polygon [1.0, 2.0, 3.0, 4.0] has no area"),
    "one point": ({"segmentation": [[1, 2]]}, "polygon [1.0, 2.0] has no area"),
    "a flat line": ({"segmentation": [1, 2, 3, 4]}, "has no area"),
    "three points, two of them equal": ({"segmentation": [[1, 2, 30, 4, 1, 2]]}, "has no area"),
    "points on a line": ({"segmentation": [[1, 1, 2, 2, 3, 3, 4, 4]]}, "expected three points or more"),
    "no polygon": ({"segmentation": []}, "no segmentation"),
    "an empty polygon": ({"segmentation": [[]]}, "no segmentation"),
    "null": ({"segmentation": None}, "no segmentation"),
    "an empty object": ({"segmentation": {}}, "no segmentation"),
    "a contour of OpenCV of two points": ({"segmentation": [[[[1, 2]], [[3, 4]]]]}, "has no area"),
    "RLE without a pixel": ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": [1200]}}, "RLE without a pixel"),
    "beside the image": ({"segmentation": [[50, 5, 60, 5, 60, 9]]}, "outside its 40x30 image (x0, y0, x1, y1 = 50, 5"),
    "box without width": ({"bbox": [10, 5, 0, 10]}, "box [10, 5, 0, 10] (x, y, width, height) has no area"),
    "box without height": ({"bbox": [10, 5, 10, 0.0]}, "has no area"),
    "box with negative width": ({"bbox": [10, 5, -1, 10]}, "has no area"),
    "box with NaN": ({"bbox": [10, 5, NAN, 10]}, "has no area"),
    "box with infinity": ({"bbox": [10, 5, INFINITY, 10]}, "has no area"),
    "another image": ({"image_id": 99}, "unknown image id 99, expected one of 1, 2"),
}  # fmt: skip


@pytest.mark.parametrize("case", EMPTY)
def test_single_annotations_are_left_out_and_counted(tmp_path, case):
    change, why = EMPTY[case]
    useless = {"area": [0], "iscrowd": "maybe", "category_id": None, "bbox": "none"}  # which does not matter then
    bad = [annotation(12) | change, annotation(14) | (useless | change if "box" not in case else change)]
    content = dataset([annotation(11), bad[0], annotation(13, area=99), bad[1]])
    arguments = write(tmp_path, content)
    with pytest.warns(UserWarning, match=r": 2 .*left out; the first is annotation 12: "):
        found = read_annotations(*arguments)
    assert [(a["id"], a["area"]) for a in found["annotations"]] == [(1, 100), (2, 99)]
    read(arguments, warning=why)
    arguments[0].write_text(json.dumps(dataset(bad)))
    with pytest.raises(DataError) as caught:  # nothing is left
        read_annotations(*arguments)
    assert why in str(caught.value) and "no annotation is left" in str(caught.value)
    assert str(caught.value).startswith(f"{arguments[0]}: ") and "\n" not in str(caught.value)


def test_a_polygon_without_area_among_others_of_its_instance(tmp_path):
    content = dataset([annotation(11), annotation(12, [[1, 2, 3, 4], *SQUARE, [7, 7, 8, 8, 9, 9]])])
    found = read(write(tmp_path, content), "1 annotation(s) with polygons that have no area, which are left out; the")
    assert len(found["annotations"]) == 2 and len(found["annotations"][1]["segmentation"]) == 1
    assert np.array_equal(mask_of(found["annotations"][1]), square_mask())


def test_equal_entries_are_taken_once(tmp_path):
    content = dataset([annotation(1)])
    content["images"].append(content["images"][0] | {"id": "1", "height": 30.0, "width": "40", "license": 3})
    arguments = write(tmp_path, content)
    assert [i["id"] for i in read(arguments, "1 of the images come twice and are taken once")["images"]] == [1, 2]
    content["images"].pop()
    content["categories"].append({"id": 90, "name": "dog", "supercategory": "animal"})
    arguments[0].write_text(json.dumps(content))
    assert [c["id"] for c in read(arguments, "1 of the categories come twice")["categories"]] == [90, 7]


def test_an_annotation_that_comes_twice_is_taken_once(tmp_path):
    crowd = annotation(2, compressed_rle(square_mask()), iscrowd=1)
    content = dataset([annotation(1), crowd, annotation(1.0), annotation(1), annotation(1, image_id=2), crowd])
    found = read(write(tmp_path, content), "3 annotation(s) come twice, equal in everything, and are taken once")
    assert [(a["id"], a["image_id"], a["iscrowd"]) for a in found["annotations"]] == [(1, 1, 0), (2, 1, 1), (3, 2, 0)]


def test_equal_annotations_of_two_ids_are_two_instances(tmp_path):
    assert len(read(write(tmp_path, dataset([annotation(1), annotation(2)])))["annotations"]) == 2


def test_an_unused_category_of_the_same_name_is_left_out(tmp_path):
    content = dataset([annotation(1)])
    for categories in ([(0, "cat"), (7, "cat")], [(7, "cat"), (9, "cat")]):
        content["categories"] = [{"id": number, "name": name} for number, name in categories]
        path = tmp_path / str(categories[0][0])
        path.mkdir()
        found = read(write(path, content), "1 categories without annotations, of the same name as another, left out")
        assert [c["id"] for c in found["categories"]] == [7]


def test_an_unused_category_of_its_own_name_stays(tmp_path):
    content = dataset([annotation(1)])
    content["categories"].insert(0, {"id": 0, "name": "animals", "supercategory": "none"})
    assert [c["id"] for c in read(write(tmp_path, content))["categories"]] == [0, 90, 7]


def test_a_box_that_does_not_fit_is_noticed_beside_a_polygon_without_area(tmp_path):
    both = annotation(12, [[1, 2, 3, 4], *SQUARE], bbox=[10, 5, 20, 15])
    with pytest.warns(UserWarning) as caught:
        read_annotations(*write(tmp_path, dataset([annotation(11), both])))
    assert len(caught) == 2 and "1 annotation(s) with polygons" in str(caught[0].message)
    assert "1 box(es) that do not fit" in str(caught[1].message)


def test_crowds_alone_are_noticed(tmp_path):
    read(write(tmp_path, dataset([annotation(1, iscrowd=1)])), "all annotations are crowds (iscrowd or ignore), which")


def test_boxes_of_corners_are_noticed(tmp_path):
    corners = annotation(12, bbox=[10, 5, 20, 15])
    content = dataset([annotation(11), corners, corners | {"segmentation": compressed_rle(square_mask())}])
    warning = "2 box(es) that do not fit their masks; bbox must be x, y, width, height; the first is annotation 12:"
    found = read(
        write(tmp_path, content), warning + " box [10, 5, 20, 15], but the mask has x0, y0, x1, y1 = 10, 5, 20, 15"
    )
    assert len(found["annotations"]) == 3


def test_rounded_boxes_and_boxes_of_masks_beyond_the_edge_fit(tmp_path):
    beyond = [[30.0, 5.0, 90.0, 5.0, 90.0, 25.0, 30.0, 25.0]]
    tiny = [[10.6, 5.6, 13.4, 5.6, 13.4, 8.4]]
    annotations = [annotation(1, bbox=[9, 4, 11, 12]), annotation(2, beyond, bbox=[30, 5, 10, 20])]
    annotations += [annotation(3, tiny, bbox=[11, 6, 2, 2]), annotation(4, tiny, bbox=[10, 5, 4, 4])]
    assert len(read(write(tmp_path, dataset(annotations)))["annotations"]) == 4


BEYOND = [-14, 13, 10, 13, 10, 43, -14, 43]  # of 40x30


@pytest.mark.parametrize("box", [[-14, 13, 24, 30], [0, 13, 10, 17], [-14.4, 12.6, 25, 31], None])
def test_a_box_of_the_whole_mask_or_of_the_part_in_the_image_fits(tmp_path, box):
    found = read(write(tmp_path, dataset([annotation(1, BEYOND, bbox=box)])))["annotations"]
    assert found[0]["bbox"] == (box or [0, 13, 10, 17])


@pytest.mark.parametrize("box", [[-14, 13, 10, 43], [0, 0, 10, 13], [0, 13, 24, 30], [300, 13, 24, 30]])
def test_a_misfit_is_shown_with_the_bounds_that_were_compared(tmp_path, box):
    what = f"box {box}, but the mask has x0, y0, x1, y1 = -14, 13, 10, 43"
    read(write(tmp_path, dataset([annotation(1, BEYOND, bbox=box)])), what)


@pytest.mark.parametrize("area", [None, 0, -1, NAN, INFINITY, [0], "large", "100", True, {}, 10**400])
def test_an_area_that_is_no_number_is_computed(tmp_path, area):
    assert read(write(tmp_path, dataset([annotation(1, area=area)])))["annotations"][0]["area"] == 100


def test_one_file_under_two_ids_is_noticed(tmp_path):
    content = dataset([annotation(1)])
    content["images"][1]["file_name"] = "1.png"
    assert (
        len(read(write(tmp_path, content), "1 images have the file of another one; the first is 1.png")["images"]) == 2
    )


def test_a_sound_file_gives_no_warning(tmp_path, capsys):
    read(write(tmp_path, dataset([annotation(1), annotation(2, compressed_rle(square_mask()))])))
    assert capsys.readouterr() == ("", "")


# --- refused


def changed(**values):
    return lambda content: content["annotations"][1].update(values)


def edited(table, index=-1, **values):
    """Change an entry; None removes the key."""

    def change(content):
        content[table][index] = {k: v for k, v in (content[table][index] | values).items() if v is not None}

    return change


def set_table(table, value):
    return lambda content: content.update({table: value})


def polygons(*segmentation):
    return changed(segmentation=list(segmentation))


RLE = compressed_rle(square_mask())
DAMAGE = {  # what is done to a good file -> what the error must say
    "no images": (set_table("images", []), "empty"),
    "no annotations": (set_table("annotations", []), "empty"),
    "no categories": (set_table("categories", []), "empty"),
    "images not a list": (set_table("images", {"1": {}}), "not in COCO format .'images' is {'1': {}}, expected a list"),
    "annotation not an object": (set_table("annotations", [1]), r"not in COCO format .* is \[1\], expected a list of"),
    "annotations missing": (lambda content: content.pop("annotations"), "not in COCO format"),
    "categories missing": (lambda content: content.pop("categories"), "'categories' is None, expected a list"),
    "unknown category": (changed(category_id=99), "annotation 12: unknown category id 99, expected one of 90, 7"),
    "fractional category": (changed(category_id=7.5), "annotation 12: category id 7.5, expected an integer or a te"),
    "no category": (changed(category_id=None), "annotation 12: category id None, expected an integer or a text"),
    "fractional image": (changed(image_id=1.5), "annotation 12: image id 1.5, expected an integer or a text"),
    "image id NaN": (changed(image_id=NAN), "annotation 12: image id nan, expected an integer or a text"),
    "image id true": (changed(image_id=True), "annotation 12: image id True, expected an integer or a text"),
    "odd coordinates": (polygons([1, 2, 3, 4, 5, 6, 7]), r"annotation 12: polygon with an odd number .*\(7\)"),
    "text coordinates": (polygons(list("abcdef")), r"annotation 12: segmentation .*'a', .* expected RLE or polygons"),
    "mixed nesting": (polygons([1, 2, 3, 4, 5, 6], 7), "annotation 12: segmentation .* expected RLE or polygons"),
    "null coordinate": (polygons([1, 2, 3, 4, 5, None]), "annotation 12: segmentation .*None.* expected RLE or polyg"),
    "NaN coordinates": (polygons([1, 2, 3, 4, 5, NAN]), "annotation 12: polygon with coordinates far .* 40x30 .*nan"),
    "coordinates of NaN alone": (polygons([NAN] * 6), "annotation 12: polygon with coordinates far .* 40x30 .*nan"),
    "infinite coordinates": (polygons([1, 2, 3, 4, 5, INFINITY]), "annotation 12: polygon with coordinates far .*inf"),
    "huge coordinates": (polygons([1, 2, 3, 4, 5, 1e300]), r"annotation 12: polygon with coordinates far.* 1e\+300"),
    "gigantic integer": (polygons([1, 2, 3, 4, 5, 10**400]), "annotation 12: segmentation .*1000.* expected RLE or"),
    "segmentation of text": (changed(segmentation="abc"), "annotation 12: segmentation 'abc', expected RLE or polyg"),
    "segmentation a number": (changed(segmentation=5), "annotation 12: segmentation 5, expected RLE or polygons"),
    "RLE of another size": (changed(segmentation=RLE | {"size": [40, 30]}), r"RLE of size \[40, 30\], .*\[30, 40\]"),
    "RLE without size": (changed(segmentation={"counts": RLE["counts"]}), "annotation 12: RLE of size None, but its"),
    "RLE without counts": (changed(segmentation={"size": RLE["size"]}), "annotation 12: RLE with malformed counts No"),
    "RLE text": (changed(segmentation=RLE | {"counts": "a b\n"}), "annotation 12: RLE with malformed counts 'a b"),
    "RLE not ASCII": (changed(segmentation=RLE | {"counts": "ä"}), "annotation 12: RLE with malformed counts 'ä'"),
    "RLE cut off": (changed(segmentation=RLE | {"counts": RLE["counts"][:-2]}), "annotation 12: RLE w"),
    "RLE ends in a number": (changed(segmentation=RLE | {"counts": RLE["counts"] + "o"}), "annotation 12: RLE with ma"),
    "counts too short": (changed(segmentation=RLE | {"counts": [5, 5]}), "12: RLE whose counts do not add up to the"),
    "counts empty": (changed(segmentation=RLE | {"counts": []}), "12: RLE whose counts do not add up to the 1200"),
    "counts negative": (changed(segmentation=RLE | {"counts": [-5, 1205]}), "annotation 12: RLE whose counts do not"),
    "counts of text": (changed(segmentation=RLE | {"counts": ["1"]}), r"12: RLE with malformed counts \['1'\], exp"),
    "counts fractional": (changed(segmentation=RLE | {"counts": [0.5, 1199.5]}), r"RLE with malformed counts \[0.5, 1"),
    "counts in a column": (changed(segmentation=RLE | {"counts": [[100], [20], [1080]]}), "RLE with malformed counts"),
    "counts in a row": (changed(segmentation=RLE | {"counts": [[100, 20, 1080]]}), "RLE with malformed counts"),
    "counts infinite": (changed(segmentation=RLE | {"counts": [INFINITY, 3]}), "RLE with malformed counts"),
    "counts with a huge sum": (changed(segmentation=RLE | {"counts": [2**62] * 4 + [1200]}), "12: RLE whose counts do"),
    "polygons of fractions": (polygons([0.2, 0.1, 0.5, 0.1, 0.5, 0.6]), "expected pixels, not fractions of the image"),
    "image id of no exact float": (changed(image_id=2.0**53), "annotation 12: image id 9.*, expected an integer"),
    "counts nested": (changed(segmentation=RLE | {"counts": [[1], [2, 3]]}), "RLE with malformed counts"),
    "box of three": (changed(bbox=[10, 5, 3]), r"annotation 12: box \[10, 5, 3\] .*is not a list of four numbers"),
    "box of text": (changed(bbox=list("abcd")), "annotation 12: box .*'a'.*is not a list of four numbers"),
    "box of digits": (changed(bbox=["1", "2", "3", "4"]), "annotation 12: box .*is not a list of four numbers"),
    "box a number": (changed(bbox=7), "annotation 12: box 7 .*is not a list of four numbers"),
    "iscrowd 2": (changed(iscrowd=2), "annotation 12: iscrowd 2, ignore None, expected 0 or 1"),
    "ignore of text": (changed(ignore="maybe"), "annotation 12: iscrowd 0, ignore 'maybe', expected 0 or 1"),
    "iscrowd a list": (changed(iscrowd=[]), r"annotation 12: iscrowd \[\], ignore None, expected 0 or 1"),
    "empty file name": (edited("images", file_name=""), "image 2 has file_name '', expected the name of an image"),
    "no file name": (edited("images", file_name=None), "image 2 has file_name None, expected the name of an image"),
    "file name a number": (edited("images", file_name=7), "image 2 has file_name 7, expected the name of an image"),
    "no image id": (edited("images", id=None), "entry 1 of 'images' has id None, expected an integer or a text"),
    "no category id": (edited("categories", id=None), "entry 1 of 'categories' has id None, expected an integer"),
    "no category name": (edited("categories", name=None), "category 7 has name None, expected a text"),
    "image width negative": (edited("images", width=-40), "image 2 has width -40, expected a positive integer"),
    "image width fractional": (edited("images", width=39.5), "image 2 has width 39.5, expected a positive integer"),
    "image width in words": (edited("images", width="forty"), "image 2 has width 'forty', expected a positive integer"),
    "image width infinite": (edited("images", width=INFINITY), "image 2 has width inf, expected a positive integer"),
    "two images of one id": (edited("images", id=1), "id 1 occurs twice in 'images', with file_name '1.png' and '2.p"),
    "two sizes of one image": (edited("images", id=1, file_name="1.png", width=30), "'images', with width 40 and 30"),
    "two categories of one id": (edited("categories", id=90), "id 90 occurs twice in 'categories', with name 'dog' a"),
    "image not there": (edited("images", file_name="x.png"), r"1 of 2 images are not in .*, the first is 'x\.png'"),
    "image in no folder": (edited("images", file_name="a/x.png"), r"1 of 2 images .*the first is 'a/x\.png'"),
    "name with a null": (edited("images", file_name="a\0.png"), "1 of 2 images are not in"),
    "two files of one name": (edited("images", file_name="b/1.png"), "images '1.png' and 'b/1.png' would both be"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_annotation_file_gives_one_clear_line(tmp_path, case):
    content = copy.deepcopy(dataset([annotation(11), annotation(12), annotation(13)]))
    DAMAGE[case][0](content)
    arguments = write(tmp_path, content)
    for need_annotations in (True, False):
        if not need_annotations and case in ("no annotations", "annotations missing"):
            continue
        with pytest.raises(DataError, match=DAMAGE[case][1]) as caught:
            read_annotations(*arguments, need_annotations)
        assert str(caught.value).startswith(f"{arguments[0]}: ") and "\n" not in str(caught.value)
        assert len(str(caught.value)) < 600


def test_fractions_of_the_image_are_no_pixels(tmp_path):
    fractions = [annotation(i, [[number / 40 for number in SQUARE[0]]], bbox=box) for i, box in ((1, None), (2, []))]
    with pytest.raises(
        DataError, match=r"no box goes beyond 1, the first is \[0\.25, 0\.125, 0\.25, 0\.25\], expected pixels"
    ):
        read_annotations(*write(tmp_path, dataset(fractions)))


def test_two_used_categories_of_one_name(tmp_path):
    content = dataset([annotation(1), annotation(2, category_id=90)])
    content["categories"][0]["name"] = "cat"
    with pytest.raises(DataError, match="categories 90 and 7 both have the name 'cat'"):
        read_annotations(*write(tmp_path, content))


@pytest.mark.parametrize(
    "content, message",
    [(b"", "not JSON"), (b'{"images": [', "not JSON"), (b"\0\0", "not JSON"), (b"[]", r"\[\], expected an object"),
     (b"1", "COCO"), (b"\x1f\x8b\x08\0\0\0", "not JSON"), (b"\xff\xfe\0", "not JSON"), (b"[" * 100_000, "nested|JSON")],
)  # fmt: skip
def test_file_that_is_not_coco(tmp_path, content, message):
    path, images = write(tmp_path, "")
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"instances\.json: .*{message}") as caught:
        read_annotations(path, images)
    assert "\n" not in str(caught.value)


PANOPTIC = {"image_id": 1, "file_name": "1.png", "segments_info": [{"id": 3, "category_id": 7}]}
KEYPOINTS = {"id": 1, "image_id": 1, "category_id": 7, "bbox": [1, 2, 3, 4], "keypoints": [1, 2, 2]}
OTHERS = {
    "panoptic": (dataset([PANOPTIC]), "holds panoptic segments, expected instances"),
    "keypoints": (dataset([KEYPOINTS]), "holds keypoints without masks, expected instances"),
    "empty masks": (dataset([KEYPOINTS | {"segmentation": []}]), "holds keypoints without masks"),
    "captions": ({"images": [], "annotations": [{"image_id": 1, "caption": "a cat"}]}, "holds captions, expected"),
    "results": (
        [annotation(1, score=0.5)],
        r"holds results \(detections with a score\), expected instances: images, cat",
    ),
    "box results": ([{"image_id": 1, "bbox": [1, 2, 3, 4], "score": 1}], "holds results"),
    "a list": ([annotation(1)], r"is not in COCO format \(\[\{.*, expected an object"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_files_of_other_kinds_are_named(tmp_path, case):
    content, message = OTHERS[case]
    arguments = write(tmp_path, content)
    for need_annotations in (True, False):
        with pytest.raises(DataError, match=rf"instances\.json: {message}") as caught:
            read_annotations(*arguments, need_annotations)
        assert "\n" not in str(caught.value)


def test_keypoints_beside_masks_are_instances(tmp_path):
    assert (
        len(read(write(tmp_path, dataset([annotation(1) | KEYPOINTS])), "box(es) that do not fit")["annotations"]) == 1
    )


def test_a_segmentation_nested_without_end(tmp_path):
    content = json.dumps(dataset([annotation(1, "DEEP")])).replace('"DEEP"', "[" * 900 + "]" * 900)
    with pytest.raises(DataError) as caught:
        read_annotations(*write(tmp_path, content))
    assert "\n" not in str(caught.value)


def test_several_faults_are_counted(tmp_path):
    content = dataset([annotation(i, category_id=99 if i > 2 else 7) for i in range(1, 6)])
    with pytest.raises(DataError, match=r"annotation 3: unknown category id 99, .* \(and 2 more annotations"):
        read_annotations(*write(tmp_path, content))


def test_missing_file_and_folder_are_named(tmp_path):
    path, images = write(tmp_path, dataset([annotation(1)]))
    with pytest.raises(DataError, match=r"nowhere\.json: cannot be read \(No such file"):
        read_annotations(tmp_path / "nowhere.json", images)
    with pytest.raises(DataError, match="nowhere is not a readable image folder"):
        read_annotations(path, tmp_path / "nowhere")
    with pytest.raises(DataError, match="cannot be read"):
        read_annotations(tmp_path, images)


# --- layouts, classes, sizes


def place(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")


def test_layout_of_coco(tmp_path):
    with pytest.raises(DataError, match=r"annotations/instances_val2017\.json .*nor valid/_annotations\.coco\.json"):
        coco_paths(tmp_path, "val")
    file = tmp_path / "annotations" / "instances_val2017.json"
    place(file)
    with pytest.raises(DataError, match="neither .*val2017 nor .*images/val2017 is a folder; put the val images there"):
        coco_paths(tmp_path, "val")
    for folder in (tmp_path / "images" / "val2017", tmp_path / "val2017"):
        folder.mkdir(parents=True)
        assert coco_paths(tmp_path, "val") == (file, folder)


def test_test_images_of_coco(tmp_path):
    (tmp_path / "test2017").mkdir()
    with pytest.raises(DataError, match=r"image_info_test2017\.json"):
        coco_paths(tmp_path, "test")
    for name in ("image_info_test2017", "image_info_test-dev2017", "instances_test2017"):
        place(tmp_path / "annotations" / f"{name}.json")
        assert coco_paths(tmp_path, "test") == (tmp_path / "annotations" / f"{name}.json", tmp_path / "test2017")


def test_layout_of_roboflow(tmp_path):
    for split, folder in {"train": "train", "val": "valid", "test": "test"}.items():
        place(tmp_path / folder / "_annotations.coco.json")
        assert coco_paths(tmp_path, split) == (tmp_path / folder / "_annotations.coco.json", tmp_path / folder)
    place(tmp_path / "annotations" / "instances_train2017.json")
    with pytest.raises(DataError, match="has both .*instances_train2017.json and .*train/_annotations.coco.json"):
        coco_paths(tmp_path, "train")


def test_a_roboflow_folder_is_read(tmp_path):
    content = dataset([annotation(0)])
    write(tmp_path, content)
    (tmp_path / "images").rename(tmp_path / "valid")
    (tmp_path / "instances.json").rename(tmp_path / "valid" / "_annotations.coco.json")
    assert [a["id"] for a in read(coco_paths(tmp_path, "val"))["annotations"]] == [1]


def test_classes_are_matched_by_name():
    assert match_classes(["a", "b", "c"], ["c", "a"]) == [2, 0]
    assert match_classes(["a", "b"], ["a", "b"]) == [0, 1]
    with pytest.raises(DataError, match="has the classes 'd', 'A', but the model was trained for 'a', 'b'; rename"):
        match_classes(["a", "b"], ["a", "d", "A"])


def test_sizes_are_compared_with_the_files(tmp_path):
    content = dataset([annotation(1)])
    path, images = write(tmp_path, content)
    check_sizes(read_annotations(path, images), images)
    for i in (1, 2):
        Image.new("RGB", (WIDTH, HEIGHT + i)).save(images / f"{i}.png")
    with pytest.raises(DataError) as caught:
        check_sizes(read_annotations(path, images), images)
    message = f"{images}/1.png: the image is 40x31, its annotation file says 40x30; correct the file or the annotations"
    assert str(caught.value) == message + " (and 1 more images)"


@pytest.mark.skipif(not TINY_COCO.is_dir(), reason="tiny_coco is not there")
def test_tiny_coco_is_read_unchanged():
    for split in ("train", "val"):
        arguments = coco_paths(TINY_COCO, split)
        found, original = read(arguments), json.loads(arguments[0].read_bytes())
        check_sizes(found, arguments[1])
        assert [i["id"] for i in found["images"]] == [i["id"] for i in original["images"]]
        assert len(found["annotations"]) == len(original["annotations"])
        for new, old in zip(found["annotations"], original["annotations"], strict=True):
            for key in ("image_id", "category_id", "bbox", "area", "iscrowd"):
                assert new[key] == old[key]
            if isinstance(old["segmentation"], list):
                assert [list(polygon) for polygon in new["segmentation"]] == old["segmentation"]
