"""What people bring: small data sets with one oddity each, read right, and AP against a computation of its own."""

import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_utils
from test_eval import indexed, own_numbers

from eval import average_precision
from formats.coco import check_sizes, match_classes, read_annotations
from formats.images import UPRIGHT, DataError, image_size, read_image

WIDTH, HEIGHT = 64, 48
NUT, BOLT = (8, 10, 20, 16), (36, 20, 16, 20)  # x, y, width, height: a red rectangle and a green one in every image


def pixels(shift):
    image = np.full((HEIGHT, WIDTH, 3), 40, np.uint8)
    for (x, y, w, h), colour in ((NUT, (200, 30, 30)), (BOLT, (30, 180, 30))):
        image[y : y + h, x + shift : x + shift + w] = colour
    return image


def polygon(box):
    x, y, w, h = box
    return [x, y, x + w, y, x + w, y + h, x, y + h]


def content():
    images, annotations = [], []
    for i in range(1, 4):
        images.append({"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT})
        for category, (x, *rest) in ((1, NUT), (2, BOLT)):
            box = [x + i, *rest]
            annotations.append({"id": len(annotations) + 1, "image_id": i, "category_id": category, "iscrowd": 0,
                                "segmentation": [polygon(box)], "bbox": box, "area": box[2] * box[3]})  # fmt: skip
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "nut"}, {"id": 2, "name": "bolt"}],
    }


@pytest.fixture
def folder(tmp_path):
    for i in range(1, 4):
        Image.fromarray(pixels(i)).save(tmp_path / f"{i}.png")
    return tmp_path


def read(folder, data, **options):
    """What read_annotations makes of the data, and its warnings."""
    path = folder / "annotations.json"
    path.write_text(json.dumps(data))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = read_annotations(path, folder, **options)
    return found, [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]


def decode(segmentation):
    if isinstance(segmentation, list):
        segmentation = mask_utils.merge(mask_utils.frPyObjects(segmentation, HEIGHT, WIDTH))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return mask_utils.decode(segmentation).astype(bool)


def each(table, change):
    def apply(data):
        for entry in data[table]:
            change(entry)

    return apply


def without(table, *keys):
    return each(table, lambda entry: [entry.pop(key, None) for key in keys])


def mapped(table, key, function):
    return each(table, lambda entry: entry.update({key: function(entry[key])}))


def append(table, **values):
    return lambda data: data[table].append(data[table][0] | values)


def both(*changes):
    return lambda data: [change(data) for change in changes]


def coco_url(entry):
    entry["coco_url"] = "http://images.cocodataset.org/train2017/" + entry.pop("file_name")


SAME = {  # the oddity: what makes it of a plain data set; the result is the plain one
    "annotation ids from 0": mapped("annotations", "id", lambda i: i - 1),
    "no annotation ids": without("annotations", "id"),
    "annotation ids as text": mapped("annotations", "id", lambda i: f"a{i}"),
    "equal annotation ids": mapped("annotations", "id", lambda i: 1),
    "no iscrowd": without("annotations", "iscrowd"),
    "no area": without("annotations", "area"),
    "no box": without("annotations", "bbox"),
    "no box, area, iscrowd, id": without("annotations", "bbox", "area", "iscrowd", "id"),
    "flat polygons": mapped("annotations", "segmentation", lambda s: s[0]),
    "points": mapped("annotations", "segmentation", lambda s: np.reshape(s[0], (-1, 2)).tolist()),
    "lists of points": mapped("annotations", "segmentation", lambda s: [np.reshape(s[0], (-1, 2)).tolist()]),
    "image ids as text in annotations": mapped("annotations", "image_id", str),
    "image ids as text in images": mapped("images", "id", str),
    "ids as floats": both(
        mapped("annotations", "id", float),
        mapped("annotations", "category_id", float),
        mapped("annotations", "iscrowd", float),
        mapped("images", "id", float),
        mapped("images", "width", float),
    ),
    "category ids as text": mapped("categories", "id", str),
    "backslashes": mapped("images", "file_name", lambda name: "images\\" + name),
    "a folder of another machine": mapped("images", "file_name", lambda name: "D:/photos/" + name),
    "no file name": each("images", coco_url),
    "no size": without("images", "width", "height"),
    "size -1": each("images", lambda entry: entry.update(width=-1, height=-1)),
}
WARNED = {  # the same with one warning, that says this
    "two points among good ones": (append("annotations", segmentation=[[1, 1, 5, 5]]), "1 annotation(s) left out"),
    "a box without area": (append("annotations", bbox=[3, 4, 5, 0]), "1 annotation(s) left out"),
    "annotations of other images": (append("annotations", image_id=9), "1 annotation(s) of images that are not"),
    "an image twice": (append("images"), "1 of the images come twice"),
    "a thin polygon in an instance": (
        lambda data: data["annotations"][2]["segmentation"].append([1, 1, 5, 5]),
        "1 annotation(s) with polygons that have no area",
    ),
}


@pytest.mark.parametrize("case", [*SAME, *WARNED])
def test_the_plain_data_set_is_found(folder, case):
    plain, _ = read(folder, content())
    odd = content()
    change, warning = WARNED.get(case, (SAME.get(case), None))
    change(odd)
    found, said = read(folder, odd)
    assert len(said) == bool(warning) and all(warning in line and "\n" not in line for line in said)
    assert [(i["id"], i["file_name"], i["height"], i["width"]) for i in found["images"]] == [
        (i["id"], i["file_name"], i["height"], i["width"]) for i in plain["images"]
    ]
    assert [(c["id"], c["name"]) for c in found["categories"]] == [(1, "nut"), (2, "bolt")]
    assert len(found["annotations"]) == 6
    for new, old in zip(found["annotations"], plain["annotations"], strict=True):
        assert all(new[key] == old[key] for key in ("id", "image_id", "category_id", "iscrowd", "area", "bbox"))
        assert np.array_equal(decode(new["segmentation"]), decode(old["segmentation"]))
    check_sizes(found, folder)


REFUSED = {
    "an id of a half": (
        each("images", lambda entry: entry.update(id=entry["id"] + 0.5)),
        "id 1.5, expected an integer",
    ),
    "a width of a half": (
        each("images", lambda entry: entry.update(width=63.5)),
        "width 63.5, expected a positive int",
    ),
    "an image twice, unequal": (append("images", file_name="2.png"), "with file_name '1.png' and '2.png'"),
    "no instance left": (each("annotations", lambda entry: entry.update(segmentation=[[1, 1, 5, 5]])), "no annotation"),
    "only annotations of other images": (each("annotations", lambda entry: entry.update(image_id=9)), "no annotation"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_two_meanings_is_refused(folder, case):
    odd = content()
    REFUSED[case][0](odd)
    with pytest.raises(DataError) as caught:
        read(folder, odd)
    assert REFUSED[case][1] in str(caught.value) and "\n" not in str(caught.value)


def test_ignored_instances_are_crowds(folder):
    odd = content()
    odd["annotations"][3]["ignore"] = 1
    assert [a["iscrowd"] for a in read(folder, odd)[0]["annotations"]] == [0, 0, 0, 1, 0, 0]


def test_a_file_for_predictions_alone(folder):
    odd = content()
    del odd["annotations"]
    found, said = read(folder, odd, need_annotations=False)
    assert not said and len(found["images"]) == 3 and found["annotations"] == []


def test_a_class_that_val_lacks(folder):
    odd = content()
    odd["categories"] = [{"id": 5, "name": "bolt"}]
    odd["annotations"] = [a | {"category_id": 5} for a in odd["annotations"] if a["category_id"] == 2]
    [category] = read(folder, odd)[0]["categories"]
    assert match_classes(["nut", "bolt"], [category["name"]]) == [1]


def test_an_image_of_another_size_is_found_before_any_step(folder):
    odd = content()
    odd["images"][1]["height"] = 72
    found, _ = read(folder, odd)
    with pytest.raises(DataError, match=r"2\.png: the image is 64x48, its annotation file says 64x72; correct the"):
        check_sizes(found, folder)
    with pytest.raises(DataError, match=r"2\.png: the image is 64x48, its annotation file says 64x72; correct the"):
        read_image(folder / "2.png", (72, 64))


# --- images


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["a.jpg", "a.png", "a.webp", "a.tif", "packed.tif"])
def test_orientation_tags_are_obeyed_unless_the_annotations_say_otherwise(tmp_path, orientation, kind):
    stored = pixels(1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"a.jpg": {"quality": 100, "subsampling": 0}, "a.webp": {"lossless": True}}.get(kind, {})
    options |= {"compression": "tiff_lzw"} if "packed" in kind else {}
    path = tmp_path / kind
    Image.fromarray(stored).save(path, exif=exif, **options)
    turned = {1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1]}
    turned |= {5: stored.swapaxes(0, 1), 6: np.rot90(stored, -1), 7: stored[::-1, ::-1].swapaxes(0, 1)}
    upright = (turned | {8: np.rot90(stored)})[orientation]
    size, swapped = upright.shape[:2], orientation >= 5

    def equal(image, expected):
        return np.abs(image.permute(1, 2, 0).numpy().astype(int) - expected).max() <= (8 if kind == "a.jpg" else 0)

    assert image_size(path) == image_size(path, size) == size
    assert equal(read_image(path), upright) and equal(read_image(path, size), upright)
    assert image_size(path, (HEIGHT, WIDTH)) == (HEIGHT, WIDTH)  # that of the stored pixels
    assert equal(read_image(path, (HEIGHT, WIDTH)), stored if swapped else upright)
    for call in (image_size, read_image):
        with pytest.raises(DataError, match=rf"the image is {size[1]}x{size[0]}, its annotation file says 5x{HEIGHT}"):
            call(path, (HEIGHT, 5))


def test_square_images_stand_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = pixels(1)[:, :HEIGHT]
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    found = read_image(tmp_path / "a.png", (HEIGHT, HEIGHT))
    assert torch.equal(found.permute(1, 2, 0), torch.from_numpy(np.rot90(stored, -1).copy()))


def test_unreadable_exif_data_is_ignored(tmp_path):
    Image.fromarray(pixels(1)).save(tmp_path / "a.png", exif=b"Exif\0\0no tags at all")
    assert image_size(tmp_path / "a.png") == (HEIGHT, WIDTH) == read_image(tmp_path / "a.png").shape[1:]


def test_sizes_of_turned_photographs(tmp_path):
    data = content()
    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(1, 4):  # stored upright, by a quarter turn, and as annotated on its side
        image = Image.fromarray(pixels(i))
        image.transpose(UPRIGHT[8]).save(tmp_path / f"{i}.png", exif=exif) if i == 2 else image.save(
            tmp_path / f"{i}.png"
        )
    Image.fromarray(pixels(3)).save(tmp_path / "3.png", exif=exif)
    without("images", "width", "height")(data)
    data["images"][2] |= {"width": WIDTH}  # fits the stored pixels alone
    found, _ = read(tmp_path, data)
    assert [(i["height"], i["width"]) for i in found["images"]] == [(HEIGHT, WIDTH)] * 3
    for i in range(1, 4):
        assert np.array_equal(read_image(tmp_path / f"{i}.png", (HEIGHT, WIDTH)).permute(1, 2, 0), pixels(i))


def test_float_images_are_scaled_or_refused(tmp_path):
    grey = pixels(1)[:, :, 0]
    path = tmp_path / "a.tif"
    Image.fromarray(grey.astype(np.float32) / 255).save(path)
    assert np.array_equal(read_image(path), np.stack([grey] * 3))
    for values, says in (
        (grey.astype(np.float32), "from 30 to 200, expected 0...1"),
        (grey.astype(np.float32) / -255, "from -0.784314 to -0.117647, expected 0...1"),
        (np.where(grey == 200, np.nan, 0.5).astype(np.float32), "from nan to nan, expected 0...1"),
        (grey.astype(np.int32) * 1000, "from 30000 to 200000, expected 0...65535"),
        (-grey.astype(np.int32), "from -200 to -30, expected 0...65535"),
    ):
        Image.fromarray(values).save(path)
        with pytest.raises(DataError) as caught:
            read_image(path)
        assert says in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_the_first_of_several_pages(tmp_path):
    first, *others = (Image.fromarray(pixels(i)) for i in range(1, 4))
    first.save(tmp_path / "a.tif", save_all=True, append_images=others)
    assert np.array_equal(read_image(tmp_path / "a.tif").permute(1, 2, 0), pixels(1))


def test_large_images_are_no_attack(tmp_path):
    path = tmp_path / "a.png"
    Image.new("1", (20_000, 10_000)).save(path)  # 200 megapixels
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert image_size(path) == (10_000, 20_000)


# --- AP


def unpacked(data, detections):
    """(truths, detections) of every image, as `own_numbers` takes them."""
    of = lambda entry, **more: {
        "category": entry["category_id"], "box": entry["bbox"], "mask": decode(entry["segmentation"]), **more
    }  # fmt: skip
    images = []
    for image in data["images"]:
        mine, found = ([a for a in some if a["image_id"] == image["id"]] for some in (data["annotations"], detections))
        truths = [of(a, crowd=bool(a["iscrowd"]), area=a["area"]) for a in mine]
        images.append((truths, [of(d, score=d["score"]) for d in found]))
    return images


def random_detections(data, seed):
    """Shifted copies of the instances, some of another class, and some where nothing is."""
    rng = np.random.default_rng(seed)
    found = []
    for image in data["images"]:
        mine = [a for a in data["annotations"] if a["image_id"] == image["id"]]
        boxes = [[*(np.array(a["bbox"][:2]) + rng.integers(-3, 4, 2)), *a["bbox"][2:]] for a in mine for _ in range(2)]
        boxes += [[*rng.integers(0, 30, 2), 12, 9] for _ in range(2)]
        for number, box in enumerate(boxes):
            category = mine[number // 2]["category_id"] if number < 2 * len(mine) else data["categories"][0]["id"]
            if rng.random() < 0.15:
                category = data["categories"][-1]["id"]
            mask = np.zeros((HEIGHT, WIDTH), np.uint8)
            x, y, w, h = (int(n) for n in box)
            mask[max(0, y) : y + h, max(0, x) : x + w] = 1
            rle = mask_utils.encode(np.asfortranarray(mask))
            found.append({"image_id": image["id"], "category_id": category, "score": float(rng.random()),
                          "bbox": [float(n) for n in (x, y, w, h)], "segmentation": rle})  # fmt: skip
    return found


def crowd(data):
    data["annotations"][1]["iscrowd"] = 1


def ignored(data):
    data["annotations"][4]["ignore"] = True


def empty_image(data):
    data["annotations"] = [a for a in data["annotations"] if a["image_id"] != 2]


def text_ids(data):
    for image in data["images"]:
        image["id"] = f"photo {image['id']}"
    for annotation in data["annotations"]:
        annotation["image_id"] = f"photo {annotation['image_id']}"


def mixed_ids(data):
    data["images"][0]["id"] = "one"
    for annotation in data["annotations"][:2]:
        annotation["image_id"] = "one"


AP_CASES = {
    "plain": lambda data: None,
    "ids from 0": SAME["annotation ids from 0"],
    "equal ids": SAME["equal annotation ids"],
    "a crowd": crowd,
    "an ignored instance": ignored,
    "an empty image": empty_image,
    "image ids as text": text_ids,
    "image ids as text and as numbers": mixed_ids,
    "categories as text": both(mapped("categories", "id", lambda i: f"c{i}"),
                               mapped("annotations", "category_id", lambda i: f"c{i}")),
    "a placeholder category": lambda data: data["categories"].insert(0, {"id": 0, "name": "parts"}),
    "all of it": both(crowd, ignored, text_ids, SAME["annotation ids from 0"]),
}  # fmt: skip


@pytest.mark.parametrize("case", AP_CASES)
def test_ap_is_that_of_a_computation_by_hand(folder, case):
    odd = content()
    AP_CASES[case](odd)
    data, _ = read(folder, odd)
    detections = random_detections(data, seed=len(case))
    scores = average_precision(indexed(data), detections, [image["id"] for image in data["images"]])
    images, categories = unpacked(data, detections), sorted(category["id"] for category in data["categories"])
    for kind in ("box", "mask"):
        assert scores[kind] == pytest.approx(own_numbers(kind, images, categories, 100)[0], abs=1e-6)
        assert 5 < scores[kind]["AP"] < 90
